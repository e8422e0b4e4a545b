"""The row stage as Triton programs, and the functions that launch them.

The forward program reads a chunk's logits once: a running maximum, and sums that are rescaled when it rises. The
backward program reads and writes every logit once. A row of logits starts at a multiple of 16 elements and may be read
up to the next row; the columns behind the vocabulary hold nothing and count as -inf.
Letters: z logit after bias and temperature, s log-probability, g, l and e gradients of the target's log-probability,
of log-sum-exp and of entropy.

Source: wijmans2025cut.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of a tile -> (rows per program, warps): 16 elements per thread at most. A wider row is read in tiles of the
# last entry.
LAUNCH = {16: (64, 4), 64: (16, 4), 256: (4, 4), 1024: (1, 4), 4096: (1, 8)}


@triton.jit
def _logits(ptr, bias_ptr, rows, stride, columns, tokens, width, scale, ACC: tl.constexpr):
    """A [ROWS, BLOCK] tile of scaled logits; -inf behind the vocabulary."""
    inside = (rows < tokens)[:, None] & (columns < stride)[None, :]
    z = tl.load(ptr + (rows * stride)[:, None] + columns[None, :], mask=inside, other=0.0)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + columns, mask=columns < width, other=0.0).to(ACC)[None, :]
    return tl.where((columns < width)[None, :], z * scale, float("-inf"))


@triton.jit
def _number(ptr, index, stride, rows, tokens):
    """One of the numbers per token, as a column; `stride` lies between two numbers of one token."""
    return tl.load(ptr + index * stride + rows, mask=rows < tokens, other=0.0)[:, None]


@triton.jit
def _save(ptr, index, stride, rows, tokens, column):
    """Store one of the numbers per token."""
    tl.store(ptr + index * stride + rows, tl.sum(column, 1), mask=rows < tokens)


@triton.jit
def _sum(tile):
    """Row sums, as a column."""
    return tl.sum(tile, 1)[:, None]


@triton.jit
def forward_program(
    logits_ptr, bias_ptr, target_ptr, numbers_ptr, stride, numbers_stride, tokens, width, scale,
    ACC: tl.constexpr, LOWEST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write the target's log-probability, the largest logit, the log of the sum above it, and the entropy."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    target = tl.load(target_ptr + rows, mask=rows < tokens, other=0)[:, None]
    # From a finite start, so that no difference of two infinities arises before the first finite logit.
    largest = tl.full((ROWS, 1), LOWEST, ACC)
    nothing = tl.zeros((ROWS, 1), ACC)
    total, moment, picked = nothing, nothing, nothing
    for tile in range(0, TILES):
        at = tile * BLOCK + tl.arange(0, BLOCK)
        z = _logits(logits_ptr, bias_ptr, rows, stride, at, tokens, width, scale, ACC)
        top = tl.maximum(largest, tl.max(z, 1)[:, None])
        fall = largest - top
        shrink = tl.exp(fall)
        s = z - top
        e = tl.exp(s)
        moment = shrink * (moment + fall * total) + _sum(e * tl.where(s == float("-inf"), 0.0, s))
        total = shrink * total + _sum(e)
        picked += _sum(tl.where(at[None, :] == target, z, 0.0))
        largest = top
    log_sum = tl.log(total)
    # The sum holds a 1; an approximate logarithm must not make a log-probability positive.
    log_sum = tl.where(log_sum < 0.0, 0.0, log_sum)
    _save(numbers_ptr, 0, numbers_stride, rows, tokens, picked - largest - log_sum)
    _save(numbers_ptr, 1, numbers_stride, rows, tokens, largest)
    _save(numbers_ptr, 2, numbers_stride, rows, tokens, log_sum)
    _save(numbers_ptr, 3, numbers_stride, rows, tokens, log_sum - moment / total)


@triton.jit
def backward_program(
    logits_ptr, bias_ptr, target_ptr, numbers_ptr, grads_ptr, out_ptr,
    stride, numbers_stride, grads_stride, tokens, width, scale,
    ACC: tl.constexpr, LOWEST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write scale (g (onehot - p) + l p - e p (s + entropy)), in place or rounded into another buffer."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target = tl.load(target_ptr + rows, mask=rows < tokens, other=0)[:, None]
    z = _logits(logits_ptr, bias_ptr, rows, stride, at, tokens, width, scale, ACC)
    s = z - _number(numbers_ptr, 1, numbers_stride, rows, tokens)
    s -= _number(numbers_ptr, 2, numbers_stride, rows, tokens)
    s = tl.where(s == float("-inf"), LOWEST, s)
    p = tl.exp(s)
    surprise = p * (s + _number(numbers_ptr, 3, numbers_stride, rows, tokens))
    g = _number(grads_ptr, 0, grads_stride, rows, tokens)
    l = _number(grads_ptr, 1, grads_stride, rows, tokens)  # noqa: E741 - the letters of this file
    e = _number(grads_ptr, 2, grads_stride, rows, tokens)
    hot = tl.where(at[None, :] == target, 1.0, 0.0)
    d = scale * (g * (hot - p) + l * p - e * surprise)
    inside = (rows < tokens)[:, None] & (at < stride)[None, :]
    tl.store(out_ptr + (rows * stride)[:, None] + at[None, :], d.to(out_ptr.dtype.element_ty), mask=inside)


def forward(logits: Tensor, bias: Tensor | None, target: Tensor, scale: float, numbers: Tensor) -> None:
    """Launch the forward program on a chunk ``[tokens, vocab]``; `numbers` is ``[4, tokens]``."""
    shape = _shape(logits)
    grid = (triton.cdiv(logits.shape[0], shape["ROWS"]),)
    with torch.cuda.device_of(logits):
        forward_program[grid](
            logits, _vector(bias), target, numbers,
            logits.stride(0), numbers.stride(0), *logits.shape, scale,
            TILES=triton.cdiv(logits.shape[1], shape["BLOCK"]), **shape,
        )  # fmt: skip


def backward(
    logits: Tensor, bias: Tensor | None, target: Tensor, numbers: Tensor, grads: Tensor, scale: float, out: Tensor
) -> None:
    """Launch the backward program; `out` has the row stride of `logits` and may be `logits`."""
    shape = _shape(logits)
    grid = (triton.cdiv(logits.shape[0], shape["ROWS"]), triton.cdiv(logits.shape[1], shape["BLOCK"]))
    with torch.cuda.device_of(logits):
        backward_program[grid](
            logits, _vector(bias), target, numbers, grads, out,
            logits.stride(0), numbers.stride(0), grads.stride(0), *logits.shape, scale, **shape,
        )  # fmt: skip


def _shape(logits: Tensor) -> dict:
    """The compile-time sizes of a launch over `[tokens, vocab]` logits, in float32 or float64."""
    block = next((columns for columns in LAUNCH if columns >= logits.shape[1]), max(LAUNCH))
    group, warps = LAUNCH[block]
    return {
        "ACC": tl.float64 if logits.dtype == torch.float64 else tl.float32,
        # Half of the least number: the difference of two such is a number still.
        "LOWEST": torch.finfo(logits.dtype).min / 2,
        "ROWS": group,
        "BLOCK": block,
        "num_warps": warps,
    }


def _vector(bias: Tensor | None) -> Tensor | None:
    """The bias with its elements side by side."""
    return None if bias is None else bias.contiguous()
