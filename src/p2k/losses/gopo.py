"""Group orthogonalized policy optimization: regress probability ratios to a projected target, one group at a time.

Letters: g drive (advantage or reward), mu stiffness, lam multiplier, v = rho - 1 relative change, rho ratio.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from p2k.core.checks import check_floating, check_positive, check_same_device, check_shape
from p2k.losses.reduction import as_mask, masked_mean, reduce, wide


def _normalised_weights(op: str, g: Tensor, weights: Tensor | None) -> Tensor:
    """Weights that sum to 1 in each group with any, uniform by default."""
    if g.ndim == 0 or g.shape[-1] == 0:
        raise ValueError(f"{op}: advantages must be [*groups, samples] with a sample or more, got {tuple(g.shape)}")
    pi = torch.ones_like(g) if weights is None else weights.to(g.dtype)
    check_shape(op, "weights", pi, tuple(g.shape))
    check_same_device(op, advantages=g, weights=pi)
    total = pi.sum(-1, keepdim=True)
    return pi / torch.where(total > 0, total, 1.0)


def water_fill(
    advantages: Float[Tensor, "*groups samples"],
    mu: float | Tensor,
    *,
    weights: Float[Tensor, "*groups samples"] | Bool[Tensor, "*groups samples"] | None = None,
) -> Float[Tensor, "*groups 1"]:
    """Solve ``sum(weights * max(-1, (advantages - lam) / mu)) = 0`` for lam, exactly, by one sort.

    Were the k best samples the free ones, the equation would be linear with root lam_k. The free samples are the
    longest prefix of the sorted group whose last member stays above its own ``lam_k - mu``.

    Args:
        advantages: drive of each sample; a shift of a group shifts its multiplier.
        mu: stiffness ``> 0``, a number or a tensor that broadcasts to ``[*groups, 1]``.
        weights: non-negative mass of each sample, any scale, or a mask; None means uniform. Samples of mass 0 have
            no say, and a group without mass gets 0.

    Raises:
        ValueError: a shape disagrees, a group is empty, or `mu` is not positive and finite.
        TypeError: the advantages are not floating point.

    Source: wang2026gopo, eq:gopo-water-filling.
    Chapter: gopo
    """
    op = "water_fill"
    check_floating(op, advantages=advantages)
    if not isinstance(mu, Tensor):
        check_positive(op, mu=mu)
    g = wide(advantages.detach())
    pi = _normalised_weights(op, g, weights)
    # Samples without mass may hold anything, so they stand at the mean; centring keeps a common offset out of the sums.
    heavy = pi > 0
    center = torch.where(heavy, pi * g, 0.0).sum(-1, keepdim=True)
    ordered, order = torch.where(heavy, g - center, 0.0).sort(-1, descending=True)
    mass = pi.gather(-1, order)
    filled = mass.cumsum(-1)
    candidates = ((mass * ordered).cumsum(-1) - mu * (1 - filled)) / filled.clamp(min=torch.finfo(g.dtype).tiny)
    free = ordered - candidates > -mu
    last = (free.sum(-1, keepdim=True) - 1).clamp(min=0)
    lam = candidates.gather(-1, last) + center
    return torch.where(heavy.any(-1, keepdim=True), lam, 0.0)


def bounded_projection(
    advantages: Float[Tensor, "*groups samples"],
    mu: float | Tensor,
    *,
    weights: Float[Tensor, "*groups samples"] | Bool[Tensor, "*groups samples"] | None = None,
) -> tuple[Float[Tensor, "*groups samples"], Float[Tensor, "*groups 1"]]:
    """The point of ``{v >= -1, mean v = 0}`` nearest to ``advantages / mu``, and the multiplier of the mean.

    Arguments and errors as in `water_fill`. A clamped sample has v = -1: its target probability is exactly 0.

    Source: wang2026gopo, eq:gopo-bounded.
    Chapter: gopo
    """
    lam = water_fill(advantages, mu, weights=weights)
    return ((wide(advantages.detach()) - lam) / mu).clamp(min=-1.0), lam


def linear_projection(
    advantages: Float[Tensor, "*groups samples"],
    mu: float | Tensor,
    *,
    weights: Float[Tensor, "*groups samples"] | Bool[Tensor, "*groups samples"] | None = None,
) -> tuple[Float[Tensor, "*groups samples"], Float[Tensor, "*groups 1"]]:
    """The zero-mean point nearest to ``advantages / mu``, and its multiplier: the mean advantage.

    Arguments as in `water_fill`.

    Source: wang2026gopo, eq:gopo-projection.
    Chapter: gopo
    """
    check_floating("linear_projection", advantages=advantages)
    g = wide(advantages.detach())
    pi = _normalised_weights("linear_projection", g, weights)
    lam = torch.where(pi > 0, pi * g, 0.0).sum(-1, keepdim=True)
    return (g - lam) / mu, lam


def stiffness_for_radius(advantages: Float[Tensor, "*groups samples"], chi_square: float) -> Float[Tensor, "*groups 1"]:
    """The mu whose linear projection has exactly this Pearson chi-square: ``sqrt(variance / chi_square)``.

    Holds while the bound is inactive, that is while no advantage lies more than mu below its group's mean.

    Source: wang2026gopo, eq:gopo-radius.
    Chapter: gopo
    """
    check_positive("stiffness_for_radius", chi_square=chi_square)
    return (wide(advantages.detach()).var(-1, correction=0, keepdim=True) / chi_square).sqrt()


def _ratios(op: str, logps: Tensor, old_logps: Tensor, advantages: Tensor, limit: float | None) -> Tensor:
    """Check the group's tensors and return the probability ratios, with the log-ratio clamped to ``+-limit``."""
    check_floating(op, logps=logps)
    check_floating(op, old_logps=old_logps)
    check_floating(op, advantages=advantages)
    check_shape(op, "old_logps", old_logps, tuple(logps.shape))
    check_same_device(op, logps=logps, old_logps=old_logps, advantages=advantages)
    if logps.shape not in (advantages.shape, advantages.shape + logps.shape[-1:]):
        raise ValueError(
            f"{op}: logps must have the shape of advantages {tuple(advantages.shape)}, or one more dimension for "
            f"tokens, got {tuple(logps.shape)}"
        )
    log_ratio = wide(logps) - wide(old_logps).detach()
    if limit is not None:
        check_positive(op, log_ratio_clip=limit)
        log_ratio = log_ratio.clamp(-limit, limit)
    return log_ratio.exp()


def gopo_loss(
    logps: Float[Tensor, "*groups samples"],
    old_logps: Float[Tensor, "*groups samples"],
    advantages: Float[Tensor, "*groups samples"],
    *,
    mu: float = 0.5,
    mask: Bool[Tensor, "*groups samples"] | None = None,
    log_ratio_clip: float | None = 5.0,
    stop_ratio: float | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Half mu times the squared distance of each ratio to its bounded target ``1 + max(-1, (advantage - lam) / mu)``.

    Args:
        logps: log-probability of each sample under the policy: sum over tokens, or their mean for the geometric ratio.
        old_logps: the same under the policy that sampled; no gradient.
        advantages: rewards or centred rewards; only differences within a group matter.
        mu: stiffness ``> 0``: curvature of the loss in the ratio, and the depth below the multiplier at which a
            sample's target becomes 0.
        mask: true where a sample counts. An empty group counts nowhere and gets a zero gradient.
        log_ratio_clip: log-ratios beyond it are clamped and get no gradient; None leaves them.
        stop_ratio: clamped samples at or below this ratio get a gradient of exactly 0; None keeps the pull, which
            decays with the square of the ratio.
        reduction: `none` (one loss per group), `mean` over non-empty groups, or `sum`.

    Returns:
        The loss, in float32 for half-precision inputs, and detached metrics.

    Raises:
        ValueError: shapes or devices disagree, or an option is out of range.
        TypeError: a tensor is not floating point.

    Source: wang2026gopo, eq:gopo-bounded-loss.
    Chapter: gopo
    """
    op = "gopo_loss"
    check_shape(op, "logps", logps, tuple(advantages.shape))
    keep = as_mask(mask, advantages)
    rho = _ratios(op, torch.where(keep, logps, 0.0), torch.where(keep, old_logps, 0.0), advantages, log_ratio_clip)
    change, lam = bounded_projection(advantages, mu, weights=keep)
    clamped = keep & (change <= -1.0)
    if stop_ratio is not None:
        check_positive(op, stop_ratio=stop_ratio)
        rho = torch.where(clamped & (rho.detach() <= stop_ratio), rho.detach(), rho)
    losses = masked_mean(0.5 * mu * (rho - (1 + change)).square(), keep, -1)
    return reduce(losses, reduction, keep.any(-1)), _metrics(rho, change, lam, clamped, keep)


def linear_gopo_loss(
    logps: Float[Tensor, "*groups samples"],
    old_logps: Float[Tensor, "*groups samples"],
    advantages: Float[Tensor, "*groups samples"],
    *,
    mu: float = 0.5,
    mask: Bool[Tensor, "*groups samples"] | None = None,
    log_ratio_clip: float | None = 5.0,
    reduction: str = "mean",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean of ``mu / 2 * (ratio - 1)^2 - A * ratio`` with the advantage centred in its group: the unbounded projection.

    Its gradient is that of `gopo_loss` while no centred advantage lies below -mu. Arguments and errors as there.

    Source: wang2026gopo, eq:gopo-linear-loss.
    Chapter: gopo
    """
    op = "linear_gopo_loss"
    check_shape(op, "logps", logps, tuple(advantages.shape))
    check_positive(op, mu=mu)
    keep = as_mask(mask, advantages)
    rho = _ratios(op, torch.where(keep, logps, 0.0), torch.where(keep, old_logps, 0.0), advantages, log_ratio_clip)
    change, lam = linear_projection(advantages, mu, weights=keep)
    losses = masked_mean(0.5 * mu * (rho - 1).square() - mu * change * rho, keep, -1)
    return reduce(losses, reduction, keep.any(-1)), _metrics(rho, change, lam, torch.zeros_like(keep), keep)


def token_gopo_losses(
    logps: Float[Tensor, "*groups samples tokens"],
    old_logps: Float[Tensor, "*groups samples tokens"],
    advantages: Float[Tensor, "*groups samples"],
    *,
    mu: float = 0.5,
    mask: Bool[Tensor, "*groups samples tokens"] | None = None,
    log_ratio_clip: float | None = 5.0,
) -> tuple[Float[Tensor, "*groups samples tokens"], dict[str, Tensor]]:
    """The quadratic of `gopo_loss` for each token's own ratio, with the target of its sample; not reduced.

    Samples without a valid token leave the group before the projection. Other arguments and errors as in `gopo_loss`.

    Source: wang2026gopo, eq:gopo-bounded-loss.
    Chapter: gopo
    """
    op = "token_gopo_losses"
    keep = as_mask(mask, logps)
    rho = _ratios(op, torch.where(keep, logps, 0.0), torch.where(keep, old_logps, 0.0), advantages, log_ratio_clip)
    counted = keep.any(-1)
    change, lam = bounded_projection(advantages, mu, weights=counted)
    losses = torch.where(keep, 0.5 * mu * (rho - (1 + change).unsqueeze(-1)).square(), 0.0)
    clamped = counted & (change <= -1.0)
    return losses, _metrics(masked_mean(rho, keep, -1), change, lam, clamped, counted)


def _metrics(rho: Tensor, change: Tensor, lam: Tensor, clamped: Tensor, keep: Tensor) -> dict[str, Tensor]:
    """Detached means over the samples that count; `conservation` is the empirical mean of the ratio minus 1."""
    rho = rho.detach()
    return {
        "multiplier": masked_mean(lam.squeeze(-1), keep.any(-1)),
        "frac_clamped": masked_mean(clamped.to(rho.dtype), keep),
        "conservation": masked_mean(rho - 1, keep),
        "chi_square": masked_mean((rho - 1).square(), keep),
        "target_error": masked_mean((rho - 1 - change).abs(), keep),
    }


class GOPOLoss(nn.Module):
    """Module twin of `gopo_loss`.

    Source: wang2026gopo, eq:gopo-bounded-loss.
    Chapter: gopo
    """

    def __init__(self, mu: float = 0.5, *, log_ratio_clip: float | None = 5.0, reduction: str = "mean") -> None:
        super().__init__()
        check_positive("GOPOLoss", mu=mu)
        self.mu, self.log_ratio_clip, self.reduction = mu, log_ratio_clip, reduction

    def forward(
        self, logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its metrics."""
        return gopo_loss(
            logps,
            old_logps,
            advantages,
            mu=self.mu,
            mask=mask,
            log_ratio_clip=self.log_ratio_clip,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"mu={self.mu}, log_ratio_clip={self.log_ratio_clip}, reduction={self.reduction!r}"
