"""Target distributions over a list: what rewards, labels or a teacher say of its candidates. None has a gradient.

Letters: r reward, h bandwidth, F smoothed distribution function, s score.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from p2k.core.checks import check_positive
from p2k.losses.reduction import as_mask, masked_mean, masked_sum, wide

# Robust spread of a normal distribution: its interquartile range is 1.349 standard deviations.
IQR_OF_NORMAL = 1.349
SMALLEST_BANDWIDTH = 1e-3
CDF_MARGIN = 1e-3


def softmax_target(
    rewards: Float[Tensor, "*lists candidates"],
    *,
    beta_reward: float = 1.0,
    mask: Bool[Tensor, "*lists candidates"] | None = None,
) -> Float[Tensor, "*lists candidates"]:
    """Boltzmann distribution of the rewards; with teacher logits, the teacher; with two candidates, Bradley-Terry.

    Args:
        rewards: any scores, larger is better. Only differences within a list matter.
        beta_reward: temperature in units of the reward, ``> 0``.
        mask: true where a candidate exists; others get 0, and a list without candidates is 0 throughout.

    Raises:
        ValueError: `beta_reward` is not positive and finite, or the mask has another shape.

    Source: wang2025adpo, eq:adpo-target.
    Chapter: adpo
    """
    check_positive("softmax_target", beta_reward=beta_reward)
    scores = wide(rewards.detach()) / beta_reward
    keep = as_mask(mask, scores)
    empty = ~keep.any(-1, keepdim=True)
    filled = torch.where(keep, scores, torch.where(empty, 0.0, -torch.inf).to(scores.dtype))
    return torch.where(keep, filled.softmax(-1), 0.0)


def standardised_target(
    rewards: Float[Tensor, "*lists candidates"],
    *,
    beta_reward: float = 0.5,
    eps: float = 1e-8,
    mask: Bool[Tensor, "*lists candidates"] | None = None,
) -> Float[Tensor, "*lists candidates"]:
    """Boltzmann distribution of the rewards after centring and division by their unbiased deviation plus `eps`.

    Equal rewards, and a list of one, give the uniform distribution. Arguments as in `softmax_target`.

    Source: wang2025adpo, eq:adpo-target.
    Chapter: adpo
    """
    check_positive("standardised_target", eps=eps)
    values = wide(rewards.detach())
    keep = as_mask(mask, values)
    centred = values - masked_mean(values, keep, -1).unsqueeze(-1)
    degrees = (keep.sum(-1, keepdim=True) - 1).clamp(min=1)
    deviation = (masked_sum(centred.square(), keep, -1).unsqueeze(-1) / degrees).sqrt()
    return softmax_target(centred / (deviation + eps), beta_reward=beta_reward, mask=keep)


def best_target(
    rewards: Float[Tensor, "*lists candidates"], *, mask: Bool[Tensor, "*lists candidates"] | None = None
) -> Float[Tensor, "*lists candidates"]:
    """All mass on the best candidate (the first of several equals): top one against the rest.

    Source: wang2025adpo, eq:adpo-target.
    Chapter: adpo
    """
    values = wide(rewards.detach())
    keep = as_mask(mask, values)
    best = torch.where(keep, values, -torch.inf).argmax(-1, keepdim=True)
    return torch.where(keep, torch.zeros_like(values).scatter(-1, best, 1.0), 0.0)


def pair_target(like: Float[Tensor, "*lists 2"], *, label_smoothing: float = 0.0) -> Float[Tensor, "*lists 2"]:
    """The pair (chosen, rejected) with a label that is wrong with probability `label_smoothing`, in ``[0, 0.5)``.

    Raises:
        ValueError: the lists are not pairs, or the smoothing is out of range.

    Source: wang2025adpo, eq:adpo-dpo.
    Chapter: adpo
    """
    if like.shape[-1] != 2:
        raise ValueError(f"pair_target: lists must hold 2 candidates, got shape {tuple(like.shape)}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"pair_target: label_smoothing must lie in [0, 0.5), got {label_smoothing}")
    pair = wide(like).new_tensor([1 - label_smoothing, label_smoothing])
    return pair.expand(like.shape)


def kde_scores(rewards: Float[Tensor, "*lists candidates"]) -> Float[Tensor, "*lists candidates"]:
    """Log-odds of the kernel-smoothed rank of each reward in its list.

    The scores keep the order of the rewards, are bounded by ``log(2 P - 1)`` for lists of P, because a candidate's own
    kernel puts it at least ``1 / (2 P)`` away from both ends, and ignore a shift or a rescaling of a whole list.

    Source: wang2025adpo, eq:adpo-kde.
    Chapter: adpo
    """
    r = wide(rewards.detach())
    count = r.shape[-1]
    ordered = r.sort(-1).values
    # Quartiles by linear interpolation; torch.quantile would refuse long batches.
    spread = _interpolate(ordered, 0.75) - _interpolate(ordered, 0.25)
    deviation = r.std(-1, keepdim=True) if count > 1 else torch.zeros_like(r)
    h = 1.06 * torch.minimum(deviation, spread / IQR_OF_NORMAL) * count**-0.2
    h = h.clamp(min=SMALLEST_BANDWIDTH)
    F = torch.special.ndtr((r.unsqueeze(-1) - r.unsqueeze(-2)) / h.unsqueeze(-1)).mean(-1)
    return torch.logit(F.clamp(CDF_MARGIN, 1 - CDF_MARGIN))


def kde_target(
    rewards: Float[Tensor, "*lists candidates"], *, beta_reward: float = 1.0
) -> Float[Tensor, "*lists candidates"]:
    """Boltzmann distribution of `kde_scores`: an outlier in the rewards moves it no further than a bounded score.

    Args:
        rewards: any scores, larger is better. Lists must be whole: a mask would change the bandwidth.
        beta_reward: temperature of the scores, ``> 0``.

    Source: wang2025adpo, eq:adpo-kde.
    Chapter: adpo
    """
    return softmax_target(kde_scores(rewards), beta_reward=beta_reward)


def _interpolate(ordered: Tensor, fraction: float) -> Tensor:
    """Quantile of sorted values along the last dimension, kept as a dimension of one."""
    position = fraction * (ordered.shape[-1] - 1)
    low, high = math.floor(position), math.ceil(position)
    return torch.lerp(ordered[..., low : low + 1], ordered[..., high : high + 1], position - low)
