"""LUCID attention: a causal triangular solve decorrelates the values before plain softmax attention reads them."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from p2k.core.attention import check_sdpa, visible_pairs
from p2k.core.backend import Backend, choose_backend
from p2k.core.checks import check_floating, check_positive, check_same_device, check_shape
from p2k.ops.lucid import blocked, registration

__all__ = ["lucid_attention", "precondition_values"]
# Wider heads spill registers: they go to torch.
WIDEST_HEAD = 128


# The signature is torch's own, and longer than ours may be.
def lucid_attention(  # noqa: PLR0913
    q: Float[Tensor, "batch heads queries width"],
    k: Float[Tensor, "batch key_heads keys width"],
    v: Float[Tensor, "batch key_heads keys value_width"],
    attn_mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "batch heads queries value_width"]:
    """Layout ``[B, H, T, D]``: softmax attention whose values were preconditioned by `precondition_values`.

    Signature and layout are those of `torch.nn.functional.scaled_dot_product_attention`. The preconditioner is
    triangular in the order of the keys whatever the mask, so that a cached prefix keeps its values: for attention
    that looks both ways it still only takes the past off. Of the mask it knows one thing. A key that no query at
    another position sees, such as padding, is left out; query i stands at key ``S - T + i``. What else varies from
    query to query (a window, a bias) enters the softmax alone.

    Args:
        q: queries ``[B, H, T, D]``, float16, bfloat16, float32 or float64.
        k: keys ``[B, G, S, D]``, with ``G = H``, or any divisor of H under `enable_gqa`; positions applied.
        v: values ``[B, G, S, V]``.
        attn_mask: broadcasts to ``[B, H, T, S]``; bool, True where a query may look, or floating, added to the
            scores. A row that sees nothing returns 0 and gradient 0.
        dropout_p: must be 0.
        is_causal: query i sees the keys 0..i; not together with `attn_mask`.
        scale: positive factor on ``<q, k>``; None means ``D ** -0.5``. The preconditioner takes the same.
        enable_gqa: let groups of H / G query heads share a key head, and its solve.
        backend: of the solve: `auto`, `torch` or `triton`. The softmax is torch's own.

    Raises:
        ValueError: shapes or devices disagree, or an option is out of its range.
        TypeError: a tensor is not floating point, the dtypes disagree, or the mask is neither bool nor floating.
        BackendUnavailable: ``backend="triton"`` where Triton cannot run.

    Source: duvvuri2026lucid, eq:lucid-output.
    Chapter: lucid
    """
    op = "lucid_attention"
    scale, mask = check_sdpa(
        op, q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )
    if k.shape[2] == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3]) + 0 * q.sum()
    options = {"scale": scale, "enable_gqa": enable_gqa}
    if mask is None:
        values = _precondition(op, k, v, None, scale, backend)
        return F.scaled_dot_product_attention(q, k, values, is_causal=is_causal, **options)
    visible = visible_pairs(mask, False, q.shape[:3] + k.shape[2:3], q.device)
    values = _precondition(op, k, v, _interfering(visible, q, k), scale, backend)
    # A row that sees nothing looks everywhere for a moment, so that no softmax is 0 / 0, and is then set to 0.
    blind = ~visible.any(-1, keepdim=True)
    mask = mask | blind if mask.dtype == torch.bool else mask.masked_fill(blind, 0.0).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, values, attn_mask=mask, **options).masked_fill(blind, 0.0)


def precondition_values(
    k: Float[Tensor, "batch heads keys width"],
    v: Float[Tensor, "batch heads keys value_width"],
    key_mask: Bool[Tensor, "batch heads keys"] | None = None,
    *,
    scale: float | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "batch heads keys value_width"]:
    """What each value adds to the earlier ones: ``w_t = v_t - sum_{j<t} exp(scale (kbar_t kbar_j - D)) w_j``.

    kbar are the keys scaled to norm ``sqrt(D)``. The system is solved by blocks, in float32 at least, in memory
    ``n (D + V)``; no ``n x n`` matrix is held, forward or backward.

    Args:
        k: keys ``[B, H, n, D]``; a zero key is orthogonal to all others.
        v: values ``[B, H, n, V]``.
        key_mask: False for a key that later ones disregard; broadcasts to ``[B, H, n]``.
        scale: positive factor in the exponent; None means ``D ** -0.5``.
        backend: `auto`, `torch` or `triton`. The kernel takes heads up to 128 wide.

    Returns:
        w ``[B, H, n, V]`` in the dtype of `v`.

    Raises:
        ValueError: shapes or devices disagree, or `scale` is not positive.
        TypeError: `k` and `v` are not of one floating dtype, or `key_mask` is not bool.
        BackendUnavailable: ``backend="triton"`` where Triton cannot run.

    Source: duvvuri2026lucid, eq:lucid-solve.
    Chapter: lucid
    """
    op = "precondition_values"
    check_floating(op, k=k, v=v)
    check_same_device(op, k=k, v=v)
    if k.ndim != 4 or k.shape[3] == 0:
        raise ValueError(f"{op}: k must be [batch, heads, keys, width], got {tuple(k.shape)}")
    if v.ndim != 4 or v.shape[:3] != k.shape[:3] or v.shape[3] == 0:
        raise ValueError(f"{op}: v must have shape {(*k.shape[:3], 'value width')}, got {tuple(v.shape)}")
    if key_mask is not None:
        if key_mask.dtype != torch.bool:
            raise TypeError(f"{op}: key_mask must be bool, got {key_mask.dtype}")
        check_same_device(op, k=k, key_mask=key_mask)
        fits = [size in (1, wanted) for size, wanted in zip(key_mask.shape, k.shape[:3], strict=False)]
        if key_mask.ndim != 3 or not all(fits):
            check_shape(op, "key_mask", key_mask, tuple(k.shape[:3]))
    if scale is not None:
        check_positive(op, scale=scale)
    return _precondition(op, k, v, key_mask, k.shape[-1] ** -0.5 if scale is None else scale, backend)


def _precondition(op: str, k: Tensor, v: Tensor, live: Tensor | None, scale: float, backend: Backend) -> Tensor:
    """Normalise, solve and round once, on the backend that `backend` means for these tensors."""
    widest = max(k.shape[-1], v.shape[-1])
    if widest > WIDEST_HEAD and backend == "triton":
        raise ValueError(f"{op}: the kernel takes heads up to {WIDEST_HEAD} wide, got {widest}")
    chosen = choose_backend("torch" if widest > WIDEST_HEAD and backend == "auto" else backend, k, op=op)
    u = blocked.unit_keys(k)
    live = None if live is None else live.to(u.dtype)
    return registration.solve(u, v.to(u.dtype), live, scale * k.shape[-1], fused=chosen == "triton").to(v.dtype)


def _interfering(visible: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Bool ``[B or 1, G or 1, S]``: keys that some query at another position sees."""
    queries, keys = q.shape[2], k.shape[2]
    if visible.shape[2] == 1 < queries:
        seen = visible[:, :, 0].expand(*visible.shape[:2], keys)
    else:
        place = torch.arange(queries, device=q.device)[:, None] + (keys - queries)
        seen = (visible & (place != torch.arange(keys, device=q.device))).any(-2)
    if seen.shape[1] > 1:
        seen = seen.unflatten(1, (k.shape[1], -1)).any(2)
    return seen
