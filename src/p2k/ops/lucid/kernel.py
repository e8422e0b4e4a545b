"""Triton programs of the preconditioned values, and the functions that launch them.

T w = v with T_ij = exp(strength (u_i u_j - 1)) below a unit diagonal is solved block after block, T recomputed and
never stored. Three programs: the inverses of the diagonal blocks, all at once, which takes their row-by-row recursion
out of the sequential chain; the substitution, one program per matrix and tile of value columns, forward with T and
backward with its transpose; and the gradient of the keys, one program per block of rows. No atomics: two runs agree
bit for bit.

The inverse is found by substitution and not by the shorter product (I - N)(I + N^2)(I + N^4)...: powers of a strictly
lower triangle of ones hold binomial coefficients, and float32 has no digit left after 64 rows of similar keys.

Everything is float32: values and keys are widened before, results rounded after. Matrices are contiguous.

Source: duvvuri2026lucid, eq:lucid-blocked, eq:lucid-backward.  Chapter: lucid
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
# Rows of a block, tiles of features and of value columns, and warps of the inverse and the substitution.
SUBSTITUTE = (64, 32, 32, 4)
# Rows of a block and warps of the gradient of the keys, by the wider of the two padded widths.
GRADIENT = {64: (32, 8), 128: (16, 4)}


@triton.jit
def _tile(ptr, rows, columns, count, width):
    """A tile of a contiguous [count, width] matrix, zero outside."""
    inside = (rows < count)[:, None] & (columns < width)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * width + columns[None, :], inside, 0.0)


@triton.jit
def _write(ptr, rows, columns, count, width, value):
    inside = (rows < count)[:, None] & (columns < width)[None, :]
    tl.store(ptr + rows.to(tl.int64)[:, None] * width + columns[None, :], value, inside)


@triton.jit
def _dot(a, b, ACC: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _couplings(cosine, strength):
    """exp(strength (u_i u_j - 1)) from the products of unit keys."""
    return tl.exp2((cosine - 1.0) * strength * LOG2E)


@triton.jit
def _block(
    u_ptr, rows, columns, size, width, strength,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Couplings of two blocks of keys. Features pass in parts: whole keys of a wide head would spill registers."""
    cosine = tl.zeros([BLOCK, BLOCK], ACC)
    for start in range(0, width, BLOCK_D):
        features = start + tl.arange(0, BLOCK_D)
        left = _tile(u_ptr, rows, features, size, width)
        cosine += _dot(left, tl.trans(_tile(u_ptr, columns, features, size, width)), ACC, PRECISION)
    return _couplings(cosine, strength)


@triton.jit
def _live(live_ptr, index, count, ACC: tl.constexpr):
    """1 for a key that may couple to later ones, else 0."""
    return tl.load(live_ptr + index, index < count, 0.0).to(ACC)


@triton.jit
def inverse_program(
    u_ptr, live_ptr, inverse_ptr, size, width, strength,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Inverse of one diagonal block of T, [BLOCK, BLOCK]; rows past the end are those of the identity."""
    blocks = tl.cdiv(size, BLOCK)
    block, plane = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    place = tl.arange(0, BLOCK)
    rows = block * BLOCK + place
    u_ptr += plane * size * width
    n = _block(u_ptr, rows, rows, size, width, strength, ACC, PRECISION, BLOCK, BLOCK_D)
    if live_ptr is not None:
        n *= _live(live_ptr + plane * size, rows, size, ACC)[None, :]
    n = tl.where((place[:, None] > place[None, :]) & (rows < size)[:, None], n, 0.0)
    x = tl.where(place[:, None] == place[None, :], 1.0, 0.0).to(ACC)
    for step in range(BLOCK - 1):
        # Row `step` is final: take it off every later row.
        column = tl.sum(tl.where((place == step)[None, :], n, 0.0), 1)
        row = tl.sum(tl.where((place == step)[:, None], x, 0.0), 0)
        x -= column[:, None] * row[None, :]
    inverse_ptr += (plane * blocks + block) * BLOCK * BLOCK
    tl.store(inverse_ptr + place[:, None] * BLOCK + place[None, :], x)


@triton.jit
def substitute_program(
    u_ptr, live_ptr, inverse_ptr, b_ptr, x_ptr, size, width, value_width, strength,
    TRANSPOSED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Solve T x = b, or T' x = b, for one matrix and one tile of columns of b."""
    tiles = tl.cdiv(value_width, BLOCK_V)
    tile, plane = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    values = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    place, blocks = tl.arange(0, BLOCK), tl.cdiv(size, BLOCK)
    u_ptr += plane * size * width
    b_ptr += plane * size * value_width
    x_ptr += plane * size * value_width
    inverse_ptr += plane * blocks * BLOCK * BLOCK
    if live_ptr is not None:
        live_ptr += plane * size
    for step in range(blocks):
        block = step
        if TRANSPOSED:
            block = blocks - 1 - step
        rows = block * BLOCK + place
        total = tl.zeros([BLOCK, BLOCK_V], ACC)
        for earlier in range(step):
            other = earlier
            if TRANSPOSED:
                other = blocks - 1 - earlier
            columns = other * BLOCK + place
            n = _block(u_ptr, rows, columns, size, width, strength, ACC, PRECISION, BLOCK, BLOCK_D)
            if live_ptr is not None:
                if TRANSPOSED:
                    n *= _live(live_ptr, rows, size, ACC)[:, None]
                else:
                    n *= _live(live_ptr, columns, size, ACC)[None, :]
            total += _dot(n, _tile(x_ptr, columns, values, size, value_width), ACC, PRECISION)
        rest = _tile(b_ptr, rows, values, size, value_width) - total
        inverse = tl.load(inverse_ptr + block * BLOCK * BLOCK + place[:, None] * BLOCK + place[None, :])
        if TRANSPOSED:
            inverse = tl.trans(inverse)
        _write(x_ptr, rows, values, size, value_width, _dot(inverse, rest, ACC, PRECISION))
        # The next block reads what other threads of this program have just written.
        tl.debug_barrier()


@triton.jit
def key_gradient_program(
    u_ptr, live_ptr, w_ptr, y_ptr, du_ptr, size, width, value_width, strength,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of unit keys: as rows of T against earlier keys, then as columns against later ones."""
    blocks = tl.cdiv(size, BLOCK)
    block, plane = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    features, values, place = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK)
    rows = block * BLOCK + place
    u_ptr += plane * size * width
    w_ptr += plane * size * value_width
    y_ptr += plane * size * value_width
    if live_ptr is not None:
        live_ptr += plane * size
    u = _tile(u_ptr, rows, features, size, width)
    du = tl.zeros([BLOCK, BLOCK_D], ACC)
    y = _tile(y_ptr, rows, values, size, value_width)
    for other in range(block + 1):
        columns = other * BLOCK + place
        u_other = _tile(u_ptr, columns, features, size, width)
        a = _couplings(_dot(u, tl.trans(u_other), ACC, PRECISION), strength)
        a *= _dot(y, tl.trans(_tile(w_ptr, columns, values, size, value_width)), ACC, PRECISION)
        if live_ptr is not None:
            a *= _live(live_ptr, columns, size, ACC)[None, :]
        a = tl.where(rows[:, None] > columns[None, :], a, 0.0)
        du += _dot(a, u_other, ACC, PRECISION)
    w = _tile(w_ptr, rows, values, size, value_width)
    for other in range(block, blocks):
        columns = other * BLOCK + place
        u_other = _tile(u_ptr, columns, features, size, width)
        a = _couplings(_dot(u, tl.trans(u_other), ACC, PRECISION), strength)
        a *= _dot(w, tl.trans(_tile(y_ptr, columns, values, size, value_width)), ACC, PRECISION)
        if live_ptr is not None:
            a *= _live(live_ptr, rows, size, ACC)[:, None]
        a = tl.where(rows[:, None] < columns[None, :], a, 0.0)
        du += _dot(a, u_other, ACC, PRECISION)
    _write(du_ptr + plane * size * width, rows, features, size, width, -strength * du)


def inverse_shape(u: Tensor) -> tuple[int, int, int]:
    """Shape of the inverse diagonal blocks of all matrices, those of one matrix behind each other."""
    block = SUBSTITUTE[0]
    return u.shape[0] * u.shape[1] * triton.cdiv(u.shape[2], block), block, block


def forward(u: Tensor, v: Tensor, live: Tensor | None, strength: float) -> tuple[Tensor, Tensor]:
    """Launch the forward programs: w ``[B, G, n, V]``, and the inverse diagonal blocks for the backward pass."""
    u, v, live = u.contiguous(), v.contiguous(), _flat(live, u)
    inverse = u.new_empty(inverse_shape(u))
    if inverse.numel():
        block, features, _, warps = SUBSTITUTE
        with torch.cuda.device_of(u):
            inverse_program[(inverse.shape[0],)](
                u, live, inverse, u.shape[2], u.shape[3], strength,
                **_arithmetic(u), BLOCK=block, BLOCK_D=features, num_warps=warps, num_stages=1,
            )  # fmt: skip
    return _substitute(u, v, live, inverse, strength, transposed=False), inverse


def backward(
    grad: Tensor, u: Tensor, live: Tensor | None, w: Tensor, inverse: Tensor, strength: float, need_keys: bool
) -> tuple[Tensor | None, Tensor]:
    """Launch the backward programs: gradients of (u, v), that of u where it is needed."""
    u, grad, live = u.contiguous(), grad.contiguous(), _flat(live, u)
    y = _substitute(u, grad, live, inverse, strength, transposed=True)
    du = u.new_empty(u.shape) if need_keys else None
    if need_keys and u.numel():
        block, warps = GRADIENT[max(64, _padded(u), _padded(w))]
        grid = (u.shape[0] * u.shape[1] * triton.cdiv(u.shape[2], block),)
        with torch.cuda.device_of(u):
            key_gradient_program[grid](
                u, live, w, y, du, u.shape[2], u.shape[3], w.shape[3], strength,
                **_arithmetic(u), BLOCK=block, BLOCK_D=_padded(u), BLOCK_V=_padded(w),
                num_warps=warps, num_stages=1,
            )  # fmt: skip
    return du, y


def _substitute(
    u: Tensor, b: Tensor, live: Tensor | None, inverse: Tensor, strength: float, *, transposed: bool
) -> Tensor:
    x = b.new_empty(b.shape)
    if x.numel():
        block, features, block_v, warps = SUBSTITUTE
        grid = (u.shape[0] * u.shape[1] * triton.cdiv(b.shape[3], block_v),)
        with torch.cuda.device_of(u):
            substitute_program[grid](
                u, live, inverse, b, x, u.shape[2], u.shape[3], b.shape[3], strength,
                transposed, **_arithmetic(u), BLOCK=block, BLOCK_D=features, BLOCK_V=block_v,
                num_warps=warps, num_stages=1,
            )  # fmt: skip
    return x


def _arithmetic(u: Tensor) -> dict:
    """How products are formed. Float64 runs in the interpreter only."""
    return {"ACC": tl.float64 if u.dtype == torch.float64 else tl.float32, "PRECISION": "tf32x3"}


def _padded(x: Tensor) -> int:
    """The width of a tile that holds the last dimension: a power of two that a matrix unit takes."""
    return max(16, triton.next_power_of_2(x.shape[-1]))


def _flat(live: Tensor | None, u: Tensor) -> Tensor | None:
    """The mask as one contiguous row per matrix."""
    return None if live is None else live.expand(u.shape[:-1]).contiguous()
