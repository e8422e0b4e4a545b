"""Rows inside and outside the cache, against torch.softmax and against the same code with three passes."""

import torch

from p2k.core.benchmark import Cost, Workload
from p2k.ops.two_pass_softmax import native

# Columns of one row. Up to 2**18 a row and its result, 2 MiB, stay in the cache between calls; from 2**23 on a row
# alone, 32 MiB, exceeds it.
CACHED = [2**14, 2**16, 2**18]
LARGE = [2**23, 2**24, 2**25]


def workloads(device: torch.device, *, quick: bool) -> list[Workload]:
    """CPU only: on a GPU every softmax that fits its registers reads once. None where the code cannot be built."""
    if device.type != "cpu" or native.why_not_native() is not None:
        return []
    cached, large = (CACHED[1:2], LARGE[:1]) if quick else (CACHED, LARGE)
    return [_row(columns, cached=True) for columns in cached] + [_row(columns, cached=False) for columns in large]


def _row(columns: int, *, cached: bool) -> Workload:
    def make_inputs(source, device, dtype) -> tuple[torch.Tensor]:
        return (5 * torch.randn(1, columns, generator=source, device=device, dtype=dtype),)

    return Workload(
        op="two_pass_softmax",
        shape={"rows": 1, "columns": columns},
        dtype=torch.float32,
        make_inputs=make_inputs,
        # Without the autograd wrapper, whose microseconds would count against a row in the cache.
        kernel=native.program("two_pass"),
        reference=lambda x: torch.softmax(x, -1),
        forward=Cost(bytes=3 * 4 * columns, flops=30 * columns),
        backward=Cost(bytes=3 * 4 * columns, flops=4 * columns),
        peers={name.replace("_", "-"): native.program(name) for name in native.PROGRAMS[1:]},
        passes=("forward",),
        cached=cached,
    )
