"""Softplus attention, its re-weighting and the softmax control in plain torch: the specification.

Letters of this file, which are the paper's: N the number of keys a query sees (i for the i-th causal query), d the
head width, a = softplus(scale log N cos(q, k)) M the unnormalised weights, A = a / Z with Z = sum a, b = relu(N A - O)
the excess over the uniform weight, Y = b^p / sum b^p. O is 1, and 0 in rows that see at most three keys.
Shape suffixes: B batch, H query heads, G key heads, T queries, S keys, D head width, V value width.

Half-precision inputs are computed in float32 and rounded once; float64 stays float64. Everything holds the whole
matrix of weights and says so.

Source: gao2025softplus, eq:softplus-attention-weights, eq:softplus-attention-reweighting.  Chapter: softplus-attention
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from p2k.core.attention import visible_pairs

# A row whose largest weight exceeds the uniform one by less than this many unit round-offs is uniform.
FLAT = 64
# Rows that see at most so many keys keep what lies below the average: with two keys nothing else would be left.
SHORT = 3
# torch's softplus is x beyond its threshold, 20 by default: an error of e^-20. Here e^-40, below float64's round-off.
LINEAR = 40.0


def unit(x: Tensor) -> Tensor:
    """Vectors along the last dimension at length 1, in at least float32; a zero vector stays, with gradient 0."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    # Any constant may be divided out first: squares of the largest component then neither overflow nor vanish.
    peak = x.detach().abs().amax(-1, keepdim=True)
    x = x / torch.where(peak == 0, 1.0, peak)
    square = x.square().sum(-1, keepdim=True)
    empty = square == 0
    return x * torch.where(empty, 1.0, square).rsqrt().masked_fill(empty, 0.0)


def visible_counts(visible: Tensor | None, keys: int, like: Tensor) -> Tensor:
    """N, how many keys each query sees, in the dtype of `like`, broadcasting to [B, H, T, 1]."""
    if visible is None:
        return like.new_full((1, 1, 1, 1), keys)
    repeated = keys if visible.shape[-1] == 1 else 1
    return visible.sum(-1, keepdim=True).to(like.dtype) * repeated


def first_weights(
    q_BHTD: Tensor, k_BGSD: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """a [B, H, T, S] and N. An additive mask multiplies a by its exponential, so that -inf hides a key."""
    q, k = unit(q_BHTD), unit(k_BGSD).repeat_interleave(q_BHTD.shape[1] // max(k_BGSD.shape[1], 1), dim=1)
    cosine = q @ k.mT
    visible = visible_pairs(mask, is_causal, cosine.shape, cosine.device)
    count = visible_counts(visible, k.shape[2], cosine)
    a = F.softplus(scale * count.clamp_min(1).log() * cosine, threshold=LINEAR)
    if visible is None:
        return a, count
    if mask is not None and mask.dtype != torch.bool:
        # Only ratios within a row count: the largest factor of each row is 1, whatever the mask's offset.
        mask = mask.to(a.dtype).expand(*mask.shape[:-1], k.shape[2])
        peak = mask.amax(-1, keepdim=True) if mask.shape[-1] else mask.sum(-1, keepdim=True)
        a = a * torch.exp(mask - peak.masked_fill(peak == -torch.inf, 0.0))
    return a.masked_fill(~visible, 0.0), count


def normalised(a: Tensor) -> Tensor:
    """A: rows of sum 1, or 0 where a row has no weight at all."""
    total = a.sum(-1, keepdim=True)
    return a / total.masked_fill(total == 0, 1.0)


def reweighted(A: Tensor, count: Tensor, power: float) -> Tensor:
    """Y from A and N, on the scale of each row's largest excess; a uniform row stays A."""
    excess = torch.relu(count * A - (count > SHORT).to(A.dtype))
    top = excess.detach().amax(-1, keepdim=True) if A.shape[-1] else excess.sum(-1, keepdim=True)
    flat = top <= FLAT * torch.finfo(A.dtype).eps
    ratio = (excess / top.masked_fill(flat, 1.0)).pow(power)
    total = ratio.sum(-1, keepdim=True)
    return torch.where(flat, A, ratio / total.masked_fill(flat, 1.0))


def weights(
    q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool, scale: float, power: float | None = None
) -> Tensor:
    """The attention matrix: A without a power, Y with one."""
    a, count = first_weights(q, k, mask, is_causal, scale)
    return normalised(a) if power is None else reweighted(normalised(a), count, power)


def _apply(matrix: Tensor, q: Tensor, v: Tensor) -> Tensor:
    v = v.repeat_interleave(q.shape[1] // max(v.shape[1], 1), dim=1).to(matrix.dtype)
    return (matrix @ v).to(q.dtype)


def softplus_attention(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSV: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """LSSA: A v. A row that sees nothing gives 0 and gradient 0."""
    return _apply(weights(q_BHTD, k_BGSD, mask, is_causal, scale), q_BHTD, v_BGSV)


def reweighted_softplus_attention(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSV: Tensor, mask: Tensor | None, is_causal: bool, scale: float, power: float
) -> Tensor:
    """LSSAR: Y v. A row that sees nothing gives 0 and gradient 0."""
    return _apply(weights(q_BHTD, k_BGSD, mask, is_causal, scale, power), q_BHTD, v_BGSV)


def log_length_attention(
    q_BHTD: Tensor, k_BGSD: Tensor, v_BGSV: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> Tensor:
    """The control: softmax of LSSA's scores, by torch's own attention on rescaled queries and keys."""
    shape = torch.Size((*q_BHTD.shape[:3], k_BGSD.shape[2]))
    q = unit(q_BHTD)
    count = visible_counts(visible_pairs(mask, is_causal, shape, q.device), shape[3], q)
    q, k = (scale * count.clamp_min(1).log() * q).to(q_BHTD.dtype), unit(k_BGSD).to(q_BHTD.dtype)
    options = {"is_causal": is_causal, "scale": 1.0, "enable_gqa": q.shape[1] != k.shape[1]}
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v_BGSV, attn_mask=mask, **options)


def naive_reweighting(A: Tensor, count: Tensor, power: float, *, epsilon: float = 1e-8) -> Tensor:
    """Y as it is written, with a constant in the denominator. It overflows in half precision and loses mass in all."""
    b = torch.relu(count * A - (count > SHORT).to(A.dtype)).pow(power)
    return b / (b.sum(-1, keepdim=True) + epsilon)


def attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *, scale: float, power: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Closed-form gradients (dq, dk, dv) of unmasked attention with as many key heads as query heads.

    Source: gao2025softplus, eq:softplus-attention-backward, eq:softplus-attention-backward-reweighted.
    Chapter: softplus-attention
    """
    a, count = first_weights(q, k, None, False, scale)
    A, Z = normalised(a), a.sum(-1, keepdim=True)
    Y, d_Y = (A if power is None else reweighted(A, count, power)), grad_out @ v.mT
    slope = d_Y - (grad_out * (Y @ v)).sum(-1, keepdim=True)
    if power is not None:
        excess = torch.relu(count * A - (count > SHORT).to(A.dtype))
        top = excess.amax(-1, keepdim=True)
        flat = top <= FLAT * torch.finfo(A.dtype).eps
        r = excess / top.masked_fill(flat, 1.0)
        mass = (r**power).sum(-1, keepdim=True).masked_fill(flat, 1.0)
        sharp = count * power * r ** (power - 1) / (top.masked_fill(flat, 1.0) * mass) * slope * (excess > 0)
        slope = torch.where(flat, slope, sharp)
        slope = slope - (slope * A).sum(-1, keepdim=True)
    d_s = slope / Z * torch.sigmoid(scale * count.log() * (unit(q) @ unit(k).mT))
    d_unit = scale * count.log() * d_s @ unit(k), (scale * count.log() * d_s).mT @ unit(q)
    return *(along_unit(x, g) for x, g in zip((q, k), d_unit, strict=True)), Y.mT @ grad_out


def along_unit(x: Tensor, gradient: Tensor) -> Tensor:
    """The gradient in x from that in its unit vector: the part across x, over its length."""
    direction = unit(x)
    return (gradient - direction * (direction * gradient).sum(-1, keepdim=True)) / x.norm(dim=-1, keepdim=True)
