"""Attention with softplus weights on length-scaled cosines, its sharpened form, and the softmax on the same scores."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from p2k.core.attention import check_sdpa
from p2k.core.backend import Backend, choose_backend
from p2k.ops.softplus_attention import reference, registration

__all__ = ["log_length_attention", "reweighted_softplus_attention", "softplus_attention"]
# Element bytes -> the widest head. Wider ones need more registers than an SM has: they go to the reference.
WIDEST_HEAD = {2: 128, 4: 64, 8: 64}

Queries = Float[Tensor, "batch heads queries width"]
Keys = Float[Tensor, "batch key_heads keys width"]
Values = Float[Tensor, "batch key_heads keys value_width"]
Mask = Bool[Tensor, "..."] | Float[Tensor, "..."] | None
Output = Float[Tensor, "batch heads queries value_width"]


# The signatures are torch's own, and longer than ours may be.
def softplus_attention(  # noqa: PLR0913
    q: Queries,
    k: Keys,
    v: Values,
    attn_mask: Mask = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: Backend = "auto",
) -> Output:
    """Layout ``[B, H, T, D]``: LSSA, values weighed by ``softplus(scale log N cos(q, k))`` over its sum.

    Signature and layout are those of `torch.nn.functional.scaled_dot_product_attention`. N is the number of keys that
    the query sees: position + 1 under a causal mask, cached keys and padding counted rightly under any mask.

    Args:
        q: queries ``[B, H, T, D]``, float16, bfloat16, float32 or float64; only their directions matter.
        k: keys ``[B, G, S, D]``, with ``G = H``, or any divisor of H under `enable_gqa`; only directions matter.
        v: values ``[B, G, S, V]``.
        attn_mask: broadcasts to ``[B, H, T, S]``; bool, True where a query may look, or floating, whose exponential
            multiplies the weight, so that -inf hides a key. A row that sees nothing returns 0 with gradient 0.
        dropout_p: must be 0.
        is_causal: query i sees the keys 0..i; not together with `attn_mask`.
        scale: positive factor on ``log N cos(q, k)``; None means ``log D``.
        enable_gqa: let groups of H / G query heads share a key head.
        backend: `auto`, `torch` or `triton`. The kernel takes heads up to 128 wide (64 in float32), bool and
            causal masks, and vectors whose products are float32 numbers; floating masks go to the reference.

    Raises:
        ValueError: shapes or devices disagree, or an option is out of its range.
        TypeError: a tensor is not floating point, the dtypes disagree, or the mask is neither bool nor floating.
        BackendUnavailable: ``backend="triton"`` where Triton cannot run.

    Source: gao2025softplus, eq:softplus-attention-weights.
    Chapter: softplus-attention
    """
    op, options = "softplus_attention", (dropout_p, is_causal, scale, enable_gqa)
    scale, attn_mask = _check(op, q, k, v, attn_mask, options)
    if _backend(op, q, v, attn_mask, backend) == "torch":
        return reference.softplus_attention(q, k, v, attn_mask, is_causal, scale)
    return registration.attention(q, k, v, attn_mask, is_causal, scale, None)


def reweighted_softplus_attention(  # noqa: PLR0913
    q: Queries,
    k: Keys,
    v: Values,
    attn_mask: Mask = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    power: float = 15.0,
    backend: Backend = "auto",
) -> Output:
    """Layout ``[B, H, T, D]``: LSSAR, the weights A of `softplus_attention` sharpened to ``relu(N A - 1) ** power``.

    The result is normalised again; weights below the average are exactly 0. Rows that see at most three keys raise
    ``N A`` itself to the power, and a uniform row stays uniform.

    Args:
        q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa, backend: as in `softplus_attention`.
        power: of the excess over the average, ``>= 1``.

    Raises:
        ValueError: shapes or devices disagree, or an option is out of its range.
        TypeError: a tensor is not floating point, the dtypes disagree, or the mask is neither bool nor floating.
        BackendUnavailable: ``backend="triton"`` where Triton cannot run.

    Source: gao2025softplus, eq:softplus-attention-reweighting.
    Chapter: softplus-attention
    """
    op, options = "reweighted_softplus_attention", (dropout_p, is_causal, scale, enable_gqa)
    scale, attn_mask = _check(op, q, k, v, attn_mask, options)
    if not 1 <= power < math.inf:
        raise ValueError(f"{op}: power must be at least 1 and finite, got {power}")
    if _backend(op, q, v, attn_mask, backend) == "torch":
        return reference.reweighted_softplus_attention(q, k, v, attn_mask, is_causal, scale, float(power))
    return registration.attention(q, k, v, attn_mask, is_causal, scale, float(power))


def log_length_attention(
    q: Queries,
    k: Keys,
    v: Values,
    attn_mask: Mask = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Output:
    """Layout ``[B, H, T, D]``: softmax of ``scale log N cos(q, k)``, the control for `softplus_attention`.

    It differs from LSSA in the function of the scores alone, and runs as torch's own attention on rescaled queries and
    keys. A floating mask is added to the scores.

    Args:
        q, k, v, attn_mask, dropout_p, is_causal, scale, enable_gqa: as in `softplus_attention`.

    Raises:
        ValueError: shapes or devices disagree, or an option is out of its range.
        TypeError: a tensor is not floating point, the dtypes disagree, or the mask is neither bool nor floating.

    Source: nakanishi2025ssmax, eq:softplus-attention-control.
    Chapter: softplus-attention
    """
    scale, attn_mask = _check("log_length_attention", q, k, v, attn_mask, (dropout_p, is_causal, scale, enable_gqa))
    return reference.log_length_attention(q, k, v, attn_mask, is_causal, scale)


def _check(
    op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: tuple
) -> tuple[float, Tensor | None]:
    """The scale, ``log D`` where none is given, and the mask with four dimensions."""
    names = ("dropout_p", "is_causal", "scale", "enable_gqa")
    _, mask = check_sdpa(op, q, k, v, attn_mask=mask, **dict(zip(names, options, strict=True)))
    scale = options[2]
    return (math.log(q.shape[3]) if scale is None else float(scale)), mask


def _backend(op: str, q: Tensor, v: Tensor, mask: Tensor | None, backend: Backend) -> str:
    """`torch` or `triton`; ValueError where the kernel is demanded for what it does not take."""
    width, widest = max(q.shape[-1], v.shape[-1]), WIDEST_HEAD[q.element_size()]
    floating = mask is not None and mask.dtype != torch.bool
    if backend == "triton" and width > widest:
        raise ValueError(f"{op}: the kernel takes heads up to {widest} wide in {q.dtype}, got {width}")
    if backend == "triton" and floating:
        raise ValueError(f"{op}: the kernel takes bool masks, got {mask.dtype}; use backend='auto' or 'torch'")
    return choose_backend("torch" if backend == "auto" and (width > widest or floating) else backend, q, op=op)
