"""Anchored direct preference optimization: cross-entropy of a target with the anchored list policy."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from p2k.losses.lists import anchored_logits, check_lists, list_metrics, resolve_temperature
from p2k.losses.reduction import as_mask, reduce


def adpo_loss(
    logps: Float[Tensor, "*lists candidates"],
    ref_logps: Float[Tensor, "*lists candidates"],
    targets: Float[Tensor, "*lists candidates"],
    *,
    tau: float | Tensor | None = None,
    beta: float | None = None,
    mask: Bool[Tensor, "*lists candidates"] | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Fit the list policy ``softmax((logps - ref_logps) / tau)`` to a target distribution by cross-entropy.

    The minimiser is ``ref * targets ** tau`` up to a constant: a larger tau shrinks gradient and curvature but puts the
    optimum farther from the anchor. Small tau, that is large ``beta = 1 / tau``, stays near it.

    Args:
        logps: log-probability of each candidate under the policy, in nats: the sum over its tokens, or their mean for
            length-normalised lists.
        ref_logps: the same under the anchor; it receives no gradient.
        targets: target probabilities, each list sums to 1 (not checked); no gradient. See `p2k.losses.targets`.
        tau: temperature ``> 0``, a number or a tensor that broadcasts to ``[*lists, 1]``; default 1.
        beta: ``1 / tau``, instead of it.
        mask: true where a candidate exists. An empty list counts nowhere and gets a zero gradient.
        reduction: `none` (one loss per list), `mean` over non-empty lists, or `sum`.

    Returns:
        The loss, in float32 for half-precision inputs, and detached metrics. A log-probability of -inf whose target is
        0 is harmless; NaN and other infinities stay in the list they came in.

    Raises:
        ValueError: shapes or devices disagree, an option is out of range, or both tau and beta are given.
        TypeError: a tensor is not floating point.

    Source: wang2025adpo, eq:adpo-loss.
    Chapter: adpo
    """
    op = "adpo_loss"
    check_lists(op, logps, ref_logps=ref_logps, targets=targets)
    keep = as_mask(mask, logps)
    logits = anchored_logits(logps, ref_logps, tau=resolve_temperature(op, tau, beta), mask=keep)
    log_policy = logits.log_softmax(-1)
    target = torch.where(keep, targets.detach().to(logits.dtype), 0.0)
    losses = -torch.where(target > 0, target * log_policy, 0.0).sum(-1)
    metrics = list_metrics(log_policy, target, logps.detach() - ref_logps.detach(), keep)
    return reduce(losses, reduction, keep.any(-1)), metrics


def decoupled_adpo_loss(
    logps: Float[Tensor, "*lists candidates"],
    ref_logps: Float[Tensor, "*lists candidates"],
    targets: Float[Tensor, "*lists candidates"],
    *,
    tau: float | Tensor | None = None,
    beta: float | None = None,
    mask: Bool[Tensor, "*lists candidates"] | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Replace the log of the list's normaliser by its tangent at the anchor, so that no candidate waits for another.

    Computes ``-sum(targets * u) + mean(exp(u))`` with anchored logits u. It lies above ``adpo_loss - log P + 1``,
    touches it where the mean of ``exp(u)`` is 1, and has its gradient at the anchor, but a shift of a whole list
    changes it. Arguments, metrics and errors as in `adpo_loss`.

    Source: wang2025adpo, eq:adpo-decoupled.
    Chapter: adpo
    """
    op = "decoupled_adpo_loss"
    check_lists(op, logps, ref_logps=ref_logps, targets=targets)
    keep = as_mask(mask, logps)
    logits = anchored_logits(logps, ref_logps, tau=resolve_temperature(op, tau, beta), mask=keep)
    target = torch.where(keep, targets.detach().to(logits.dtype), 0.0)
    linear = torch.where(target > 0, target * logits, 0.0).sum(-1)
    losses = torch.where(keep, logits.exp(), 0.0).sum(-1) / keep.sum(-1).clamp(min=1) - linear
    metrics = list_metrics(logits.log_softmax(-1), target, logps.detach() - ref_logps.detach(), keep)
    return reduce(losses, reduction, keep.any(-1)), metrics


class ADPOLoss(nn.Module):
    """Module twin of `adpo_loss`.

    Source: wang2025adpo, eq:adpo-loss.
    Chapter: adpo
    """

    def __init__(self, tau: float | None = None, *, beta: float | None = None, reduction: str = "mean") -> None:
        super().__init__()
        self.tau = resolve_temperature("ADPOLoss", tau, beta)
        self.reduction = reduction

    def forward(
        self, logps: Tensor, ref_logps: Tensor, targets: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its metrics."""
        return adpo_loss(logps, ref_logps, targets, tau=self.tau, mask=mask, reduction=self.reduction)

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"tau={self.tau}, reduction={self.reduction!r}"
