"""Rows inside and outside the cache, against torch.softmax and against the same code with three passes.

The result's memory is an input: a fresh page costs the system about as much as a pass over it, which would drown the
difference of one pass in four.
"""

import torch

from p2k.core.benchmark import Cost, Workload
from p2k.ops.two_pass_softmax import native

# Columns of one row: 256 KiB, which stays in a core's own cache with its result, and 128 MiB, which fits none.
CACHED, LARGE, LARGE_QUICK = 2**16, 2**25, 2**22


def workloads(device: torch.device, *, quick: bool) -> list[Workload]:
    """CPU only: on a GPU every softmax that fits its registers reads once. None where the code cannot be built."""
    if device.type != "cpu" or native.why_not_native() is not None:
        return []
    return [_row(CACHED, cached=True), _row(LARGE_QUICK if quick else LARGE, cached=False)]


def _row(columns: int, *, cached: bool) -> Workload:
    def make_inputs(source, device, dtype) -> tuple[torch.Tensor, ...]:
        x = torch.randn(1, columns, generator=source, device=device, dtype=dtype)
        return 5 * x, torch.empty_like(x)

    return Workload(
        op="two_pass_softmax",
        shape={"rows": 1, "columns": columns},
        dtype=torch.float32,
        make_inputs=make_inputs,
        kernel=native.program("two_pass"),
        reference=lambda x, out: torch.softmax(x, -1, out=out),
        forward=Cost(bytes=3 * 4 * columns, flops=30 * columns),
        backward=Cost(bytes=3 * 4 * columns, flops=4 * columns),
        peers={name.replace("_", "-"): native.program(name) for name in native.PROGRAMS[1:]},
        passes=("forward",),
        cached=cached,
    )
