"""Sizes at which softplus attention is measured, plain and re-weighted, beside torch's softmax attention.

Bytes are those of the streaming form: queries, keys, values and output once and three float32 per row, in the backward
pass the same operands, the upstream gradient and three gradients. The scores are computed once forward and twice
backward, under re-weighting once more in each; only pairs below the diagonal count.

Chapter: softplus-attention
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from p2k.core.benchmark import Cost, Workload
from p2k.ops.softplus_attention import reweighted_softplus_attention, softplus_attention

# (batch, heads, tokens, head width); the longest has as many heads as leave the reference its n x n matrices.
SIZES = [(4, 12, 512, 64), (4, 12, 2048, 64), (1, 8, 8192, 128)]
SIZES_CPU = [(2, 2, 64, 32), (1, 4, 512, 64)]


def workloads(device: torch.device, *, quick: bool) -> list[Workload]:
    """Workloads for a device, small ones first; `quick` keeps one per function."""
    cuda = device.type == "cuda"
    sizes = SIZES if cuda else SIZES_CPU
    dtype = torch.bfloat16 if cuda else torch.float32
    functions = (softplus_attention, reweighted_softplus_attention)
    return [_attention(f, size, dtype, cuda) for f in functions for size in (sizes[:1] if quick else sizes)]


def _attention(function, size: tuple[int, int, int, int], dtype: torch.dtype, fused: bool) -> Workload:
    batch, heads, tokens, width = size
    rows, walks = batch * heads * tokens, int(function is reweighted_softplus_attention)
    operand, product = rows * width * dtype.itemsize, rows * (tokens + 1) * width

    def make_inputs(source, device, dtype) -> tuple[Tensor, ...]:
        shape = (batch, heads, tokens, width)
        return tuple(torch.randn(shape, generator=source, device=device, dtype=dtype) for _ in range(3))

    return Workload(
        op=f"softplus_attention.{'reweighted' if walks else 'plain'}",
        shape={"batch": batch, "heads": heads, "tokens": tokens, "width": width},
        dtype=dtype,
        make_inputs=make_inputs,
        kernel=functools.partial(function, is_causal=True, backend="triton") if fused else None,
        reference=functools.partial(function, is_causal=True, backend="torch"),
        forward=Cost(bytes=4 * operand + 12 * rows, flops=(2 + walks) * product),
        backward=Cost(bytes=8 * operand + 12 * rows, flops=(7 + 2 * walks) * product),
        peers={"sdpa": functools.partial(F.scaled_dot_product_attention, is_causal=True)},
        strangers=("sdpa",),
        dot=True,
    )
