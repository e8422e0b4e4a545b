"""Sizes at which the preconditioned values are measured: the blocked solve beside a dense triangular solve.

Bytes are those of the blocked form: keys and values once, the result once; backward twice that. Each couplings tile is
a product over the key width, and meets the values in a product over their width: half of n x n, once forward, four
times backward (the transposed solve, and rows and columns of the key gradient, with two products of the values there).
"""

import torch
from torch import Tensor

from p2k.core.benchmark import Cost, Workload
from p2k.core.peers import peer
from p2k.ops.lucid import precondition_values, reference

# (batch, heads, keys, head width); the longest has as many heads as leave the dense solve its n x n matrices.
SIZES = [(8, 16, 256, 64), (4, 16, 1024, 64), (2, 16, 4096, 128), (1, 16, 8192, 128)]
SIZES_CPU = [(2, 2, 128, 32), (1, 2, 1024, 64)]


def deltaformer_values(k: Tensor, v: Tensor) -> Tensor:
    """The values of DeltaFormer, the nearest open kernel: as many couplings and products, rows normalised to one."""
    from fla.ops.deltaformer.parallel import ParallelDeltaformerFunction

    keys = k.transpose(1, 2).contiguous()
    return ParallelDeltaformerFunction.apply(keys, keys, v.transpose(1, 2).contiguous(), None).transpose(1, 2)


def workloads(device: torch.device, *, quick: bool) -> list[Workload]:
    """Workloads for a device, small ones first, one in float32 on a GPU; `quick` keeps one."""
    cuda = device.type == "cuda"
    sizes, dtype = (SIZES if cuda else SIZES_CPU)[: 1 if quick else None], torch.bfloat16 if cuda else torch.float32
    found = [_solve(size, dtype, cuda) for size in sizes]
    return found + [_solve(size, torch.float32, cuda) for size in SIZES[1:2] if cuda and not quick]


def _solve(size: tuple[int, int, int, int], dtype: torch.dtype, fused: bool) -> Workload:
    batch, heads, keys, width = size
    rows = batch * heads * keys
    operand, product = rows * width * dtype.itemsize, rows * keys * width
    others = peer("flash-linear-attention", "p2k.ops.lucid.bench:deltaformer_values") if fused else {}

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
        peers={"blocked": lambda k, v: precondition_values(k, v, backend="torch")} | others,
        strangers=tuple(others),
        dot=True,
    )
