"""Sizes at which the preconditioned values are measured: the blocked solve beside a dense triangular solve.

Bytes are those of the blocked form: keys and values once, the result once; backward twice that. Each couplings tile is
a product over the key width, and meets the values in a product over their width: half of n x n, once forward, four
times backward (the transposed solve, and rows and columns of the key gradient, with two products of the values there).
"""

import torch
from torch import Tensor

from p2k.core.benchmark import Cost, Workload
from p2k.ops.lucid import precondition_values, reference

# (batch, heads, keys, head width)
SIZES = [(8, 16, 256, 64), (4, 16, 1024, 64), (2, 16, 4096, 128), (1, 32, 8192, 128)]
SIZES_CPU = [(2, 2, 128, 32), (1, 2, 1024, 64)]


def workloads(device: torch.device, *, quick: bool) -> list[Workload]:
    """Workloads for a device, small ones first; `quick` keeps one."""
    cuda = device.type == "cuda"
    sizes = SIZES if cuda else SIZES_CPU
    dtypes = [torch.bfloat16, torch.float32] if cuda and not quick else [torch.bfloat16 if cuda else torch.float32]
    return [_solve(size, dtype, cuda) for dtype in dtypes for size in (sizes[:1] if quick else sizes)]


def _solve(size: tuple[int, int, int, int], dtype: torch.dtype, fused: bool) -> Workload:
    batch, heads, keys, width = size
    rows = batch * heads * keys
    operand, product = rows * width * dtype.itemsize, rows * keys * width

    def make_inputs(source, device, dtype) -> tuple[Tensor, ...]:
        shape = (batch, heads, keys, width)
        return tuple(torch.randn(shape, generator=source, device=device, dtype=dtype) for _ in range(2))

    return Workload(
        op="lucid",
        shape={"batch": batch, "heads": heads, "keys": keys, "width": width},
        dtype=dtype,
        make_inputs=make_inputs,
        kernel=(lambda k, v: precondition_values(k, v, backend="triton")) if fused else None,
        reference=lambda k, v: reference.precondition_values(k, v, None, width**-0.5),
        forward=Cost(bytes=3 * operand, flops=2 * product),
        backward=Cost(bytes=6 * operand, flops=8 * product),
        peers={"blocked": lambda k, v: precondition_values(k, v, backend="torch")},
    )
