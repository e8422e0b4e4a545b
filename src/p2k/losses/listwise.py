"""Losses that read the order of a whole list: Plackett-Luce likelihood and Bradley-Terry over all pairs."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from p2k.losses.lists import anchored_logits, check_lists, list_metrics, resolve_temperature
from p2k.losses.reduction import as_mask, masked_mean, reduce
from p2k.losses.targets import best_target


def plackett_luce_loss(
    logps: Float[Tensor, "*lists candidates"],
    ref_logps: Float[Tensor, "*lists candidates"],
    rewards: Float[Tensor, "*lists candidates"],
    *,
    tau: float | Tensor | None = None,
    beta: float | None = None,
    mask: Bool[Tensor, "*lists candidates"] | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Negative log-likelihood of the ranking by reward, drawn best first from the anchored list policy.

    Args:
        logps: log-probability of each candidate under the policy, in nats.
        ref_logps: the same under the anchor; no gradient.
        rewards: scores that order the list; equals stay in the order in which they come.
        tau: temperature ``> 0``; default 1.
        beta: ``1 / tau``, instead of it.
        mask: true where a candidate exists.
        reduction: `none` (one loss per list, summed over places), `mean` over non-empty lists, or `sum`.

    Raises:
        ValueError: shapes or devices disagree, or an option is out of range.
        TypeError: a tensor is not floating point.

    Source: xia2008listmle, eq:policy-map-plackett-luce.
    Chapter: policy-map
    """
    op = "plackett_luce_loss"
    check_lists(op, logps, ref_logps=ref_logps, rewards=rewards)
    keep = as_mask(mask, logps)
    u = anchored_logits(logps, ref_logps, tau=resolve_temperature(op, tau, beta), mask=keep)
    order = torch.where(keep, rewards.detach().to(u.dtype), -torch.inf).argsort(dim=-1, descending=True, stable=True)
    present = keep.gather(-1, order)
    ranked = u.gather(-1, order)
    still_open = ranked.flip(-1).logcumsumexp(-1).flip(-1)
    losses = torch.where(present, still_open - ranked, 0.0).sum(-1)
    metrics = list_metrics(u.log_softmax(-1), best_target(rewards, mask=keep).to(u.dtype), logps - ref_logps, keep)
    return reduce(losses, reduction, keep.any(-1)), metrics


def all_pairs_loss(
    logps: Float[Tensor, "*lists candidates"],
    ref_logps: Float[Tensor, "*lists candidates"],
    rewards: Float[Tensor, "*lists candidates"],
    *,
    beta: float = 0.1,
    mask: Bool[Tensor, "*lists candidates"] | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO averaged over all pairs of a list with different rewards: the baseline that sees what a list loss sees.

    Args:
        logps: log-probability of each candidate under the policy, in nats.
        ref_logps: the same under the reference; no gradient.
        rewards: scores whose order makes the pairs; a tie makes none.
        beta: inverse temperature ``> 0``.
        mask: true where a candidate exists.
        reduction: `none` (one loss per list), `mean` over lists with a pair or more, or `sum`.

    Raises:
        ValueError: shapes or devices disagree, or an option is out of range.
        TypeError: a tensor is not floating point.

    Source: rafailov2023dpo, eq:policy-map-dpo-all-pairs.
    Chapter: policy-map
    """
    op = "all_pairs_loss"
    check_lists(op, logps, ref_logps=ref_logps, rewards=rewards)
    keep = as_mask(mask, logps)
    tau = resolve_temperature(op, None, beta)
    scaled = torch.where(keep, anchored_logits(logps, ref_logps, tau=tau), 0.0)
    margins = scaled.unsqueeze(-1) - scaled.unsqueeze(-2)
    r = rewards.detach()
    pairs = (r.unsqueeze(-1) > r.unsqueeze(-2)) & keep.unsqueeze(-1) & keep.unsqueeze(-2)
    # Only pairs that count may meet the sigmoid: inf - inf elsewhere would leave a NaN gradient.
    per_pair = -logsigmoid(torch.where(pairs, margins, 0.0))
    pairs_flat, per_flat = pairs.flatten(-2), per_pair.flatten(-2)
    losses = masked_mean(per_flat, pairs_flat, -1)
    margins_flat = torch.where(pairs, margins, 0.0).detach().flatten(-2)
    metrics = {
        "rewards/accuracies": masked_mean((margins_flat > 0).to(margins_flat.dtype), pairs_flat),
        "rewards/margins": masked_mean(margins_flat, pairs_flat),
    }
    return reduce(losses, reduction, pairs_flat.any(-1)), metrics
