"""Triton programs of attention with row entropies, and the functions that launch them.

Forward: one program per tile of queries walks the keys once. Beside the running maximum m, the sum l = sum exp(s - m)
and the output, it keeps t = sum exp(s - m) (s - m); then H = log l - t / l, and no score ever reaches memory. Backward:
a small program for rowsum(dO * O), one program per tile of queries for dq, one per tile of keys for dk and dv. Both
recompute the scores; no atomics, so two runs agree bit for bit. A key head serves `group` query heads.

A pointer that is None switches its branch off at compile time: without a gradient of the entropy the backward pass is
plain attention's. Offsets of a batch, a head and a tile are 64 bit, inside a tile 32 bit.

Source: wang2025inflection, eq:inflection-streaming, eq:inflection-backward.  Chapter: inflection
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from p2k.core.backend import interpreting

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Program -> (element bytes, padded head width) -> (tile of queries, tile of keys, warps, stages): the largest tiles
# whose registers do not spill on sm_80 and sm_90.
LAUNCH = {
    "forward": {
        (2, 64): (128, 64, 8, 3),
        (2, 128): (128, 64, 8, 2),
        (2, 256): (64, 32, 8, 2),
        (4, 64): (64, 32, 4, 1),
        (4, 128): (32, 32, 4, 2),
    },
    "query_gradient": {
        (2, 64): (64, 32, 4, 2),
        (2, 128): (64, 64, 8, 2),
        (2, 256): (32, 32, 8, 1),
        (4, 64): (32, 32, 4, 2),
        (4, 128): (16, 32, 4, 1),
    },
    "key_gradient": {
        (2, 64): (64, 32, 4, 2),
        (2, 128): (32, 64, 8, 2),
        (2, 256): (32, 32, 8, 1),
        (4, 64): (32, 32, 4, 2),
        (4, 128): (16, 16, 4, 1),
    },
}


@triton.jit
def _tile(ptr, rows, stride, count, width, BLOCK: tl.constexpr):
    """A [rows, BLOCK] tile of a matrix with unit column stride, zero outside."""
    columns = tl.arange(0, BLOCK)
    inside = (rows < count)[:, None] & (columns < width)[None, :]
    first = tl.min(rows, 0).to(tl.int64)
    return tl.load(ptr + first * stride + (rows - tl.min(rows, 0))[:, None] * stride + columns[None, :], inside, 0.0)


@triton.jit
def _write(ptr, rows, count, width, value, BLOCK: tl.constexpr):
    """Round a tile once, into a contiguous matrix."""
    columns = tl.arange(0, BLOCK)
    inside = (rows < count)[:, None] & (columns < width)[None, :]
    tl.store(ptr + rows.to(tl.int64)[:, None] * width + columns[None, :], value.to(ptr.dtype.element_ty), inside)


@triton.jit
def _dot(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """Matrix product with the accumulation type as result. The interpreter cannot multiply bfloat16."""
    if UPCAST:
        a, b = a.to(ACC), b.to(ACC)
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _mask(s, mask_ptr, query, key, queries, keys, mask_row, mask_column, CAUSAL: tl.constexpr):
    """Scores of a tile with -inf where a query must not see a key; `query` and `key` broadcast to the tile."""
    visible = (query < queries) & (key < keys)
    if CAUSAL:
        visible &= key <= query
    if mask_ptr is not None:
        given = tl.load(mask_ptr + query.to(tl.int64) * mask_row + key * mask_column, visible, 0)
        if given.dtype == tl.int1:
            visible &= given
        else:
            s += given.to(s.dtype)
    return tl.where(visible, s, float("-inf"))


@triton.jit
def _score_gradient(below, d_a, log_sum, delta, entropy, d_entropy, HAS_ENTROPY: tl.constexpr):
    """(a, dS) of a tile of s - max s: a = exp(s - max s) / l, dS = a (dP - delta) - dH a (log a + H).

    Maximum and log l come apart, because their sum loses the digits of log l where scores are large.
    """
    log_a = below - log_sum
    a = tl.exp2(log_a * LOG2E)
    # 0 log 0 = 0, for a hidden key at -inf and for one at the lowest finite score, which libraries use as a mask.
    log_a = tl.where(a == 0, 0.0, log_a)
    slope = d_a - delta
    if HAS_ENTROPY:
        slope -= d_entropy * (log_a + entropy)
    return a, a * slope


@triton.jit
def forward_program(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, entropy_ptr, peak_ptr, log_sum_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_column, heads, group, queries, keys, width, value_width, scale,
    CAUSAL: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Output and row numbers of one tile of queries."""
    tiles = tl.cdiv(queries, BLOCK_Q)
    tile, plane = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = plane // heads, plane % heads
    k_ptr += batch * k_batch + head // group * k_head
    v_ptr += batch * v_batch + head // group * v_head
    if mask_ptr is not None:
        mask_ptr += batch * mask_batch + head * mask_head
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = _tile(q_ptr + batch * q_batch + head * q_head, rows, q_row, queries, width, BLOCK_D)
    m = tl.full([BLOCK_Q], float("-inf"), ACC)
    total = tl.zeros([BLOCK_Q], ACC)
    t = tl.zeros([BLOCK_Q], ACC)
    acc = tl.zeros([BLOCK_Q, BLOCK_V], ACC)
    stop = keys
    if CAUSAL:
        stop = tl.minimum(keys, (tile + 1) * BLOCK_Q)
    for start in range(0, stop, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        k = _tile(k_ptr, columns, k_row, keys, width, BLOCK_D)
        s = _dot(q, tl.trans(k), ACC, PRECISION, UPCAST) * scale
        s = _mask(s, mask_ptr, rows[:, None], columns[None, :], queries, keys, mask_row, mask_column, CAUSAL)
        highest = tl.maximum(m, tl.max(s, 1))
        # A row that has seen nothing yet keeps a finite reference, so that no -inf is subtracted from another.
        reference = tl.where(highest == float("-inf"), 0.0, highest)
        below = s - reference[:, None]
        p = tl.exp2(below * LOG2E)
        fall = tl.where(m == float("-inf"), 0.0, m - reference)
        shrink = tl.where(m == float("-inf"), 0.0, tl.exp2(fall * LOG2E))
        t = shrink * (t + fall * total) + tl.sum(p * tl.where(p == 0, 0.0, below), 1)
        total = shrink * total + tl.sum(p, 1)
        v = _tile(v_ptr, columns, v_row, keys, value_width, BLOCK_V)
        acc = acc * shrink[:, None] + _dot(p.to(v.dtype), v, ACC, PRECISION, UPCAST)
        m = highest
    total = tl.where(total == 0, 1.0, total)
    log_sum = tl.log2(total) * LN2
    numbers = plane * queries + rows
    tl.store(entropy_ptr + numbers, log_sum - t / total, rows < queries)
    tl.store(log_sum_ptr + numbers, log_sum, rows < queries)
    tl.store(peak_ptr + numbers, tl.where(m == float("-inf"), 0.0, m), rows < queries)
    out_ptr += plane * queries * value_width
    _write(out_ptr, rows, queries, value_width, acc / total[:, None], BLOCK_V)


@triton.jit
def delta_program(
    grad_ptr, out_ptr, delta_ptr, grad_batch, grad_head, grad_row, heads, queries, value_width,
    ACC: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """rowsum(dO * O), the part of dS that every key of a row shares."""
    tiles = tl.cdiv(queries, BLOCK_Q)
    tile, plane = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    grad_ptr += plane // heads * grad_batch + plane % heads * grad_head
    grad = _tile(grad_ptr, rows, grad_row, queries, value_width, BLOCK_V).to(ACC)
    out = _tile(out_ptr + plane * queries * value_width, rows, value_width, queries, value_width, BLOCK_V).to(ACC)
    tl.store(delta_ptr + plane * queries + rows, tl.sum(grad * out, 1), rows < queries)


@triton.jit
def query_gradient_program(
    q_ptr, k_ptr, v_ptr, mask_ptr, grad_ptr, peak_ptr, log_sum_ptr, delta_ptr, entropy_ptr, grad_entropy_ptr, dq_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    mask_batch, mask_head, mask_row, mask_column, heads, group, queries, keys, width, value_width, scale,
    CAUSAL: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries."""
    tiles = tl.cdiv(queries, BLOCK_Q)
    tile, plane = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = plane // heads, plane % heads
    k_ptr += batch * k_batch + head // group * k_head
    v_ptr += batch * v_batch + head // group * v_head
    if mask_ptr is not None:
        mask_ptr += batch * mask_batch + head * mask_head
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = _tile(q_ptr + batch * q_batch + head * q_head, rows, q_row, queries, width, BLOCK_D)
    grad = _tile(grad_ptr + batch * grad_batch + head * grad_head, rows, grad_row, queries, value_width, BLOCK_V)
    numbers = plane * queries + rows
    peak = tl.load(peak_ptr + numbers, rows < queries, 0.0)[:, None]
    log_sum = tl.load(log_sum_ptr + numbers, rows < queries, 0.0)[:, None]
    delta = tl.load(delta_ptr + numbers, rows < queries, 0.0)[:, None]
    entropy, d_entropy = delta, delta
    if grad_entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + numbers, rows < queries, 0.0)[:, None]
        d_entropy = tl.load(grad_entropy_ptr + numbers, rows < queries, 0.0)[:, None]
    acc = tl.zeros([BLOCK_Q, BLOCK_D], ACC)
    stop = keys
    if CAUSAL:
        stop = tl.minimum(keys, (tile + 1) * BLOCK_Q)
    for start in range(0, stop, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        k = _tile(k_ptr, columns, k_row, keys, width, BLOCK_D)
        v = _tile(v_ptr, columns, v_row, keys, value_width, BLOCK_V)
        s = _dot(q, tl.trans(k), ACC, PRECISION, UPCAST) * scale
        s = _mask(s, mask_ptr, rows[:, None], columns[None, :], queries, keys, mask_row, mask_column, CAUSAL)
        d_a = _dot(grad, tl.trans(v), ACC, PRECISION, UPCAST)
        a, d_s = _score_gradient(s - peak, d_a, log_sum, delta, entropy, d_entropy, grad_entropy_ptr is not None)
        acc += _dot(d_s.to(k.dtype), k, ACC, PRECISION, UPCAST)
    _write(dq_ptr + plane * queries * width, rows, queries, width, acc * scale, BLOCK_D)


@triton.jit
def key_gradient_program(
    q_ptr, k_ptr, v_ptr, mask_ptr, grad_ptr, peak_ptr, log_sum_ptr, delta_ptr, entropy_ptr, grad_entropy_ptr,
    dk_ptr, dv_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    mask_batch, mask_head, mask_row, mask_column, heads, group, queries, keys, width, value_width, scale,
    CAUSAL: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, summed over the query heads it serves."""
    tiles = tl.cdiv(keys, BLOCK_K)
    tile, plane = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    key_heads = heads // group
    batch, key_head = plane // key_heads, plane % key_heads
    columns = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    k = _tile(k_ptr + batch * k_batch + key_head * k_head, columns, k_row, keys, width, BLOCK_D)
    v = _tile(v_ptr + batch * v_batch + key_head * v_head, columns, v_row, keys, value_width, BLOCK_V)
    dk = tl.zeros([BLOCK_K, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_K, BLOCK_V], ACC)
    first = 0
    if CAUSAL:
        first = tile * BLOCK_K // BLOCK_Q * BLOCK_Q
    for member in range(0, group):
        head = key_head * group + member
        seen = mask_ptr
        if mask_ptr is not None:
            seen = mask_ptr + batch * mask_batch + head * mask_head
        for start in range(first, queries, BLOCK_Q):
            rows = start + tl.arange(0, BLOCK_Q)
            q = _tile(q_ptr + batch * q_batch + head * q_head, rows, q_row, queries, width, BLOCK_D)
            grad = _tile(
                grad_ptr + batch * grad_batch + head * grad_head, rows, grad_row, queries, value_width, BLOCK_V
            )
            numbers = (batch * heads + head) * queries + rows
            peak = tl.load(peak_ptr + numbers, rows < queries, 0.0)[None, :]
            log_sum = tl.load(log_sum_ptr + numbers, rows < queries, 0.0)[None, :]
            delta = tl.load(delta_ptr + numbers, rows < queries, 0.0)[None, :]
            entropy, d_entropy = delta, delta
            if grad_entropy_ptr is not None:
                entropy = tl.load(entropy_ptr + numbers, rows < queries, 0.0)[None, :]
                d_entropy = tl.load(grad_entropy_ptr + numbers, rows < queries, 0.0)[None, :]
            # Tiles stand transposed here, keys by queries: their products with q and dO need no transposition.
            s = _dot(k, tl.trans(q), ACC, PRECISION, UPCAST) * scale
            s = _mask(s, seen, rows[None, :], columns[:, None], queries, keys, mask_row, mask_column, CAUSAL)
            d_a = _dot(v, tl.trans(grad), ACC, PRECISION, UPCAST)
            a, d_s = _score_gradient(s - peak, d_a, log_sum, delta, entropy, d_entropy, grad_entropy_ptr is not None)
            dv += _dot(a.to(grad.dtype), grad, ACC, PRECISION, UPCAST)
            dk += _dot(d_s.to(q.dtype), q, ACC, PRECISION, UPCAST)
    _write(dk_ptr + plane * keys * width, columns, keys, width, dk * scale, BLOCK_D)
    _write(dv_ptr + plane * keys * value_width, columns, keys, value_width, dv, BLOCK_V)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward program: output and, per row, entropy, largest score and log of the sum relative to it."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    entropy, peak, log_sum = (q.new_empty(q.shape[:-1], dtype=wide) for _ in range(3))
    if entropy.numel():
        q, k, v = _unit(q), _unit(k), _unit(v)
        shape = _shape("forward", q, v)
        with torch.cuda.device_of(q):
            forward_program[(_programs(q, shape["BLOCK_Q"]),)](
                q, k, v, mask, out, entropy, peak, log_sum,
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_mask_strides(q, k, mask),
                *_sizes(q, k, v), scale, CAUSAL=is_causal, **shape,
            )  # fmt: skip
    return out, entropy, peak, log_sum


def backward(
    grad: Tensor,
    grad_entropy: Tensor | None,
    qkv: Sequence[Tensor],
    mask: Tensor | None,
    rows: Sequence[Tensor],
    is_causal: bool,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launch the backward programs: gradients of (q, k, v). Those of k and v come together or not at all."""
    out, entropy, peak, log_sum = rows
    wanted = (needs[0], needs[1] or needs[2], needs[1] or needs[2])
    dq, dk, dv = (x.new_empty(x.shape) if want else None for x, want in zip(qkv, wanted, strict=True))
    if not entropy.numel():
        return dq, *(None if x is None else x.zero_() for x in (dk, dv))
    q, k, v, grad = (_unit(x) for x in (*qkv, grad))
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    delta = torch.empty_like(peak)
    common = (q, k, v, mask, grad, peak, log_sum, delta, entropy, grad_entropy)
    strides = (stride for x in (q, k, v, grad) for stride in x.stride()[:3])
    numbers = (*strides, *_mask_strides(q, k, mask), *_sizes(q, k, v), scale, is_causal)
    with torch.cuda.device_of(q):
        shape = _shape("query_gradient", q, v)
        programs = _programs(q, shape["BLOCK_Q"])
        rows = {name: shape[name] for name in ("ACC", "BLOCK_Q", "BLOCK_V", "num_warps")}
        heads, queries, value_width = q.shape[1], q.shape[2], v.shape[3]
        delta_program[(programs,)](grad, out, delta, *grad.stride()[:3], heads, queries, value_width, **rows)
        if dq is not None:
            query_gradient_program[(programs,)](*common, dq, *numbers, **shape)
        if dk is not None and dk.numel():
            shape = _shape("key_gradient", q, v)
            key_gradient_program[(_programs(k, shape["BLOCK_K"]),)](*common, dk, dv, *numbers, **shape)
    return dq, dk, dv


def _shape(program: str, q: Tensor, v: Tensor) -> dict:
    """The compile-time sizes and launch options of a program."""
    width, value_width = (max(16, triton.next_power_of_2(x.shape[-1])) for x in (q, v))
    # Float64 runs in the interpreter only, where any entry will do.
    size = min(q.element_size(), 4)
    block_q, block_k, warps, stages = LAUNCH[program][size, max(64, width, value_width)]
    accumulate = tl.float64 if q.dtype == torch.float64 else tl.float32
    options = {"ACC": accumulate, "PRECISION": "tf32x3", "UPCAST": interpreting(), "num_warps": warps}
    blocks = {"BLOCK_Q": block_q, "BLOCK_K": block_k, "BLOCK_D": width, "BLOCK_V": value_width}
    return {**options, **blocks, "num_stages": stages}


def _programs(x: Tensor, block: int) -> int:
    """One program per tile of rows of every matrix in `x`."""
    return x.shape[0] * x.shape[1] * triton.cdiv(x.shape[2], block)


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """heads, group, queries, keys, width, value_width."""
    return q.shape[1], q.shape[1] // max(k.shape[1], 1), q.shape[2], k.shape[2], q.shape[3], v.shape[3]


def _unit(x: Tensor) -> Tensor:
    """The tensor itself where its last dimension has unit stride, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _mask_strides(q: Tensor, k: Tensor, mask: Tensor | None) -> tuple[int, ...]:
    """Strides of a mask broadcast to [batch, heads, queries, keys]: 0 along a repeated dimension."""
    if mask is None:
        return 0, 0, 0, 0
    return mask.expand(*q.shape[:3], k.shape[2]).stride()
