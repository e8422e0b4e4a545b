"""Rows inside and outside the cache, against torch.softmax and against the same code with three passes."""

import torch

from p2k.core.benchmark import Cost, Workload
from p2k.ops.two_pass_softmax import native, two_pass_softmax

# Columns of one row: 256 KiB and 128 MiB.
SIZES = [2**16, 2**25]


def workloads(device: torch.device, *, quick: bool) -> list[Workload]:
    """CPU only: on a GPU every softmax that fits its registers reads once. None where the code cannot be built."""
    if device.type != "cpu" or native.why_not_native() is not None:
        return []
    return [_row(columns) for columns in ([2**16, 2**22] if quick else SIZES)]


def _row(columns: int) -> Workload:
    peers = {name.replace("_", "-"): native.program(name) for name in native.PROGRAMS[1:]}
    return Workload(
        op="two_pass_softmax",
        shape={"rows": 1, "columns": columns},
        dtype=torch.float32,
        make_inputs=lambda source, device, dtype: (
            torch.rand(1, columns, generator=source, device=device, dtype=dtype) * 2000 - 1000,
        ),
        kernel=lambda x: two_pass_softmax(x, backend="native"),
        reference=lambda x: torch.softmax(x, -1),
        forward=Cost(bytes=3 * 4 * columns, flops=30 * columns),
        backward=Cost(bytes=3 * 4 * columns, flops=4 * columns),
        peers=peers,
        passes=("forward",),
    )
