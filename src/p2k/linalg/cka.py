"""Centred kernel alignment with linear kernels: how alike two representations of the same examples are."""

import torch
from jaxtyping import Float
from torch import Tensor

from p2k.core.checks import check_floating

__all__ = ["delta_cka", "linear_cka", "shared_basis"]


def linear_cka(x: Float[Tensor, "count width"], y: Float[Tensor, "count other"]) -> Float[Tensor, ""]:
    """Linear CKA of two representations: ``|X'Y|^2 / (|X'X| |Y'Y|)`` of the centred matrices, in Frobenius norms.

    1 for representations that differ by an orthogonal map and a scale, 0 for uncorrelated ones. It is computed in
    float64: in float32 the value of equal representations is off by about 1e-4, as large as what is to be measured.

    Args:
        x: features of each example.
        y: features of the same examples, of any width.

    Returns:
        0-d float64 tensor in 0..1; 0 where a representation does not vary.

    Raises:
        ValueError: fewer than two examples, or counts that differ.
        TypeError: a tensor is not floating point.

    Source: kornblith2019cka, eq:inflection-cka.
    Chapter: inflection
    """
    x, y = _centred("linear_cka", x, y)
    # Gram matrices of the examples where those are fewer than the features.
    if len(x) < max(x.shape[1], y.shape[1]):
        kernel, other = x @ x.mT, y @ y.mT
        cross, own = (kernel * other).sum(), kernel.norm() * other.norm()
    else:
        cross, own = (x.mT @ y).square().sum(), (x.mT @ x).norm() * (y.mT @ y).norm()
    return torch.where(own > 0, cross / torch.where(own > 0, own, 1.0), 0.0)


def shared_basis(
    x: Float[Tensor, "count width"], y: Float[Tensor, "count width"], components: int
) -> tuple[Float[Tensor, "width components"], float]:
    """First principal directions of both representations stacked, and the share of variance they explain.

    Args:
        x, y: features before and after a change, of one width.
        components: number of directions, ``>= 1``; never more than the width.

    Raises:
        ValueError: shapes disagree or `components` is not positive.

    Source: wang2025inflection, eq:inflection-delta-cka.
    Chapter: inflection
    """
    if x.shape != y.shape or components < 1:
        raise ValueError(
            f"shared_basis: x and y must have one shape and components >= 1, "
            f"got {tuple(x.shape)}, {tuple(y.shape)} and {components}"
        )
    stacked = torch.cat([x, y]).double()
    _, singular, right = torch.linalg.svd(stacked - stacked.mean(0), full_matrices=False)
    energy = singular.square()
    total = energy.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return right[:components].mT, (energy[:components].sum() / total).item()


def delta_cka(
    before: Float[Tensor, "count width"], after: Float[Tensor, "count width"], *, components: int = 64
) -> tuple[float, float]:
    """How far a representation moved: 1 - CKA in the shared principal basis, and the variance that basis explains.

    A truncated basis counts a rotation out of it as change; with all components it does not.

    Args:
        before, after: features of the same examples.
        components: size of the shared basis, ``>= 1``.

    Raises:
        ValueError: shapes disagree, fewer than two examples, or `components` is not positive.

    Source: wang2025inflection, eq:inflection-delta-cka.
    Chapter: inflection
    """
    basis, explained = shared_basis(before, after, components)
    return 1 - linear_cka(before.double() @ basis, after.double() @ basis).item(), explained


def _centred(op: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    check_floating(op, x=x)
    check_floating(op, y=y)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < 2:
        raise ValueError(
            f"{op}: x and y must be [count, width] with one count >= 2, got {tuple(x.shape)}, {tuple(y.shape)}"
        )
    x, y = x.double(), y.double()
    return x - x.mean(0), y - y.mean(0)
