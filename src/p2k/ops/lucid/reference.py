"""LUCID attention in plain torch, in the paper's order: the specification. It holds two n x n matrices and says so.

Letters of this file: kbar a key scaled to norm sqrt(D), T the unit lower triangular preconditioner, w = T^-1 v.
Shape suffixes: B batch, H query heads, G key heads, T queries, S keys, D head width, V value width.

Half-precision inputs are computed in float32 and rounded once; float64 stays float64. Chapter: lucid
"""

import torch
from torch import Tensor

from p2k.core.attention import visible_pairs


def preconditioner(k_BGSD: Tensor, live_BGS: Tensor | None, scale: float) -> Tensor:
    """T = I + strictly lower part of exp(scale (kbar kbar' - D)); a key that is not live has a unit vector for column.

    Source: duvvuri2026lucid, eq:lucid-preconditioner.  Chapter: lucid
    """
    width = k_BGSD.shape[-1]
    k = k_BGSD.to(torch.promote_types(k_BGSD.dtype, torch.float32))
    # Dividing by the largest entry first keeps the square of a huge key finite and changes no direction.
    k = k / k.detach().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(k.dtype).tiny)
    square = k.square().sum(-1, keepdim=True)
    kbar = k * torch.where(square > 0, (width / square.masked_fill(square == 0, 1.0)).sqrt(), 0.0)
    t = torch.exp(scale * (kbar @ kbar.mT - width)).tril(-1)
    if live_BGS is not None:
        t = t * live_BGS[..., None, :]
    return t + torch.eye(t.shape[-1], dtype=t.dtype, device=t.device)


def precondition_values(k: Tensor, v: Tensor, live: Tensor | None, scale: float) -> Tensor:
    """The solution w of T w = v by one dense triangular solve.

    Source: duvvuri2026lucid, eq:lucid-solve.  Chapter: lucid
    """
    t = preconditioner(k, live, scale)
    return torch.linalg.solve_triangular(t, v.to(t.dtype), upper=False, unitriangular=True).to(v.dtype)


def interfering_keys(visible: Tensor | None, heads: int, keys_shape: torch.Size, queries: int) -> Tensor | None:
    """Bool [B or 1, G or 1, S]: keys that some query at another position sees. Query i stands at key S - T + i."""
    if visible is None:
        return None
    _, groups, keys, _ = keys_shape
    own = torch.ones(queries, keys, dtype=torch.bool, device=visible.device)
    own = own.tril(keys - queries).triu(keys - queries)
    seen = (visible.expand(*visible.shape[:2], queries, keys) & ~own).any(-2)
    return seen if seen.shape[1] == 1 else seen.unflatten(1, (groups, heads // groups)).any(2)


def lucid_attention(q_BHTD: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """softmax(scale q k' + mask) T^-1 v, zero where a query sees nothing.

    Source: duvvuri2026lucid, eq:lucid-output.  Chapter: lucid
    """
    heads, group = q_BHTD.shape[1], q_BHTD.shape[1] // max(k.shape[1], 1)
    seen = None if is_causal else visible_pairs(mask, False, q_BHTD.shape[:3] + k.shape[2:3], q_BHTD.device)
    live = interfering_keys(seen, heads, k.shape, q_BHTD.shape[2])
    wide = torch.promote_types(q_BHTD.dtype, torch.float32)
    w = precondition_values(k, v, live, scale).to(wide).repeat_interleave(group, 1)
    s = scale * (q_BHTD.to(wide) @ k.to(wide).repeat_interleave(group, 1).mT)
    visible = visible_pairs(mask, is_causal, s.shape, s.device)
    if visible is None:
        return (s.softmax(-1) @ w).to(q_BHTD.dtype)
    if mask is not None and mask.dtype != torch.bool:
        s = s + torch.where(visible, mask, 0).to(wide)
    blind = ~visible.any(-1, keepdim=True)
    a = s.masked_fill(~visible & ~blind, -torch.inf).softmax(-1).masked_fill(blind, 0.0)
    return (a @ w).to(q_BHTD.dtype)
