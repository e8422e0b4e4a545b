"""Attention with row entropies in plain torch: the specification. It holds the whole matrix and says so.

Letters of this file: s scores, a = softmax(s) one attention row, lse = log sum exp(s), H = -sum a log a in nats.
Shape suffixes: B batch, H query heads, G key heads, T queries, S keys, D head width, V value width.

Half-precision inputs are computed in float32 and rounded once; float64 stays float64.

Source: wang2025inflection, eq:inflection-entropy.  Chapter: inflection
"""

import torch
from torch import Tensor

from p2k.core.attention import visible_pairs


def scores(
    q_BHTD: Tensor, k_BGSD: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor | None]:
    """Scaled scores [B, H, T, S], -inf where masked, and the boolean of visible pairs (None when all are)."""
    wide = torch.promote_types(q_BHTD.dtype, torch.float32)
    k = k_BGSD.repeat_interleave(q_BHTD.shape[1] // k_BGSD.shape[1], dim=1)
    s = scale * (q_BHTD.to(wide) @ k.to(wide).mT)
    visible = visible_pairs(mask, is_causal, s.shape, s.device)
    if visible is None:
        return s, None
    if mask is not None and mask.dtype != torch.bool:
        s = s + torch.where(visible, mask, 0).to(wide)
    return s.masked_fill(~visible, -torch.inf), visible


def attention_entropy(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSV: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention and H [B, H, T]. A row that sees nothing gives 0 for both, and gradient 0."""
    s, visible = scores(q_BHTD, k_BGSD, mask, is_causal, scale)
    v = v_BGSV.repeat_interleave(q_BHTD.shape[1] // v_BGSV.shape[1], dim=1).to(s.dtype)
    if visible is None:
        log_a = s.log_softmax(-1)
    else:
        # Rows without a visible key get finite scores first: their gradient must be 0, not NaN.
        blind = ~visible.any(-1, keepdim=True)
        log_a = s.masked_fill(blind, 0.0).log_softmax(-1)
        log_a = log_a.masked_fill(~visible, -torch.inf)
    a = log_a.exp()
    # 0 log 0 = 0, for a hidden key at -inf and for one at the lowest finite score, which libraries use as a mask.
    entropy = -(a * log_a.masked_fill(a == 0, 0.0)).sum(-1)
    return (a @ v).to(q_BHTD.dtype), entropy


def attention_entropy_backward(
    grad_out: Tensor, grad_entropy: Tensor, q: Tensor, k: Tensor, v: Tensor, *, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Closed-form gradients (dq, dk, dv) of unmasked attention with as many key heads as query heads.

    dS = A * (dP - rowsum(dO * O)) - dH * A * (log A + H), the first term being plain attention's.

    Source: wang2025inflection, eq:inflection-backward.  Chapter: inflection
    """
    log_a = (scale * q @ k.mT).log_softmax(-1)
    a = log_a.exp()
    entropy = -(a * log_a).sum(-1, keepdim=True)
    d_a = grad_out @ v.mT
    row = (grad_out * (a @ v)).sum(-1, keepdim=True)
    d_s = a * (d_a - row) - grad_entropy.unsqueeze(-1) * a * (log_a + entropy)
    return scale * d_s @ k, scale * d_s.mT @ q, a.mT @ grad_out


def attention_row_entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats of each row of a matrix of probabilities, ``0 log 0 = 0``."""
    return torch.special.entr(probabilities).sum(-1)
