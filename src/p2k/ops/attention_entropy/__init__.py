"""Attention that also returns the entropy of each of its rows, without ever holding the attention matrix."""

from jaxtyping import Bool, Float
from torch import Tensor

from p2k.core.attention import check_sdpa
from p2k.core.backend import Backend, choose_backend
from p2k.ops.attention_entropy import reference, registration
from p2k.ops.attention_entropy.second_call import entropy_by_second_call

__all__ = ["attention_entropy", "entropy_by_second_call"]
# Bytes of an element -> widest head of the kernel: beyond, its registers spill, and `auto` takes the reference.
WIDEST_HEAD = {2: 256, 4: 128, 8: 128}


# The signature is torch's own, and longer than ours may be.
def attention_entropy(  # noqa: PLR0913
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
) -> tuple[Float[Tensor, "batch heads queries value_width"], Float[Tensor, "batch heads queries"]]:
    """Layout ``[B, H, T, D]``: scaled dot-product attention and the entropy in nats of every attention row.

    Signature and layout are those of `torch.nn.functional.scaled_dot_product_attention`; both results carry
    gradients. The reference holds the matrix of scores, the kernel never does.

    Args:
        q: queries ``[B, H, T, D]``, float16, bfloat16, float32 or float64.
        k: keys ``[B, G, S, D]``, with ``G = H``, or any divisor of H under `enable_gqa`.
        v: values ``[B, G, S, V]``.
        attn_mask: broadcasts to ``[B, H, T, S]``; bool, True where a query may look, or floating, added to the
            scores. A row that sees nothing returns 0, entropy 0 and gradient 0.
        dropout_p: must be 0: a dropped row is no distribution, its entropy means nothing.
        is_causal: query i sees the keys 0..i; not together with `attn_mask`.
        scale: positive factor on ``<q, k>``; None means ``D ** -0.5``.
        enable_gqa: let groups of H / G query heads share a key head.
        backend: `auto`, `torch` or `triton`. The kernel takes heads up to 256 wide in half precision and up to 128 in
            float32; for wider ones `auto` is the reference, which holds the matrix.

    Returns:
        Output ``[B, H, T, V]`` in the dtype of `q`, entropy ``[B, H, T]`` in float32 (float64 for float64).

    Raises:
        ValueError: shapes or devices disagree, an option is out of its range, or a head is too wide for ``"triton"``.
        TypeError: a tensor is not floating point, the dtypes disagree, or the mask is neither bool nor floating.
        BackendUnavailable: ``backend="triton"`` where Triton cannot run.

    Source: wang2025inflection, eq:inflection-entropy.
    Chapter: inflection
    """
    op = "attention_entropy"
    scale, attn_mask = check_sdpa(
        op, q, k, v, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )
    width, widest = max(q.shape[-1], v.shape[-1]), WIDEST_HEAD[q.element_size()]
    wide = width > widest
    if wide and backend == "triton":
        raise ValueError(f"{op}: the kernel takes heads up to {widest} wide in {q.dtype}, got {width}")
    if choose_backend("torch" if wide and backend == "auto" else backend, q, op=op) == "torch":
        return reference.attention_entropy(q, k, v, attn_mask, is_causal, scale)
    return registration.attention_entropy(q, k, v, attn_mask, is_causal, scale)
