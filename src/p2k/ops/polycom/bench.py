"""Sizes at which PolyNorm and PolyReLU are measured, with what the fused form moves and computes.

Bytes are those of the fused kernels: forward reads x and writes the result, backward reads the gradient and x and
writes dx; PolyNorm keeps four float32 numbers per token. The gradient of the bias sums over all elements.
"""

import torch
from torch import Tensor

from p2k.core.benchmark import Cost, Workload
from p2k.core.peers import peer
from p2k.ops.polycom import poly_norm, poly_relu

# (tokens, width): launch-bound to bandwidth-bound, and a row in tiles.
SIZES = [(1024, 512), (8192, 4096), (32768, 14336)]
SIZES_CPU = [(256, 512), (1024, 512), (4096, 1024)]


def workloads(device: torch.device, *, quick: bool) -> list[Workload]:
    """Workloads for a device, small ones first; `quick` keeps one size per activation."""
    cuda = device.type == "cuda"
    sizes = SIZES if cuda else SIZES_CPU
    dtype = torch.bfloat16 if cuda else torch.float32
    return [build(*size, dtype, cuda) for build in (_norm, _relu) for size in (sizes[:1] if quick else sizes)]


def _norm(tokens: int, width: int, dtype: torch.dtype, fused: bool) -> Workload:
    moved = tokens * width * dtype.itemsize
    return Workload(
        op="polycom.poly_norm",
        shape={"tokens": tokens, "width": width},
        dtype=dtype,
        make_inputs=_inputs(tokens, width),
        kernel=(lambda *inputs: poly_norm(*inputs, backend="triton")) if fused else None,
        reference=lambda *inputs: poly_norm(*inputs, backend="torch"),
        forward=Cost(bytes=2 * moved + 16 * tokens, flops=14 * tokens * width),
        backward=Cost(bytes=3 * moved + 16 * tokens, flops=28 * tokens * width),
        peers=_liger() if fused else {},
        summed=tokens * width,
    )


def _relu(tokens: int, width: int, dtype: torch.dtype, fused: bool) -> Workload:
    moved = tokens * width * dtype.itemsize
    return Workload(
        op="polycom.poly_relu",
        shape={"tokens": tokens, "width": width},
        dtype=dtype,
        make_inputs=_inputs(tokens, width),
        kernel=(lambda *inputs: poly_relu(*inputs, backend="triton")) if fused else None,
        reference=lambda *inputs: poly_relu(*inputs, backend="torch"),
        forward=Cost(bytes=2 * moved, flops=7 * tokens * width),
        backward=Cost(bytes=3 * moved, flops=13 * tokens * width),
        summed=tokens * width,
    )


def _inputs(tokens: int, width: int):
    def make_inputs(source, device, dtype) -> tuple[Tensor, ...]:
        shapes = [(tokens, width), (3,), ()]
        return tuple(torch.randn(shape, generator=source, device=device, dtype=dtype) for shape in shapes)

    return make_inputs


def _liger() -> dict:
    """Liger's PolyNorm, whose weights run from the cubic down."""
    found = peer("liger-kernel", "liger_kernel.ops.poly_norm:LigerPolyNormFunction.apply")
    return {
        name: lambda x, weight, bias, call=function: call(x, weight.flip(0), bias, 1e-6, False)
        for name, function in found.items()
    }
