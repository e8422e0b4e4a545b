"""Triton programs of softplus attention, plain (LSSA) and re-weighted (LSSAR), and the functions that launch them.

Forward: one program per tile of queries walks the keys. Scores are bounded by scale log N, so that the sums of weights
are plain additions: no running maximum, no rescaling, and tiles may be added in any order. Re-weighting walks the keys
twice: the first walk finds each row's sum and largest weight, which fix the excess over the average, the second adds
powers of that excess. Backward: one program per tile of queries for dq, which under re-weighting first sums each row's
gradient against its weights, and one per tile of keys for dk and dv. Both recompute the scores; no atomics, so two
runs agree bit for bit. A key head serves `group` query heads.

Queries and keys enter products as they are stored; their inverse lengths multiply the products. A pointer that is None
switches its branch off at compile time. Only offsets inside a tile are 32 bit.

Source: gao2025softplus, eq:softplus-attention-streaming, eq:softplus-attention-backward.  Chapter: softplus-attention
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from p2k.core.backend import interpreting
from p2k.ops.softplus_attention import layout

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# A row whose largest weight exceeds the uniform one by less than this many unit round-offs is uniform.
FLAT_ROUNDING = 64


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
def _count(count_ptr, rows, queries, keys, CAUSAL: tl.constexpr, ACC: tl.constexpr):
    """N, the number of keys that each row sees; at least 1, whose logarithm is 0."""
    if count_ptr is not None:
        count = tl.load(count_ptr + rows, rows < queries, 1)
    elif CAUSAL:
        count = tl.minimum(rows + 1, keys)
    else:
        count = tl.zeros_like(rows) + keys
    return tl.maximum(count, 1).to(ACC)


@triton.jit
def _visible(mask_ptr, query, key, queries, keys, mask_row, mask_column, CAUSAL: tl.constexpr):
    """Which pairs of a tile see each other; `query` and `key` broadcast to the tile."""
    visible = (query < queries) & (key < keys)
    if CAUSAL:
        visible &= key <= query
    if mask_ptr is not None:
        visible &= tl.load(mask_ptr + query.to(tl.int64) * mask_row + key * mask_column, visible, 0)
    return visible


@triton.jit
def _softplus(s, visible):
    """log(1 + e^s) to full relative precision, and its slope; 0 where hidden."""
    u = tl.exp2(-tl.abs(s) * LOG2E)
    w = 1 + u
    # The rounding of 1 + u divides out: log(w) / (w - 1) is smooth, and u lost nothing.
    log_w = tl.where(w == 1, u, tl.log2(w) * LN2 * (u / tl.where(w == 1, 1.0, w - 1)))
    return tl.where(visible, tl.maximum(s, 0.0) + log_w, 0.0), tl.where(visible, tl.where(s >= 0, 1.0, u) / w, 0.0)


@triton.jit
def _scored(
    q, k_ptr, k_inverse_ptr, mask_ptr, rows, columns, factor, k_row, mask_row, mask_column, queries, keys, width,
    CAUSAL: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """(keys, their inverse lengths, weights, slopes) of a tile of queries against a tile of keys."""
    k = _tile(k_ptr, columns, k_row, keys, width, BLOCK_D)
    inverse = tl.load(k_inverse_ptr + columns, columns < keys, 0.0)
    seen = _visible(mask_ptr, rows[:, None], columns[None, :], queries, keys, mask_row, mask_column, CAUSAL)
    a, rise = _softplus(_dot(q, tl.trans(k), ACC, PRECISION, UPCAST) * factor[:, None] * inverse[None, :], seen)
    return k, inverse, a, rise


@triton.jit
def _sharpened(a, count, total, top, power):
    """(excess over the average, its power relative to the row's top); a itself in a uniform row, whose top is 0."""
    excess = count * (a / total) - tl.where(count > 3, 1.0, 0.0)
    # Comparisons that let NaN through: a bad number must not end as a weight of 0.
    excess = tl.where(excess < 0, 0.0, excess)
    ratio = tl.where(excess == 0, 1.0, excess / tl.where(top == 0, 1.0, top))
    powered = tl.where(excess == 0, 0.0, tl.exp2(power * tl.log2(ratio)))
    return excess, tl.where(top == 0, a, powered)


@triton.jit
def _weight_gradient(a, d_a, count, total, top, mass, delta, power, SHARPEN: tl.constexpr):
    """(weight, gradient in A up to the row's own term) of a tile; without re-weighting the weight is A."""
    weight, slope = a / total, d_a - delta
    if SHARPEN:
        excess, powered = _sharpened(a, count, total, top, power)
        weight = powered / mass
        # d b^p / mass, as p b^p / b: where b is 0, so is its power.
        steep = count * power * weight / tl.where(excess == 0, 1.0, excess)
        slope *= tl.where(top == 0, 1.0, steep)
    return weight, slope


@triton.jit
def length_program(
    x_ptr, inverse_ptr, x_batch, x_head, x_row, heads, count, width,
    ACC: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """1 / |x| of each vector, 0 for a zero vector, whatever the size of its entries."""
    tiles = tl.cdiv(count, BLOCK_Q)
    tile, plane = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    x = _tile(x_ptr + plane // heads * x_batch + plane % heads * x_head, rows, x_row, count, width, BLOCK_D).to(ACC)
    peak = tl.max(tl.abs(x), 1)
    x = x / tl.where(peak == 0, 1.0, peak)[:, None]
    square = tl.where(peak == 0, 1.0, tl.sum(x * x, 1))
    inverse = tl.where(peak == 0, 0.0, tl.rsqrt(square) / tl.where(peak == 0, 1.0, peak))
    tl.store(inverse_ptr + plane * count + rows, inverse, rows < count)


@triton.jit
def forward_program(
    q_ptr, k_ptr, v_ptr, mask_ptr, count_ptr, q_inverse_ptr, k_inverse_ptr, out_ptr, total_ptr, top_ptr, mass_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    mask_batch, mask_head, mask_row, mask_column, heads, group, queries, keys, width, value_width, scale, power,
    CAUSAL: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, NARROW: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Output and row numbers of one tile of queries; a `top_ptr` asks for re-weighting."""
    tiles = tl.cdiv(queries, BLOCK_Q)
    tile, plane = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = plane // heads, plane % heads
    k_ptr += batch * k_batch + head // group * k_head
    v_ptr += batch * v_batch + head // group * v_head
    k_inverse_ptr += (batch * (heads // group) + head // group) * keys
    if mask_ptr is not None:
        mask_ptr += batch * mask_batch + head * mask_head
        count_ptr += plane * queries
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = _tile(q_ptr + batch * q_batch + head * q_head, rows, q_row, queries, width, BLOCK_D)
    count = _count(count_ptr, rows, queries, keys, CAUSAL, ACC)
    factor = scale * tl.log2(count) * LN2 * tl.load(q_inverse_ptr + plane * queries + rows, rows < queries, 0.0)
    total, top, mass = tl.zeros([BLOCK_Q], ACC), tl.zeros([BLOCK_Q], ACC), tl.zeros([BLOCK_Q], ACC)
    acc = tl.zeros([BLOCK_Q, BLOCK_V], ACC)
    stop = keys
    if CAUSAL:
        stop = tl.minimum(keys, (tile + 1) * BLOCK_Q)
    if top_ptr is not None:
        for start in range(0, stop, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            _, _, a, _ = _scored(q, k_ptr, k_inverse_ptr, mask_ptr, rows, columns, factor, k_row, mask_row,
                mask_column, queries, keys, width, CAUSAL, ACC, PRECISION, UPCAST, BLOCK_D)  # fmt: skip
            total += tl.sum(a, 1)
            top = tl.maximum(top, tl.max(a, 1))
        total = tl.where(total == 0, 1.0, total)
        top = count * (top / total) - tl.where(count > 3, 1.0, 0.0)
        top = tl.where(top <= FLAT, 0.0, top)
    for start in range(0, stop, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        v = _tile(v_ptr, columns, v_row, keys, value_width, BLOCK_V)
        _, _, weight, _ = _scored(q, k_ptr, k_inverse_ptr, mask_ptr, rows, columns, factor, k_row, mask_row,
            mask_column, queries, keys, width, CAUSAL, ACC, PRECISION, UPCAST, BLOCK_D)  # fmt: skip
        if top_ptr is not None:
            _, weight = _sharpened(weight, count[:, None], total[:, None], top[:, None], power)
        mass += tl.sum(weight, 1)
        if NARROW:
            # Float16 ends at 6e-8: weights of a tile are rounded on the scale of their row's largest.
            unit = tl.max(weight, 1)[:, None]
            unit = tl.where(unit == 0, 1.0, unit)
            acc += unit * _dot((weight / unit).to(v.dtype), v, ACC, PRECISION, UPCAST)
        else:
            acc += _dot(weight.to(v.dtype), v, ACC, PRECISION, UPCAST)
    mass = tl.where(mass == 0, 1.0, mass)
    numbers = plane * queries + rows
    if top_ptr is not None:
        tl.store(top_ptr + numbers, top, rows < queries)
        tl.store(mass_ptr + numbers, mass, rows < queries)
    else:
        total = mass
    tl.store(total_ptr + numbers, total, rows < queries)
    _write(out_ptr + plane * queries * value_width, rows, queries, value_width, acc / mass[:, None], BLOCK_V)


@triton.jit
def query_gradient_program(
    q_ptr, k_ptr, v_ptr, mask_ptr, count_ptr, q_inverse_ptr, k_inverse_ptr, grad_ptr, total_ptr, top_ptr, mass_ptr,
    delta_ptr, own_ptr, out_ptr, dq_ptr, q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    grad_batch, grad_head, grad_row, mask_batch, mask_head, mask_row, mask_column, heads, group, queries, keys, width,
    value_width, scale, power, CAUSAL: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries, and what each row's weights share: rowsum(dO * O), and `own` under re-weighting."""
    tiles = tl.cdiv(queries, BLOCK_Q)
    tile, plane = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = plane // heads, plane % heads
    k_ptr += batch * k_batch + head // group * k_head
    v_ptr += batch * v_batch + head // group * v_head
    k_inverse_ptr += (batch * (heads // group) + head // group) * keys
    if mask_ptr is not None:
        mask_ptr += batch * mask_batch + head * mask_head
        count_ptr += plane * queries
    rows = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    numbers = plane * queries + rows
    q = _tile(q_ptr + batch * q_batch + head * q_head, rows, q_row, queries, width, BLOCK_D)
    grad = _tile(grad_ptr + batch * grad_batch + head * grad_head, rows, grad_row, queries, value_width, BLOCK_V)
    out = _tile(out_ptr + plane * queries * value_width, rows, value_width, queries, value_width, BLOCK_V)
    delta = tl.sum(grad.to(ACC) * out.to(ACC), 1)
    tl.store(delta_ptr + numbers, delta, rows < queries)
    count = _count(count_ptr, rows, queries, keys, CAUSAL, ACC)
    q_inverse = tl.load(q_inverse_ptr + numbers, rows < queries, 0.0)
    factor = scale * tl.log2(count) * LN2 * q_inverse
    total = tl.load(total_ptr + numbers, rows < queries, 1.0)[:, None]
    count, delta, top, mass = count[:, None], delta[:, None], total, total
    own = tl.zeros([BLOCK_Q], ACC)
    stop = keys
    if CAUSAL:
        stop = tl.minimum(keys, (tile + 1) * BLOCK_Q)
    if own_ptr is not None:
        top = tl.load(top_ptr + numbers, rows < queries, 0.0)[:, None]
        mass = tl.load(mass_ptr + numbers, rows < queries, 1.0)[:, None]
        for start in range(0, stop, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            v = _tile(v_ptr, columns, v_row, keys, value_width, BLOCK_V)
            _, _, a, _ = _scored(q, k_ptr, k_inverse_ptr, mask_ptr, rows, columns, factor, k_row, mask_row,
                mask_column, queries, keys, width, CAUSAL, ACC, PRECISION, UPCAST, BLOCK_D)  # fmt: skip
            d_a = _dot(grad, tl.trans(v), ACC, PRECISION, UPCAST)
            _, slope = _weight_gradient(a, d_a, count, total, top, mass, delta, power, True)
            own += tl.sum(slope * (a / total), 1)
        tl.store(own_ptr + numbers, own, rows < queries)
    if dq_ptr is not None:
        acc = tl.zeros([BLOCK_Q, BLOCK_D], ACC)
        for start in range(0, stop, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            v = _tile(v_ptr, columns, v_row, keys, value_width, BLOCK_V)
            k, inverse, a, rise = _scored(q, k_ptr, k_inverse_ptr, mask_ptr, rows, columns, factor, k_row, mask_row,
                mask_column, queries, keys, width, CAUSAL, ACC, PRECISION, UPCAST, BLOCK_D)  # fmt: skip
            d_a = _dot(grad, tl.trans(v), ACC, PRECISION, UPCAST)
            _, slope = _weight_gradient(a, d_a, count, total, top, mass, delta, power, own_ptr is not None)
            d_s = (slope - own[:, None]) / total * rise
            direction = (k.to(ACC) * inverse[:, None]).to(k.dtype)
            acc += _dot(d_s.to(k.dtype), direction, ACC, PRECISION, UPCAST)
        along = q.to(ACC) * q_inverse[:, None]
        acc = (acc - along * tl.sum(along * acc, 1)[:, None]) * factor[:, None]
        _write(dq_ptr + plane * queries * width, rows, queries, width, acc, BLOCK_D)


@triton.jit
def key_gradient_program(
    q_ptr, k_ptr, v_ptr, mask_ptr, count_ptr, q_inverse_ptr, k_inverse_ptr, grad_ptr, total_ptr, top_ptr, mass_ptr,
    delta_ptr, own_ptr, dk_ptr, dv_ptr,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, grad_batch, grad_head, grad_row,
    mask_batch, mask_head, mask_row, mask_column, heads, group, queries, keys, width, value_width, scale, power,
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
    inverse = tl.load(k_inverse_ptr + plane * keys + columns, columns < keys, 0.0)[:, None]
    dk, dv = tl.zeros([BLOCK_K, BLOCK_D], ACC), tl.zeros([BLOCK_K, BLOCK_V], ACC)
    first = 0
    if CAUSAL:
        first = tile * BLOCK_K // BLOCK_Q * BLOCK_Q
    for member in range(0, group):
        head = key_head * group + member
        row_0 = (batch * heads + head) * queries
        seen_ptr, seen_count = mask_ptr, count_ptr
        if mask_ptr is not None:
            seen_ptr = mask_ptr + batch * mask_batch + head * mask_head
            seen_count = count_ptr + row_0
        for start in range(first, queries, BLOCK_Q):
            rows = start + tl.arange(0, BLOCK_Q)
            inside = rows < queries
            q = _tile(q_ptr + batch * q_batch + head * q_head, rows, q_row, queries, width, BLOCK_D)
            up_ptr = grad_ptr + batch * grad_batch + head * grad_head
            grad = _tile(up_ptr, rows, grad_row, queries, value_width, BLOCK_V)
            count = _count(seen_count, rows, queries, keys, CAUSAL, ACC)
            q_inverse = tl.load(q_inverse_ptr + row_0 + rows, inside, 0.0)
            stretch, count = scale * tl.log2(count) * LN2, count[None, :]
            total = tl.load(total_ptr + row_0 + rows, inside, 1.0)[None, :]
            delta = tl.load(delta_ptr + row_0 + rows, inside, 0.0)[None, :]
            own, top, mass = tl.zeros_like(delta), total, total
            if own_ptr is not None:
                own = tl.load(own_ptr + row_0 + rows, inside, 0.0)[None, :]
                top = tl.load(top_ptr + row_0 + rows, inside, 0.0)[None, :]
                mass = tl.load(mass_ptr + row_0 + rows, inside, 1.0)[None, :]
            # Tiles stand transposed here, keys by queries: their products with q and dO need no transposition.
            s = _dot(k, tl.trans(q), ACC, PRECISION, UPCAST) * (stretch * q_inverse)[None, :] * inverse
            seen = _visible(seen_ptr, rows[None, :], columns[:, None], queries, keys, mask_row, mask_column, CAUSAL)
            a, rise = _softplus(s, seen)
            d_a = _dot(v, tl.trans(grad), ACC, PRECISION, UPCAST)
            weight, slope = _weight_gradient(a, d_a, count, total, top, mass, delta, power, own_ptr is not None)
            dv += _dot(weight.to(grad.dtype), grad, ACC, PRECISION, UPCAST)
            d_s = (slope - own) / total * rise * stretch[None, :]
            direction = (q.to(ACC) * q_inverse[:, None]).to(q.dtype)
            dk += _dot(d_s.to(q.dtype), direction, ACC, PRECISION, UPCAST)
    along = k.to(ACC) * inverse
    dk = (dk - along * tl.sum(along * dk, 1)[:, None]) * inverse
    _write(dk_ptr + plane * keys * width, columns, keys, width, dk, BLOCK_D)
    _write(dv_ptr + plane * keys * value_width, columns, keys, value_width, dv, BLOCK_V)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, power: float | None
) -> tuple[Tensor, ...]:
    """Output, inverse lengths of queries and keys, row sums; under re-weighting largest excesses and sums of powers."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    q_inverse, total = (q.new_empty(q.shape[:-1], dtype=wide) for _ in range(2))
    k_inverse = k.new_empty(k.shape[:-1], dtype=wide)
    top, mass = (q.new_empty((0,) if power is None else q.shape[:-1], dtype=wide) for _ in range(2))
    if out.numel():
        q, k, v = layout.unit_stride(q), layout.unit_stride(k), layout.unit_stride(v)
        shape, flat = _shape("forward", power, q, v), FLAT_ROUNDING * torch.finfo(wide).eps
        options = {name: shape[name] for name in ("ACC", "BLOCK_Q", "BLOCK_D", "num_warps")}
        with torch.cuda.device_of(q):
            for x, inverse in ((q, q_inverse), (k, k_inverse)):
                grid = (layout.programs(x, shape["BLOCK_Q"]),)
                if inverse.numel():
                    length_program[grid](x, inverse, *layout.strides(x), *x.shape[1:], **options)
            forward_program[(layout.programs(q, shape["BLOCK_Q"]),)](
                q, k, v, mask, layout.visible_counts(q, k, mask), q_inverse, k_inverse, out, total,
                *((None, None) if power is None else (top, mass)), *layout.numbers(q, k, v, mask=mask),
                scale, power or 0.0, CAUSAL=is_causal, NARROW=q.dtype == torch.float16, FLAT=flat, **shape,
            )  # fmt: skip
    return out, q_inverse, k_inverse, total, top, mass


def backward(
    grad: Tensor,
    qkv: Sequence[Tensor],
    mask: Tensor | None,
    saved: Sequence[Tensor],
    is_causal: bool,
    scale: float,
    power: float | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launch the backward programs: gradients of (q, k, v). Those of k and v come together or not at all."""
    out, q_inverse, k_inverse, total, *sharp = saved
    wanted = (needs[0], needs[1] or needs[2], needs[1] or needs[2])
    dq, dk, dv = (x.new_empty(x.shape) if want else None for x, want in zip(qkv, wanted, strict=True))
    if not out.numel() or not k_inverse.numel():
        return tuple(None if x is None else x.zero_() for x in (dq, dk, dv))
    q, k, v, grad = (layout.unit_stride(x) for x in (*qkv, grad))
    delta, own = torch.empty_like(total), None if power is None else torch.empty_like(total)
    top, mass = (None, None) if power is None else sharp
    count = layout.visible_counts(q, k, mask)
    common = (q, k, v, mask, count, q_inverse, k_inverse, grad, total, top, mass, delta, own)
    numbers = (*layout.numbers(q, k, v, grad, mask=mask), scale, power or 0.0, is_causal)
    with torch.cuda.device_of(q):
        shape = _shape("query_gradient", power, q, v)
        query_gradient_program[(layout.programs(q, shape["BLOCK_Q"]),)](*common, out, dq, *numbers, **shape)
        if dk is not None:
            shape = _shape("key_gradient", power, q, v)
            key_gradient_program[(layout.programs(k, shape["BLOCK_K"]),)](*common, dk, dv, *numbers, **shape)
    return dq, dk, dv


def _shape(program: str, power: float | None, q: Tensor, v: Tensor) -> dict:
    """The compile-time sizes and launch options of a program."""
    width, value_width = (max(16, triton.next_power_of_2(x.shape[-1])) for x in (q, v))
    # Float64 runs in the interpreter only, where any entry will do.
    size, sharp = min(q.element_size(), 4), "" if power is None else "sharp "
    block_q, block_k, warps, stages = layout.LAUNCH[sharp + program][size, max(64, width, value_width)]
    accumulate = tl.float64 if q.dtype == torch.float64 else tl.float32
    options = {"ACC": accumulate, "PRECISION": "tf32x3", "UPCAST": interpreting()}
    options |= {"BLOCK_Q": block_q, "BLOCK_K": block_k, "BLOCK_D": width, "BLOCK_V": value_width}
    return options | {"num_warps": warps, "num_stages": stages}
