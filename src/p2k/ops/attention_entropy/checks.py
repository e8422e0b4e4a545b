"""Shape checks of attention arguments, shared by the op and its second-call form."""

import torch
from torch import Tensor

from p2k.core.checks import check_positive, check_same_device


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
