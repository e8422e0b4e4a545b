"""Triton programs of PolyNorm and PolyReLU, and the functions that launch them.

PolyNorm walks groups of ROWS rows. Forward needs three sums per row, of y^2, y^4 and y^6, and backward four, of g and
g y^i; all powers are taken in the accumulation type, of y = x / 2^e below 2 in size. The forward pass finds e while it
sums: when a later tile of a row is larger, the sums so far are multiplied by powers of two, which is exact. A row that
fits in one tile stays in registers; a wider one is read again, tile by tile. The forward pass saves 2^-e and
rho_i = 1 / sqrt(mean(y^(2i)) + eps 2^(-2 i e)) for each row. PolyReLU is elementwise, and saves nothing.
No atomics: coefficient gradients are one partial sum per program and one reduction, so two runs agree bit for bit.
Letters: g upstream gradient, a1 a2 a3 coefficients, b constant term, n width.

Source: zhuo2025polycom, eq:polycom-polynorm, eq:polycom-backward, eq:polycom-polyrelu.  Chapter: polycom
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns of a tile -> (rows per program, warps): 8 elements of each operand per thread, at least 4 warps. A row wider
# than the last entry is read in tiles of that entry.
LAUNCH = {
    16: (64, 4), 32: (32, 4), 64: (16, 4), 128: (8, 4), 256: (4, 4), 512: (2, 4), 1024: (1, 4), 2048: (1, 8),
    4096: (1, 16),
}  # fmt: skip
# Elements and warps of one block of the elementwise kernel.
BLOCK, WARPS = 1024, 4
# Programs of a backward pass: enough to fill a GPU, few enough that the partial sums stay small.
PARTIALS = 512
# Numbers that a program adds up over its rows: gradients of a1, a2, a3 and b.
SUMS = 4


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
def _sum(tile):
    """Row sums, as a column."""
    return tl.sum(tile, 1)[:, None]


@triton.jit
def _downscale(largest):
    """2^-e for the largest size in a row, at least 1: the row times this is below 2."""
    return tl.exp2(-tl.minimum(tl.floor(tl.log2(largest)), 126.0))


@triton.jit
def _saved(ptr, which, rows, tokens):
    """One of the four saved numbers of each row, as a column."""
    return tl.load(ptr + which * tokens + rows, mask=rows < tokens, other=0.0)[:, None]


@triton.jit
def _save(ptr, which, rows, tokens, column):
    """Store one number per row."""
    tl.store(ptr + which * tokens + rows, tl.sum(column, 1), mask=rows < tokens)


@triton.jit
def _constant(ptr, ACC: tl.constexpr):
    """The constant term, zero where there is none."""
    return tl.zeros((), ACC) if ptr is None else tl.load(ptr).to(ACC)


@triton.jit
def norm_forward_program(
    x_ptr, weight_ptr, bias_ptr, out_ptr, saved_ptr, x_stride, tokens, width, eps,
    ACC: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write b + sum a_i rho_i y^i, and 2^-e, rho_1, rho_2, rho_3."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    x, nothing = tl.zeros((ROWS, BLOCK), ACC), tl.zeros((ROWS, 1), ACC)
    largest, s1, s2, s3 = nothing + 1.0, nothing, nothing, nothing
    for tile in range(0, TILES):
        x = _tile(x_ptr, rows, x_stride, tile * BLOCK + columns, tokens, width, ACC, ALIGN)
        grown = tl.maximum(largest, tl.max(tl.abs(x), 1)[:, None])
        shrink = _downscale(grown) / _downscale(largest)
        q, k = x * _downscale(grown), shrink * shrink
        q = q * q
        s1, s2, s3 = s1 * k + _sum(q), s2 * k * k + _sum(q * q), s3 * k * k * k + _sum(q * q * q)
        largest = grown
    down = _downscale(largest)
    d = down * down
    rho1 = tl.rsqrt(s1 / width + eps * d)
    rho2 = tl.rsqrt(s2 / width + eps * d * d)
    rho3 = tl.rsqrt(s3 / width + eps * d * d * d)
    _save(saved_ptr, 0, rows, tokens, down)
    _save(saved_ptr, 1, rows, tokens, rho1)
    _save(saved_ptr, 2, rows, tokens, rho2)
    _save(saved_ptr, 3, rows, tokens, rho3)
    a1 = tl.load(weight_ptr).to(ACC) * rho1
    a2 = tl.load(weight_ptr + 1).to(ACC) * rho2
    a3 = tl.load(weight_ptr + 2).to(ACC) * rho3
    b = _constant(bias_ptr, ACC)
    for tile in range(0, TILES):
        at = tile * BLOCK + columns
        if TILES > 1:
            x = _tile(x_ptr, rows, x_stride, at, tokens, width, ACC, ALIGN)
        y = x * down
        _write(out_ptr, rows, at, tokens, width, b + y * (a1 + y * (a2 + y * a3)), ALIGN)


@triton.jit
def norm_backward_program(
    grad_ptr, x_ptr, weight_ptr, saved_ptr, dx_ptr, partial_ptr, grad_stride, x_stride, tokens, width,
    ACC: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Write dx and this program's share of the coefficient gradients, where their pointers are there."""
    columns = tl.arange(0, BLOCK)
    zero, nothing = tl.zeros((ROWS, BLOCK), ACC), tl.zeros((ROWS, 1), ACC)
    d1, d2, d3, db = nothing, nothing, nothing, nothing
    a1 = tl.load(weight_ptr).to(ACC)
    a2 = tl.load(weight_ptr + 1).to(ACC)
    a3 = tl.load(weight_ptr + 2).to(ACC)
    for group in range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0)):
        rows = (tl.zeros((ROWS,), tl.int64) + group) * ROWS + tl.arange(0, ROWS)
        down = _saved(saved_ptr, 0, rows, tokens)
        rho1, rho2 = _saved(saved_ptr, 1, rows, tokens), _saved(saved_ptr, 2, rows, tokens)
        rho3 = _saved(saved_ptr, 3, rows, tokens)
        g, y = zero, zero
        s0, s1, s2, s3 = nothing, nothing, nothing, nothing
        for tile in range(0, TILES):
            at = tile * BLOCK + columns
            g = _tile(grad_ptr, rows, grad_stride, at, tokens, width, ACC, ALIGN)
            y = _tile(x_ptr, rows, x_stride, at, tokens, width, ACC, ALIGN) * down
            s0, s1 = s0 + _sum(g), s1 + _sum(g * y)
            s2, s3 = s2 + _sum(g * y * y), s3 + _sum(g * y * y * y)
        if partial_ptr is not None:
            d1, d2, d3, db = d1 + rho1 * s1, d2 + rho2 * s2, d3 + rho3 * s3, db + s0
        if dx_ptr is not None:
            c1, c2, c3 = rho1 * rho1 * s1 / width, rho2 * rho2 * s2 / width, rho3 * rho3 * s3 / width
            for tile in range(0, TILES):
                at = tile * BLOCK + columns
                if TILES > 1:
                    g = _tile(grad_ptr, rows, grad_stride, at, tokens, width, ACC, ALIGN)
                    y = _tile(x_ptr, rows, x_stride, at, tokens, width, ACC, ALIGN) * down
                q = y * y
                first = a1 * rho1 * (g - c1 * y)
                second = 2.0 * a2 * rho2 * y * (g - c2 * q)
                third = 3.0 * a3 * rho3 * q * (g - c3 * q * y)
                _write(dx_ptr, rows, at, tokens, width, down * (first + second + third), ALIGN)
    if partial_ptr is not None:
        at = partial_ptr + tl.program_id(0) * 4
        tl.store(at, tl.sum(d1))
        tl.store(at + 1, tl.sum(d2))
        tl.store(at + 2, tl.sum(d3))
        tl.store(at + 3, tl.sum(db))


@triton.jit
def relu_forward_program(x_ptr, weight_ptr, bias_ptr, out_ptr, elements, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Write b + sum a_i r^i with r = relu(x)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < elements, other=0.0).to(ACC)
    r = tl.where(x < 0.0, 0.0, x)  # NaN is not below zero, so it passes
    a1 = tl.load(weight_ptr).to(ACC)
    a2 = tl.load(weight_ptr + 1).to(ACC)
    a3 = tl.load(weight_ptr + 2).to(ACC)
    y = _constant(bias_ptr, ACC) + r * (a1 + r * (a2 + r * a3))
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=at < elements)


@triton.jit
def relu_backward_program(
    grad_ptr, x_ptr, weight_ptr, dx_ptr, partial_ptr, elements, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write dx and this program's share of the coefficient gradients, where their pointers are there."""
    zero = tl.zeros((BLOCK,), ACC)
    d1, d2, d3, db = zero, zero, zero, zero
    a1 = tl.load(weight_ptr).to(ACC)
    a2 = tl.load(weight_ptr + 1).to(ACC)
    a3 = tl.load(weight_ptr + 2).to(ACC)
    for group in range(tl.program_id(0), tl.cdiv(elements, BLOCK), tl.num_programs(0)):
        at = (tl.zeros((BLOCK,), tl.int64) + group) * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(grad_ptr + at, mask=at < elements, other=0.0).to(ACC)
        x = tl.load(x_ptr + at, mask=at < elements, other=0.0).to(ACC)
        r = tl.where(x < 0.0, 0.0, x)
        if dx_ptr is not None:
            slope = a1 + r * (2.0 * a2 + r * (3.0 * a3))
            dx = tl.where(x <= 0.0, 0.0, g * slope)
            tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=at < elements)
        if partial_ptr is not None:
            d1, d2, d3, db = d1 + g * r, d2 + g * r * r, d3 + g * r * r * r, db + g
    if partial_ptr is not None:
        at = partial_ptr + tl.program_id(0) * 4
        tl.store(at, tl.sum(d1))
        tl.store(at + 1, tl.sum(d2))
        tl.store(at + 2, tl.sum(d3))
        tl.store(at + 3, tl.sum(db))


def norm_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Launch PolyNorm: the result, and the four saved numbers of each row, ``[4, tokens]``."""
    rows = _rows(x)
    tokens, width = rows.shape
    out, saved = x.new_empty(x.shape), x.new_empty(SUMS, tokens, dtype=_accumulator(x))
    shape = _shape(rows)
    if tokens:
        with torch.cuda.device_of(x):
            norm_forward_program[(triton.cdiv(tokens, shape["ROWS"]),)](
                rows, weight.contiguous(), bias, out, saved, rows.stride(0), tokens, width, eps, **shape
            )
    return out, saved


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, saved: Tensor, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    """Launch the backward pass of PolyNorm: gradients of (x, weight, bias), None where `needs` says no."""
    dx = x.new_empty(x.shape) if needs[0] else None
    g, rows = _rows(grad), _rows(x)
    tokens, width = rows.shape
    shape = _shape(rows, g)
    programs = min(triton.cdiv(tokens, shape["ROWS"]), PARTIALS)
    partial = saved.new_empty(programs, SUMS) if any(needs[1:]) else None
    if tokens:
        with torch.cuda.device_of(x):
            norm_backward_program[(programs,)](
                g, rows, weight.contiguous(), saved, dx, partial, g.stride(0), rows.stride(0), tokens, width, **shape
            )
    return dx, *_coefficients(weight, partial, needs)


def relu_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Launch PolyReLU: the result, and an empty tensor, since it saves nothing."""
    out, flat = x.new_empty(x.shape), x.contiguous()
    if x.numel():
        with torch.cuda.device_of(x):
            relu_forward_program[(triton.cdiv(x.numel(), BLOCK),)](
                flat, weight.contiguous(), bias, out, x.numel(), ACC=_acc(x), BLOCK=BLOCK, num_warps=WARPS
            )
    return out, x.new_empty(SUMS, 0, dtype=_accumulator(x))


def relu_backward(
    grad: Tensor, x: Tensor, weight: Tensor, saved: Tensor, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    """Launch the backward pass of PolyReLU: gradients of (x, weight, bias), None where `needs` says no."""
    dx = x.new_empty(x.shape) if needs[0] else None
    programs = min(triton.cdiv(x.numel(), BLOCK), PARTIALS)
    partial = saved.new_empty(programs, SUMS) if any(needs[1:]) else None
    if x.numel():
        with torch.cuda.device_of(x):
            relu_backward_program[(programs,)](
                grad.contiguous(), x.contiguous(), weight.contiguous(), dx, partial, x.numel(),
                ACC=_acc(x), BLOCK=BLOCK, num_warps=WARPS,
            )  # fmt: skip
    return dx, *_coefficients(weight, partial, needs)


def _coefficients(weight: Tensor, partial: Tensor | None, needs: list[bool]) -> tuple[Tensor | None, Tensor | None]:
    """The one reduction over programs, rounded to the type of the coefficients."""
    if partial is None:
        return None, None
    total = partial.sum(0)
    dweight = total[:3].to(weight.dtype, copy=True) if needs[1] else None
    return dweight, total[3].to(weight.dtype, copy=True) if needs[2] else None


def _accumulator(x: Tensor) -> torch.dtype:
    """Type of sums and saved numbers."""
    return torch.promote_types(x.dtype, torch.float32)


def _acc(x: Tensor) -> tl.dtype:
    """The same for a program; float64 occurs in the interpreter only."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _shape(*operands: Tensor) -> dict:
    """The compile-time sizes of a launch over `[tokens, width]` operands, the first of which sets the dtype.

    ALIGN divides every row's start and length, so that loads may be as wide as that many elements.
    """
    width = operands[0].shape[1]
    block = next((columns for columns in LAUNCH if columns >= width), max(LAUNCH))
    group, warps = LAUNCH[block]
    return {
        "ACC": _acc(operands[0]),
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
