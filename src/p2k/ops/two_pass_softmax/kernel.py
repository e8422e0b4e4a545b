"""Triton row programs of softmax: pairs, online and three passes, their common backward, and the launchers.

Every program takes ROWS rows. A row of up to WIDEST columns is RESIDENT: read once, kept in registers, written once,
and then all three move the same bytes. A wider row is walked in tiles of TILE columns, once per pass, and the passes
are what the three differ in: pairs and online read it twice, three passes thrice.
Letters: e^x = p 2^n with integer-valued n = v + k, m 2^v the running sum; top the largest argument, s a sum relative
to it. The largest n is that of the largest x, because rounding keeps the order.

Source: dukhan2020twopass, eq:two-pass-softmax-pair, eq:two-pass-softmax-merge.  Chapter: two-pass-softmax
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from p2k.core.backend import interpreting

# Columns of a resident row -> (rows per program, warps): at most 32 elements of a row per thread, which the compile
# check finds to fit in registers. A wider row is read in tiles.
LAUNCH = {
    16: (64, 4), 32: (32, 4), 64: (16, 4), 128: (8, 4), 256: (4, 4), 512: (2, 4), 1024: (1, 4), 2048: (1, 4),
    4096: (1, 8), 8192: (1, 16), 16384: (1, 32), 32768: (1, 32),
}  # fmt: skip
# The backward program holds two tiles of a row, so it goes over to tiles at half the width.
WIDEST, WIDEST_BACKWARD = 32768, 16384
# Columns of a resident row that the pair program computes at once: see there.
PART = 8192
# The tile of a wider row, and its (rows per program, warps).
TILE, TILED = 4096, (1, 8)

LOG2_E = tl.constexpr(1.4426950408889634)
# ln 2 in two parts. The first has 24 bits; a fused multiply-add takes off its product with n without rounding it.
LN2_HIGH = tl.constexpr(0.693147182464599609375)
LN2_LOW = tl.constexpr(-1.904654299957767e-09)
# Arguments below this count as -inf.
LOWEST = tl.constexpr(-1e9)
# 1.5 * 2^23: added to a float32 of at most 2^22, it rounds it to an integer and leaves that in the lowest bits.
MAGIC = tl.constexpr(12582912.0)


@triton.jit
def _tile(ptr, rows, stride, at, count, columns, ACC: tl.constexpr, ALIGN: tl.constexpr, OUTSIDE: tl.constexpr):
    """A [ROWS, BLOCK] tile in the accumulation type; OUTSIDE beyond the tensor."""
    inside = (rows < count)[:, None] & tl.max_constancy(at < columns, ALIGN)[None, :]
    start = tl.multiple_of(rows * stride, ALIGN)
    return tl.load(ptr + start[:, None] + at[None, :], mask=inside, other=OUTSIDE).to(ACC)


@triton.jit
def _write(ptr, rows, at, count, columns, value, ALIGN: tl.constexpr):
    """Round a tile once, into a contiguous output."""
    inside = (rows < count)[:, None] & tl.max_constancy(at < columns, ALIGN)[None, :]
    start = tl.multiple_of(rows * columns, ALIGN)
    tl.store(ptr + start[:, None] + at[None, :], value.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def _fma(a, b, c, FUSED: tl.constexpr):
    """a b + c, rounded once. The interpreter has no such operation; float64 holds its float32 product exactly."""
    if FUSED or a.dtype == tl.float64:
        return tl.fma(a, b, c)
    return (a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)).to(tl.float32)


@triton.jit
def _polynomial(t):
    """e^t on [-ln 2 / 2, ln 2 / 2] by a minimax polynomial of degree five."""
    p = 0.00828929059207439423 * t + 0.0418978221714496613
    p = p * t + 0.166676521301269531
    p = p * t + 0.499991506338119507
    p = p * t + 0.999999701976776123
    return p * t + 1.0


@triton.jit
def _rounded(x, v):
    """x / ln 2 - v, rounded to an integer, for an integer-valued v."""
    if x.dtype == tl.float64:
        return tl.floor(x * LOG2_E + (0.5 - v))
    return (x * LOG2_E + (MAGIC - v)) - MAGIC


@triton.jit
def _pair(x, v, FUSED: tl.constexpr):
    """(p, k) with p 2^(v + k) = e^x; NaN for +inf and NaN.

    The exponent is computed relative to v: a resident row then keeps x, not p and n, while v is found.
    """
    k = _rounded(x, v)
    n = k + v
    t = _fma(n, tl.full(n.shape, -LN2_HIGH, n.dtype), x, FUSED)
    t = _fma(n, tl.full(n.shape, -LN2_LOW, n.dtype), t, FUSED)
    # Double precision exists in the interpreter only, where it serves gradient checks.
    return tl.exp(t) if t.dtype == tl.float64 else _polynomial(t), k


@triton.jit
def _power_of_two(k):
    """2^k for an integer-valued k <= 0, written into the exponent field; 0 below the normal range, and for NaN."""
    if k.dtype == tl.float64:
        return tl.exp2(tl.maximum(k, -1100.0))
    biased = tl.maximum(k, -127.0) + (MAGIC + 127.0)
    return (biased.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _inverse(m, top):
    """1 / m, and NaN for a row without any argument above LOWEST."""
    return tl.where(top > LOWEST, 1.0 / m, float("nan"))


@triton.jit
def _bounded(x):
    """Arguments from LOWEST on, NaN kept: e^LOWEST is 0 beside any other, and its exponent is finite."""
    return tl.maximum(x, LOWEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _exponentials(x, top):
    """e^(x - top), and 0 for -inf also where nothing else has been seen."""
    return tl.exp2((x - tl.where(top == float("-inf"), 0.0, top)) * LOG2_E)


@triton.jit
def _sum(tile):
    """Row sums, as a column."""
    return tl.sum(tile, 1)[:, None]


@triton.jit
def _largest(tile):
    """Row maxima, as a column."""
    return tl.max(tile, 1)[:, None]


@triton.jit
def pair_program(
    x_ptr, y_ptr, x_stride, count, columns, ACC: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, RESIDENT: tl.constexpr, PART: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """Softmax by pairs: m 2^v = sum of p 2^n, then p / m 2^(n - v)."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, PART)
    if RESIDENT:
        # In parts, because the compiler spreads the polynomials of a whole wide row over more registers than there are.
        parts, top, total = (), tl.full((ROWS, 1), LOWEST, ACC), tl.zeros((ROWS, 1), ACC)
        for part in tl.static_range(0, BLOCK, PART):
            x = _bounded(_tile(x_ptr, rows, x_stride, part + at, count, columns, ACC, ALIGN, float("-inf")))
            parts, top = parts + (x,), tl.maximum(top, _largest(x))
        terms = ()
        for part in tl.static_range(0, BLOCK // PART):
            p, k = _pair(parts[part], _rounded(top, 0.0), FUSED)
            term = p * _power_of_two(k)
            terms, total = terms + (term,), total + _sum(term)
        inverse = _inverse(total, top)
        for part in tl.static_range(0, BLOCK // PART):
            _write(y_ptr, rows, part * PART + at, count, columns, terms[part] * inverse, ALIGN)
    else:
        m, top = tl.zeros((ROWS, 1), ACC), tl.full((ROWS, 1), LOWEST, ACC)
        v = _rounded(top, 0.0)
        for start in range(0, columns, BLOCK):
            x = _bounded(_tile(x_ptr, rows, x_stride, start + at, count, columns, ACC, ALIGN, float("-inf")))
            top = tl.maximum(top, _largest(x))
            higher = _rounded(top, 0.0)
            p, k = _pair(x, higher, FUSED)
            m = m * _power_of_two(v - higher) + _sum(p * _power_of_two(k))
            v = higher
        inverse = _inverse(m, top)
        for start in range(0, columns, BLOCK):
            x = _bounded(_tile(x_ptr, rows, x_stride, start + at, count, columns, ACC, ALIGN, float("-inf")))
            p, k = _pair(x, v, FUSED)
            _write(y_ptr, rows, start + at, count, columns, p * inverse * _power_of_two(k), ALIGN)


@triton.jit
def online_program(
    x_ptr, y_ptr, x_stride, count, columns, ACC: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Softmax with a running maximum: a tile that raises it rescales the sum by an exponential."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    if RESIDENT:
        x = _tile(x_ptr, rows, x_stride, at, count, columns, ACC, ALIGN, float("-inf"))
        terms = _exponentials(x, _largest(x))
        _write(y_ptr, rows, at, count, columns, terms * (1.0 / _sum(terms)), ALIGN)
    else:
        s, top = tl.zeros((ROWS, 1), ACC), tl.full((ROWS, 1), float("-inf"), ACC)
        for start in range(0, columns, BLOCK):
            x = _tile(x_ptr, rows, x_stride, start + at, count, columns, ACC, ALIGN, float("-inf"))
            higher = tl.maximum(top, _largest(x))
            s = s * _exponentials(top, higher) + _sum(_exponentials(x, higher))
            top = higher
        inverse = 1.0 / s
        for start in range(0, columns, BLOCK):
            x = _tile(x_ptr, rows, x_stride, start + at, count, columns, ACC, ALIGN, float("-inf"))
            _write(y_ptr, rows, start + at, count, columns, _exponentials(x, top) * inverse, ALIGN)


@triton.jit
def three_pass_program(
    x_ptr, y_ptr, x_stride, count, columns, ACC: tl.constexpr, ALIGN: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """Softmax as textbooks have it: the maximum, then the sum, then the result."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    if RESIDENT:
        x = _tile(x_ptr, rows, x_stride, at, count, columns, ACC, ALIGN, float("-inf"))
        top = _largest(x)
        s = _sum(_exponentials(x, top))
        _write(y_ptr, rows, at, count, columns, _exponentials(x, top) * (1.0 / s), ALIGN)
    else:
        top, s = tl.full((ROWS, 1), float("-inf"), ACC), tl.zeros((ROWS, 1), ACC)
        for start in range(0, columns, BLOCK):
            x = _tile(x_ptr, rows, x_stride, start + at, count, columns, ACC, ALIGN, float("-inf"))
            top = tl.maximum(top, _largest(x))
        for start in range(0, columns, BLOCK):
            x = _tile(x_ptr, rows, x_stride, start + at, count, columns, ACC, ALIGN, float("-inf"))
            s += _sum(_exponentials(x, top))
        inverse = 1.0 / s
        for start in range(0, columns, BLOCK):
            x = _tile(x_ptr, rows, x_stride, start + at, count, columns, ACC, ALIGN, float("-inf"))
            _write(y_ptr, rows, start + at, count, columns, _exponentials(x, top) * inverse, ALIGN)


@triton.jit
def backward_program(
    grad_ptr, y_ptr, dx_ptr, grad_stride, y_stride, count, columns, ACC: tl.constexpr, ALIGN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, RESIDENT: tl.constexpr,
):  # fmt: skip
    """dx = y (g - <g, y>), the same for every way to compute y."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    if RESIDENT:
        g = _tile(grad_ptr, rows, grad_stride, at, count, columns, ACC, ALIGN, 0.0)
        y = _tile(y_ptr, rows, y_stride, at, count, columns, ACC, ALIGN, 0.0)
        _write(dx_ptr, rows, at, count, columns, y * (g - _sum(g * y)), ALIGN)
    else:
        along = tl.zeros((ROWS, 1), ACC)
        for start in range(0, columns, BLOCK):
            g = _tile(grad_ptr, rows, grad_stride, start + at, count, columns, ACC, ALIGN, 0.0)
            y = _tile(y_ptr, rows, y_stride, start + at, count, columns, ACC, ALIGN, 0.0)
            along += _sum(g * y)
        for start in range(0, columns, BLOCK):
            g = _tile(grad_ptr, rows, grad_stride, start + at, count, columns, ACC, ALIGN, 0.0)
            y = _tile(y_ptr, rows, y_stride, start + at, count, columns, ACC, ALIGN, 0.0)
            _write(dx_ptr, rows, start + at, count, columns, y * (g - along), ALIGN)


PROGRAMS = {"pair": pair_program, "online": online_program, "three_pass": three_pass_program}


def forward(x: Tensor, program: str = "pair") -> Tensor:
    """Launch one of `PROGRAMS` on the rows of `x`."""
    y, rows = x.new_empty(x.shape), _rows(x)
    if x.numel():
        shape = _shape(WIDEST, rows)
        grid = (triton.cdiv(rows.shape[0], shape["ROWS"]),)
        if program == "pair":
            part = min(shape["BLOCK"], PART) if shape["RESIDENT"] else shape["BLOCK"]
            shape |= {"PART": part, "FUSED": not interpreting()}
        with torch.cuda.device_of(x):
            PROGRAMS[program][grid](rows, y, rows.stride(0), *rows.shape, **shape)
    return y


def backward(grad: Tensor, y: Tensor) -> Tensor:
    """Launch the backward program on an upstream gradient and the softmax."""
    dx, g, rows = y.new_empty(y.shape), _rows(grad), _rows(y)
    if y.numel():
        shape = _shape(WIDEST_BACKWARD, rows, g)
        grid = (triton.cdiv(rows.shape[0], shape["ROWS"]),)
        with torch.cuda.device_of(y):
            backward_program[grid](g, rows, dx, g.stride(0), rows.stride(0), *rows.shape, **shape)
    return dx


def _shape(widest: int, *operands: Tensor) -> dict:
    """The compile-time sizes of a launch over `[rows, columns]` operands, the first of which sets the dtype.

    ALIGN divides every row's start and length, so that loads may be as wide as that many elements.
    """
    columns = operands[0].shape[1]
    block = next((width for width in LAUNCH if columns <= width <= widest), None)
    group, warps = TILED if block is None else LAUNCH[block]
    return {
        "ACC": tl.float64 if operands[0].dtype == torch.float64 else tl.float32,
        "ALIGN": math.gcd(16, columns, *(operand.stride(0) for operand in operands)),
        "ROWS": group,
        "BLOCK": TILE if block is None else block,
        "RESIDENT": block is not None,
        "num_warps": warps,
    }


def _rows(tensor: Tensor) -> Tensor:
    """`[rows, columns]` with unit column stride and any row stride: a view where the layout allows one."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()
