"""ADPO, APO and GOPO on verl's contract: one loss per group of samples of the same prompt, anchored at the old policy.

Row ``b * num_generations + g`` is sample g of prompt b, so a micro-batch holds whole groups. With `index`, the prompt
identifiers on the host, the order itself is checked. A row without a valid token leaves its group.
"""

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from p2k.losses.adpo import adpo_loss
from p2k.losses.apo import apo_loss
from p2k.losses.gopo import gopo_loss, token_gopo_losses
from p2k.losses.lists import split_groups
from p2k.losses.policy import AGGREGATION_OPTIONS, check_batch
from p2k.losses.reduction import aggregate, check_choice, masked_mean, sequence_log_ratio, wide
from p2k.losses.registry import read_options, register_policy_loss
from p2k.losses.targets import softmax_target

GROUP_OPTIONS = {"num_generations": None, "index": None, "ratio_level": "sequence", "log_ratio_clip": None}


def _groups(
    op: str, tensors: dict[str, Tensor], mask: Tensor, options: object, levels: tuple[str, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-ratios ``[groups, samples]``, one advantage per sample, and which samples count."""
    keep = check_batch(op, mask, **tensors)
    check_choice(op, "ratio_level", options.ratio_level, levels)
    if options.num_generations is None:
        raise ValueError(f"{op}: config must give num_generations, the samples per prompt")
    size = options.num_generations
    groups = split_groups(op, size, keep.shape[0], options.index)
    level = "sequence_mean" if options.ratio_level == "sequence_mean" else "sequence"
    log_ratio = sequence_log_ratio(tensors["log_prob"], tensors["old_log_prob"], keep, ratio_level=level)
    if options.log_ratio_clip is not None:
        log_ratio = log_ratio.clamp(-options.log_ratio_clip, options.log_ratio_clip)
    advantage = masked_mean(wide(tensors["advantages"].detach()), keep, -1)
    shape = (groups, size)
    return log_ratio.view(shape), advantage.view(shape), keep.any(-1).view(shape)


def _only_group_mean(op: str, loss_agg_mode: str, weights: Tensor | None) -> None:
    """Options of the contract that a loss per group cannot honour are refused, not dropped."""
    if loss_agg_mode != "seq-mean-token-mean":
        raise ValueError(
            f"{op}: a group has one loss, averaged over groups: use seq-mean-token-mean, got {loss_agg_mode!r}"
        )
    _no_weights(op, weights)


def _no_weights(op: str, weights: Tensor | None) -> None:
    if weights is not None:
        raise ValueError(f"{op}: rollout_is_weights per token have no place in a loss per group: pass None")


@register_policy_loss("adpo")
def adpo_policy_loss(
    old_log_prob: Float[Tensor, "rows tokens"],
    log_prob: Float[Tensor, "rows tokens"],
    advantages: Float[Tensor, "rows tokens"],
    response_mask: Num[Tensor, "rows tokens"] | Bool[Tensor, "rows tokens"],
    loss_agg_mode: str = "seq-mean-token-mean",
    config: object = None,
    rollout_is_weights: None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`adpo_loss` with the old policy as anchor and the Boltzmann distribution of the advantages as target.

    Options: `num_generations` (required), `tau` 0.8, `beta_reward` 0.5, `ratio_level` `sequence` or `sequence_mean`,
    `log_ratio_clip` None, `index` None.

    Raises:
        ValueError: shapes disagree, rows are not whole groups, or an option is unknown or unsupported.
        TypeError: a tensor is not floating point.

    Source: wang2025adpo, eq:adpo-online.
    Chapter: adpo
    """
    op = "adpo_policy_loss"
    _only_group_mean(op, loss_agg_mode, rollout_is_weights)
    options = read_options(op, config, **GROUP_OPTIONS, tau=0.8, beta_reward=0.5)
    tensors = {"log_prob": log_prob, "old_log_prob": old_log_prob, "advantages": advantages}
    ratio, advantage, keep = _groups(op, tensors, response_mask, options, ("sequence", "sequence_mean"))
    target = softmax_target(advantage, beta_reward=options.beta_reward, mask=keep).to(ratio.dtype)
    return adpo_loss(ratio, torch.zeros_like(ratio), target, tau=options.tau, mask=keep)


@register_policy_loss("apo")
def apo_policy_loss(
    old_log_prob: Float[Tensor, "rows tokens"],
    log_prob: Float[Tensor, "rows tokens"],
    advantages: Float[Tensor, "rows tokens"],
    response_mask: Num[Tensor, "rows tokens"] | Bool[Tensor, "rows tokens"],
    loss_agg_mode: str = "seq-mean-token-mean",
    config: object = None,
    rollout_is_weights: None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`apo_loss` with the old policy as anchor and the Boltzmann distribution of the advantages as target.

    Options: those of `adpo_policy_loss` with `tau` 0.5 and `beta_reward` 0.3, and `alpha` 0.6, a number or a tensor.
    Raises likewise.

    Source: wang2025apo, eq:apo-online.
    Chapter: apo
    """
    op = "apo_policy_loss"
    _only_group_mean(op, loss_agg_mode, rollout_is_weights)
    options = read_options(op, config, **GROUP_OPTIONS, tau=0.5, beta_reward=0.3, alpha=0.6)
    tensors = {"log_prob": log_prob, "old_log_prob": old_log_prob, "advantages": advantages}
    ratio, advantage, keep = _groups(op, tensors, response_mask, options, ("sequence", "sequence_mean"))
    target = softmax_target(advantage, beta_reward=options.beta_reward, mask=keep).to(ratio.dtype)
    return apo_loss(ratio, torch.zeros_like(ratio), target, alpha=options.alpha, tau=options.tau, mask=keep)


@register_policy_loss("gopo")
def gopo_policy_loss(
    old_log_prob: Float[Tensor, "rows tokens"],
    log_prob: Float[Tensor, "rows tokens"],
    advantages: Float[Tensor, "rows tokens"],
    response_mask: Num[Tensor, "rows tokens"] | Bool[Tensor, "rows tokens"],
    loss_agg_mode: str = "seq-mean-token-mean",
    config: object = None,
    rollout_is_weights: None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`gopo_loss` on the ratio of each sequence, or of each token against its sequence's target.

    Options: `num_generations` (required), `mu` 0.5, `ratio_level` `sequence`, `sequence_mean` or `token`,
    `log_ratio_clip` 5, `index` None, and with `token` those of `aggregate`: only there any aggregation is defined.
    Raises as `adpo_policy_loss`.

    Source: wang2026gopo, eq:gopo-bounded-loss.
    Chapter: gopo
    """
    op = "gopo_policy_loss"
    defaults = {**GROUP_OPTIONS, "log_ratio_clip": 5.0, "mu": 0.5, **AGGREGATION_OPTIONS}
    options = read_options(op, config, **defaults)
    tensors = {"log_prob": log_prob, "old_log_prob": old_log_prob, "advantages": advantages}
    ratio, advantage, keep = _groups(op, tensors, response_mask, options, ("sequence", "sequence_mean", "token"))
    if options.ratio_level != "token":
        _only_group_mean(op, loss_agg_mode, rollout_is_weights)
        clip = options.log_ratio_clip
        return gopo_loss(ratio, torch.zeros_like(ratio), advantage, mu=options.mu, mask=keep, log_ratio_clip=clip)
    _no_weights(op, rollout_is_weights)
    shape = (*advantage.shape, log_prob.shape[-1])
    losses, metrics = token_gopo_losses(
        log_prob.view(shape),
        old_log_prob.view(shape),
        advantage,
        mu=options.mu,
        mask=response_mask.view(shape),
        log_ratio_clip=options.log_ratio_clip,
    )
    scale, items = options.loss_scale_factor, options.num_items_in_batch
    rows = losses.view(log_prob.shape)
    loss = aggregate(rows, response_mask, loss_agg_mode, loss_scale_factor=scale, num_items_in_batch=items)
    return loss, metrics
