"""Self-attention blocks of the vision transformer."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from p2k.core.checks import check_positive

__all__ = ["ATTENTIONS", "ReAttention", "SelfAttention"]


class SelfAttention(nn.Module):
    """Multi-head softmax attention among all tokens.

    Args:
        dim: width of a token, a multiple of `heads`.
        heads: number of heads, ``>= 1``.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size is not positive or `heads` does not divide `dim`.

    Source: dosovitskiy2021vit, eq:oqc-attention; ``4 dim ** 2`` weights and ``4 dim`` biases.
    Chapter: oqc
    """

    def __init__(self, dim: int, heads: int, *, device=None, dtype=None) -> None:
        super().__init__()
        check_positive("SelfAttention", dim=dim, heads=heads)
        if dim % heads:
            raise ValueError(f"{type(self).__name__}: dim must be a multiple of heads = {heads}, got {dim}")
        self.heads = heads
        self.query_key_value = nn.Linear(dim, 3 * dim, device=device, dtype=dtype)
        self.out = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Exchange among the tokens of each image."""
        split = self.query_key_value(x).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        return self.out(self.attend(*split.unbind(0)).transpose(-2, -3).flatten(-2))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of each head, ``[batch, heads, tokens, width]``."""
        return F.scaled_dot_product_attention(query, key, value)

    def extra_repr(self) -> str:
        """Heads."""
        return f"heads={self.heads}"


class ReAttention(SelfAttention):
    """Attention whose maps are mixed across heads by a learned matrix and normalised over the heads.

    Args:
        dim: width of a token, a multiple of `heads`.
        heads: number of heads, ``>= 1``.
        device, dtype: of the parameters.

    Raises:
        ValueError: a size is not positive or `heads` does not divide `dim`.

    Source: zhou2021deepvit, eq:oqc-reattention; ``heads ** 2 + 2 heads`` parameters more than `SelfAttention`. The
    mixing matrix starts as the identity.
    Chapter: oqc
    """

    def __init__(self, dim: int, heads: int, *, device=None, dtype=None) -> None:
        super().__init__(dim, heads, device=device, dtype=dtype)
        self.mix = nn.Parameter(torch.eye(heads, device=device, dtype=dtype))
        self.norm = nn.LayerNorm(heads, device=device, dtype=dtype)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Mixed and normalised maps times values."""
        maps = (query @ key.mT * query.shape[-1] ** -0.5).softmax(-1)
        mixed = torch.einsum("...hqk,hg->...qkg", maps.to(value.dtype), self.mix.to(value.dtype))
        return self.norm(mixed).movedim(-1, -3).to(value.dtype) @ value


ATTENTIONS = {"softmax": SelfAttention, "re-attention": ReAttention}
