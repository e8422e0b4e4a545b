"""Lists of candidates in coordinates relative to an anchor: the ground that ADPO, APO and the rankings stand on."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from p2k.core.checks import check_floating, check_positive, check_same_device, check_shape
from p2k.losses.reduction import as_mask, masked_mean, wide


def check_lists(op: str, logps: Tensor, **others: Tensor) -> None:
    """Raise unless all tensors are floating, on one device and of the shape of `logps`, with at least one candidate."""
    for name, tensor in {"logps": logps, **others}.items():
        check_floating(op, **{name: tensor})
        check_shape(op, name, tensor, tuple(logps.shape))
    check_same_device(op, logps=logps, **others)
    if logps.ndim == 0 or logps.shape[-1] == 0:
        raise ValueError(f"{op}: logps must be [*lists, candidates] with a candidate or more, got {tuple(logps.shape)}")


def resolve_temperature(op: str, tau: float | Tensor | None, beta: float | None) -> float | Tensor:
    """Tau from either `tau` or ``beta = 1 / tau``; 1 when neither is given.

    Raises:
        ValueError: both are given, or a number is not positive and finite. A tensor is not read: that would wait for
            the device.
    """
    if tau is not None and beta is not None:
        raise ValueError(f"{op}: pass tau or beta = 1 / tau, not both")
    if beta is not None:
        check_positive(op, beta=beta)
        return 1.0 / beta
    if tau is None:
        return 1.0
    if not isinstance(tau, Tensor):
        check_positive(op, tau=tau)
    return tau


def anchored_logits(
    logps: Float[Tensor, "*lists candidates"],
    ref_logps: Float[Tensor, "*lists candidates"],
    *,
    tau: float | Tensor = 1.0,
    mask: Bool[Tensor, "*lists candidates"] | None = None,
) -> Float[Tensor, "*lists candidates"]:
    """Log-ratio to the anchor divided by the temperature; its softmax over the list is the anchored list policy.

    Args:
        logps: log-probability of each candidate under the policy.
        ref_logps: log-probability under the anchor; it receives no gradient.
        tau: temperature ``> 0``, a number or a tensor that broadcasts to ``[*lists, 1]``.
        mask: true where a candidate exists. Others get -inf; a list without candidates gets zeros, so that its
            softmax stays finite.

    Source: wang2025adpo, eq:adpo-anchored-logits.
    Chapter: adpo
    """
    logits = (wide(logps) - wide(ref_logps).detach()) / tau
    keep = as_mask(mask, logits)
    empty = ~keep.any(-1, keepdim=True)
    return torch.where(keep, logits, torch.where(empty, 0.0, -torch.inf).to(logits.dtype))


def informative(
    rewards: Float[Tensor, "*lists candidates"], mask: Bool[Tensor, "*lists candidates"] | None = None
) -> Bool[Tensor, "*lists"]:
    """True for the lists whose rewards differ. The others teach nothing: DAPO resamples, a list loss masks them."""
    keep = as_mask(mask, rewards)
    highest = torch.where(keep, rewards, -torch.inf).amax(-1)
    lowest = torch.where(keep, rewards, torch.inf).amin(-1)
    return highest > lowest


def list_metrics(
    log_policy: Float[Tensor, "*lists candidates"],
    targets: Float[Tensor, "*lists candidates"],
    log_ratio: Float[Tensor, "*lists candidates"],
    keep: Bool[Tensor, "*lists candidates"],
) -> dict[str, Tensor]:
    """Detached means over non-empty lists of what one watches: fit to the target, sharpness, distance to the anchor."""
    log_policy, targets, log_ratio = log_policy.detach(), targets.detach(), log_ratio.detach()
    filled = keep.any(-1)
    policy = torch.where(keep, log_policy.exp(), 0.0)
    divergence = torch.where(targets > 0, targets * (targets.log() - log_policy), 0.0).sum(-1)
    entropy = -torch.where(policy > 0, policy * log_policy, 0.0).sum(-1)
    agrees = policy.argmax(-1) == targets.argmax(-1)
    return {
        "kl": masked_mean(divergence, filled),
        "entropy": masked_mean(entropy, filled),
        "rewards/accuracies": masked_mean(agrees.to(policy.dtype), filled),
        "log_ratio/mean_abs": masked_mean(log_ratio.abs(), keep),
    }


def split_groups(op: str, num_generations: int, rows: int, index: Sequence | None = None) -> int:
    """Number of groups when row ``b * num_generations + g`` is sample g of prompt b.

    Args:
        op: name for the message.
        num_generations: samples per prompt, at least 1.
        rows: rows of the batch.
        index: prompt identifier of each row on the host, where known, to check the order itself.

    Raises:
        ValueError: the rows are not whole groups, or the identifiers show that a group is split or shuffled. A loss
            over a group is wrong on a part of it, so a micro-batch must hold whole groups.
    """
    if num_generations < 1 or rows % num_generations:
        raise ValueError(
            f"{op}: {rows} rows are not whole groups of num_generations={num_generations}: "
            "choose a micro-batch size that is a multiple of it"
        )
    if index is not None:
        names = [str(name) for name in index]
        heads = names[::num_generations]
        whole = len(set(heads)) == len(heads) and all(
            name == heads[row // num_generations] for row, name in enumerate(names)
        )
        if len(names) != rows or not whole:
            raise ValueError(
                f"{op}: the rows of one prompt must stand together, {num_generations} at a time: "
                "sort the batch by prompt before it is cut into micro-batches"
            )
    return rows // num_generations
