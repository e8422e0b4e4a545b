"""Orthogonal parts of token vectors and the overlap between two of them."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from p2k.core.checks import check_floating, check_positive

__all__ = ["chance_overlap", "cosine_overlap", "project_off", "project_off_subspace", "project_onto"]


def project_onto(
    vectors: Float[Tensor, "*tokens width"], directions: Float[Tensor, "*#tokens width"], *, eps: float = 0.0
) -> Float[Tensor, "*tokens width"]:
    """The part of each vector parallel to its direction.

    Args:
        vectors: one vector per token, any floating dtype; half precision is computed in float32.
        directions: one direction per token or one for all, of any length; a zero direction has no parallel part.
        eps: added to the squared length of the direction, ``>= 0``.

    Returns:
        Tensor of the shape and dtype of `vectors`; differentiable in both arguments.

    Raises:
        TypeError: the dtypes differ or are not floating point.
        ValueError: the widths differ or `eps` is negative or not finite.
    """
    op = "project_onto"
    _check_pair(op, vectors, directions)
    check_positive(op, zero_allowed=True, eps=eps)
    v, d = _wide(vectors), _wide(directions)
    squared_length = d.square().sum(-1, keepdim=True) + eps
    safe = torch.where(squared_length == 0, 1.0, squared_length)
    return ((v * d).sum(-1, keepdim=True) / safe * d).to(vectors.dtype)


def project_off(
    vectors: Float[Tensor, "*tokens width"], directions: Float[Tensor, "*#tokens width"], *, eps: float = 0.0
) -> Float[Tensor, "*tokens width"]:
    """The part of each vector orthogonal to its direction; arguments and errors as in `project_onto`."""
    _check_pair("project_off", vectors, directions)
    v, d = _wide(vectors), _wide(directions)
    return (v - project_onto(v, d, eps=eps)).to(vectors.dtype)


def project_off_subspace(
    vectors: Float[Tensor, "*tokens width"], basis: Float[Tensor, "count width"]
) -> Float[Tensor, "*tokens width"]:
    """The part of each vector orthogonal to every row of `basis`.

    Args:
        vectors: one vector per token.
        basis: spanning vectors in rows; they may be dependent, of any length, or zero.

    Returns:
        Tensor of the shape and dtype of `vectors`.

    Raises:
        TypeError: the dtypes differ or are not floating point.
        ValueError: the widths differ.
    """
    _check_pair("project_off_subspace", vectors, basis)
    v = _wide(vectors)
    _, lengths, rows = torch.linalg.svd(_wide(basis), full_matrices=False)
    # The rank rule of numpy.linalg.matrix_rank; a mask instead of a selection keeps shapes fixed.
    cut = lengths.amax() * max(basis.shape) * torch.finfo(v.dtype).eps
    orthonormal = rows * (lengths > cut).unsqueeze(-1)
    return (v - (v @ orthonormal.mT) @ orthonormal).to(vectors.dtype)


def cosine_overlap(
    first: Float[Tensor, "*tokens width"], second: Float[Tensor, "*tokens width"]
) -> Float[Tensor, "*tokens"]:
    """Absolute cosine between the two vectors of each token, 0 where one of them is zero.

    Compare its mean with `chance_overlap`: unrelated vectors overlap too.

    Raises:
        TypeError: the dtypes differ or are not floating point.
        ValueError: the widths differ.

    Source: wang2026oqc, eq:oqc-overlap.
    Chapter: oqc
    """
    _check_pair("cosine_overlap", first, second)
    return (_unit(_wide(first)) * _unit(_wide(second))).sum(-1).abs()


def chance_overlap(width: int) -> float:
    """Mean absolute cosine of two unrelated random vectors of `width` entries, ``sqrt(2 / (pi width))``.

    The value is the large-width limit; at width 8 it is 3 % too low.

    Raises:
        ValueError: `width` is not positive.

    Source: wang2026oqc, eq:oqc-chance.
    Chapter: oqc
    """
    check_positive("chance_overlap", width=width)
    return math.sqrt(2 / (math.pi * width))


def _unit(vectors: Tensor) -> Tensor:
    """Vectors of length 1; zero stays zero. Scaling by the largest entry first keeps the squares in range."""
    largest = vectors.abs().amax(-1, keepdim=True)
    scaled = vectors / torch.where(largest == 0, 1.0, largest)
    squared_length = scaled.square().sum(-1, keepdim=True)
    return scaled * torch.where(squared_length == 0, 1.0, squared_length).rsqrt()


def _wide(tensor: Tensor) -> Tensor:
    """Float32 for the half types: an inner product in 16 bits hides what a projection removed."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _check_pair(op: str, first: Tensor, second: Tensor) -> None:
    """Both floating, one dtype, one positive width."""
    check_floating(op, first=first, second=second)
    if first.ndim == 0 or second.ndim == 0 or first.shape[-1] != second.shape[-1] or first.shape[-1] == 0:
        raise ValueError(
            f"{op}: both arguments must have the same last dimension of at least 1, "
            f"got shapes {tuple(first.shape)} and {tuple(second.shape)}"
        )
