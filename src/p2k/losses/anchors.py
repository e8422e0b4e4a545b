"""Anchors: the reference that a list loss measures ratios from, and when it moves.

All have ``reference(logps, compute)``, the anchor's log-probabilities without gradient, ``step(parameters)``, called
after each update of the policy, and a state dict. Parameters are a mapping from names to tensors, so that a stack of
models under `torch.func` works like a module: ``compute`` is, say, ``lambda p: functional_call(model, p, x)``.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Parameters = Mapping[str, Tensor]
Compute = Callable[[Parameters], Tensor]


class UniformAnchor:
    """An anchor that prefers nothing: log-probability 0 for every candidate.

    Source: wang2025adpo, eq:adpo-anchors.
    Chapter: adpo
    """

    def reference(self, logps: Tensor, compute: Compute | None = None) -> Tensor:
        """Zeros like `logps`."""
        return torch.zeros_like(logps)

    def step(self, parameters: Parameters, divergence: Tensor | None = None) -> None:
        """Nothing moves."""

    def state_dict(self) -> dict[str, Tensor]:
        """Empty: there is no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Accept the empty state only."""
        if state:
            raise ValueError(f"{type(self).__name__} has no state, got {', '.join(state)}")


class OnPolicyAnchor(UniformAnchor):
    """The policy at sampling time: pass `reference` the log-probabilities stored then. No second model is kept.

    Source: wang2025adpo, eq:adpo-anchors.
    Chapter: adpo
    """

    def reference(self, logps: Tensor, compute: Compute | None = None) -> Tensor:
        """`logps` without gradient."""
        return logps.detach()


class FixedAnchor:
    """A copy of the parameters that never moves; the base of those that do.

    Args:
        parameters: names to tensors; copied, without gradient.

    Source: wang2025adpo, eq:adpo-anchors.
    Chapter: adpo
    """

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = {name: tensor.detach().clone() for name, tensor in parameters.items()}

    def reference(self, logps: Tensor, compute: Compute) -> Tensor:
        """Evaluate `compute` on the anchor's parameters without gradient."""
        with torch.no_grad():
            return compute(self.parameters)

    @torch.no_grad()
    def step(self, parameters: Parameters, divergence: Tensor | None = None) -> None:
        """Move the anchor as its rule says. `divergence` is read by `KLTriggeredAnchor` alone.

        Raises:
            ValueError: the names differ from the anchor's.
        """
        if parameters.keys() != self.parameters.keys():
            raise ValueError(f"{type(self).__name__}: parameters must be named {', '.join(self.parameters)}")
        self._move(parameters, divergence)

    def _move(self, parameters: Parameters, divergence: Tensor | None) -> None:
        """A fixed anchor stays."""

    def _extra(self) -> dict[str, Tensor]:
        """State beside the parameters."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of all tensors that the next step depends on."""
        return {name: tensor.clone() for name, tensor in {**self.parameters, **self._extra()}.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore in place.

        Raises:
            ValueError: names are missing or unknown.
        """
        own = {**self.parameters, **self._extra()}
        if state.keys() != own.keys():
            raise ValueError(f"{type(self).__name__}: state must hold {', '.join(own)}, got {', '.join(state)}")
        for name, tensor in own.items():
            tensor.copy_(state[name])


class DynamicAnchor(FixedAnchor):
    """A hard copy of the policy every `every` steps. For a fixed target it has no fixed point: it keeps sharpening.

    Source: wang2025adpo, eq:adpo-anchors.
    Chapter: adpo
    """

    def __init__(self, parameters: Parameters, *, every: int) -> None:
        super().__init__(parameters)
        if every < 1:
            raise ValueError(f"DynamicAnchor: every must be at least 1 step, got {every}")
        self.every = every
        self.steps = torch.zeros((), dtype=torch.int64)

    def _move(self, parameters: Parameters, divergence: Tensor | None) -> None:
        # The counter lives on the host, where reading it waits for nothing.
        self.steps += 1
        if self.steps % self.every == 0:
            for name, tensor in self.parameters.items():
                tensor.copy_(parameters[name])

    def _extra(self) -> dict[str, Tensor]:
        return {"_steps": self.steps}


class EMAAnchor(FixedAnchor):
    """An exponential moving average; `decay` is the weight on the old anchor (TRL's mixup alpha is 1 minus it).

    Source: wang2025adpo, eq:adpo-anchors.
    Chapter: adpo
    """

    def __init__(self, parameters: Parameters, *, decay: float = 0.99) -> None:
        super().__init__(parameters)
        if not 0 <= decay <= 1:
            raise ValueError(f"EMAAnchor: decay must lie in [0, 1], got {decay}")
        self.decay = decay

    def _move(self, parameters: Parameters, divergence: Tensor | None) -> None:
        for name, tensor in self.parameters.items():
            tensor.lerp_(parameters[name].to(tensor.dtype), 1 - self.decay)


class KLTriggeredAnchor(FixedAnchor):
    """A hard copy when the mean divergence of a full window of steps exceeds a threshold; the window then restarts.

    The decision stays on the device: both outcomes are selected tensor by tensor, and nothing waits for the host.

    Args:
        parameters: names to tensors; copied, without gradient.
        threshold: in the units of the divergence passed to `step`, ``> 0``.
        window: steps that are averaged.

    Source: wang2025adpo, eq:adpo-anchors.
    Chapter: adpo
    """

    def __init__(self, parameters: Parameters, *, threshold: float = 0.1, window: int = 10) -> None:
        super().__init__(parameters)
        if not threshold > 0 or window < 1:
            raise ValueError(f"KLTriggeredAnchor: threshold must be > 0 and window >= 1, got {threshold}, {window}")
        self.threshold = threshold
        device = next(iter(self.parameters.values())).device
        # NaN marks a place that is not filled yet, so an unfilled window has a NaN mean and triggers nothing.
        self.recent = torch.full((window,), torch.nan, device=device)

    def _move(self, parameters: Parameters, divergence: Tensor | None) -> None:
        if divergence is None:
            raise ValueError("KLTriggeredAnchor: step needs the divergence of this step from the anchor")
        self.recent.copy_(self.recent.roll(1))
        self.recent[0] = divergence.detach()
        moves = self.recent.mean() > self.threshold
        for name, tensor in self.parameters.items():
            tensor.copy_(torch.where(moves, parameters[name].to(tensor.dtype), tensor))
        self.recent.copy_(torch.where(moves, torch.nan, self.recent))

    def _extra(self) -> dict[str, Tensor]:
        return {"_recent": self.recent}


ANCHORS: dict[str, type] = {
    "uniform": UniformAnchor,
    "fixed": FixedAnchor,
    "dynamic": DynamicAnchor,
    "ema": EMAAnchor,
    "kl_triggered": KLTriggeredAnchor,
    "on_policy": OnPolicyAnchor,
}


def build_anchor(name: str, parameters: Parameters | None = None, **options: float) -> UniformAnchor | FixedAnchor:
    """Build an anchor by its name; `uniform` and `on_policy` take neither parameters nor options.

    Raises:
        ValueError: an unknown name, or parameters where none are used or none where they are needed.
        TypeError: an option that the anchor does not have.
    """
    if name not in ANCHORS:
        raise ValueError(f"build_anchor: name must be one of {', '.join(ANCHORS)}, got {name!r}")
    kind = ANCHORS[name]
    if issubclass(kind, FixedAnchor) != (parameters is not None):
        wants = "needs parameters" if issubclass(kind, FixedAnchor) else "keeps no parameters: pass none"
        raise ValueError(f"build_anchor: {name} {wants}")
    return kind(**options) if parameters is None else kind(parameters, **options)
