"""Argument checks and masks of attention functions that follow torch's scaled_dot_product_attention."""

import torch
from torch import Tensor

from p2k.core.checks import check_floating, check_positive, check_same_device


def check_attention(op: str, q: Tensor, k: Tensor, v: Tensor, *, scale: float | None) -> float:
    """Raise ValueError unless the three tensors can attend, and return the scale of the scores."""
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        if tensor.ndim != 4:
            raise ValueError(f"{op}: {name} must be [batch, heads, length, width], got {tuple(tensor.shape)}")
    check_same_device(op, q=q, k=k, v=v)
    batch, heads, _, width = q.shape
    if k.shape[0] != batch or k.shape[3] != width or width == 0:
        wanted = f"({batch}, heads, keys, {max(width, 1)})"
        raise ValueError(f"{op}: k must have shape {wanted} for q {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3] or v.shape[3] == 0:
        raise ValueError(f"{op}: v must have shape {(*k.shape[:3], 'value width')}, got {tuple(v.shape)}")
    if scale is None:
        return width**-0.5
    check_positive(op, scale=scale)
    return scale


def check_mask(op: str, mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Return `mask` with four dimensions, or raise unless it is bool or floating and broadcasts to the scores."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"{op}: attn_mask must be bool or floating point, got {mask.dtype}")
    if mask.requires_grad:
        raise ValueError(f"{op}: attn_mask must not require a gradient: its gradient would be the attention matrix")
    check_same_device(op, q=q, attn_mask=mask)
    scores = (*q.shape[:3], k.shape[2])
    shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if mask.ndim > 4 or any(size not in (1, wanted) for size, wanted in zip(shape, scores, strict=True)):
        raise ValueError(f"{op}: attn_mask must broadcast to {scores}, got {tuple(mask.shape)}")
    return mask.reshape(shape)


# The arguments are torch's own.
def check_sdpa(  # noqa: PLR0913
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> tuple[float, Tensor | None]:
    """Raise unless the arguments of `scaled_dot_product_attention` fit; return the scale and the mask ``[., ., ., .]``.

    The layout is ``[B, H, T, D]``; `scale` None means ``D ** -0.5``. None of our attentions drops weights, so
    `dropout_p` must be 0.
    """
    check_floating(op, q=q, k=k, v=v)
    scale = check_attention(op, q, k, v, scale=scale)
    if dropout_p != 0:
        raise ValueError(f"{op}: dropout_p must be 0, dropping weights is not supported, got {dropout_p}")
    if q.shape[1] != k.shape[1] and not (enable_gqa and k.shape[1] and q.shape[1] % k.shape[1] == 0):
        hint = "a divisor of its heads" if enable_gqa else "as many heads, or pass enable_gqa=True"
        raise ValueError(f"{op}: for q with {q.shape[1]} heads k must have {hint}, got {k.shape[1]}")
    if attn_mask is None:
        return scale, None
    if is_causal:
        raise ValueError(f"{op}: give attn_mask or is_causal, not both")
    return scale, check_mask(op, attn_mask, q, k)


def visible_pairs(mask: Tensor | None, is_causal: bool, shape: torch.Size, device: torch.device) -> Tensor | None:
    """Boolean that broadcasts to scores of `shape` ``[B, H, T, S]``, True where a query sees a key; None: everywhere.

    An additive mask hides what it sets to -inf. As in torch, causal means that query i sees the keys 0..i.
    """
    if is_causal:
        return torch.ones(shape[-2:], dtype=torch.bool, device=device).tril()
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask != -torch.inf
