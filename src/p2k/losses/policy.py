"""Policy-gradient losses per token and per sequence, on verl's contract.

Every loss takes ``(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)``, all
tensors ``[rows, tokens]``, and returns ``(loss, metrics)``. `config` is None, a dict of the loss's own options, or a
trainer's configuration object. `rollout_is_weights` corrects for a sampler that is not the old policy, token by token.
"""

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

from p2k.core.checks import check_floating, check_same_device, check_shape
from p2k.losses.reduction import aggregate, as_mask, masked_mean, sequence_log_ratio, wide
from p2k.losses.registry import read_options, register_policy_loss

# Beyond e^20 a ratio says only that the batch is useless; float32 must still be able to square it.
TOKEN_LOG_RATIO_LIMIT = 20.0
SEQUENCE_LOG_RATIO_LIMIT = 10.0
AGGREGATION_OPTIONS = {"loss_scale_factor": None, "num_items_in_batch": None}
CLIP_OPTIONS = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": None}


def check_batch(op: str, mask: Tensor, **tensors: Tensor) -> Bool[Tensor, "rows tokens"]:
    """Check verl's tensors, ``[rows, tokens]`` on one device, and return the mask as booleans."""
    first = tensors["log_prob"]
    if first.ndim != 2:
        raise ValueError(f"{op}: log_prob must be [rows, tokens], got shape {tuple(first.shape)}")
    for name, tensor in tensors.items():
        check_floating(op, **{name: tensor})
        check_shape(op, name, tensor, tuple(first.shape))
    check_shape(op, "response_mask", mask, tuple(first.shape))
    check_same_device(op, **tensors, response_mask=mask)
    return as_mask(mask, first)


def _clip_bounds(op: str, options: object) -> tuple[float, float]:
    """Lower and upper end of the ratios that may move; `clip_ratio` stands in for the end that is not given."""
    low = options.clip_ratio if options.clip_ratio_low is None else options.clip_ratio_low
    high = options.clip_ratio if options.clip_ratio_high is None else options.clip_ratio_high
    if not (0 <= low < 1 and high >= 0):
        raise ValueError(f"{op}: clip_ratio_low must lie in [0, 1) and clip_ratio_high be >= 0, got {low} and {high}")
    return 1 - low, 1 + high


def _weighted(op: str, losses: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return losses
    check_shape(op, "rollout_is_weights", weights, tuple(losses.shape))
    return losses * wide(weights.detach())


@register_policy_loss("vanilla")
def ppo_clip_loss(
    old_log_prob: Float[Tensor, "rows tokens"],
    log_prob: Float[Tensor, "rows tokens"],
    advantages: Float[Tensor, "rows tokens"],
    response_mask: Num[Tensor, "rows tokens"] | Bool[Tensor, "rows tokens"],
    loss_agg_mode: str = "token-mean",
    config: object = None,
    rollout_is_weights: Float[Tensor, "rows tokens"] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's pessimistic clipped ratio; GRPO, Dr.GRPO, RLOO and DAPO are this loss with other advantages and means.

    Options: `clip_ratio` 0.2, `clip_ratio_low`, `clip_ratio_high` (DAPO raises it alone), `clip_ratio_c` 3.0, the cap
    on the loss of a negative advantage in units of it (None for no cap), and those of `aggregate`.

    Raises:
        ValueError: shapes disagree or an option is unknown or out of range.
        TypeError: a tensor is not floating point.

    Source: schulman2017ppo, eq:policy-map-ppo-clip.
    Chapter: policy-map
    """
    op = "ppo_clip_loss"
    keep = check_batch(op, response_mask, log_prob=log_prob, old_log_prob=old_log_prob, advantages=advantages)
    options = read_options(op, config, **CLIP_OPTIONS, clip_ratio_c=3.0, **AGGREGATION_OPTIONS)
    low, high = _clip_bounds(op, options)
    raw = sequence_log_ratio(log_prob, old_log_prob, keep, ratio_level="token")
    ratio = raw.clamp(-TOKEN_LOG_RATIO_LIMIT, TOKEN_LOG_RATIO_LIMIT).exp()
    advantage = torch.where(keep, wide(advantages.detach()), 0.0)
    free, clipped = -advantage * ratio, -advantage * ratio.clamp(low, high)
    losses = torch.maximum(free, clipped)
    metrics = {
        "actor/ppo_kl": masked_mean(-raw.detach(), keep),
        "actor/pg_clipfrac": masked_mean((clipped > free).to(losses.dtype), keep),
    }
    if options.clip_ratio_c is not None:
        if not options.clip_ratio_c > 1:
            raise ValueError(f"{op}: clip_ratio_c must be > 1, got {options.clip_ratio_c}")
        cap = -advantage * options.clip_ratio_c
        capped = (advantage < 0) & (losses > cap)
        losses = torch.where(capped, cap, losses)
        metrics["actor/pg_clipfrac_lower"] = masked_mean(capped.to(losses.dtype), keep)
    return _aggregate(_weighted(op, losses, rollout_is_weights), keep, loss_agg_mode, options), metrics


@register_policy_loss("gpg")
def reinforce_loss(
    old_log_prob: Float[Tensor, "rows tokens"],
    log_prob: Float[Tensor, "rows tokens"],
    advantages: Float[Tensor, "rows tokens"],
    response_mask: Num[Tensor, "rows tokens"] | Bool[Tensor, "rows tokens"],
    loss_agg_mode: str = "token-mean",
    config: object = None,
    rollout_is_weights: Float[Tensor, "rows tokens"] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """REINFORCE: log-probability times advantage, without a ratio. Right for the first update on a batch only.

    Options: those of `aggregate`. Raises as `ppo_clip_loss`.

    Source: williams1992reinforce, eq:policy-map-reinforce.
    Chapter: policy-map
    """
    op = "reinforce_loss"
    keep = check_batch(op, response_mask, log_prob=log_prob, old_log_prob=old_log_prob, advantages=advantages)
    options = read_options(op, config, **AGGREGATION_OPTIONS)
    advantage = torch.where(keep, wide(advantages.detach()), 0.0)
    losses = -advantage * torch.where(keep, wide(log_prob), 0.0)
    drift = wide(old_log_prob.detach()) - wide(log_prob.detach())
    metrics = {"actor/ppo_kl": masked_mean(drift, keep)}
    return _aggregate(_weighted(op, losses, rollout_is_weights), keep, loss_agg_mode, options), metrics


@register_policy_loss("gspo")
def gspo_loss(
    old_log_prob: Float[Tensor, "rows tokens"],
    log_prob: Float[Tensor, "rows tokens"],
    advantages: Float[Tensor, "rows tokens"],
    response_mask: Num[Tensor, "rows tokens"] | Bool[Tensor, "rows tokens"],
    loss_agg_mode: str = "seq-mean-token-mean",
    config: object = None,
    rollout_is_weights: Float[Tensor, "rows tokens"] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's clip on one ratio per sequence, the geometric mean of its token ratios.

    Options: `clip_ratio` 3e-4, `clip_ratio_low`, `clip_ratio_high` (4e-4 in the paper; short sequences need about
    0.2), `num_items_in_batch` in sequences. Only `seq-mean-token-mean` is defined: all tokens of a sequence share its
    ratio. The gradient is that of the value, as in TRL: with `rollout_is_weights` that differ within a sequence, every
    token of it gets their mean, where verl's backward pass gives each token its own. Raises as `ppo_clip_loss`, and
    for any other aggregation.

    Source: zheng2025gspo, eq:policy-map-gspo.
    Chapter: policy-map
    """
    op = "gspo_loss"
    keep = check_batch(op, response_mask, log_prob=log_prob, old_log_prob=old_log_prob, advantages=advantages)
    if loss_agg_mode != "seq-mean-token-mean":
        raise ValueError(f"{op}: the ratio belongs to a sequence: use seq-mean-token-mean, got {loss_agg_mode!r}")
    options = read_options(op, config, **{**CLIP_OPTIONS, "clip_ratio": 3e-4}, **AGGREGATION_OPTIONS)
    low, high = _clip_bounds(op, options)
    raw = sequence_log_ratio(log_prob, old_log_prob, keep, ratio_level="sequence_mean").unsqueeze(-1)
    ratio = raw.clamp(max=SEQUENCE_LOG_RATIO_LIMIT).exp()
    advantage = torch.where(keep, wide(advantages.detach()), 0.0)
    free, clipped = -advantage * ratio, -advantage * ratio.clamp(low, high)
    losses = torch.maximum(free, clipped)
    metrics = {
        "actor/ppo_kl": masked_mean(-raw.detach().expand_as(keep), keep),
        "actor/pg_clipfrac": masked_mean((clipped > free).to(losses.dtype), keep),
    }
    return _aggregate(_weighted(op, losses, rollout_is_weights), keep, loss_agg_mode, options), metrics


def _aggregate(losses: Tensor, keep: Tensor, mode: str, options: object) -> Tensor:
    return aggregate(
        losses,
        keep,
        mode,
        loss_scale_factor=options.loss_scale_factor,
        num_items_in_batch=options.num_items_in_batch,
    )
