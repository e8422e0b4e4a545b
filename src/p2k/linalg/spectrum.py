"""How many directions a cloud of vectors uses, and how well its classes lie apart."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from p2k.core.checks import check_floating

__all__ = ["class_separation", "effective_rank", "participation_ratio"]


def effective_rank(vectors: Float[Tensor, "*tokens width"]) -> Float[Tensor, ""]:
    """Exponential of the entropy of the covariance eigenvalues, normalised to sum 1.

    Args:
        vectors: at least one vector; leading dimensions are flattened and the mean is removed.

    Returns:
        0-d tensor between 1 and ``min(count - 1, width)``, or 0 where nothing varies (one vector, equal vectors).
        Differentiable except where nothing varies.

    Raises:
        TypeError: not floating point.
        ValueError: no vector, no width, or NaN or inf among the entries.

    Source: wang2026oqc, eq:oqc-effective-rank.
    Chapter: oqc
    """
    centred = _centred("effective_rank", vectors)
    # Singular values squared: the covariance itself would square the condition number.
    eigenvalues = torch.linalg.svdvals(centred).square()
    total = eigenvalues.sum()
    varies = total > 0
    share = eigenvalues / torch.where(varies, total, 1.0)
    entropy = -(share * torch.where(share > 0, share, 1.0).log()).sum()
    return varies * entropy.exp()


def participation_ratio(vectors: Float[Tensor, "*tokens width"]) -> Float[Tensor, ""]:
    """Squared sum over sum of squares of the covariance eigenvalues: the count of directions of equal variance.

    Arguments, range, degenerate value and errors as in `effective_rank`, which it never exceeds.

    Source: wang2026oqc, eq:oqc-participation.
    Chapter: oqc
    """
    centred = _centred("participation_ratio", vectors)
    count, width = centred.shape
    # Traces need no eigenvalues, and both Gram matrices have the same non-zero ones.
    gram = centred.mT @ centred if width <= count else centred @ centred.mT
    squares = gram.square().sum()
    varies = squares > 0
    return varies * gram.trace().square() / torch.where(varies, squares, 1.0)


def class_separation(features: Float[Tensor, "count width"], labels: Int[Tensor, " count"]) -> Float[Tensor, ""]:
    """Scatter between class means over scatter within classes, ``tr(S_B) / tr(S_W)``.

    Args:
        features: one vector per example.
        labels: class of each example, any integers.

    Returns:
        0-d tensor ``>= 0``; inf where every class has collapsed to its own point; 0 where all examples agree.

    Raises:
        TypeError: features not floating point or labels not integer.
        ValueError: the shapes disagree or fewer than two classes are present.

    Source: wang2026oqc, eq:oqc-separation.
    Chapter: oqc
    """
    op = "class_separation"
    check_floating(op, features=features)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"{op}: labels must be integers, got {labels.dtype}")
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"{op}: features must be [count, width] and labels [count], "
            f"got {tuple(features.shape)} and {tuple(labels.shape)}"
        )
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    classes, member, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise ValueError(f"{op}: at least two classes are needed, got {len(classes)}")
    sums = wide.new_zeros(len(classes), wide.shape[1]).index_add(0, member, wide)
    means = sums / counts.unsqueeze(-1)
    between = (counts.unsqueeze(-1) * (means - wide.mean(0)).square()).sum()
    within = (wide - means[member]).square().sum()
    return torch.where(between > 0, between / within, 0.0)


def _centred(op: str, vectors: Tensor) -> Tensor:
    """Rows without their mean, scaled by the largest entry so that fourth powers stay in range."""
    check_floating(op, vectors=vectors)
    if vectors.ndim == 0 or vectors.numel() == 0:
        raise ValueError(f"{op}: vectors must hold at least one vector of width 1, got shape {tuple(vectors.shape)}")
    if not vectors.isfinite().all():
        raise ValueError(f"{op}: vectors must be finite, got NaN or inf")
    rows = vectors.reshape(-1, vectors.shape[-1])
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    # Removing one row first makes equal rows exactly zero, which their rounded mean would not.
    shifted = rows - rows[:1]
    largest = shifted.detach().abs().amax()
    scaled = shifted / torch.where(largest > 0, largest, 1.0)
    return scaled - scaled.mean(0)
