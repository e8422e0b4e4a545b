"""The solve by blocks of rows in torch: memory grows with n, not with n squared, forward and backward.

Letters as in `reference`, with u = kbar / sqrt(D) of norm 1: T_ij = exp(strength (u_i u_j - 1)) for j < i, where
strength = scale D. Block b needs w of the blocks before it, so w_b = T_bb^-1 (v_b - sum_c<b T_bc w_c); the backward
pass is the same with T transposed, from the last block to the first. Chapter: lucid
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64


def unit_keys(k: Tensor) -> Tensor:
    """Keys scaled to norm 1 in at least float32; a zero key stays zero and passes no gradient."""
    k = k.to(torch.promote_types(k.dtype, torch.float32))
    peak = k.detach().abs().amax(-1, keepdim=True)
    # The largest entry divides first: squares of huge keys would overflow, those of tiny ones vanish.
    k = k / peak.masked_fill(peak == 0, 1.0)
    square = k.square().sum(-1, keepdim=True)
    return k * torch.where(square > 0, square.masked_fill(square == 0, 1.0).rsqrt(), 0.0)


def couplings(rows: Tensor, columns: Tensor, strength: float, live: Tensor | None) -> Tensor:
    """exp(strength (u_i u_j - 1)) of a block of rows with columns, 0 in the columns that are not live."""
    found = torch.exp(strength * (rows @ columns.mT - 1))
    return found if live is None else found * live.unsqueeze(-2)


def substitute(u: Tensor, b: Tensor, live: Tensor | None, strength: float, *, transposed: bool = False) -> Tensor:
    """Solve T x = b, or T' x = b, block after block.

    Args:
        u: unit keys ``[..., n, D]``.
        b: right-hand sides ``[..., n, V]`` in the dtype of `u`.
        live: 1 where a key may couple to later ones, else 0, ``[..., n]`` in the dtype of `u`; None: all.
        strength: factor in the exponent, positive.
        transposed: solve with the transpose.

    Source: duvvuri2026lucid, eq:lucid-blocked.  Chapter: lucid
    """
    starts = range(0, b.shape[-2], BLOCK)
    done = b[..., :0, :]
    for start in reversed(starts) if transposed else starts:
        own = slice(start, start + BLOCK)
        here = None if live is None else live[..., own]
        u_own, rest = u[..., own, :], b[..., own, :]
        if done.shape[-2]:
            if transposed:
                rest = rest - couplings(u[..., start + BLOCK :, :], u_own, strength, here).mT @ done
            else:
                before = None if live is None else live[..., :start]
                rest = rest - couplings(u_own, u[..., :start, :], strength, before) @ done
        t = couplings(u_own, u_own, strength, here).tril(-1)
        t = t.mT if transposed else t
        solved = torch.linalg.solve_triangular(t, rest, upper=transposed, unitriangular=True)
        done = torch.cat((solved, done) if transposed else (done, solved), -2)
    return done


def key_gradient(u: Tensor, w: Tensor, y: Tensor, live: Tensor | None, strength: float) -> Tensor:
    """Gradient in the unit keys of a loss with gradient T' y in w: dT_ij = -y_i w_j, then through the exponential.

    Source: duvvuri2026lucid, eq:lucid-backward.  Chapter: lucid
    """
    total, n = torch.zeros_like(u), u.shape[-2]
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        rows, columns = u[..., start:stop, :], u[..., :stop, :]
        t = couplings(rows, columns, strength, None if live is None else live[..., :stop]).tril(start - 1)
        a = -strength * t * (y[..., start:stop, :] @ w[..., :stop, :].mT)
        total = total + F.pad(a @ columns, (0, 0, start, n - stop)) + F.pad(a.mT @ rows, (0, 0, 0, n - stop))
    return total


class _Blocked(torch.autograd.Function):
    """The blocked solve, its backward pass made of differentiable operations."""

    generate_vmap_rule = True

    @staticmethod
    def forward(u, v, live, strength):
        return substitute(u, v, live, strength)

    @staticmethod
    def setup_context(ctx, inputs, output):
        u, _, live, ctx.strength = inputs
        ctx.save_for_backward(u, live, output)

    @staticmethod
    def backward(ctx, grad):
        u, live, w = ctx.saved_tensors
        y = substitute(u, grad, live, ctx.strength, transposed=True)
        du = key_gradient(u, w, y, live, ctx.strength) if ctx.needs_input_grad[0] else None
        return du, y if ctx.needs_input_grad[1] else None, None, None


def solve(u: Tensor, v: Tensor, live: Tensor | None, strength: float) -> Tensor:
    """w of T w = v; arguments as in `substitute`. Differentiable twice; the second derivative holds n x n matrices."""
    return _Blocked.apply(u, v, live, strength)
