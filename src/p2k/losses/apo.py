"""Alpha-divergence preference optimization: one loss from reverse (alpha = 0) to forward KL (alpha = 1).

Letters: p list policy, q target, u anchored logits, s = log q - log p, m = q^alpha p^(1 - alpha).
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from p2k.losses.lists import anchored_logits, check_lists, list_metrics, resolve_temperature
from p2k.losses.reduction import as_mask, reduce


def _tilted_difference(log_a: Tensor, log_b: Tensor, k: Tensor) -> Tensor:
    """``a * expm1(k * (log b - log a)) / k`` entry by entry, with its limit ``a * (log b - log a)`` at k = 0.

    Where a has underflowed the product would be 0 * inf: there its first term ``a^(1 - k) b^k / k`` is left, which is
    computed in logarithms. Elsewhere ``b / a`` fits the dtype because b is at most 1.
    """
    a = log_a.exp()
    gone = a < 2 * torch.finfo(a.dtype).tiny
    at_zero = k == 0
    safe_k = torch.where(at_zero, 1.0, k)
    s = torch.where(gone, 0.0, log_b - torch.where(gone, 0.0, log_a))
    near = a * torch.where(at_zero, s, torch.expm1(k * s) / safe_k)
    mixed = torch.where(k == 1, log_b, safe_k * log_b + (1 - safe_k) * log_a)
    return torch.where(gone & ~at_zero, (mixed.exp() - a) / safe_k, near)


class _AlphaDivergence(torch.autograd.Function):
    """D_alpha(q || softmax(u)) of each list, with a gradient free of cancellation for every alpha.

    Both passes keep the value's two stable forms: p * expm1(alpha s) below one half, q * expm1((alpha - 1) s) above.
    The backward pass is written in differentiable operations, so second derivatives are those of the formula.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, q: Tensor, alpha: Tensor, keep: Tensor) -> Tensor:
        log_p, log_q = u.log_softmax(-1), _floored_log(q)
        low = _tilted_difference(log_p, log_q, alpha) / (alpha - 1).clamp(max=-0.25)
        high = -_tilted_difference(log_q, log_p, 1 - alpha) / alpha.clamp(min=0.25)
        return torch.where(keep, torch.where(alpha < 0.5, low, high), 0.0).sum(-1)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        u, q, alpha, keep = ctx.saved_tensors
        log_p = u.log_softmax(-1)
        pull = torch.where(keep, _tilted_difference(log_p, _floored_log(q), alpha), 0.0)
        policy = torch.where(keep, log_p.exp(), 0.0)
        return grad.unsqueeze(-1) * (policy * pull.sum(-1, keepdim=True) - pull), None, None, None


def _floored_log(q: Tensor) -> Tensor:
    """Log of a probability that may have underflowed; the reverse end would otherwise be infinite."""
    return q.clamp(min=torch.finfo(q.dtype).tiny).log()


def apo_loss(
    logps: Float[Tensor, "*lists candidates"],
    ref_logps: Float[Tensor, "*lists candidates"],
    targets: Float[Tensor, "*lists candidates"],
    *,
    alpha: float | Tensor = 0.5,
    tau: float | Tensor | None = None,
    mask: Bool[Tensor, "*lists candidates"] | None = None,
    reduction: str = "mean",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Fit the anchored list policy p to a target q in the alpha-divergence.

    It is ``(1 - sum(q^alpha p^(1 - alpha))) / (alpha (1 - alpha))`` for each list. Here ``alpha = 1`` is the forward
    KL(q || p), which covers the target, and ``alpha = 0`` the reverse KL(p || q), which seeks its modes; both are
    accepted exactly. Between them the loss is at most ``1 / (alpha (1 - alpha))``.

    Args:
        logps: log-probability of each candidate under the policy, in nats.
        ref_logps: the same under the anchor; it receives no gradient.
        targets: target probabilities, each list sums to 1 (not checked); no gradient. A probability below the
            smallest normal number of its dtype counts as that number, which keeps ``alpha = 0`` finite.
        alpha: number in [0, 1], or a tensor that broadcasts to ``[*lists, 1]`` and is not read on the host.
        tau: temperature ``> 0``, a number or a tensor that broadcasts to ``[*lists, 1]``; default 1.
        mask: true where a candidate exists. An empty list counts nowhere and gets a zero gradient.
        reduction: `none` (one loss per list), `mean` over non-empty lists, or `sum`.

    Returns:
        The loss, in float32 for half-precision inputs, and detached metrics, among them `ess`, the effective number
        of candidates under weights ``q^alpha p^(1 - alpha)``.

    Raises:
        ValueError: shapes or devices disagree, or an option is out of range.
        TypeError: a tensor is not floating point.

    Source: wang2025apo, eq:apo-divergence, eq:apo-gradient.
    Chapter: apo
    """
    op = "apo_loss"
    check_lists(op, logps, ref_logps=ref_logps, targets=targets)
    if not isinstance(alpha, Tensor) and not 0 <= alpha <= 1:
        raise ValueError(f"{op}: alpha must lie in [0, 1] (1 is the forward KL), got {alpha}")
    keep = as_mask(mask, logps)
    u = anchored_logits(logps, ref_logps, tau=resolve_temperature(op, tau, None), mask=keep)
    q = torch.where(keep, targets.detach().to(u.dtype), 0.0)
    weight = torch.as_tensor(alpha, dtype=u.dtype, device=u.device).detach()
    losses = _AlphaDivergence.apply(u, q, weight, keep)
    log_p = u.detach().log_softmax(-1)
    metrics = list_metrics(log_p, q, logps.detach() - ref_logps.detach(), keep)
    sizes = effective_sample_size(log_p, q, weight, mask=keep)
    metrics["ess"] = reduce(sizes, "mean", keep.any(-1))
    metrics["alpha"] = weight.mean()
    return reduce(losses, reduction, keep.any(-1)), metrics


def effective_sample_size(
    log_policy: Float[Tensor, "*lists candidates"],
    targets: Float[Tensor, "*lists candidates"],
    alpha: Float[Tensor, "*broadcast"],
    *,
    mask: Bool[Tensor, "*lists candidates"] | None = None,
) -> Float[Tensor, "*lists"]:
    """How many candidates share the weights ``q^alpha p^(1 - alpha)``: from 1 to the length of the list.

    Args:
        log_policy: log of the list policy p.
        targets: target distribution q.
        alpha: exponent in [0, 1], broadcasting against the lists.
        mask: true where a candidate exists; an empty list has size 0.

    Source: wang2025apo, eq:apo-ess.
    Chapter: apo
    """
    keep = as_mask(mask, targets).expand(torch.broadcast_shapes(targets.shape, alpha.shape))
    log_p = log_policy.clamp(min=torch.finfo(log_policy.dtype).min)
    log_m = alpha * _floored_log(targets) + (1 - alpha) * log_p
    m = torch.where(keep, torch.where(keep, log_m, -torch.inf).softmax(-1), 0.0)
    m = torch.where(keep.any(-1, keepdim=True), m, 0.0)
    total = m.square().sum(-1)
    return torch.where(total > 0, 1 / torch.where(total > 0, total, 1.0), 0.0)


class APOLoss(nn.Module):
    """Module twin of `apo_loss`; a schedule may pass its own alpha to `forward`.

    Source: wang2025apo, eq:apo-divergence.
    Chapter: apo
    """

    def __init__(self, alpha: float = 0.5, *, tau: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        self.alpha, self.tau, self.reduction = alpha, tau, reduction

    def forward(
        self,
        logps: Tensor,
        ref_logps: Tensor,
        targets: Tensor,
        *,
        mask: Tensor | None = None,
        alpha: float | Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its metrics."""
        chosen = self.alpha if alpha is None else alpha
        return apo_loss(logps, ref_logps, targets, alpha=chosen, tau=self.tau, mask=mask, reduction=self.reduction)

    def extra_repr(self) -> str:
        """The options, for `repr`."""
        return f"alpha={self.alpha}, tau={self.tau}, reduction={self.reduction!r}"
