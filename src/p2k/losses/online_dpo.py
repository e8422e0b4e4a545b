"""DPO on verl's contract: every pair of a group's samples with different rewards, anchored at the old policy."""

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from p2k.losses.lists import split_groups
from p2k.losses.listwise import all_pairs_loss
from p2k.losses.policy import check_batch
from p2k.losses.reduction import masked_mean, sequence_log_ratio, wide
from p2k.losses.registry import read_options, register_policy_loss


@register_policy_loss("online_dpo")
def online_dpo_policy_loss(
    old_log_prob: Float[Tensor, "rows tokens"],
    log_prob: Float[Tensor, "rows tokens"],
    advantages: Float[Tensor, "rows tokens"],
    response_mask: Num[Tensor, "rows tokens"] | Bool[Tensor, "rows tokens"],
    loss_agg_mode: str = "seq-mean-token-mean",
    config: object = None,
    rollout_is_weights: None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`all_pairs_loss` of each group, the higher advantage chosen; a group of equals has no pair and costs nothing.

    With binary rewards and success rate p the first step on a group of G follows ``(R - p) beta / (2 G p (1 - p))``:
    the direction of GRPO with the square of its weight.

    Options: `num_generations` (required), `beta` 1, `index` None. A group without a valid token counts nowhere.

    Raises:
        ValueError: shapes disagree, rows are not whole groups, an option is unknown, or another aggregation than one
            loss per group, averaged over groups, is asked for.
        TypeError: a tensor is not floating point.

    Source: rafailov2023dpo, eq:policy-map-dpo-all-pairs.
    Chapter: policy-map
    """
    op = "online_dpo_policy_loss"
    keep = check_batch(op, response_mask, log_prob=log_prob, old_log_prob=old_log_prob, advantages=advantages)
    options = read_options(op, config, num_generations=None, beta=1.0, index=None)
    if loss_agg_mode != "seq-mean-token-mean" or rollout_is_weights is not None:
        raise ValueError(f"{op}: a group has one loss: use seq-mean-token-mean without weights, got {loss_agg_mode!r}")
    if options.num_generations is None:
        raise ValueError(f"{op}: config must give num_generations, the samples per prompt")
    groups = split_groups(op, options.num_generations, keep.shape[0], options.index)
    shape = (groups, options.num_generations)
    ratio = sequence_log_ratio(log_prob, old_log_prob, keep).view(shape)
    advantage = _per_row(advantages, keep).view(shape).to(ratio.dtype)
    anchor, present = torch.zeros_like(ratio), keep.any(-1).view(shape)
    losses, metrics = all_pairs_loss(ratio, anchor, advantage, beta=options.beta, mask=present, reduction="none")
    return masked_mean(losses, present.any(-1)), metrics


def _per_row(advantages: Tensor, keep: Tensor) -> Tensor:
    """Mean over a row's valid tokens, measured from the largest: equal tokens give their value to the last bit.

    A plain mean rounds with the length, and two answers that differ in the last bit only would make a pair.
    """
    values = wide(advantages.detach())
    best = torch.where(keep, values, -torch.inf).amax(-1)
    best = torch.where(keep.any(-1), best, 0.0)
    return best + masked_mean(values - best.unsqueeze(-1), keep, -1)
