"""The saturation index of a layer and the rule that picks inflection layers from it.

Chapter: inflection
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def saturation_index(
    entropy: Float[Tensor, " layers"], gradient: Float[Tensor, " layers"], *, weight: float = 0.5
) -> Float[Tensor, " layers"]:
    """Index in 0..1 that is high where attention entropy and gradient norm are both low.

    Each part is the inverse of its quantity, scaled to 0..1 over the layers; of the gradient its logarithm. The
    scaling makes some layer reach each end in any model, an untrained one too: look at the raw curves as well.

    Args:
        entropy: mean attention entropy of each layer.
        gradient: gradient norm of each layer, ``> 0``.
        weight: of the entropy part, in 0..1.

    Raises:
        ValueError: shapes disagree, a gradient is not positive, or `weight` is out of range.

    Source: wang2025inflection, eq:inflection-index.
    Chapter: inflection
    """
    if entropy.ndim != 1 or entropy.shape != gradient.shape or not 0 <= weight <= 1:
        raise ValueError(
            f"saturation_index: entropy and gradient must be [layers] and weight in 0..1, "
            f"got {tuple(entropy.shape)}, {tuple(gradient.shape)} and {weight}"
        )
    if not (gradient > 0).all():
        raise ValueError(f"saturation_index: gradient must be positive in every layer, got {gradient.tolist()}")
    return weight * _inverse(entropy) + (1 - weight) * _inverse(gradient.double().log())


def gradient_drop(gradient: Float[Tensor, " layers"]) -> Float[Tensor, " layers"]:
    """Loss of gradient on its way down through the next layer, ``log g[l+1] - log g[l]``; 0 for the last layer.

    The other reading of "steep decay": pass ``gradient_drop(g).neg().exp()`` as the gradient of `saturation_index`.
    """
    logs = gradient.double().log()
    return torch.cat([logs.diff(), logs.new_zeros(1)])


def inflection_layers(
    index: Float[Tensor, " layers"], *, dilation: int = 1, threshold: float = 0.0, skip_top: float = 0.0
) -> list[int]:
    """Layers at the local maxima of the index and their neighbours.

    Args:
        index: saturation index of each layer; the first and the last layer compete with one neighbour.
        dilation: neighbours taken on each side of a maximum, ``>= 0``.
        threshold: a maximum must exceed it.
        skip_top: share of the uppermost layers never taken, in 0..1.

    Raises:
        ValueError: a setting is out of range.

    Source: wang2025inflection, eq:inflection-rule.
    Chapter: inflection
    """
    if index.ndim != 1 or dilation < 0 or not 0 <= skip_top <= 1:
        raise ValueError(f"inflection_layers: got shape {tuple(index.shape)}, dilation {dilation}, skip_top {skip_top}")
    return band(local_maxima(index.tolist(), threshold), len(index), dilation=dilation, skip_top=skip_top)


def local_maxima(values: Sequence[float], threshold: float = 0.0) -> list[int]:
    """Positions above the threshold and above both neighbours; a plateau counts once, at its lowest layer."""
    starts = [i for i in range(len(values)) if i == 0 or values[i] != values[i - 1]]
    steps = [-float("inf"), *(values[i] for i in starts), -float("inf")]
    levels = zip(starts, steps, steps[1:], steps[2:], strict=False)
    return [i for i, below, value, above in levels if below < value > above and value > threshold]


def band(maxima: Sequence[int], layers: int, *, dilation: int = 1, skip_top: float = 0.0) -> list[int]:
    """Maxima with their neighbours, clipped to the model."""
    stop = layers - round(skip_top * layers)
    near = {i + step for i in maxima for step in range(-dilation, dilation + 1)}
    return sorted(i for i in near if 0 <= i < stop)


def _inverse(values: Tensor) -> Tensor:
    """1 at the smallest value, 0 at the largest; 0 everywhere where all are equal."""
    values = values.double()
    spread = values.max() - values.min()
    return torch.where(spread > 0, (values.max() - values) / torch.where(spread > 0, spread, 1.0), 0.0)
