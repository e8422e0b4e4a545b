"""What a trained model's feed-forward blocks do with their auxiliary branch, measured on held-out images."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from p2k.core.checks import require
from p2k.data import ImageData, as_float
from p2k.data.augment import normalise
from p2k.linalg.projection import chance_overlap, cosine_overlap
from p2k.linalg.spectrum import class_separation, effective_rank, participation_ratio


@dataclass(frozen=True)
class Overlap:
    """Mean absolute cosine between the main vector and its companion, token by token.

    Args:
        space: where both live: ``hidden`` width, or the ``rank`` space of the low-rank variants.
        before: with the auxiliary vector as it comes.
        after: with the part that is injected; after a projection zero up to rounding, by construction.
        chance: what unrelated vectors of this width have; judge `before` against it.
        parallel_energy: share of the auxiliary vectors' energy along the main vector, mean squared cosine.
        pythagoras: largest ``| |main + injected|^2 / (|main|^2 + |injected|^2) - 1 |`` over tokens.
    """

    space: Literal["hidden", "rank"]
    before: float
    after: float
    chance: float
    parallel_energy: float
    pythagoras: float


@dataclass(frozen=True)
class LayerMechanism:
    """One feed-forward block.

    Args:
        overlaps: one per space that has branches; none for a plain host.
        effective_rank: of the token covariance of the block's hidden vector.
        participation_ratio: of the same covariance.
    """

    overlaps: tuple[Overlap, ...]
    effective_rank: float
    participation_ratio: float


@dataclass(frozen=True)
class Mechanism:
    """All feed-forward blocks of a model, and its pooled features.

    Args:
        layers: in the order of the forward pass.
        class_separation: between-class over within-class scatter of the pooled features.
        silhouette: mean silhouette of the pooled features by class, -1..1.
    """

    layers: tuple[LayerMechanism, ...]
    class_separation: float
    silhouette: float


@torch.no_grad()
def measure(
    model: nn.Module, data: ImageData, *, split: Literal["train", "val", "test"] = "test", limit: int = 1024
) -> Mechanism:
    """Measure a trained model on the first `limit` images of a split.

    Args:
        model: has ``features(images)``, and feed-forward blocks with ``hidden(x)`` and, where they have an auxiliary
            branch, ``branches(x)`` (and ``rank_branches(x)``).
        data: normalised here as in training.
        split: images to use.
        limit: number of images, ``>= 2``.

    Raises:
        ValueError: the model has no feed-forward block, or the images show fewer than two classes.
        MissingDependency: scikit-learn is not installed.

    Source: wang2026oqc, eq:oqc-overlap, eq:oqc-effective-rank, eq:oqc-participation, eq:oqc-separation.
    Chapter: oqc
    """
    device = next(model.parameters()).device
    images, labels = (tensor[:limit].to(device) for tensor in data.split(split))
    mean, std = (tensor.to(device) for tensor in data.channel_statistics())
    features, inputs = _capture(model, normalise(as_float(images), mean, std))
    metrics = require("sklearn.metrics", extra="book", purpose="the silhouette")
    return Mechanism(
        tuple(_layer(block, x) for block, x in inputs),
        class_separation(features, labels).item(),
        float(metrics.silhouette_score(features.double().cpu().numpy(), labels.cpu().numpy())),
    )


def _capture(model: nn.Module, images: Tensor) -> tuple[Tensor, list[tuple[nn.Module, Tensor]]]:
    """Pooled features, and each feed-forward block with its input. A host inside a block is asked for its hidden
    vector, not called, so that only the outer block is seen."""
    inputs: list[tuple[nn.Module, Tensor]] = []
    blocks = [module for module in model.modules() if hasattr(module, "hidden")]
    hooks = [block.register_forward_pre_hook(lambda module, args: inputs.append((module, args[0]))) for block in blocks]
    training = model.training
    try:
        features = model.eval().features(images)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if not inputs:
        raise ValueError(f"measure: {type(model).__name__} has no feed-forward block with a hidden(x) method")
    return features, inputs


def _layer(block: nn.Module, x: Tensor) -> LayerMechanism:
    hidden = block.hidden(x)
    sources = {"hidden": "branches", "rank": "rank_branches"}
    overlaps = tuple(
        _overlap(space, *getattr(block, method)(x)) for space, method in sources.items() if hasattr(block, method)
    )
    return LayerMechanism(overlaps, effective_rank(hidden).item(), participation_ratio(hidden).item())


def _overlap(space: Literal["hidden", "rank"], main: Tensor, aux: Tensor, injected: Tensor) -> Overlap:
    # Float64: a cosine of zero is a difference of large terms, and its rounding is not what is measured here.
    main, aux, injected = main.double(), aux.double(), injected.double()
    before = cosine_overlap(main, aux)
    parts = main.square().sum(-1) + injected.square().sum(-1)
    whole = (main + injected).square().sum(-1)
    excess = torch.where(parts > 0, whole / torch.where(parts > 0, parts, 1.0) - 1, 0.0)
    return Overlap(
        space,
        before.mean().item(),
        cosine_overlap(main, injected).mean().item(),
        chance_overlap(main.shape[-1]),
        before.square().mean().item(),
        excess.abs().max().item(),
    )
