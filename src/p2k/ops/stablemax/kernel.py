"""StableMax cross-entropy as Triton programs, and the functions that launch them.

The forward program reads every logit once and looks for no maximum. It sums s(z) over the classes that are not the
target: the loss log(1 + R / s(z_y)) and the gradient of the target's logit, -R / (R + s(z_y)) / (1 + |z_y|), then keep
their relative accuracy however small they are. Each lane of a tile carries its sum with a correction for what rounding
took from it. Sums over the logits from 0 on are kept in units of 1 / UNIT and those over negative logits in units of
UNIT, which keeps both inside the range of float32 for any float32 logit and 2**24 classes.
The backward program reads and writes every logit once; a probability is the product of s(z) with one number per token.
Letters: z logit, y target, s(z) = z + 1 from 0 on and 1 / (1 - z) below, R the sum of s over the other classes.

Source: prieto2025grokking, eq:stablemax-rest, eq:stablemax-gradient.  Chapter: stablemax
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of a tile -> (rows per program, warps): 8 elements per thread, at least 4 warps. A wider row is read in tiles
# of the last entry.
LAUNCH = {16: (64, 4), 32: (32, 4), 64: (16, 4), 128: (8, 4), 256: (4, 4), 512: (2, 4), 1024: (1, 4), 2048: (1, 8)}
UNIT = 2.0**-24


@triton.jit
def _logits(ptr, rows, stride, columns, tokens, width, ACC: tl.constexpr, ALIGN: tl.constexpr):
    """A [ROWS, BLOCK] tile in the accumulation type; -inf outside the tensor, where s is 0."""
    inside = (rows < tokens)[:, None] & tl.max_constancy(columns < width, ALIGN)[None, :]
    start = tl.multiple_of(rows * stride, ALIGN)
    return tl.load(ptr + start[:, None] + columns[None, :], mask=inside, other=float("-inf")).to(ACC)


@triton.jit
def _numbers(ptr, rows, tokens, other):
    """One number per token."""
    return tl.load(ptr + rows, mask=rows < tokens, other=other)


@triton.jit
def _label_logits(ptr, rows, stride, label, tokens, width, ACC: tl.constexpr):
    """The logit of each token's label; 0 for one that is not in the row."""
    known = (rows < tokens) & (label >= 0) & (label < width)
    return tl.load(ptr + rows * stride + tl.where(known, label, 0), mask=known, other=0.0).to(ACC)


@triton.jit
def _add(total, lost, value):
    """total + value, and what rounding took from it (Kahan's sum)."""
    value = value - lost
    larger = total + value
    return larger, (larger - total) - value


@triton.jit
def _negative(z, unit):
    """unit * s(z) for z <= 0."""
    return unit / (1.0 - z)


@triton.jit
def _log_s(z):
    """log s(z), the symmetric logarithm."""
    size = tl.log(1.0 + tl.abs(z))
    return tl.where(z < 0.0, -size, size)


@triton.jit
def _log1p(x):
    """log(1 + x) for 0 <= x <= 1: the rounding of 1 + x cancels from the quotient."""
    one_more = 1.0 + x
    small = one_more - 1.0
    return tl.where(small == 0.0, x, tl.log(one_more) * (x / tl.where(small == 0.0, 1.0, small)))


@triton.jit
def forward_program(
    logits_ptr, target_ptr, loss_ptr, numbers_ptr, stride, numbers_stride, tokens, width, ignore_index,
    UNIT: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write the loss, one over the sum of s, the unit both are in, and 1 - p_y."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    label = _numbers(target_ptr, rows, tokens, ignore_index)
    zero = tl.zeros((ROWS, BLOCK), ACC)
    high, high_lost, low, low_lost = zero, zero, zero, zero
    for tile in range(0, TILES):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        z = _logits(logits_ptr, rows, stride, at, tokens, width, ACC, ALIGN)
        other = at[None, :] != label[:, None]
        # A NaN is not below 0, so it stays with the upper half; an infinity becomes one in the correction.
        below, above = _negative(tl.minimum(z, 0.0), 1.0 / UNIT), z * UNIT + UNIT
        high, high_lost = _add(high, high_lost, tl.where(other & ((z < 0.0) == 0), above, 0.0))
        low, low_lost = _add(low, low_lost, tl.where(other & (z < 0.0), below, 0.0))
    positive = tl.sum(high - high_lost, 1)
    negative = tl.sum(low - low_lost, 1)
    own = _label_logits(logits_ptr, rows, stride, label, tokens, width, ACC)
    mixed = (positive > 0.0) | (own >= 0.0)
    unit = tl.where(mixed, UNIT, 1.0 / UNIT).to(ACC)
    rest = tl.where(mixed, positive + negative * (UNIT * UNIT), negative + positive)
    own_s = tl.where(own >= 0.0, own * unit + unit, _negative(tl.minimum(own, 0.0), unit))
    ratio = rest * tl.where(own >= 0.0, 1.0 / (1.0 + tl.maximum(own, 0.0)), 1.0 - own) / unit
    # log(1 + r) = log r + log(1 + 1 / r): above 1, where the ratio may overflow, in logarithms of its parts.
    apart = tl.where(ratio == float("inf"), tl.log(rest) - tl.log(unit) - _log_s(own), tl.log(ratio))
    loss = tl.where(ratio > 1.0, apart, 0.0) + _log1p(tl.where(ratio > 1.0, 1.0 / ratio, ratio))
    inverse = 1.0 / (rest + own_s)
    wrong = (label < 0) | (label >= width) | (own == float("inf")) | (own != own)
    loss = tl.where(wrong, float("nan"), loss)
    inverse = tl.where(wrong, float("nan"), inverse)
    inside = rows < tokens
    tl.store(loss_ptr + rows, tl.where(label == ignore_index, 0.0, loss), mask=inside)
    tl.store(numbers_ptr + rows, inverse, mask=inside)
    tl.store(numbers_ptr + numbers_stride + rows, unit, mask=inside)
    tl.store(numbers_ptr + 2 * numbers_stride + rows, rest * inverse, mask=inside)


@triton.jit
def backward_program(
    grad_ptr, logits_ptr, target_ptr, numbers_ptr, out_ptr,
    grad_stride, stride, numbers_stride, tokens, width, ignore_index,
    ACC: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write g (p - onehot) / (1 + |z|), with the target's p - 1 from the rest."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    label = _numbers(target_ptr, rows, tokens, ignore_index)[:, None]
    g = tl.load(grad_ptr + rows * grad_stride, mask=rows < tokens, other=0.0).to(ACC)[:, None]
    inverse = _numbers(numbers_ptr, rows, tokens, 0.0)[:, None]
    unit = _numbers(numbers_ptr + numbers_stride, rows, tokens, 1.0)[:, None]
    rest = _numbers(numbers_ptr + 2 * numbers_stride, rows, tokens, 0.0)[:, None]
    z = _logits(logits_ptr, rows, stride, at, tokens, width, ACC, ALIGN)
    s = tl.where(z >= 0.0, z * unit + unit, _negative(tl.minimum(z, 0.0), unit))
    d = tl.where(at[None, :] == label, -rest, s * inverse) / (1.0 + tl.abs(z)) * g
    d = tl.where(label == ignore_index, 0.0, d)
    inside = (rows < tokens)[:, None] & tl.max_constancy(at < width, ALIGN)[None, :]
    start = tl.multiple_of(rows * width, ALIGN)
    tl.store(out_ptr + start[:, None] + at[None, :], d.to(out_ptr.dtype.element_ty), mask=inside)


def forward(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Launch the forward program: losses, and the numbers ``[3, tokens]`` that the backward program reads."""
    accumulated = torch.promote_types(logits.dtype, torch.float32)
    loss = logits.new_empty(target.shape, dtype=accumulated)
    numbers = logits.new_empty(3, target.numel(), dtype=accumulated)
    z, y = _rows(logits), target.reshape(-1).contiguous()
    tokens, width = z.shape
    shape = _shape(z)
    if tokens:
        with torch.cuda.device_of(logits):
            forward_program[(triton.cdiv(tokens, shape["ROWS"]),)](
                z, y, loss, numbers, z.stride(0), numbers.stride(0), tokens, width, ignore_index,
                UNIT=UNIT, TILES=triton.cdiv(width, shape["BLOCK"]), **shape,
            )  # fmt: skip
    return loss, numbers


def backward(grad: Tensor, logits: Tensor, target: Tensor, numbers: Tensor, ignore_index: int) -> Tensor:
    """Launch the backward program: the gradient of the logits."""
    out = logits.new_empty(logits.shape)
    z, y, g = _rows(logits), target.reshape(-1).contiguous(), grad.reshape(-1)
    tokens, width = z.shape
    shape = _shape(z)
    if tokens:
        with torch.cuda.device_of(logits):
            backward_program[(triton.cdiv(tokens, shape["ROWS"]), triton.cdiv(width, shape["BLOCK"]))](
                g, z, y, numbers, out,
                g.stride(0), z.stride(0), numbers.stride(0), tokens, width, ignore_index, **shape,
            )  # fmt: skip
    return out


def _shape(z: Tensor) -> dict:
    """The compile-time sizes of a launch over `[tokens, classes]` logits.

    ALIGN divides every row's start and length, so that loads may be as wide as that many elements.
    """
    block = next((columns for columns in LAUNCH if columns >= z.shape[1]), max(LAUNCH))
    group, warps = LAUNCH[block]
    return {
        "ACC": tl.float64 if z.dtype == torch.float64 else tl.float32,
        "ALIGN": math.gcd(16, z.shape[1], z.stride(0)),
        "ROWS": group,
        "BLOCK": block,
        "num_warps": warps,
    }


def _rows(tensor: Tensor) -> Tensor:
    """`[tokens, classes]` with unit column stride and any row stride: a view where the layout allows one."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
