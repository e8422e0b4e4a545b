"""A small vision transformer with a pluggable feed-forward block, and matching of whole models to one budget."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from p2k.core.backend import Backend
from p2k.core.checks import check_positive
from p2k.models.attention import ATTENTIONS
from p2k.models.readout import READOUTS
from p2k.nn.matching import Match, count_parameters, match_hidden
from p2k.nn.oqc import build_feed_forward, width_step

__all__ = ["DIGITS", "OQC_CIFAR100", "OQC_TINYIMAGENET", "ViT", "ViTConfig", "build_vit", "match_vit"]


@dataclass(frozen=True)
class ViTConfig:
    """Everything of a model but its feed-forward block.

    Attributes:
        image_size: side of the square image in pixels.
        patch_size: side of a patch in pixels; divides `image_size`.
        in_channels: image channels.
        num_classes: width of the logits.
        dim: width of a token; a multiple of `heads`.
        depth: number of blocks, ``>= 1``.
        heads: attention heads.
        hidden: hidden width of the feed-forward block that sets the budget.
        rank: number of quadratic features of the arms that have them.
        readout: key of `p2k.models.readout.READOUTS`.
        attention: key of `p2k.models.attention.ATTENTIONS`.
    """

    image_size: int
    patch_size: int
    in_channels: int
    num_classes: int
    dim: int
    depth: int
    heads: int
    hidden: int
    rank: int
    readout: str = "penultimate"
    attention: str = "softmax"

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = self.image_size // self.patch_size
        return side, side


# Depth, width, heads, rank, and TinyImageNet's patches follow the paper; CIFAR's patches and the hidden width are ours.
OQC_CIFAR100 = ViTConfig(32, 4, 3, 100, dim=256, depth=8, heads=8, hidden=512, rank=56)
OQC_TINYIMAGENET = ViTConfig(64, 8, 3, 200, dim=256, depth=8, heads=8, hidden=512, rank=56)
DIGITS = ViTConfig(8, 2, 1, 10, dim=24, depth=2, heads=2, hidden=64, rank=8)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then feed-forward, each added to its input."""

    def __init__(self, dim: int, attention: nn.Module, feed_forward: nn.Module, *, device=None, dtype=None) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.attention = attention
        self.feed_forward_norm = nn.LayerNorm(dim, device=device, dtype=dtype)
        self.feed_forward = feed_forward

    def attend(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """The first half of the block."""
        return x + self.attention(self.attention_norm(x))

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        """Both halves."""
        x = self.attend(x)
        return x + self.feed_forward(self.feed_forward_norm(x))


class ViT(nn.Module):
    """Vision transformer on square images: linear patches, learned positions, pre-norm blocks, mean pooling.

    There is no class token, so that the tokens are a grid, which AFBO needs.

    Args:
        image_size, patch_size, in_channels, num_classes, dim, depth, heads, readout, attention: as in `ViTConfig`.
        feed_forward: makes the feed-forward block of one layer from `dim`.
        device, dtype: of the parameters made here; `feed_forward` chooses its own.

    Raises:
        ValueError: a size is not positive, `patch_size` does not divide `image_size`, `heads` does not divide `dim`, or
            a readout or attention is unknown.

    Source: dosovitskiy2021vit, with the readout of wang2026oqc, eq:oqc-readout.
    Chapter: oqc
    """

    def __init__(  # noqa: PLR0913 - one keyword for each size of a model, as in timm
        self,
        *,
        image_size: int,
        patch_size: int,
        in_channels: int,
        num_classes: int,
        dim: int,
        depth: int,
        heads: int,
        feed_forward: Callable[[int], nn.Module],
        readout: str = "penultimate",
        attention: str = "softmax",
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        check_positive("ViT", image_size=image_size, patch_size=patch_size, in_channels=in_channels)
        check_positive("ViT", num_classes=num_classes, dim=dim, depth=depth, heads=heads)
        if image_size % patch_size:
            raise ValueError(f"ViT: image_size must be a multiple of patch_size = {patch_size}, got {image_size}")
        _check_choice("readout", readout, READOUTS)
        _check_choice("attention", attention, ATTENTIONS)
        factory = {"device": device, "dtype": dtype}
        self.image_shape, self.patch_size = (in_channels, image_size, image_size), patch_size
        self.embed = nn.Linear(in_channels * patch_size**2, dim, **factory)
        self.positions = nn.Parameter(torch.empty((image_size // patch_size) ** 2, dim, **factory))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.blocks = nn.ModuleList(
            Block(dim, ATTENTIONS[attention](dim, heads, **factory), feed_forward(dim), **factory) for _ in range(depth)
        )
        self.readout = READOUTS[readout](dim, **factory)
        self.head = nn.Linear(dim, num_classes, **factory)

    def tokens(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch tokens dim"]:
        """Embedded patches in row-major order, with their positions."""
        if tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(f"ViT: images must be [batch, *{self.image_shape}], got {tuple(images.shape)}")
        size = self.patch_size
        # [batch, channels, rows, size, columns, size] -> [batch, rows * columns, channels * size * size]
        split = images.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))
        patches = split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return self.embed(patches) + self.positions

    def features(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        """Pooled features before the head."""
        last = self.tokens(images)
        penultimate = last
        for block in self.blocks:
            penultimate, last = last, block(last)
        return self.readout(last, penultimate)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        return self.head(self.features(images))

    @torch.no_grad()
    def feed_forward_inputs(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> list[Float[Tensor, "batch tokens dim"]]:
        """What enters each block's feed-forward, for figures: pass it to its `hidden` or `branches`."""
        inputs, x = [], self.tokens(images)
        for block in self.blocks:
            inputs.append(block.feed_forward_norm(block.attend(x)))
            x = block(x)
        return inputs

    def extra_repr(self) -> str:
        """Image shape and patch size."""
        return f"image_shape={self.image_shape}, patch_size={self.patch_size}"


def build_vit(
    config: ViTConfig,
    ffn_name: str,
    *,
    hidden: int | None = None,
    rank: int | None = None,
    backend: Backend = "auto",
    device=None,
    dtype=None,
) -> ViT:
    """Build the model of one arm.

    Args:
        config: everything but the feed-forward block.
        ffn_name: key of `p2k.nn.oqc.FEED_FORWARDS`.
        hidden: hidden width; None takes the one of `config`, which is not matched between arms: see `match_vit`.
        rank: number of quadratic features; None takes the one of `config`.
        backend: `auto`, `torch` or `triton`, for the arms that project.
        device, dtype: of the parameters.

    Raises:
        ValueError: an unknown name or an unusable size.

    Chapter: oqc
    """

    def feed_forward(dim: int) -> nn.Module:
        return build_feed_forward(
            ffn_name,
            dim,
            config.hidden if hidden is None else hidden,
            rank=config.rank if rank is None else rank,
            grid=config.grid,
            backend=backend,
            device=device,
            dtype=dtype,
        )

    return ViT(
        image_size=config.image_size,
        patch_size=config.patch_size,
        in_channels=config.in_channels,
        num_classes=config.num_classes,
        dim=config.dim,
        depth=config.depth,
        heads=config.heads,
        feed_forward=feed_forward,
        readout=config.readout,
        attention=config.attention,
        device=device,
        dtype=dtype,
    )


def match_vit(
    config: ViTConfig,
    names: Sequence[str],
    *,
    budget_of: str = "glu",
    rank: int | None = None,
    multiple_of: int = 1,
) -> dict[str, Match]:
    """Hidden widths that give every arm the parameter count of one of them.

    Args:
        config: its `hidden` is the width of the arm that sets the budget.
        names: arms to match, keys of `p2k.nn.oqc.FEED_FORWARDS`.
        budget_of: the arm that sets the budget.
        rank: number of quadratic features; None takes the one of `config`.
        multiple_of: consider only widths divisible by this number, ``>= 1``.

    Returns:
        One `Match` per name, within 0.5 % of the budget, counting the whole model.

    Raises:
        ValueError: an unknown name.
        BudgetUnreachable: no width of an arm comes close enough.

    Source: wang2026oqc, eq:oqc-budget.
    Chapter: oqc
    """
    check_positive("match_vit", multiple_of=multiple_of)
    with torch.device("meta"):
        budget = count_parameters(build_vit(config, budget_of, rank=rank))

    def match(name: str) -> Match:
        # A multiple of two numbers at once is a multiple of their least common one.
        step = math.lcm(multiple_of, width_step(name))
        return match_hidden(lambda hidden: build_vit(config, name, hidden=hidden, rank=rank), budget, multiple_of=step)

    return {name: match(name) for name in names}


def _check_choice(argument: str, choice: str, choices: dict) -> None:
    if choice not in choices:
        raise ValueError(f"ViT: {argument} must be one of {', '.join(choices)}, got {choice!r}")
