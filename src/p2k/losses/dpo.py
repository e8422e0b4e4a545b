"""Preference losses over pairs (chosen, rejected), under TRL's names.

Each loss is a function of the two log-ratios to the reference, chosen and rejected, in nats.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from p2k.core.checks import check_floating, check_positive, check_same_device, check_shape
from p2k.losses.reduction import reduce, wide

PairLoss = Callable[[Tensor, Tensor, float, float], Tensor]
PAIR_LOSSES: dict[str, PairLoss] = {}
# Upper end (excluded) of the label smoothing that a loss defines; a loss that is absent takes none.
SMOOTHED = {"sigmoid": 0.5, "robust": 0.5, "exo_pair": 0.5}


def register_pair_loss(name: str) -> Callable[[PairLoss], PairLoss]:
    """Enter a loss of (chosen log-ratio, rejected log-ratio, beta, label_smoothing) under a `loss_type`."""

    def enter(function: PairLoss) -> PairLoss:
        if name in PAIR_LOSSES:
            raise ValueError(f"register_pair_loss: {name!r} is taken")
        PAIR_LOSSES[name] = function
        return function

    return enter


@register_pair_loss("sigmoid")
def sigmoid_pair(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Bradley-Terry likelihood; with smoothing, conservative DPO, whose optimum is finite.

    Source: rafailov2023dpo, eq:dpo.
    Chapter: policy-map
    """
    logit = beta * (chosen - rejected)
    if label_smoothing == 0:
        # The absent term would be 0 * inf for an infinite margin.
        return -logsigmoid(logit)
    return -(1 - label_smoothing) * logsigmoid(logit) - label_smoothing * logsigmoid(-logit)


@register_pair_loss("robust")
def robust_pair(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Unbiased for the clean loss when labels flip with probability `label_smoothing`; unbounded below.

    Source: chowdhury2024rdpo, eq:robust-dpo.
    Chapter: policy-map
    """
    logit = beta * (chosen - rejected)
    if label_smoothing == 0:
        return -logsigmoid(logit)
    weighted = -(1 - label_smoothing) * logsigmoid(logit) + label_smoothing * logsigmoid(-logit)
    return weighted / (1 - 2 * label_smoothing)


@register_pair_loss("ipo")
def ipo_pair(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Squared distance of the margin to ``1 / (2 beta)``; pass length-averaged log-probabilities, as TRL does.

    Source: azar2024ipo, eq:ipo.
    Chapter: policy-map
    """
    return (chosen - rejected - 1 / (2 * beta)).square()


@register_pair_loss("hinge")
def hinge_pair(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Hinge on the scaled margin.

    Source: zhao2023slic, eq:slic.
    Chapter: policy-map
    """
    return (1 - beta * (chosen - rejected)).relu()


@register_pair_loss("exo_pair")
def exo_pair(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Reverse KL from the pair policy to the label ``(1 - label_smoothing, label_smoothing)``, which must be soft.

    Source: ji2024exo, eq:exo-pair.
    Chapter: policy-map
    """
    if label_smoothing == 0:
        raise ValueError("dpo_loss: exo_pair is infinite for hard labels: pass label_smoothing in (0, 0.5), say 1e-3")
    logit = beta * (chosen - rejected)
    win, lose = logsigmoid(logit), logsigmoid(-logit)
    label = torch.tensor([1 - label_smoothing, label_smoothing], dtype=torch.float64).log().tolist()
    return win.exp() * (win - label[0]) + lose.exp() * (lose - label[1])


@register_pair_loss("apo_zero")
def apo_zero_pair(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Anchored Preference Optimization, chosen up and rejected down; not this book's alpha-divergence APO.

    Source: doosterlinck2024apo, eq:apo-zero.
    Chapter: apo
    """
    return 1 - (beta * chosen).sigmoid() + (beta * rejected).sigmoid()


@register_pair_loss("apo_down")
def apo_down_pair(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Anchored Preference Optimization, both down and rejected more; not this book's alpha-divergence APO.

    Source: doosterlinck2024apo, eq:apo-down.
    Chapter: apo
    """
    return (beta * chosen).sigmoid() + 1 - (beta * (chosen - rejected)).sigmoid()


def _check_options(op: str, beta: float, loss_type: str, label_smoothing: float) -> None:
    """Raise ValueError, naming what is supported, for an option that a loss would ignore or cannot take."""
    check_positive(op, beta=beta)
    if loss_type not in PAIR_LOSSES:
        raise ValueError(f"{op}: loss_type must be one of {', '.join(PAIR_LOSSES)}, got {loss_type!r}")
    if label_smoothing == 0:
        return
    if loss_type not in SMOOTHED:
        takers = ", ".join(SMOOTHED)
        raise ValueError(f"{op}: {loss_type} takes no label_smoothing (only {takers} do), got {label_smoothing}")
    if not 0 < label_smoothing < SMOOTHED[loss_type]:
        raise ValueError(f"{op}: label_smoothing must lie in [0, {SMOOTHED[loss_type]}), got {label_smoothing}")


def dpo_loss(  # noqa: PLR0913  The four log-probabilities and the option names are TRL's.
    chosen_logps: Float[Tensor, "*pairs"],
    rejected_logps: Float[Tensor, "*pairs"],
    ref_chosen_logps: Float[Tensor, "*pairs"] | None,
    ref_rejected_logps: Float[Tensor, "*pairs"] | None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    reference_free: bool = False,
    reduction: str = "mean",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Preference loss over pairs of completions.

    Args:
        chosen_logps: log-probability of each preferred completion under the policy, in nats, summed over tokens.
        rejected_logps: the same for the other completion.
        ref_chosen_logps: the same under the reference, without gradient; None when `reference_free`.
        ref_rejected_logps: likewise.
        beta: inverse temperature ``> 0``.
        loss_type: `sigmoid`, `robust`, `ipo`, `hinge`, `exo_pair`, `apo_zero` or `apo_down`.
        label_smoothing: probability that a label is wrong, in ``[0, 0.5)``; for `sigmoid`, `robust` and `exo_pair`.
        reference_free: take the reference's log-probabilities as 0.
        reduction: `none`, `mean` or `sum` over pairs.

    Returns:
        The loss, in float32 for half-precision inputs, and detached metrics under TRL's names. No pairs give 0.

    Raises:
        ValueError: shapes or devices disagree, an option is unknown or out of range, or a loss would ignore it.
        TypeError: a tensor is not floating point.

    Source: rafailov2023dpo, eq:dpo.
    Chapter: policy-map
    """
    op = "dpo_loss"
    _check_options(op, beta, loss_type, label_smoothing)
    references = {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}
    if any((tensor is None) != reference_free for tensor in references.values()):
        raise ValueError(f"{op}: pass both reference log-probabilities, or None for both with reference_free=True")
    tensors = {"chosen_logps": chosen_logps, "rejected_logps": rejected_logps, **references}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for name, tensor in tensors.items():
        check_floating(op, **{name: tensor})
        check_shape(op, name, tensor, tuple(chosen_logps.shape))
    check_same_device(op, **tensors)
    chosen, rejected = wide(chosen_logps), wide(rejected_logps)
    if not reference_free:
        chosen, rejected = chosen - wide(ref_chosen_logps).detach(), rejected - wide(ref_rejected_logps).detach()
    losses = PAIR_LOSSES[loss_type](chosen, rejected, beta, label_smoothing)
    winner, loser = beta * chosen.detach(), beta * rejected.detach()
    watched = {
        "rewards/chosen": winner,
        "rewards/rejected": loser,
        "rewards/accuracies": (winner > loser).to(winner.dtype),
        "rewards/margins": winner - loser,
        "logps/chosen": wide(chosen_logps.detach()),
        "logps/rejected": wide(rejected_logps.detach()),
    }
    return reduce(losses, reduction), {name: reduce(values, "mean") for name, values in watched.items()}


class DPOLoss(nn.Module):
    """Module twin of `dpo_loss`, with a reference.

    Source: rafailov2023dpo, eq:dpo.
    Chapter: policy-map
    """

    def __init__(
        self,
        beta: float = 0.1,
        *,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _check_options("DPOLoss", beta, loss_type, label_smoothing)
        self.beta, self.loss_type = beta, loss_type
        self.label_smoothing, self.reduction = label_smoothing, reduction

    def forward(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor,
        ref_rejected_logps: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its metrics."""
        return dpo_loss(
            chosen_logps,
            rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            beta=self.beta,
            loss_type=self.loss_type,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"beta={self.beta}, loss_type={self.loss_type!r}, label_smoothing={self.label_smoothing}"
