"""Cut cross-entropy as Triton programs, and the functions that launch them. No logit reaches memory.

Forward: one program per tile of tokens and part of the vocabulary; each leaves a running maximum, a sum and the
target's logit, and a few small torch operations merge the parts. Backward: one program per tile of tokens for the
gradient of the hidden states, which also records the tiles it keeps; then one program per tile of the vocabulary for
the weight, which recomputes the logits of kept tiles only. A gradient row is wider than the registers, so its owner
adds to it in memory, in float32; no other program touches it, there is no atomic and no lock, and two runs agree bit
for bit.

Letters: z logit, s its slope under the softcap, p = softmax(z), d = p - onehot, l and g gradients of log-sum-exp and
of the loss. A pointer that is None switches its branch off at compile time.

Source: wijmans2025cut, eq:cut-cross-entropy-merge, eq:cut-cross-entropy-gradients, eq:cut-cross-entropy-filter.
Chapter: cut-cross-entropy
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from p2k.core.backend import interpreting
from p2k.ops.cut_cross_entropy import tiles

# Element bytes -> (tokens, entries, channels of a step, warps, stages) of a forward program, and (channels of a step,
# warps, stages) of the two backward programs, whose tile is the filter's: the largest whose registers do not spill.
FORWARD = {2: (128, 128, 64, 8, 3), 4: (64, 64, 32, 8, 2)}
BACKWARD = {2: (32, 8, 2), 4: (16, 8, 2)}
# A row starts at a multiple of this many elements, so that it loads in wide words.
ALIGNMENT = 16
# Programs that a forward pass should have at least: two per multiprocessor of a large GPU.
PROGRAMS = 264
# Column numbers behind the vocabulary: no target has this code.
NOWHERE = tl.constexpr(-3)


@triton.jit
def _dot(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Matrix product with the accumulation type as result. The interpreter cannot multiply bfloat16."""
    if UPCAST:
        a, b = a.to(ACC), b.to(ACC)
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _columns(order_ptr, tile, vocab, BLOCK_V: tl.constexpr):
    """Vocabulary entries of a tile; `NOWHERE` behind the last."""
    at = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    if order_ptr is not None:
        return tl.load(order_ptr + at, mask=at < vocab, other=NOWHERE)
    return tl.where(at < vocab, at, NOWHERE).to(tl.int64)


@triton.jit
def _rows_of(ptr, names, there, stride, channels, dim):
    """A [names, channels] tile of a matrix with unit column stride, zero where nothing is there."""
    mask = there[:, None] & (channels < dim)[None, :]
    return tl.load(ptr + names[:, None] * stride + channels[None, :], mask=mask, other=0.0)


@triton.jit
def _tanh(x):
    """Hyperbolic tangent without a library; a series near 0, where the quotient cancels."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    q = x * x
    near = x * (1.0 - q * (1.0 / 3.0 - q * (2.0 / 15.0 - q * (17.0 / 315.0 - q * (62.0 / 2835.0)))))
    return tl.where(q < 0.04, near, tl.where(x < 0.0, -far, far))


@triton.jit
def _logits(
    hidden_ptr, weight_ptr, bias_ptr, rows, present, columns, hidden_stride, weight_stride, dim, softcap,
    CAPPED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A [BLOCK_T, BLOCK_V] tile of logits, -inf behind the vocabulary."""
    z = tl.zeros([BLOCK_T, BLOCK_V], ACC)
    for start in range(0, dim, BLOCK_D):
        channels = start + tl.arange(0, BLOCK_D)
        h = _rows_of(hidden_ptr, rows, present, hidden_stride, channels, dim)
        w = _rows_of(weight_ptr, columns, columns >= 0, weight_stride, channels, dim)
        z += _dot(h, tl.trans(w), ACC, PRECISION, UPCAST)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + columns, mask=columns >= 0, other=0.0).to(ACC)[None, :]
    if CAPPED:
        z = softcap * _tanh(z / softcap)
    return tl.where((columns >= 0)[None, :], z, float("-inf"))


@triton.jit
def _difference(z, numbers_ptr, rows, present, columns, code, tokens):
    """(p, d) of a tile; d is 0 in absent rows."""
    largest = tl.load(numbers_ptr + tokens + rows, mask=present, other=0.0)
    log_sum = tl.load(numbers_ptr + 2 * tokens + rows, mask=present, other=0.0)
    p = tl.where(present[:, None], tl.exp(z - largest[:, None] - log_sum[:, None]), 0.0)
    hot = tl.where(columns[None, :] == code[:, None], 1.0, 0.0)
    return p, tl.where(present[:, None], p - hot, 0.0)


@triton.jit
def _gradient(z, p, d, grads_ptr, rows, present, columns, tokens, softcap, CAPPED: tl.constexpr):
    """Gradient of a tile of logits before bias and softcap."""
    g = tl.load(grads_ptr + rows, mask=present, other=0.0)[:, None]
    l = tl.load(grads_ptr + tokens + rows, mask=present, other=0.0)[:, None]  # noqa: E741 - the letters of this file
    found = g * d + l * p
    if CAPPED:
        share = tl.where((columns >= 0)[None, :], z, 0.0) / softcap
        found *= 1.0 - share * share
    return found


@triton.jit
def forward_program(
    hidden_ptr, weight_ptr, bias_ptr, code_ptr, parts_ptr, tokens, vocab, dim, hidden_stride, weight_stride, softcap,
    tiles_per_part,
    LOWEST: tl.constexpr, CAPPED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Target's logit, maximum and sum over one part of the vocabulary, for one tile of tokens."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    part = tl.program_id(1)
    code = tl.load(code_ptr + rows, mask=rows < tokens, other=-1)
    present = code != -1
    # From a finite start, so that no difference of two infinities arises before the first finite logit.
    largest = tl.full([BLOCK_T], LOWEST, ACC)
    total = tl.zeros([BLOCK_T], ACC)
    picked = tl.zeros([BLOCK_T], ACC)
    last = tl.minimum((part + 1) * tiles_per_part, tl.cdiv(vocab, BLOCK_V))
    for tile in range(part * tiles_per_part, last):
        columns = _columns(None, tile, vocab, BLOCK_V)
        z = _logits(
            hidden_ptr, weight_ptr, bias_ptr, rows, present, columns, hidden_stride, weight_stride, dim, softcap,
            CAPPED, ACC, PRECISION, UPCAST, BLOCK_T, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        top = tl.maximum(largest, tl.max(z, 1))
        total = total * tl.exp(largest - top) + tl.sum(tl.exp(z - top[:, None]), 1)
        picked += tl.sum(tl.where(columns[None, :] == code[:, None], z, 0.0), 1)
        largest = top
    parts_ptr += part.to(tl.int64) * 3 * tokens
    tl.store(parts_ptr + rows, picked, mask=rows < tokens)
    tl.store(parts_ptr + tokens + rows, largest, mask=rows < tokens)
    tl.store(parts_ptr + 2 * tokens + rows, total, mask=rows < tokens)


@triton.jit
def hidden_program(
    grads_ptr, hidden_ptr, weight_ptr, bias_ptr, code_ptr, numbers_ptr, order_ptr, kept_ptr, dhidden_ptr,
    tokens, vocab, dim, hidden_stride, weight_stride, softcap, epsilon,
    CAPPED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradient of the hidden states of one tile of tokens, and which of its tiles the filter keeps."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    code = tl.load(code_ptr + rows, mask=rows < tokens, other=-1)
    present = code != -1
    count = tl.cdiv(vocab, BLOCK_V)
    for tile in range(0, count):
        columns = _columns(order_ptr, tile, vocab, BLOCK_V)
        z = _logits(
            hidden_ptr, weight_ptr, bias_ptr, rows, present, columns, hidden_stride, weight_stride, dim, softcap,
            CAPPED, ACC, PRECISION, UPCAST, BLOCK_T, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        p, d = _difference(z, numbers_ptr, rows, present, columns, code, tokens)
        # A certain target has d near 0 and p near 1: only where log-sum-exp has a gradient must p be small as well.
        unused = tl.load(grads_ptr + tokens + rows, mask=present, other=0.0)[:, None] == 0.0
        # Counted this way, NaN is kept. One sum over both axes: on two, Triton 3.7 fails for Blackwell.
        large = tl.sum(tl.where((tl.abs(d) < epsilon) & ((p < epsilon) | unused), 0, 1))
        tl.store(kept_ptr + tl.program_id(0) * count + tile, large > 0)
        if dhidden_ptr is not None:  # noqa: SIM102 - this one is decided at compile time, the next is not
            if large > 0:
                g = _gradient(z, p, d, grads_ptr, rows, present, columns, tokens, softcap, CAPPED)
                for start in range(0, dim, BLOCK_D):
                    channels = start + tl.arange(0, BLOCK_D)
                    w = _rows_of(weight_ptr, columns, columns >= 0, weight_stride, channels, dim)
                    at = dhidden_ptr + rows[:, None] * dim + channels[None, :]
                    mask = present[:, None] & (channels < dim)[None, :]
                    sofar = tl.load(at, mask=mask, other=0.0)
                    tl.store(at, sofar + _dot(g.to(w.dtype), w, ACC, PRECISION, UPCAST), mask=mask)
                # What one thread stored another may load for the next tile.
                tl.debug_barrier()


@triton.jit
def weight_program(
    grads_ptr, hidden_ptr, weight_ptr, bias_ptr, code_ptr, numbers_ptr, order_ptr, kept_ptr, dweight_ptr, dbias_ptr,
    tokens, vocab, dim, hidden_stride, weight_stride, softcap,
    CAPPED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Gradients of weight and bias for one tile of the vocabulary."""
    tile = tl.program_id(0)
    columns = _columns(order_ptr, tile, vocab, BLOCK_V)
    dbias = tl.zeros([BLOCK_V], ACC)
    for row_tile in range(0, tl.cdiv(tokens, BLOCK_T)):
        keep = 1
        if kept_ptr is not None:
            keep = tl.load(kept_ptr + row_tile * tl.cdiv(vocab, BLOCK_V) + tile)
        if keep != 0:
            rows = (row_tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
            code = tl.load(code_ptr + rows, mask=rows < tokens, other=-1)
            present = code != -1
            z = _logits(
                hidden_ptr, weight_ptr, bias_ptr, rows, present, columns, hidden_stride, weight_stride, dim, softcap,
                CAPPED, ACC, PRECISION, UPCAST, BLOCK_T, BLOCK_V, BLOCK_D,
            )  # fmt: skip
            p, d = _difference(z, numbers_ptr, rows, present, columns, code, tokens)
            g = _gradient(z, p, d, grads_ptr, rows, present, columns, tokens, softcap, CAPPED)
            dbias += tl.sum(g, 0)
            if dweight_ptr is not None:
                for start in range(0, dim, BLOCK_D):
                    channels = start + tl.arange(0, BLOCK_D)
                    h = _rows_of(hidden_ptr, rows, present, hidden_stride, channels, dim)
                    at = dweight_ptr + columns[:, None] * dim + channels[None, :]
                    mask = (columns >= 0)[:, None] & (channels < dim)[None, :]
                    sofar = tl.load(at, mask=mask, other=0.0)
                    tl.store(at, sofar + _dot(tl.trans(g).to(h.dtype), h, ACC, PRECISION, UPCAST), mask=mask)
                tl.debug_barrier()
    if dbias_ptr is not None:
        tl.store(dbias_ptr + columns, dbias, mask=columns >= 0)


def forward(hidden: Tensor, weight: Tensor, code: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """The numbers ``[3, tokens]``: target's logit, largest logit, log of the sum above it; 0 for absent tokens."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    operands = hidden, weight, bias = _operands(hidden, weight, bias)
    tokens, vocab = len(hidden), len(weight)
    # Float64 runs in the interpreter only, where any entry will do.
    *tile, channels, warps, stages = FORWARD[min(hidden.element_size(), 4)]
    rows, columns = triton.cdiv(tokens, tile[0]), triton.cdiv(vocab, tile[1])
    per_part = triton.cdiv(columns, min(columns, triton.cdiv(PROGRAMS, max(rows, 1))))
    parts = hidden.new_empty(triton.cdiv(columns, per_part), 3, tokens, dtype=wide)
    if tokens:
        with torch.cuda.device_of(hidden):
            forward_program[(rows, len(parts))](
                *operands, code, parts, *_sizes(hidden, weight), softcap or 1.0, per_part,
                LOWEST=torch.finfo(wide).min / 2, **_shape(hidden, softcap, tile, channels, warps, stages),
            )  # fmt: skip
    picked, largest, total = parts.unbind(1)
    peak = largest.amax(0)
    log_sum = (total * (largest - peak).exp()).sum(0).log()
    picked = picked.sum(0).masked_fill(code == tiles.UNKNOWN, torch.nan)
    return torch.stack((picked, peak, log_sum)).masked_fill(code == tiles.ABSENT, 0.0)


def backward(
    grads: Tensor, hidden: Tensor, weight: Tensor, code: Tensor, bias: Tensor | None, numbers: Tensor,
    softcap: float | None, epsilon: float, sort: bool, filter_weight: bool, needs: Sequence[bool],
    tile: tuple[int, int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of (hidden, weight, bias) and the kept tiles; `grads` is ``[2, tokens]``, contiguous."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    dtype, dim = hidden.dtype, hidden.shape[1]
    operands = hidden, weight, bias = _operands(hidden, weight, bias)
    tokens, vocab = len(hidden), len(weight)
    grid = triton.cdiv(tokens, tile[0]), triton.cdiv(vocab, tile[1])
    # Without a filter every tile is kept, and nobody need find out.
    filtering = epsilon > 0
    kept = torch.ones(grid, dtype=torch.bool, device=hidden.device)
    dhidden = hidden.new_zeros(hidden.shape, dtype=wide) if needs[0] else None
    dweight = weight.new_zeros(weight.shape, dtype=wide) if needs[1] else None
    dbias = weight.new_zeros(vocab, dtype=wide) if needs[2] else None
    order = tiles.vocabulary_order(hidden, weight, bias, code != tiles.ABSENT) if sort else None
    common = (grads, *operands, code, numbers, order)
    sizes = (*_sizes(hidden, weight), softcap or 1.0)
    shape = _shape(hidden, softcap, tile, *BACKWARD[min(hidden.element_size(), 4)])
    with torch.cuda.device_of(hidden):
        if tokens and (needs[0] or filtering):
            hidden_program[(grid[0],)](*common, kept, dhidden, *sizes, epsilon, **shape)
        if tokens and (needs[1] or needs[2]):
            mask = kept if filtering and filter_weight else None
            weight_program[(grid[1],)](*common, mask, dweight, dbias, *sizes, **shape)
    # Behind each row lie the zeros that the operands were given.
    dhidden, dweight = (None if x is None else x[:, :dim] for x in (dhidden, dweight))
    found = (None if x is None else x.to(dtype).contiguous() for x in (dhidden, dweight, dbias))
    return *found, kept


def _shape(hidden: Tensor, softcap: float | None, tile: Sequence[int], channels: int, warps: int, stages: int) -> dict:
    """The compile-time sizes and launch options of a program."""
    return {
        "CAPPED": softcap is not None,
        "ACC": tl.float64 if hidden.dtype == torch.float64 else tl.float32,
        "PRECISION": "tf32x3",
        "UPCAST": interpreting(),
        "BLOCK_T": tile[0],
        "BLOCK_V": tile[1],
        "BLOCK_D": channels,
        "num_warps": warps,
        "num_stages": stages,
    }


def _operands(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Matrices whose rows start where wide loads may: others are copied once, with zeros behind each row."""
    return _aligned(hidden), _aligned(weight), None if bias is None else bias.contiguous()


def _aligned(x: Tensor) -> Tensor:
    missing = -x.shape[1] % ALIGNMENT
    if missing == 0 and x.stride(1) == 1 and x.stride(0) % ALIGNMENT == 0:
        return x
    return torch.nn.functional.pad(x, (0, missing)).contiguous()


def _sizes(hidden: Tensor, weight: Tensor) -> tuple[int, ...]:
    """tokens, vocab, dim and the strides of rows."""
    return len(hidden), *weight.shape, hidden.stride(0), weight.stride(0)
