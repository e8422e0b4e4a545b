"""Triton programs of both OQC row stages, and the functions that launch them.

Every program walks groups of ROWS rows. A row is a few sums, then one elementwise pass. A row that fits in one tile
stays in registers between the two; a wider one is read again, tile by tile. A pointer that is None switches its
branch off at compile time. The forward pass saves c = <a, m> / n and 1 / n, n = <m, m> + eps, for each token; the
backward pass recomputes the rest. No atomics: a gradient that sums over tokens is a partial sum per program and one
reduction over programs, so two runs agree bit for bit.
Letters: g upstream gradient, m main vector, a auxiliary vector after its channel gate, k gate, w channel gate.

Source: wang2026oqc, eq:oqc-inject, eq:oqc-rank, eq:oqc-backward.  Chapter: oqc
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of a tile -> (rows per program, warps): 8 elements of each operand per thread, at least 4 warps, which is
# what the compile check finds to fit in registers. A row wider than the last entry is read in tiles of that entry.
LAUNCH = {
    16: (64, 4), 32: (32, 4), 64: (16, 4), 128: (8, 4), 256: (4, 4), 512: (2, 4), 1024: (1, 4), 2048: (1, 8),
    4096: (1, 16),
}  # fmt: skip
# Programs of a backward pass that keeps partial sums: enough to fill a GPU, few enough that the sums stay small.
PARTIALS = 512


@triton.jit
def _tile(ptr, rows, stride, columns, tokens, width, ACC: tl.constexpr, ALIGN: tl.constexpr):
    """A [ROWS, BLOCK] tile in the accumulation type; zero outside the tensor."""
    inside = (rows < tokens)[:, None] & tl.max_constancy(columns < width, ALIGN)[None, :]
    start = tl.multiple_of(rows * stride, ALIGN)
    return tl.load(ptr + start[:, None] + columns[None, :], mask=inside, other=0.0).to(ACC)


@triton.jit
def _write(ptr, rows, columns, tokens, width, value, ALIGN: tl.constexpr):
    """Round a tile once, into a contiguous output."""
    inside = (rows < tokens)[:, None] & tl.max_constancy(columns < width, ALIGN)[None, :]
    start = tl.multiple_of(rows * width, ALIGN)
    tl.store(ptr + start[:, None] + columns[None, :], value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _channels(ptr, columns, width, ACC: tl.constexpr):
    """One number per channel, as a row; ones where there is none to load."""
    if ptr is None:
        return tl.full((1, columns.shape[0]), 1.0, ACC)
    return tl.load(ptr + columns, mask=columns < width, other=0.0).to(ACC)[None, :]


@triton.jit
def _numbers(ptr, rows, stride, tokens, ACC: tl.constexpr):
    """One number per token, as a column; ones where there is none to load. Stride 0 repeats a 0-d gate."""
    if ptr is None:
        return tl.full((rows.shape[0], 1), 1.0, ACC)
    return tl.load(ptr + rows * stride, mask=rows < tokens, other=0.0).to(ACC)[:, None]


@triton.jit
def _save(ptr, rows, tokens, column):
    """Store one number per token."""
    tl.store(ptr + rows, tl.sum(column, 1).to(ptr.dtype.element_ty), mask=rows < tokens)


@triton.jit
def _sum(tile):
    """Row sums, as a column."""
    return tl.sum(tile, 1)[:, None]


@triton.jit
def _inverse(n, TINY: tl.constexpr):
    """1 / n, and 0 for a squared norm without a finite inverse: such a row has no direction."""
    return tl.where(n < TINY, 0.0, 1.0 / tl.where(n < TINY, 1.0, n))


@triton.jit
def _add_partial(ptr, group, columns, width, tile):
    """Add the tile's column sums to this program's row of partial sums, which its first group starts."""
    at = ptr + tl.program_id(0).to(tl.int64) * width + columns
    tl.debug_barrier()  # other threads of the program may have stored what this one is about to read
    before = tl.load(at, mask=(columns < width) & (group != tl.program_id(0)), other=0.0)
    tl.store(at, before + tl.sum(tile, 0), mask=columns < width)


@triton.jit
def inject_forward_program(
    main_ptr, aux_ptr, gate_ptr, pre_ptr, out_ptr, c_ptr, inverse_ptr,
    main_stride, aux_stride, gate_stride, tokens, width, eps,
    ACC: tl.constexpr, TINY: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write main + k (a - c main), c and 1 / n."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    zero, nothing = tl.zeros((ROWS, BLOCK), ACC), tl.zeros((ROWS, 1), ACC)
    m, a, mm, am = zero, zero, nothing, nothing
    for tile in range(0, TILES):
        at = tile * BLOCK + columns
        m = _tile(main_ptr, rows, main_stride, at, tokens, width, ACC, ALIGN)
        a = _tile(aux_ptr, rows, aux_stride, at, tokens, width, ACC, ALIGN) * _channels(pre_ptr, at, width, ACC)
        mm, am = mm + _sum(m * m), am + _sum(a * m)
    inverse = _inverse(mm + eps, TINY)
    c = am * inverse
    _save(c_ptr, rows, tokens, c)
    _save(inverse_ptr, rows, tokens, inverse)
    k = _numbers(gate_ptr, rows, gate_stride, tokens, ACC)
    for tile in range(0, TILES):
        at = tile * BLOCK + columns
        if TILES > 1:
            m = _tile(main_ptr, rows, main_stride, at, tokens, width, ACC, ALIGN)
            a = _tile(aux_ptr, rows, aux_stride, at, tokens, width, ACC, ALIGN) * _channels(pre_ptr, at, width, ACC)
        _write(out_ptr, rows, at, tokens, width, m + k * (a - c * m), ALIGN)


@triton.jit
def inject_backward_program(
    grad_ptr, main_ptr, aux_ptr, gate_ptr, pre_ptr, c_ptr, inverse_ptr,
    dmain_ptr, daux_ptr, dgate_ptr, dpre_ptr,
    grad_stride, main_stride, aux_stride, gate_stride, tokens, width,
    ACC: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write the gradients whose pointers are there, with tau = k <g, m> / n."""
    columns = tl.arange(0, BLOCK)
    zero, nothing = tl.zeros((ROWS, BLOCK), ACC), tl.zeros((ROWS, 1), ACC)
    dpre = zero
    for group in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        rows = (tl.zeros((ROWS,), tl.int64) + group) * ROWS + tl.arange(0, ROWS)
        c = _numbers(c_ptr, rows, 1, tokens, ACC)
        k = _numbers(gate_ptr, rows, gate_stride, tokens, ACC)
        g, m, z, w = zero, zero, zero, tl.zeros((1, BLOCK), ACC)
        gm, gp = nothing, nothing
        for tile in range(0, TILES):
            at = tile * BLOCK + columns
            g = _tile(grad_ptr, rows, grad_stride, at, tokens, width, ACC, ALIGN)
            m = _tile(main_ptr, rows, main_stride, at, tokens, width, ACC, ALIGN)
            z = _tile(aux_ptr, rows, aux_stride, at, tokens, width, ACC, ALIGN)
            w = _channels(pre_ptr, at, width, ACC)
            gm, gp = gm + _sum(g * m), gp + _sum(g * (w * z - c * m))
        tau = k * gm * _numbers(inverse_ptr, rows, 1, tokens, ACC)
        if dgate_ptr is not None:
            _save(dgate_ptr, rows, tokens, gp)
        for tile in range(0, TILES):
            at = tile * BLOCK + columns
            if TILES > 1:
                g = _tile(grad_ptr, rows, grad_stride, at, tokens, width, ACC, ALIGN)
                m = _tile(main_ptr, rows, main_stride, at, tokens, width, ACC, ALIGN)
                z = _tile(aux_ptr, rows, aux_stride, at, tokens, width, ACC, ALIGN)
                w = _channels(pre_ptr, at, width, ACC)
            v = k * g
            da = v - tau * m
            if dmain_ptr is not None:
                _write(dmain_ptr, rows, at, tokens, width, g - c * v - tau * (w * z - 2.0 * c * m), ALIGN)
            if daux_ptr is not None:
                _write(daux_ptr, rows, at, tokens, width, w * da, ALIGN)
            if dpre_ptr is not None:
                if TILES > 1:
                    _add_partial(dpre_ptr, group, at, width, da * z)
                else:
                    dpre += da * z
    if dpre_ptr is not None and TILES == 1:
        _add_partial(dpre_ptr, tl.program_id(0), columns, width, dpre)


@triton.jit
def rank_forward_program(
    left_ptr, right_ptr, host_ptr, weight_ptr, gate_ptr, out_ptr, c_ptr, inverse_ptr,
    left_stride, right_stride, host_stride, gate_stride, tokens, width, eps, norm_eps,
    ACC: tl.constexpr, TINY: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write k (rho f - c u), c and 1 / n, with s = left * right, f = weight * s and rho = 1 / rms(s)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    zero, nothing = tl.zeros((ROWS, BLOCK), ACC), tl.zeros((ROWS, 1), ACC)
    u, f, ss, fu, uu = zero, zero, nothing, nothing, nothing
    for tile in range(0, TILES):
        at = tile * BLOCK + columns
        s = _tile(left_ptr, rows, left_stride, at, tokens, width, ACC, ALIGN)
        s *= _tile(right_ptr, rows, right_stride, at, tokens, width, ACC, ALIGN)
        u = _tile(host_ptr, rows, host_stride, at, tokens, width, ACC, ALIGN)
        f = s * _channels(weight_ptr, at, width, ACC)
        ss, fu, uu = ss + _sum(s * s), fu + _sum(f * u), uu + _sum(u * u)
    inverse = _inverse(uu + eps, TINY)
    rho = tl.rsqrt(ss / width + norm_eps)
    c = rho * fu * inverse
    _save(c_ptr, rows, tokens, c)
    _save(inverse_ptr, rows, tokens, inverse)
    k = _numbers(gate_ptr, rows, gate_stride, tokens, ACC)
    for tile in range(0, TILES):
        at = tile * BLOCK + columns
        if TILES > 1:
            s = _tile(left_ptr, rows, left_stride, at, tokens, width, ACC, ALIGN)
            s *= _tile(right_ptr, rows, right_stride, at, tokens, width, ACC, ALIGN)
            u = _tile(host_ptr, rows, host_stride, at, tokens, width, ACC, ALIGN)
            f = s * _channels(weight_ptr, at, width, ACC)
        _write(out_ptr, rows, at, tokens, width, k * (rho * f - c * u), ALIGN)


@triton.jit
def rank_backward_program(
    grad_ptr, left_ptr, right_ptr, host_ptr, weight_ptr, gate_ptr, c_ptr, inverse_ptr,
    dleft_ptr, dright_ptr, dhost_ptr, dweight_ptr, dgate_ptr,
    grad_stride, left_stride, right_stride, host_stride, gate_stride, tokens, width, norm_eps,
    ACC: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write the gradients whose pointers are there; x and y are the factors, u the host, rho = 1 / rms(x y)."""
    columns = tl.arange(0, BLOCK)
    zero, nothing = tl.zeros((ROWS, BLOCK), ACC), tl.zeros((ROWS, 1), ACC)
    dweight = zero
    for group in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        rows = (tl.zeros((ROWS,), tl.int64) + group) * ROWS + tl.arange(0, ROWS)
        c = _numbers(c_ptr, rows, 1, tokens, ACC)
        k = _numbers(gate_ptr, rows, gate_stride, tokens, ACC)
        g, x, y, u, w = zero, zero, zero, zero, tl.zeros((1, BLOCK), ACC)
        ss, gu, fg, fu = nothing, nothing, nothing, nothing
        for tile in range(0, TILES):
            at = tile * BLOCK + columns
            g = _tile(grad_ptr, rows, grad_stride, at, tokens, width, ACC, ALIGN)
            x = _tile(left_ptr, rows, left_stride, at, tokens, width, ACC, ALIGN)
            y = _tile(right_ptr, rows, right_stride, at, tokens, width, ACC, ALIGN)
            u = _tile(host_ptr, rows, host_stride, at, tokens, width, ACC, ALIGN)
            w = _channels(weight_ptr, at, width, ACC)
            ss, gu = ss + _sum(x * y * (x * y)), gu + _sum(g * u)
            fg, fu = fg + _sum(w * x * y * g), fu + _sum(w * x * y * u)
        rho = tl.rsqrt(ss / width + norm_eps)
        tau = k * gu * _numbers(inverse_ptr, rows, 1, tokens, ACC)
        # <s, w df> of the norm's own backward, from the sums: df = k g - tau u.
        along = rho * rho * (k * fg - tau * fu) / width
        if dgate_ptr is not None:
            _save(dgate_ptr, rows, tokens, rho * fg - c * gu)
        for tile in range(0, TILES):
            at = tile * BLOCK + columns
            if TILES > 1:
                g = _tile(grad_ptr, rows, grad_stride, at, tokens, width, ACC, ALIGN)
                x = _tile(left_ptr, rows, left_stride, at, tokens, width, ACC, ALIGN)
                y = _tile(right_ptr, rows, right_stride, at, tokens, width, ACC, ALIGN)
                u = _tile(host_ptr, rows, host_stride, at, tokens, width, ACC, ALIGN)
                w = _channels(weight_ptr, at, width, ACC)
            v = k * g
            df = v - tau * u
            ds = rho * (w * df - x * y * along)
            if dleft_ptr is not None:
                _write(dleft_ptr, rows, at, tokens, width, ds * y, ALIGN)
            if dright_ptr is not None:
                _write(dright_ptr, rows, at, tokens, width, ds * x, ALIGN)
            if dhost_ptr is not None:
                _write(dhost_ptr, rows, at, tokens, width, -c * v - tau * (rho * w * x * y - 2.0 * c * u), ALIGN)
            if dweight_ptr is not None:
                if TILES > 1:
                    _add_partial(dweight_ptr, group, at, width, rho * df * x * y)
                else:
                    dweight += rho * df * x * y
    if dweight_ptr is not None and TILES == 1:
        _add_partial(dweight_ptr, tl.program_id(0), columns, width, dweight)


def inject_forward(
    main: Tensor, aux: Tensor, gate: Tensor | None, pre_gate: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward program: the result and, per token, c and 1 / n."""
    out, c, inverse = _outputs(main)
    m, a = _rows(main), _rows(aux)
    gate, gate_stride = _per_token(gate)
    pre_gate = None if pre_gate is None else pre_gate.contiguous()
    tokens, width = m.shape
    shape = _shape(m, a)
    if tokens:
        with torch.cuda.device_of(main):
            inject_forward_program[(triton.cdiv(tokens, shape["ROWS"]),)](
                m, a, gate, pre_gate, out, c, inverse,
                m.stride(0), a.stride(0), gate_stride, tokens, width, eps,
                TINY=torch.finfo(c.dtype).tiny, **shape,
            )  # fmt: skip
    return out, c, inverse


def inject_backward(
    grad: Tensor, main: Tensor, aux: Tensor, gate: Tensor | None, pre_gate: Tensor | None, c: Tensor, inverse: Tensor,
    needs: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Launch the backward program: gradients of (main, aux, gate, pre_gate), None where `needs` says no."""
    dmain, daux = (main.new_empty(main.shape) if need else None for need in needs[:2])
    dgate = _gate_gradient(gate, c) if needs[2] else None
    g, m, a = _rows(grad), _rows(main), _rows(aux)
    gates, gate_stride = _per_token(gate)
    channels = None if pre_gate is None else pre_gate.contiguous()
    tokens, width = m.shape
    shape = _shape(m, a, g)
    programs = triton.cdiv(tokens, shape["ROWS"])
    dpre = c.new_empty(min(programs, PARTIALS), width) if needs[3] else None
    if tokens:
        with torch.cuda.device_of(main):
            inject_backward_program[(programs if dpre is None else len(dpre),)](
                g, m, a, gates, channels, c, inverse, dmain, daux, dgate, dpre,
                g.stride(0), m.stride(0), a.stride(0), gate_stride, tokens, width, **shape,
            )  # fmt: skip
    return dmain, daux, _sum_gate(gate, dgate), _sum_programs(pre_gate, dpre)


def rank_forward(
    left: Tensor, right: Tensor, host: Tensor, weight: Tensor, gate: Tensor | None, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the rank-space forward program: the result and, per token, c and 1 / n."""
    out, c, inverse = _outputs(left)
    x, y, u = _rows(left), _rows(right), _rows(host)
    gate, gate_stride = _per_token(gate)
    tokens, width = x.shape
    shape = _shape(x, y, u)
    if tokens:
        with torch.cuda.device_of(left):
            rank_forward_program[(triton.cdiv(tokens, shape["ROWS"]),)](
                x, y, u, weight.contiguous(), gate, out, c, inverse,
                x.stride(0), y.stride(0), u.stride(0), gate_stride, tokens, width, eps, norm_eps,
                TINY=torch.finfo(c.dtype).tiny, **shape,
            )  # fmt: skip
    return out, c, inverse


def rank_backward(
    grad: Tensor, left: Tensor, right: Tensor, host: Tensor, weight: Tensor, gate: Tensor | None, c: Tensor,
    inverse: Tensor, norm_eps: float, needs: list[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Launch the rank-space backward program: gradients of (left, right, host, weight, gate), None if not needed."""
    dleft, dright, dhost = (left.new_empty(left.shape) if need else None for need in needs[:3])
    dgate = _gate_gradient(gate, c) if needs[4] else None
    g, x, y, u = _rows(grad), _rows(left), _rows(right), _rows(host)
    gates, gate_stride = _per_token(gate)
    tokens, width = x.shape
    shape = _shape(x, y, u, g)
    programs = triton.cdiv(tokens, shape["ROWS"])
    dweight = c.new_empty(min(programs, PARTIALS), width) if needs[3] else None
    if tokens:
        with torch.cuda.device_of(left):
            rank_backward_program[(programs if dweight is None else len(dweight),)](
                g, x, y, u, weight.contiguous(), gates, c, inverse, dleft, dright, dhost, dweight, dgate,
                g.stride(0), x.stride(0), y.stride(0), u.stride(0), gate_stride, tokens, width, norm_eps, **shape,
            )  # fmt: skip
    return dleft, dright, dhost, _sum_programs(weight, dweight), _sum_gate(gate, dgate)


def _shape(*operands: Tensor) -> dict:
    """The compile-time sizes of a launch over `[tokens, width]` operands, the first of which sets the dtype.

    ALIGN divides every row's start and length, so that loads may be as wide as that many elements.
    """
    width = operands[0].shape[1]
    block = next((columns for columns in LAUNCH if columns >= width), max(LAUNCH))
    group, warps = LAUNCH[block]
    return {
        "ACC": tl.float64 if operands[0].dtype == torch.float64 else tl.float32,
        "ALIGN": math.gcd(16, width, *(operand.stride(0) for operand in operands)),
        "ROWS": group,
        "BLOCK": block,
        "TILES": triton.cdiv(width, block),
        "num_warps": warps,
    }


def _rows(tensor: Tensor) -> Tensor:
    """`[tokens, width]` with unit column stride and any row stride: a view where the layout allows one."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _per_token(gate: Tensor | None) -> tuple[Tensor | None, int]:
    """A gate as one number per token and the stride that walks it: 0 for a 0-d gate."""
    if gate is None or gate.ndim == 0:
        return gate, 0
    numbers = gate.reshape(-1)
    return numbers, numbers.stride(0)


def _outputs(main: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Empty result and saved numbers c and 1 / n, one per token, in the accumulation type."""
    wide = torch.promote_types(main.dtype, torch.float32)
    c, inverse = (main.new_empty(main.shape[:-1], dtype=wide) for _ in range(2))
    return main.new_empty(main.shape), c, inverse


def _gate_gradient(gate: Tensor, c: Tensor) -> Tensor:
    """One number per token: in the gate's own type, or unrounded where a 0-d gate will sum them."""
    return torch.empty_like(c) if gate.ndim == 0 else gate.new_empty(gate.shape)


def _sum_gate(gate: Tensor | None, dgate: Tensor | None) -> Tensor | None:
    """The gradient of a 0-d gate sums over tokens."""
    return dgate.sum().to(gate.dtype) if dgate is not None and gate.ndim == 0 else dgate


def _sum_programs(channels: Tensor | None, partial: Tensor | None) -> Tensor | None:
    """The one reduction over programs, rounded to the type of the parameter."""
    return None if partial is None else partial.sum(0).to(channels.dtype)
