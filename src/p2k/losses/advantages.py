"""Advantages from rewards: functions of one reward per row and its group, and estimators on verl's contract.

A group is the samples of one prompt. Rows of a group need not stand together: `group_ids` numbers them.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from p2k.core.checks import check_floating, check_positive, check_shape
from p2k.losses.reduction import as_mask, check_choice, masked_mean, masked_sum, wide
from p2k.losses.registry import read_options, register_adv_est

SCALES = ("group", "batch", "none")


def group_ids(index: Sequence | np.ndarray | Tensor, device: torch.device | str = "cpu") -> Int[Tensor, " rows"]:
    """Number the prompts of a batch from their identifiers on the host (any hashable; strings in verl).

    A tensor is taken as the numbers themselves, in ``[0, rows)``.
    """
    if isinstance(index, Tensor):
        return index.to(device)
    _, numbers = np.unique(np.asarray([str(name) for name in index]), return_inverse=True)
    return torch.as_tensor(numbers, device=device)


def _group_sum(values: Tensor, groups: Tensor) -> Tensor:
    """For each row, the sum over its group. There are never more groups than rows, so none need be counted."""
    totals = values.new_zeros(values.shape[0]).index_add(0, groups, values)
    return totals[groups]


def _centre(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Reward minus its group's mean, and the size of the group.

    The group's best comes off first. Otherwise the mean of equal rewards need not round to them, and the difference
    of one unit round-off over a deviation of 0 + 1e-6 is an advantage of 0.06 in float32.
    """
    check_shape("advantages", "groups", groups, tuple(rewards.shape))
    size = _group_sum(torch.ones_like(rewards), groups)
    best = torch.full_like(rewards, -torch.inf).scatter_reduce(0, groups, rewards, "amax")[groups]
    gap = rewards - best
    return gap - _group_sum(gap, groups) / size, size


def group_advantages(
    rewards: Float[Tensor, " rows"],
    groups: Int[Tensor, " rows"],
    *,
    scale_rewards: str = "group",
    eps: float = 1e-6,
) -> Float[Tensor, " rows"]:
    """Reward minus its group's mean, divided by a deviation: GRPO with `group`, Dr.GRPO with `none`.

    Args:
        rewards: one reward per row.
        groups: number of each row's prompt, in ``[0, rows)``.
        scale_rewards: divide by the unbiased deviation of the `group` or of the whole `batch`, plus `eps`, or by
            `none`. A lone sample has no baseline and, as in verl, keeps its reward with deviation 1.
        eps: added to the deviation, ``> 0``: verl uses 1e-6, TRL 1e-4.

    Raises:
        ValueError: an unknown scale (True and False are refused: they do not say which), or shapes disagree.
        TypeError: the rewards are not floating point.

    Source: shao2024grpo, eq:policy-map-grpo-advantage; liu2025drgrpo, eq:policy-map-dr-grpo-advantage.
    Chapter: policy-map
    """
    check_choice("group_advantages", "scale_rewards", scale_rewards, SCALES)
    check_positive("group_advantages", eps=eps)
    values = wide(rewards.detach())
    check_floating("group_advantages", rewards=rewards)
    deviations, size = _centre(values, groups)
    alone = size == 1
    centred = torch.where(alone, values, deviations)
    if scale_rewards == "none":
        return centred
    if scale_rewards == "batch":
        return centred / (values.std() + eps) if values.numel() > 1 else centred
    variance = _group_sum(deviations.square(), groups) / (size - 1).clamp(min=1)
    return centred / torch.where(alone, 1.0, variance.sqrt() + eps)


def rloo_advantages(rewards: Float[Tensor, " rows"], groups: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Reward minus the mean of the other samples of its group; a lone sample keeps its reward.

    Arguments and errors as in `group_advantages`.

    Source: ahmadian2024rloo, eq:policy-map-rloo.
    Chapter: policy-map
    """
    values = wide(rewards.detach())
    check_floating("rloo_advantages", rewards=rewards)
    deviations, size = _centre(values, groups)
    return torch.where(size == 1, values, deviations * size / (size - 1).clamp(min=1))


def informative_rows(rewards: Float[Tensor, " rows"], groups: Int[Tensor, " rows"]) -> Bool[Tensor, " rows"]:
    """True for rows of groups whose rewards differ: DAPO resamples the others, because they teach nothing.

    Source: yu2025dapo, eq:policy-map-dapo-dynamic-sampling.
    Chapter: policy-map
    """
    deviations, _ = _centre(wide(rewards.detach()), groups)
    return _group_sum(deviations.abs(), groups) > 0


def overlong_penalty(lengths: Num[Tensor, " rows"], *, max_length: int, cache: int) -> Float[Tensor, " rows"]:
    """DAPO's soft punishment of long answers: 0 up to ``max_length - cache``, then linear to -1 at `max_length`.

    Args:
        lengths: response lengths in tokens.
        max_length: longest response that earns more than -1.
        cache: width of the ramp in tokens, in ``[1, max_length]``.

    Source: yu2025dapo, eq:policy-map-dapo-overlong.
    Chapter: policy-map
    """
    if not 1 <= cache <= max_length:
        raise ValueError(f"overlong_penalty: cache must lie in [1, max_length={max_length}], got {cache}")
    return ((max_length - cache - lengths) / cache).clamp(-1.0, 0.0)


def generalised_advantages(
    token_level_rewards: Float[Tensor, "rows tokens"],
    values: Float[Tensor, "rows tokens"],
    response_mask: Num[Tensor, "rows tokens"] | Bool[Tensor, "rows tokens"],
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
) -> tuple[Float[Tensor, "rows tokens"], Float[Tensor, "rows tokens"]]:
    """Discounted sums of temporal differences, and the returns that train the critic; masked tokens are skipped.

    Args:
        token_level_rewards: reward of each token.
        values: the critic's estimate before each token.
        response_mask: 1 where a token counts.
        gamma: discount in [0, 1].
        lam: trace decay in [0, 1].

    Source: schulman2016gae, eq:policy-map-gae.
    Chapter: policy-map
    """
    keep = as_mask(response_mask, values)
    reward, value = wide(token_level_rewards.detach()), wide(values.detach())
    trace = next_value = torch.zeros_like(value[:, 0])
    traces = []
    for token in reversed(range(value.shape[1])):
        error = reward[:, token] + gamma * next_value - value[:, token]
        trace = torch.where(keep[:, token], error + gamma * lam * trace, trace)
        next_value = torch.where(keep[:, token], value[:, token], next_value)
        traces.append(trace)
    advantages = torch.where(keep, torch.stack(traces[::-1], dim=1), 0.0)
    return advantages, torch.where(keep, advantages + value, 0.0)


def whiten(values: Float[Tensor, "rows tokens"], mask: Bool[Tensor, "rows tokens"]) -> Float[Tensor, "rows tokens"]:
    """Shift and scale to mean 0 and unbiased variance 1 over the tokens that count."""
    centred = values - masked_mean(values, mask)
    variance = masked_sum(centred.square(), mask) / (mask.sum() - 1).clamp(min=1)
    return torch.where(mask, centred * (variance + 1e-8).rsqrt(), 0.0)


def _per_token(token_level_rewards: Tensor, response_mask: Tensor) -> tuple[Tensor, Bool[Tensor, "rows tokens"]]:
    keep = as_mask(response_mask, token_level_rewards)
    return masked_sum(wide(token_level_rewards.detach()), keep, -1), keep


@register_adv_est("grpo")
def grpo_estimator(
    token_level_rewards: Tensor, response_mask: Tensor, *, index: Sequence | Tensor, config: object = None
) -> tuple[Tensor, Tensor]:
    """`group_advantages` for each row's summed reward, on each of its tokens. Options: `scale_rewards`, `epsilon`."""
    options = read_options("grpo_estimator", config, scale_rewards="group", epsilon=1e-6)
    rewards, keep = _per_token(token_level_rewards, response_mask)
    ids = group_ids(index, rewards.device)
    advantages = group_advantages(rewards, ids, scale_rewards=options.scale_rewards, eps=options.epsilon)
    spread = torch.where(keep, advantages.unsqueeze(-1), 0.0)
    return spread, spread


@register_adv_est("dr_grpo")
def dr_grpo_estimator(
    token_level_rewards: Tensor, response_mask: Tensor, *, index: Sequence | Tensor, config: object = None
) -> tuple[Tensor, Tensor]:
    """`grpo_estimator` without a deviation: the centred reward. It takes no options."""
    read_options("dr_grpo_estimator", config)
    return grpo_estimator(token_level_rewards, response_mask, index=index, config={"scale_rewards": "none"})


@register_adv_est("rloo")
def rloo_estimator(
    token_level_rewards: Tensor, response_mask: Tensor, *, index: Sequence | Tensor, config: object = None
) -> tuple[Tensor, Tensor]:
    """`rloo_advantages` for each row's summed reward, on each of its tokens. It takes no options."""
    read_options("rloo_estimator", config)
    rewards, keep = _per_token(token_level_rewards, response_mask)
    spread = torch.where(keep, rloo_advantages(rewards, group_ids(index, rewards.device)).unsqueeze(-1), 0.0)
    return spread, spread


@register_adv_est("gae")
def gae_estimator(
    token_level_rewards: Tensor, response_mask: Tensor, *, values: Tensor, config: object = None
) -> tuple[Tensor, Tensor]:
    """`generalised_advantages`, whitened over the batch. Options: `gamma` and `lam`, both 1."""
    options = read_options("gae_estimator", config, gamma=1.0, lam=1.0)
    advantages, returns = generalised_advantages(
        token_level_rewards, values, response_mask, gamma=options.gamma, lam=options.lam
    )
    return whiten(advantages, as_mask(response_mask, advantages)), returns
