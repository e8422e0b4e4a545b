"""Row entropies without a new kernel: a second call of torch's own attention, with the keys as values.

With scores s = scale <q, k> and no additive mask, H = lse - sum_j a_j s_j = lse - scale <q, sum_j a_j k_j>: the sum is
what attention returns when the keys stand in for the values.

Source: wang2025inflection, eq:inflection-second-call.  Chapter: inflection
"""

import torch
from jaxtyping import Float
from torch import Tensor

from p2k.core.attention import check_attention
from p2k.core.checks import check_floating


def entropy_by_second_call(
    q: Float[Tensor, "batch heads queries width"],
    k: Float[Tensor, "batch heads keys width"],
    *,
    is_causal: bool = False,
    scale: float | None = None,
) -> Float[Tensor, "batch heads queries"]:
    """Entropy of each attention row in nats, from torch's fused attention called with the keys as values.

    The difference of two large numbers loses digits as scores grow; `attention_entropy` does not. No gradient flows,
    because torch's fused attention has none for its log-sum-exp: this is for measuring.

    Args:
        q: queries ``[B, H, T, D]``.
        k: keys ``[B, H, S, D]``.
        is_causal: query i sees the keys 0..i.
        scale: factor on the scores; None means ``D ** -0.5``.

    Raises:
        ValueError: shapes or devices disagree.
        TypeError: a tensor is not floating point or the dtypes disagree.

    Source: wang2025inflection, eq:inflection-second-call.
    Chapter: inflection
    """
    op = "entropy_by_second_call"
    check_floating(op, q=q, k=k)
    scale = check_attention(op, q, k, k, scale=scale)
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"{op}: k must have {q.shape[1]} heads like q, got {k.shape[1]}")
    with torch.no_grad():
        mean_key, lse = _attention_with_lse(q, k, is_causal, scale)
        wide = torch.promote_types(q.dtype, torch.float32)
        return lse.to(wide) - scale * (q.to(wide) * mean_key.to(wide)).sum(-1)


def _attention_with_lse(q: Tensor, k: Tensor, is_causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention with V = K and the log-sum-exp of each row, from the fused call torch has on this device."""
    if q.is_cuda:
        call = torch.ops.aten._scaled_dot_product_efficient_attention
        mean_key, lse, *_ = call(q, k, k, None, True, 0.0, is_causal, scale=scale)
        # That kernel pads its rows to a multiple of 32.
        return mean_key, lse[..., : q.shape[2]]
    call = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return call(q, k, k, 0.0, is_causal, scale=scale)
