"""Rows inside and outside the cache on a CPU; on a GPU, rows in registers and in tiles, the three row programs."""

import functools
import statistics

import torch

from p2k.core.benchmark import Clock, Cost, Workload, interleaved_seconds
from p2k.core.peers import peer
from p2k.core.seeding import generator
from p2k.ops.two_pass_softmax import native, registration, two_pass_softmax

# Columns of one row. Up to 2**18 a row and its result, 2 MiB, stay in the cache between calls; from 2**23 on a row
# alone, 32 MiB, exceeds it.
CACHED = [2**14, 2**16, 2**18]
LARGE = [2**23, 2**24, 2**25]
# (rows, columns) on a GPU: launch-bound to bandwidth-bound; the widest resident row of each direction and wider ones.
ROWS = [(128, 1024), (4096, 4096), (4096, 16384), (4096, 32768), (4096, 65536), (4096, 128256), (512, 262144)]


def workloads(device: torch.device, *, quick: bool) -> list[Workload]:
    """Workloads for a device, small ones first; none on a CPU where the native code cannot be built."""
    if device.type == "cuda":
        wide = [ROWS[1], ROWS[5]][: 1 if quick else None]
        half = ROWS[1:2] if quick else ROWS
        return [_rows(*size, dtype) for dtype, rows in ((torch.bfloat16, half), (torch.float32, wide)) for size in rows]
    if native.why_not_native() is not None:
        return []
    cached, large = (CACHED[1:2], LARGE[:1]) if quick else (CACHED, LARGE)
    return [_row(columns, cached=True) for columns in cached] + [_row(columns, cached=False) for columns in large]


def _rows(rows: int, columns: int, dtype: torch.dtype) -> Workload:
    """All three programs at one size; the bytes are the least: what a program reads again lowers its percentage."""
    elements = rows * columns
    return Workload(
        op="two_pass_softmax",
        shape={"rows": rows, "columns": columns},
        dtype=dtype,
        make_inputs=functools.partial(_inputs, rows, columns),
        kernel=functools.partial(two_pass_softmax, backend="triton"),
        reference=lambda x: torch.softmax(x, -1),
        forward=Cost(bytes=2 * elements * dtype.itemsize, flops=30 * elements),
        backward=Cost(bytes=3 * elements * dtype.itemsize, flops=4 * elements),
        peers={name: functools.partial(registration.softmax, program=name) for name in ("online", "three_pass")}
        | peer("liger-kernel", "liger_kernel.ops.softmax:LigerSoftmaxFunction.apply"),
    )


def _row(columns: int, *, cached: bool) -> Workload:
    return Workload(
        op="two_pass_softmax",
        shape={"rows": 1, "columns": columns},
        dtype=torch.float32,
        make_inputs=functools.partial(_inputs, 1, columns),
        # Without the autograd wrapper, whose microseconds would count against a row in the cache.
        kernel=native.program("two_pass"),
        reference=lambda x: torch.softmax(x, -1),
        forward=Cost(bytes=3 * 4 * columns, flops=30 * columns),
        backward=Cost(bytes=3 * 4 * columns, flops=4 * columns),
        peers={name.replace("_", "-"): native.program(name) for name in native.PROGRAMS[1:]},
        passes=("forward",),
        cached=cached,
    )


def _inputs(rows: int, columns: int, source, device, dtype) -> tuple[torch.Tensor]:
    return (5 * torch.randn(rows, columns, generator=source, device=device, dtype=dtype),)


def ratios(columns: int, *, blocks: int, seconds: float, span: float = 1000.0) -> dict[str, list[float]]:
    """Seconds of every rival over those of the two-pass code on one row of a CPU, one median per block of rounds.

    All of them take turns in every round, so that a slow moment of the machine hits them alike.

    Args:
        columns: of the row, uniform in ``[-span, span]``.
        blocks: independent repetitions within this run.
        seconds: of timing per rival and block.

    Raises:
        BackendUnavailable: there is no compiler.
    """
    clock = Clock(torch.device("cpu"))
    x = (2 * torch.rand(1, columns, generator=generator(0), device="cpu") - 1) * span
    code = {name.replace("_", "-"): native.program(name) for name in native.PROGRAMS}
    code["torch"] = functools.partial(torch.softmax, dim=-1)
    # A call on a short row is hardly longer than a look at the clock.
    repeats = max(1, 2**20 // columns)
    calls = {name: [functools.partial(function, x)] * repeats for name, function in code.items()}
    found: dict[str, list[float]] = {name: [] for name in code if name != "two-pass"}
    for _ in range(blocks):
        samples = interleaved_seconds(calls, clock, budget=seconds, warm_up=seconds / 5)
        for name, values in found.items():
            pairs = zip(samples[name], samples["two-pass"], strict=True)
            values.append(statistics.median(theirs / ours for theirs, ours in pairs))
    return found
