"""Sizes at which attention with row entropies is measured, beside plain attention, which is what it adds to.

What is timed is the attention output; the entropy of each row is computed on the way, with no gradient sent into it, as
a diagnosis does. Bytes are those of the streaming form: queries, keys, values and output once, two float32 per row, and
in the backward pass the same operands, the upstream gradient and three gradients. The scores are computed once forward
and twice backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from p2k.core.benchmark import Cost, Workload
from p2k.ops.attention_entropy import attention_entropy

# (batch, heads, tokens, head width): BERT's sizes, then longer rows, as many as leave the reference its n x n matrices.
SIZES = [(32, 12, 128, 64), (32, 12, 512, 64), (8, 16, 2048, 64), (1, 8, 8192, 128)]
SIZES_CPU = [(4, 4, 64, 32), (2, 4, 512, 64)]


def workloads(device: torch.device, *, quick: bool) -> list[Workload]:
    """Workloads for a device, small ones first, one in float32 on a GPU; `quick` keeps one."""
    cuda = device.type == "cuda"
    sizes, dtype = (SIZES if cuda else SIZES_CPU)[: 1 if quick else None], torch.bfloat16 if cuda else torch.float32
    found = [_attention(size, dtype, cuda) for size in sizes]
    return found + [_attention(size, torch.float32, cuda) for size in SIZES[1:2] if cuda and not quick]


def _attention(size: tuple[int, int, int, int], dtype: torch.dtype, fused: bool) -> Workload:
    batch, heads, tokens, width = size
    rows = batch * heads * tokens
    operand, product = rows * width * dtype.itemsize, 2 * rows * tokens * width

    def make_inputs(source, device, dtype) -> tuple[Tensor, ...]:
        shape = (batch, heads, tokens, width)
        return tuple(torch.randn(shape, generator=source, device=device, dtype=dtype) for _ in range(3))

    return Workload(
        op="attention_entropy",
        shape={"batch": batch, "heads": heads, "tokens": tokens, "width": width},
        dtype=dtype,
        make_inputs=make_inputs,
        kernel=(lambda *inputs: attention_entropy(*inputs, backend="triton")[0]) if fused else None,
        reference=lambda *inputs: attention_entropy(*inputs, backend="torch")[0],
        forward=Cost(bytes=4 * operand + 8 * rows, flops=2 * product),
        backward=Cost(bytes=8 * operand + 8 * rows, flops=5 * product),
        peers={"sdpa": F.scaled_dot_product_attention},
        dot=True,
    )
