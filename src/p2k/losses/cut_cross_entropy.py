"""Cross-entropy from hidden states and the head's weight, exact by default, with the paper's filter on request."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from p2k.core.autocast import as_linear_operand
from p2k.core.backend import Backend
from p2k.core.checks import check_positive
from p2k.losses.reduction import REDUCTIONS, check_choice, reduce, wide
from p2k.ops.cut_cross_entropy import cut_cross_entropy, default_filter_eps
from p2k.ops.linear_logp import linear_logp


def linear_cross_entropy(  # noqa: PLR0913 - torch's arguments, then the head's, then the filter's
    hidden: Float[Tensor, "*tokens dim"],
    weight: Float[Tensor, "vocab dim"],
    target: Int64[Tensor, "*tokens"],
    bias: Float[Tensor, " vocab"] | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss_weight: float = 0.0,
    softcap: float | None = None,
    filter_eps: float | str | None = None,
    sort_vocab: bool = False,
    filter_weight: bool = True,
    backend: Backend = "auto",
) -> Tensor:
    """``cross_entropy(linear(hidden, weight, bias), target)`` without the logits of all tokens in memory.

    Loss and gradients are exact. With `filter_eps` the gradients, never the loss, leave out tiles of
    ``softmax - onehot`` below it: much of a flat softmax, as early in training, where ``1 / vocab`` is below it.

    Args:
        hidden: hidden state of each token, floating.
        weight: weight of the head, dtype of `hidden`.
        target: class of each token, ``[*tokens]``.
        bias: bias of the head, dtype of `hidden`.
        ignore_index: a target that marks a token as absent: loss and gradient 0, not counted.
        reduction: `none`, `mean` over present tokens (0 where there are none) or `sum`.
        label_smoothing: share of the target spread evenly over the vocabulary, in ``[0, 1]``; not with `softcap`.
        z_loss_weight: adds this times the square of log-sum-exp, ``>= 0``.
        softcap: c of ``c tanh(z / c)``, ``> 0``; computed tile by tile.
        filter_eps: None keeps every gradient; a threshold in ``(0, 1)``, or `auto`: eps of the product's dtype / 32.
        sort_vocab: with a filter, order the vocabulary by mean logit in the backward pass: more tiles are skipped.
        filter_weight: with a filter, False keeps the gradients of `weight` and `bias` whole.
        backend: `auto`, `torch` or `triton`.

    Returns:
        The loss in nats, float32 (float64 for float64): a scalar, or ``[*tokens]`` for `none`.

    Raises:
        ValueError: shapes or devices disagree, an option is out of range, or an option has nothing to act on.
        TypeError: a tensor is not floating point, the dtypes disagree, or `target` is not int64.

    Source: wijmans2025cut, eq:cut-cross-entropy-loss, eq:cut-cross-entropy-smoothing.
    Chapter: cut-cross-entropy
    """
    check_choice("linear_cross_entropy", "reduction", reduction, REDUCTIONS)
    smoothing = label_smoothing, z_loss_weight, softcap
    eps = _check_options("linear_cross_entropy", hidden, *smoothing, filter_eps, sort_vocab, filter_weight)
    if softcap is None and eps == 0:
        logp, logsumexp, _ = linear_logp(hidden, weight, target, bias=bias, ignore_index=ignore_index, backend=backend)
        loss = -logp
    else:
        filtering = {"filter_eps": eps, "sort_vocab": sort_vocab, "filter_weight": filter_weight, "backend": backend}
        options = {"bias": bias, "softcap": softcap, "ignore_index": ignore_index, **filtering}
        loss, logsumexp = cut_cross_entropy(hidden, weight, target, **options)
    present = target != ignore_index
    if label_smoothing:
        loss = (1 - label_smoothing) * loss + label_smoothing * _above_mean(logsumexp, hidden, weight, bias, present)
    return reduce(loss + z_loss_weight * logsumexp.square() if z_loss_weight else loss, reduction, present)


def _above_mean(logsumexp: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, present: Tensor) -> Tensor:
    """Log-sum-exp over the mean of a token's logits, which is a product with the mean row of the head."""
    mean = weight.mean(0, dtype=wide(weight[:0]).dtype)
    logit = (wide(hidden.masked_fill(~present[..., None], 0.0)) * mean).sum(-1)
    return logsumexp - (logit if bias is None else logit + wide(bias).mean())


def _check_options(
    op: str, hidden: Tensor, label_smoothing: float, z_loss_weight: float, softcap: float | None,
    filter_eps: float | str | None, sort_vocab: bool, filter_weight: bool,
) -> float:  # fmt: skip
    """Raise ValueError for an option out of range or without effect; the threshold, 0 for none."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {label_smoothing}")
    check_positive(op, zero_allowed=True, z_loss_weight=z_loss_weight)
    if label_smoothing and softcap is not None:
        raise ValueError(f"{op}: label_smoothing needs the mean logit, which softcap makes as costly as all logits")
    if filter_eps is None:
        if sort_vocab or not filter_weight:
            raise ValueError(f"{op}: sort_vocab and filter_weight belong to a filter: pass filter_eps too")
        return 0.0
    # An empty slice has the dtype that the operands get under autocast.
    eps = default_filter_eps(as_linear_operand(hidden[..., :0]).dtype) if filter_eps == "auto" else filter_eps
    if isinstance(eps, str) or not 0 < eps < 1:
        raise ValueError(f"{op}: filter_eps must be None, 'auto' or in (0, 1), got {filter_eps!r}")
    return eps


class LinearCrossEntropyLoss(nn.Module):
    """`linear_cross_entropy` with its options fixed; the head's weight stays with the model and is an argument.

    Args:
        options: `ignore_index`, `reduction`, `label_smoothing`, `z_loss_weight`, `softcap`, `filter_eps`, `sort_vocab`,
            `filter_weight` and `backend`, as for `linear_cross_entropy`.

    Raises:
        ValueError: as `linear_cross_entropy`.

    Source: wijmans2025cut, eq:cut-cross-entropy-loss.
    Chapter: cut-cross-entropy
    """

    def __init__(  # noqa: PLR0913 - the function's options
        self,
        *,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss_weight: float = 0.0,
        softcap: float | None = None,
        filter_eps: float | str | None = None,
        sort_vocab: bool = False,
        filter_weight: bool = True,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        op = "LinearCrossEntropyLoss"
        check_choice(op, "reduction", reduction, REDUCTIONS)
        like = torch.empty(0)
        _check_options(op, like, label_smoothing, z_loss_weight, softcap, filter_eps, sort_vocab, filter_weight)
        self.options = {
            "ignore_index": ignore_index,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "z_loss_weight": z_loss_weight,
            "softcap": softcap,
            "filter_eps": filter_eps,
            "sort_vocab": sort_vocab,
            "filter_weight": filter_weight,
            "backend": backend,
        }

    def forward(
        self,
        hidden: Float[Tensor, "*tokens dim"],
        weight: Float[Tensor, "vocab dim"],
        target: Int64[Tensor, "*tokens"],
        bias: Float[Tensor, " vocab"] | None = None,
    ) -> Tensor:
        """The loss, as `linear_cross_entropy` returns it."""
        return linear_cross_entropy(hidden, weight, target, bias, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
