"""What every loss shares: wide arithmetic, masks through which no NaN leaks, reductions and token aggregation."""

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

REDUCTIONS = ("none", "mean", "sum")
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
RATIO_LEVELS = ("sequence", "sequence_mean", "token")
KL_ESTIMATORS = ("k1", "k2", "k3")


def check_choice(op: str, name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of the supported names."""
    if value not in choices or not isinstance(value, str):
        raise ValueError(f"{op}: {name} must be one of {', '.join(choices)}, got {value!r}")


def wide(tensor: Tensor) -> Tensor:
    """Float32 for the half types, unchanged otherwise: exponentials and sums must not run in 16 bits."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def as_mask(mask: Tensor | None, like: Tensor) -> Bool[Tensor, "*shape"]:
    """A boolean mask of the shape of `like`; None keeps everything, integers and floats count where not zero."""
    if mask is None:
        return torch.ones_like(like, dtype=torch.bool)
    if mask.shape != like.shape:
        raise ValueError(f"mask must have shape {tuple(like.shape)}, got {tuple(mask.shape)}")
    return mask != 0


def masked_sum(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum where the mask is true. A masked NaN does not enter, as it would through a product with zero."""
    kept = torch.where(mask, values, 0.0)
    return kept.sum() if dim is None else kept.sum(dim)


def masked_mean(values: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean where the mask is true, and 0 where it is nowhere true."""
    count = mask.sum() if dim is None else mask.sum(dim)
    return masked_sum(values, mask, dim) / count.clamp(min=1)


def reduce(values: Float[Tensor, "*items"], reduction: str, mask: Tensor | None = None) -> Tensor:
    """Apply `none`, `mean` or `sum`. Masked items are 0, do not count in the mean and receive no gradient."""
    check_choice("reduce", "reduction", reduction, REDUCTIONS)
    keep = as_mask(mask, values)
    if reduction == "none":
        return torch.where(keep, values, 0.0)
    return masked_sum(values, keep) if reduction == "sum" else masked_mean(values, keep)


def aggregate(
    losses: Float[Tensor, "rows tokens"],
    mask: Num[Tensor, "rows tokens"] | Bool[Tensor, "rows tokens"],
    loss_agg_mode: str = "token-mean",
    *,
    loss_scale_factor: float | None = None,
    num_items_in_batch: float | Tensor | None = None,
) -> Float[Tensor, ""]:
    """Reduce a loss per token to a number; no amount of padding changes the result.

    Args:
        losses: loss of each token, ``[rows, tokens]``.
        mask: 1 where a token counts. A row without any is no sequence: no mean over sequences counts it.
        loss_agg_mode: `token-mean`, all tokens weigh the same; `seq-mean-token-mean`, all sequences weigh the same;
            `seq-mean-token-sum`, the mean over sequences of their sums; `seq-mean-token-sum-norm`, the sum over
            everything divided by `loss_scale_factor`.
        loss_scale_factor: the constant of `seq-mean-token-sum-norm`, usually the longest response in tokens. It has
            no default, because the padded width would make the loss depend on the padding. verl 0.9 also divides by the
            number of sequences: its factor times that number is ours.
        num_items_in_batch: tokens (`token-mean`) or sequences (`seq-mean-*`) of the whole batch, when this call sees
            a part of it and the parts are summed.

    Raises:
        ValueError: an unknown mode, or a number that the mode does not use or lacks.
    """
    op = "aggregate"
    check_choice(op, "loss_agg_mode", loss_agg_mode, AGGREGATIONS)
    constant = loss_agg_mode == "seq-mean-token-sum-norm"
    if constant and loss_scale_factor is None:
        raise ValueError(f"{op}: {loss_agg_mode} needs loss_scale_factor: pass the longest response length in tokens")
    if not constant and loss_scale_factor is not None:
        raise ValueError(f"{op}: loss_scale_factor belongs to seq-mean-token-sum-norm, not to {loss_agg_mode}")
    if constant and num_items_in_batch is not None:
        raise ValueError(f"{op}: {loss_agg_mode} divides by loss_scale_factor and takes no num_items_in_batch")
    keep = as_mask(mask, losses)
    if constant:
        return masked_sum(losses, keep) / loss_scale_factor
    if loss_agg_mode == "token-mean":
        count = keep.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return masked_sum(losses, keep) / count
    per_row = masked_mean(losses, keep, -1) if loss_agg_mode == "seq-mean-token-mean" else masked_sum(losses, keep, -1)
    count = keep.any(-1).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return per_row.sum() / count


def sequence_log_ratio(
    logps: Float[Tensor, "*rows tokens"],
    old_logps: Float[Tensor, "*rows tokens"],
    mask: Num[Tensor, "*rows tokens"] | Bool[Tensor, "*rows tokens"] | None = None,
    *,
    ratio_level: str = "sequence",
) -> Tensor:
    """Log of the probability ratio to the old policy, at the level a loss works on.

    Args:
        logps: log-probability of each sampled token.
        old_logps: the same under the old policy; it receives no gradient.
        mask: 1 where a token counts; masked tokens contribute 0.
        ratio_level: `sequence`, the sum (log of the product of token ratios), ``[*rows]``; `sequence_mean`, the mean
            over valid tokens (log of the geometric mean), ``[*rows]``; `token`, unreduced, ``[*rows, tokens]``.

    Raises:
        ValueError: shapes disagree or the level is unknown.
    """
    check_choice("sequence_log_ratio", "ratio_level", ratio_level, RATIO_LEVELS)
    if logps.shape != old_logps.shape:
        raise ValueError(
            f"sequence_log_ratio: old_logps must have shape {tuple(logps.shape)}, got {tuple(old_logps.shape)}"
        )
    keep = as_mask(mask, logps)
    # Masking before any exponential: a masked -inf would otherwise turn the zero gradient into NaN.
    log_ratio = torch.where(keep, wide(logps) - wide(old_logps).detach(), 0.0)
    if ratio_level == "token":
        return log_ratio
    total = log_ratio.sum(-1)
    return total if ratio_level == "sequence" else total / keep.sum(-1).clamp(min=1)


def kl_estimate(
    logps: Float[Tensor, "*shape"], ref_logps: Float[Tensor, "*shape"], *, estimator: str = "k3"
) -> Float[Tensor, "*shape"]:
    """Estimate KL(policy || reference) from samples of the policy, sample by sample.

    Args:
        logps: log-probability under the policy.
        ref_logps: log-probability under the reference.
        estimator: with d = ref - policy: `k1` is -d, `k2` is d^2 / 2, `k3` is exp(d) - d - 1 (never negative).

    Raises:
        ValueError: an unknown estimator.
    """
    check_choice("kl_estimate", "estimator", estimator, KL_ESTIMATORS)
    difference = wide(ref_logps).detach() - wide(logps)
    if estimator == "k1":
        return -difference
    return 0.5 * difference.square() if estimator == "k2" else torch.expm1(difference) - difference
