"""What changes during training without a gradient: the temperature of ADPO per prompt, and the alpha of APO.

Everything stays on the device, so that no schedule makes the host wait.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from p2k.core.checks import check_positive
from p2k.losses.apo import effective_sample_size
from p2k.losses.reduction import wide


def _unit_range(values: Tensor) -> Tensor:
    """Min-max scaling of a whole tensor to [0, 1]; one half throughout where all are equal."""
    low, high = values.min(), values.max()
    width = high - low
    return torch.where(width > 0, (values - low) / torch.where(width > 0, width, 1.0), 0.5)


def adaptive_temperature(
    entropy: Float[Tensor, "prompts samples"],
    rewards: Float[Tensor, "prompts samples"],
    *,
    tau: float = 1.0,
    entropy_weight: float = 0.5,
    failure_weight: float = 1.0,
    tau_range: tuple[float, float] = (0.1, 5.0),
) -> Float[Tensor, "prompts 1"]:
    """Temperature per prompt: up with the policy's entropy, and up where it is sure and wrong.

    Computes ``tau * (1 + entropy_weight * H + failure_weight * (1 - H) * (1 - R))``, clipped to `tau_range`, with H the
    prompt's mean entropy and R its mean reward, min-max scaled over the batch (one half if all are equal).

    Args:
        entropy: entropy of each sample per token, divided by the log of the vocabulary; clamped to [0, 1].
        rewards: reward of each sample.
        tau: base temperature ``> 0``.
        entropy_weight: alpha of the paper, ``>= 0``.
        failure_weight: beta of the paper, ``>= 0``.
        tau_range: smallest and largest temperature.

    Raises:
        ValueError: shapes disagree or a number is out of range.

    Source: wang2025adpo, eq:adpo-temperature.
    Chapter: adpo
    """
    op = "adaptive_temperature"
    check_positive(op, tau=tau, lowest=tau_range[0], highest=tau_range[1])
    check_positive(op, zero_allowed=True, entropy_weight=entropy_weight, failure_weight=failure_weight)
    if entropy.shape != rewards.shape or entropy.ndim != 2:
        raise ValueError(
            f"{op}: entropy and rewards must be [prompts, samples], got {tuple(entropy.shape)}, {tuple(rewards.shape)}"
        )
    H = wide(entropy.detach()).clamp(0.0, 1.0).mean(-1)
    R = _unit_range(wide(rewards.detach()).mean(-1))
    factor = 1 + entropy_weight * H + failure_weight * (1 - H) * (1 - R)
    return (tau * factor).clamp(*tau_range).unsqueeze(-1)


def confidence(mean_logps: Float[Tensor, "*samples"], log_vocab: float) -> Float[Tensor, ""]:
    """One minus the mean negative log-probability per token in units of the log of the vocabulary, in [0, 1].

    Source: wang2025apo, eq:apo-schedule.
    Chapter: apo
    """
    check_positive("confidence", log_vocab=log_vocab)
    return 1 - (-wide(mean_logps.detach()) / log_vocab).clamp(0.0, 1.0).mean()


def improvement(advantages: Float[Tensor, "*samples"]) -> Float[Tensor, ""]:
    """``max(0, 2 m - 1)`` with m the mean of the min-max scaled advantages; for one binary group, its success rate.

    Source: wang2025apo, eq:apo-schedule.
    Chapter: apo
    """
    return (2 * _unit_range(wide(advantages.detach())).mean() - 1).clamp(min=0.0)


def guarded_alpha(
    certainty: Float[Tensor, ""],
    progress: Float[Tensor, ""],
    *,
    alpha_min: float = 0.35,
    alpha_max: float = 0.9,
) -> Float[Tensor, ""]:
    """Lower alpha from `alpha_max` toward `alpha_min` by the product of `confidence` and `improvement`.

    Args:
        certainty: in [0, 1], see `confidence`.
        progress: in [0, 1], see `improvement`.
        alpha_min: end of the mode-seeking side, in [0, alpha_max].
        alpha_max: end of the covering side, at most 1.

    Raises:
        ValueError: the ends are out of order.

    Source: wang2025apo, eq:apo-schedule.
    Chapter: apo
    """
    if not 0 <= alpha_min <= alpha_max <= 1:
        raise ValueError(f"guarded_alpha: expected 0 <= alpha_min <= alpha_max <= 1, got {alpha_min}, {alpha_max}")
    return alpha_max - (alpha_max - alpha_min) * certainty * progress


class ESSAlpha:
    """Steer alpha to the value whose weights ``q^alpha p^(1 - alpha)`` are shared by a given part of the group.

    Args:
        alpha_min: lowest of the candidates.
        alpha_max: highest of the candidates, and the value during warm-up and on-policy.
        target: wanted effective sample size as a fraction of the group, in (0, 1].
        candidates: values tried, evenly spaced.
        decay: weight on the old alpha.
        max_step: largest change in one call.
        warmup: calls that keep `alpha_max`.
        on_policy_below: mean absolute anchored logit under which a batch counts as on-policy, where the sample says
            nothing yet.

    Source: wang2025apo, eq:apo-ess.
    Chapter: apo
    """

    def __init__(
        self,
        *,
        alpha_min: float = 0.35,
        alpha_max: float = 0.9,
        target: float = 0.5,
        candidates: int = 11,
        decay: float = 0.9,
        max_step: float = 0.05,
        warmup: int = 10,
        on_policy_below: float = 0.01,
    ) -> None:
        if not 0 < alpha_min <= alpha_max < 1:
            raise ValueError(f"ESSAlpha: expected 0 < alpha_min <= alpha_max < 1, got {alpha_min}, {alpha_max}")
        if not (0 < target <= 1 and 0 <= decay <= 1 and candidates >= 1 and warmup >= 0):
            raise ValueError(
                "ESSAlpha: expected target in (0, 1], decay in [0, 1], candidates >= 1, warmup >= 0, "
                f"got {target}, {decay}, {candidates}, {warmup}"
            )
        check_positive("ESSAlpha", max_step=max_step)
        self.grid = torch.linspace(alpha_min, alpha_max, candidates)
        self.alpha_max, self.target, self.decay = alpha_max, target, decay
        self.max_step, self.warmup, self.on_policy_below = max_step, warmup, on_policy_below
        self.alpha = torch.tensor(alpha_max)
        self.calls = 0

    @torch.no_grad()
    def step(
        self, logits: Float[Tensor, "lists candidates"], targets: Float[Tensor, "lists candidates"]
    ) -> Float[Tensor, ""]:
        """Read a batch of anchored logits and their targets and return the alpha to use for it."""
        self.calls += 1
        u = wide(logits.detach())
        self.alpha = self.alpha.to(u)
        grid = self.grid.to(u)
        if self.calls > self.warmup:
            sizes = effective_sample_size(u.log_softmax(-1), targets.detach().to(u.dtype), grid.view(-1, 1, 1)).mean(-1)
            wanted = grid[(sizes - self.target * u.shape[-1]).abs().argmin()]
            change = ((1 - self.decay) * (wanted - self.alpha)).clamp(-self.max_step, self.max_step)
            held = u.abs().mean() < self.on_policy_below
            self.alpha = torch.where(held, self.alpha_max, (self.alpha + change).clamp(1e-3, 1 - 1e-3))
        return self.alpha

    def state_dict(self) -> dict[str, Tensor | int]:
        """Alpha and the number of calls."""
        return {"alpha": self.alpha.clone(), "calls": self.calls}

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Restore what `state_dict` gave."""
        self.alpha, self.calls = state["alpha"].clone(), int(state["calls"])
