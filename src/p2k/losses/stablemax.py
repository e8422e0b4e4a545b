"""StableMax cross-entropy with torch's argument names, and a softmax cross-entropy that does not collapse."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from p2k.core.backend import Backend
from p2k.core.checks import check_floating, check_same_device, check_shape
from p2k.losses.reduction import REDUCTIONS, check_choice, reduce, wide
from p2k.ops.stablemax import stablemax_loss
from p2k.ops.stablemax.reference import symlog

__all__ = ["StableMaxCrossEntropyLoss", "rest_cross_entropy", "stablemax_cross_entropy"]


def stablemax_cross_entropy(
    logits: Float[Tensor, "*items classes"],
    target: Int64[Tensor, "*items"],
    weight: Float[Tensor, " classes"] | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """Cross-entropy with StableMax probabilities in the place of softmax.

    It is torch's cross-entropy of the symmetric logarithm of the logits. Unlike softmax it depends on a constant that
    is added to all logits.

    Args:
        logits: one number per class, classes last (`torch.nn.functional.cross_entropy` has them second; for two
            dimensions that is the same).
        target: class of each item.
        weight: factor on the loss of each class; the mean divides by the weights that were used.
        ignore_index: a target that marks an item as absent; it gets no loss and no gradient.
        reduction: `none`, `mean` over the items that are there (0 where there is none), or `sum`.
        label_smoothing: share of the target that is spread over all classes, in [0, 1].
        backend: `auto`, `torch` or `triton`; the kernel takes neither `weight` nor `label_smoothing`.

    Returns:
        The loss, in float32 for half-precision logits.

    Raises:
        ValueError: shapes or devices disagree, an option is out of range, a target is out of range on a CPU, or
            `triton` is asked for with an option that its kernel does not have.
        TypeError: `logits` or `weight` is not floating point, or `target` is not int64.
        BackendUnavailable: ``backend="triton"`` where Triton cannot run.

    Source: prieto2025grokking, eq:stablemax-loss.
    Chapter: stablemax
    """
    op = "stablemax_cross_entropy"
    check_choice(op, "reduction", reduction, REDUCTIONS)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must lie in [0, 1], got {label_smoothing}")
    if weight is None and label_smoothing == 0:
        losses = stablemax_loss(logits, target, ignore_index=ignore_index, backend=backend)
        return reduce(losses, reduction, target != ignore_index)
    if backend == "triton":
        raise ValueError(f"{op}: backend='triton' takes neither weight nor label_smoothing; use 'auto' or 'torch'")
    _check(op, logits, target, weight)
    rows, labels = symlog(wide(logits)).reshape(-1, logits.shape[-1]), target.reshape(-1)
    options = {"weight": None if weight is None else weight.to(rows.dtype), "label_smoothing": label_smoothing}
    if reduction == "mean" and labels.numel() > 0:
        total = F.cross_entropy(rows, labels, ignore_index=ignore_index, reduction="sum", **options)
        keep = labels != ignore_index
        counts = keep if weight is None else options["weight"][labels.masked_fill(~keep, 0)] * keep
        return total / counts.sum().clamp(min=torch.finfo(rows.dtype).tiny)
    kind = "none" if reduction == "none" else "sum"
    losses = F.cross_entropy(rows, labels, ignore_index=ignore_index, reduction=kind, **options)
    return losses.view(target.shape) if reduction == "none" else losses


def rest_cross_entropy(
    logits: Float[Tensor, "*items classes"],
    target: Int64[Tensor, "*items"],
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Softmax cross-entropy from the gap between the target's logit and the log-sum-exp of all others.

    ``log(1 + exp(-gap))`` keeps its relative accuracy, and so does its gradient, until the exponential underflows: in
    float32 at a gap of about 100, where ``log_softmax`` returns exactly 0 from about 17 on.

    Args:
        logits: one number per class, classes last.
        target: class of each item.
        ignore_index: a target that marks an item as absent; it gets no loss and no gradient.
        reduction: `none`, `mean` over the items that are there, or `sum`.

    Returns:
        The loss, in float32 for half-precision logits.

    Raises:
        ValueError: shapes or devices disagree, or `reduction` is unknown.
        TypeError: `logits` is not floating point or `target` is not int64.

    Source: prieto2025grokking, eq:stablemax-rest.
    Chapter: stablemax
    """
    op = "rest_cross_entropy"
    check_choice(op, "reduction", reduction, REDUCTIONS)
    _check(op, logits, target, None)
    keep = target != ignore_index
    label = target.masked_fill(~keep, 0)[..., None]
    z = wide(logits).masked_fill(~keep[..., None], 0.0)
    others = z.scatter(-1, label, -torch.inf)
    top = others.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).min)
    total = (others - top).exp().sum(-1)
    alone = total == 0
    gap = z.gather(-1, label)[..., 0] - top[..., 0] - torch.where(alone, 1.0, total).log()
    return reduce(-F.logsigmoid(gap.masked_fill(alone, torch.inf)), reduction, keep)


class StableMaxCrossEntropyLoss(nn.Module):
    """`stablemax_cross_entropy` as a module, with the arguments of `torch.nn.CrossEntropyLoss`.

    Args:
        weight: factor on the loss of each class, ``[classes]``.
        ignore_index: a target that marks an item as absent.
        reduction: `none`, `mean` or `sum`.
        label_smoothing: share of the target that is spread over all classes, in [0, 1].

    Source: prieto2025grokking, eq:stablemax-loss.
    Chapter: stablemax
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        check_choice("StableMaxCrossEntropyLoss", "reduction", reduction, REDUCTIONS)
        self.register_buffer("weight", weight)
        self.ignore_index, self.reduction, self.label_smoothing = ignore_index, reduction, label_smoothing

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of a batch."""
        return stablemax_cross_entropy(
            logits,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


def _check(op: str, logits: Tensor, target: Tensor, weight: Tensor | None) -> None:
    """Dtypes, devices and shapes."""
    check_floating(op, logits=logits)
    check_same_device(op, logits=logits, target=target, **({} if weight is None else {"weight": weight}))
    if target.dtype != torch.int64:
        raise TypeError(f"{op}: target must be torch.int64, got {target.dtype}")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"{op}: logits must have a last dimension of at least 1, got shape {tuple(logits.shape)}")
    check_shape(op, "target", target, tuple(logits.shape[:-1]))
    if weight is not None:
        check_floating(op, weight=weight)
        check_shape(op, "weight", weight, (logits.shape[-1],))
