"""A small decoder-only transformer (pre-LN) with exchangeable attention, and its key/value cache."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from p2k.ops.attention_entropy import attention_entropy
from p2k.ops.lucid import lucid_attention
from p2k.ops.softplus_attention import log_length_attention, reweighted_softplus_attention, softplus_attention

# (query [B,H,T,D], key [B,H,S,D], value [B,H,S,D], visible [.,1,T,S] or None = every key) -> [B,H,T,D]
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
# A builder may return a module: its parameters then belong to the block.
ATTENTIONS: dict[str, Callable[[int, int], Attention]] = {}


def register_attention(name: str) -> Callable[[Callable[[int, int], Attention]], Callable[[int, int], Attention]]:
    """Register a builder ``(heads, head_dim) -> attention`` under `name`; a taken name raises ValueError."""

    def register(builder: Callable[[int, int], Attention]) -> Callable[[int, int], Attention]:
        if name in ATTENTIONS:
            raise ValueError(f"register_attention: name must be new, got {name!r}, which is taken")
        ATTENTIONS[name] = builder
        return builder

    return register


@register_attention("sdpa")
def _build_sdpa(heads: int, head_dim: int) -> Attention:
    return lambda query, key, value, visible: F.scaled_dot_product_attention(query, key, value, attn_mask=visible)


@register_attention("lucid")
def _build_lucid(heads: int, head_dim: int) -> Attention:
    return lucid_attention


@register_attention("attention-entropy")
def _build_attention_entropy(heads: int, head_dim: int) -> Attention:
    return lambda query, key, value, visible: attention_entropy(query, key, value, visible)[0]


# These take torch's arguments, and count the keys a query sees from `visible`.
register_attention("log-length")(lambda heads, head_dim: log_length_attention)
register_attention("softplus")(lambda heads, head_dim: softplus_attention)
register_attention("reweighted-softplus")(lambda heads, head_dim: reweighted_softplus_attention)
register_attention("reweighted-softplus-3")(lambda heads, head_dim: partial(reweighted_softplus_attention, power=3.0))


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT: `context` counts prompt and completion, `hidden` is the feed-forward width (None: 4 dim)."""

    vocab_size: int
    context: int
    dim: int = 64
    depth: int = 2
    heads: int = 4
    hidden: int | None = None
    positions: Literal["learned", "rotary"] = "learned"
    attention: str = "sdpa"
    tie_weights: bool = True

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("vocab_size", "context", "dim", "depth", "heads")}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"GPTConfig: {name} must be at least 1, got {size}")
        if self.dim % self.heads or (self.positions == "rotary" and (self.dim // self.heads) % 2):
            raise ValueError(f"GPTConfig: dim / heads must be whole (even if rotary), got {self.dim} / {self.heads}")
        if self.positions not in ("learned", "rotary"):
            raise ValueError(f"GPTConfig: positions must be 'learned' or 'rotary', got {self.positions!r}")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"GPTConfig: attention must be one of {sorted(ATTENTIONS)}, got {self.attention!r}")


# Widths and depths by name; `gpt_preset` adds vocabulary and context. Parameters without embeddings: 12 dim^2 depth.
GPT_PRESETS: dict[str, dict[str, int]] = {
    "cpu-tiny": {"dim": 32, "depth": 1, "heads": 2},
    "cpu": {"dim": 64, "depth": 2, "heads": 4},
    "gpu-10m": {"dim": 384, "depth": 6, "heads": 6},
    "gpu-25m": {"dim": 512, "depth": 8, "heads": 8},
    "gpu-50m": {"dim": 640, "depth": 10, "heads": 10},
}


def gpt_preset(name: str, *, vocab_size: int, context: int, **overrides: object) -> GPTConfig:
    """The configuration called `name` for a vocabulary and context; unknown names raise ValueError."""
    if name not in GPT_PRESETS:
        raise ValueError(f"gpt_preset: name must be one of {sorted(GPT_PRESETS)}, got {name!r}")
    return GPTConfig(vocab_size, context, **{**GPT_PRESETS[name], **overrides})


class KVCache:
    """Keys and values of the tokens seen so far, one tensor ``[depth, 2, batch, heads, capacity, head_dim]``."""

    def __init__(self, storage: Tensor, length: int = 0) -> None:
        self.storage = storage
        self.length = length

    @staticmethod
    def shape(config: GPTConfig, batch: int, capacity: int) -> tuple[int, ...]:
        """Shape of the storage for `batch` sequences of at most `capacity` tokens."""
        return (config.depth, 2, batch, config.heads, capacity, config.dim // config.heads)

    @classmethod
    def allocate(cls, model: "GPT", batch: int, capacity: int) -> "KVCache":
        """An empty cache on the model's device, in its dtype."""
        weight = model.token_embedding.weight
        return cls(weight.new_zeros(cls.shape(model.config, batch, capacity)))

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write the new tokens' keys and values of one layer; return those of all tokens so far."""
        end = self.length + key.shape[-2]
        if end > self.storage.shape[-2]:
            raise ValueError(f"KVCache: at most {self.storage.shape[-2]} tokens fit, got {end}; allocate more capacity")
        self.storage[layer, 0, :, :, self.length : end] = key
        self.storage[layer, 1, :, :, self.length : end] = value
        return self.storage[layer, 0, :, :, :end], self.storage[layer, 1, :, :, :end]


def rotate(x: Float[Tensor, "batch heads tokens dim"], positions: Int[Tensor, "#batch tokens"]) -> Tensor:
    """Rotary position embedding: turn each pair (x_i, x_{i+dim/2}) by its position times 10000^(-2i/dim)."""
    half = x.shape[-1] // 2
    exponent = torch.arange(half, device=x.device, dtype=torch.float32) / half
    angle = positions[:, None, :, None] * torch.exp(-math.log(10_000.0) * exponent)
    cosine, sine = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)


class Block(nn.Module):
    """Pre-LN residual block: attention, then a feed-forward layer."""

    def __init__(self, config: GPTConfig, feed_forward: nn.Module) -> None:
        super().__init__()
        self.heads, self.rotary = config.heads, config.positions == "rotary"
        self.attention_norm = nn.LayerNorm(config.dim)
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.attend = ATTENTIONS[config.attention](config.heads, config.dim // config.heads)
        self.out = nn.Linear(config.dim, config.dim)
        self.feed_forward_norm = nn.LayerNorm(config.dim)
        self.feed_forward = feed_forward

    def forward(
        self, x: Tensor, positions: Tensor, visible: Tensor | None, cache: KVCache | None, layer: int
    ) -> Tensor:
        """Map ``[batch, tokens, dim]`` to the same shape; `layer` is this block's place in the cache."""
        query, key, value = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).unbind(-3)
        query, key, value = (tensor.transpose(-3, -2) for tensor in (query, key, value))
        if self.rotary:
            query, key = rotate(query, positions), rotate(key, positions)
        if cache is not None:
            key, value = cache.extend(layer, key, value)
        x = x + self.out(self.attend(query, key, value, visible).transpose(-3, -2).flatten(-2))
        return x + self.feed_forward(self.feed_forward_norm(x))


class GPT(nn.Module):
    """Decoder-only transformer over token ids.

    Args:
        config: sizes and choices.
        feed_forward: builds one block's feed-forward module from the width; None means GELU with `config.hidden`.
    """

    def __init__(self, config: GPTConfig, feed_forward: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        self.config = config
        hidden = config.hidden or 4 * config.dim
        build = feed_forward or (
            lambda dim: nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))
        )
        self.token_embedding = nn.Embedding(config.vocab_size, config.dim)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.context, config.dim)
        self.blocks = nn.ModuleList(Block(config, build(config.dim)) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.head = None if config.tie_weights else nn.Linear(config.dim, config.vocab_size, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        """Weights N(0, 0.02), the residual branches' last maps smaller by sqrt(2 depth), biases 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            nn.init.normal_(block.out.weight, std=0.02 / math.sqrt(2 * self.config.depth))

    @property
    def head_weight(self) -> Float[Tensor, "vocab dim"]:
        """The matrix that turns features into logits: the token embedding where weights are tied."""
        return self.token_embedding.weight if self.head is None else self.head.weight

    def features(
        self,
        tokens: Int[Tensor, "batch tokens"],
        *,
        valid: Bool[Tensor, "batch seen"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Normalised hidden states whose product with `head_weight` is the logits; arguments as in `forward`."""
        start = 0 if cache is None else cache.length
        count = tokens.shape[-1]
        seen = start + count
        if seen > self.config.context:
            raise ValueError(f"GPT: at most {self.config.context} tokens fit the context, got {seen}")
        if valid is not None and valid.shape[-1] != seen:
            raise ValueError(f"GPT: valid must cover the {seen} tokens seen so far, got shape {tuple(valid.shape)}")
        index = torch.arange(seen, device=tokens.device)
        positions, visible = index[None, start:], None
        if count > 1:
            visible = index[start:, None] >= index
        if valid is not None:
            positions = (valid.cumsum(-1) - 1).clamp_min(0)[..., start:]
            own = index[start:, None] == index  # a padding query sees itself, so that no softmax is empty
            causal = visible if count > 1 else torch.ones_like(own)
            visible = ((causal & valid[..., None, :]) | own).unsqueeze(-3)
        x = self.token_embedding(tokens)
        if self.config.positions == "learned":
            x = x + self.position_embedding(positions)
        for layer, block in enumerate(self.blocks):
            x = block(x, positions, visible, cache, layer)
        if cache is not None:
            cache.length = seen
        return self.norm(x)

    def forward(
        self,
        tokens: Int[Tensor, "batch tokens"],
        *,
        valid: Bool[Tensor, "batch seen"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "batch tokens vocab"]:
        """Logits of the token after each of `tokens`.

        Args:
            tokens: ids in ``[0, vocab_size)``; with a cache, only the tokens that follow those already in it.
            valid: False at padding, over all tokens seen so far (cached ones included); None means no padding.
                Positions count valid tokens only, so left padding changes no logit of a valid token.
            cache: keys and values of earlier tokens, extended in place; None recomputes everything.

        Raises:
            ValueError: more tokens than the context or the cache holds, or `valid` does not cover them.
        """
        return F.linear(self.features(tokens, valid=valid, cache=cache), self.head_weight)
