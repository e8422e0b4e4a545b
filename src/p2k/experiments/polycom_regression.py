"""Which functions does gradient descent find? Small networks fit a smooth polynomial-like target and one with kinks.

All seeds, rates and targets of an activation train as one batch of stacked parameters. Inputs are standard normal and
drawn anew in every step, so that there is nothing to overfit; targets have mean 0 and variance 1.

Source: zhuo2025polycom.  Chapter: polycom
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from p2k.core.checks import check_positive
from p2k.core.errors import P2KError
from p2k.core.seeding import generator
from p2k.experiments.statistics import PairedDifference, paired_difference
from p2k.nn.polycom import PolyNorm, PolyReLU, SquaredReLU

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "squared ReLU": SquaredReLU,
    "GELU": nn.GELU,
    "PolyReLU": PolyReLU,
    "PolyNorm": PolyNorm,
}
INPUTS = 4


def smooth(x: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """x y + 0.3 z^3 + sin 2w: two polynomials and a wave. A cubic activation is made for it."""
    return x[..., 0] * x[..., 1] + 0.3 * x[..., 2] ** 3 + torch.sin(2 * x[..., 3])


def kinked(x: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """The distance of x from y plus max(z, w): piecewise linear, so that a few ReLU units are exact."""
    return (x[..., 0] - x[..., 1]).abs() + torch.maximum(x[..., 2], x[..., 3])


TARGETS = {"smooth": smooth, "kinked": kinked}


@dataclass(frozen=True)
class RegressionConfig:
    """Sizes: two hidden layers of `hidden` units, `steps` of Adam on `batch` fresh points, `tests` points to report."""

    hidden: int = 32
    batch: int = 64
    steps: int = 400
    tests: int = 4096
    rates: tuple[float, ...] = (1e-2, 3e-2, 1e-1)

    def __post_init__(self) -> None:
        check_positive("RegressionConfig", hidden=self.hidden, batch=self.batch, steps=self.steps, tests=self.tests)


@dataclass(frozen=True, eq=False)
class RegressionResult:
    """Mean squared error per seed, as a share of the target's variance, at the rate that the tuning seed prefers."""

    rate: float
    errors: tuple[float, ...]

    def minus(self, other: "RegressionResult") -> PairedDifference:
        """Difference of errors, paired by seed."""
        return paired_difference(self.errors, other.errors)


def fit(
    activation: str, config: RegressionConfig, *, seeds: Sequence[int], tuning_seed: int
) -> dict[str, RegressionResult]:
    """Fit both targets with every rate and seed, and report the seeds at the rate that suits the tuning seed.

    Args:
        activation: a key of `ACTIVATIONS`.
        config: sizes.
        seeds: of the report; of initial weights and points, the same for every activation.
        tuning_seed: chooses the rate, on points of its own; not among `seeds`.

    Raises:
        ValueError: an unknown activation, or the tuning seed is among the reported ones.
        P2KError: an error at the chosen rate is not finite.
    """
    if activation not in ACTIVATIONS or tuning_seed in seeds:
        raise ValueError(f"fit: activation must be one of {list(ACTIVATIONS)}, tuning_seed new, got {activation!r}")
    runs = list(itertools.product(TARGETS, config.rates, (tuning_seed, *seeds)))
    models = [_network(activation, config.hidden, seed) for _, _, seed in runs]
    parameters, _ = stack_module_state(models)
    predict = vmap(lambda values, x: functional_call(models[0], values, (x,))[..., 0])
    optimizer = torch.optim.Adam(parameters.values(), lr=1.0, fused=True)
    sources = {seed: generator(1_000_000 + seed) for seed in (tuning_seed, *seeds)}
    rates = torch.tensor([rate for _, rate, _ in runs])
    scales = {name: _moments(target) for name, target in TARGETS.items()}
    for step in range(config.steps):
        x, y = _points(runs, sources, config.batch, scales)
        loss = (predict(parameters, x) - y).square().mean(-1)
        optimizer.zero_grad(set_to_none=True)
        loss.sum().backward()
        before = {name: p.detach().clone() for name, p in parameters.items()}
        optimizer.step()
        share = rates * min(1.0, (step + 1) / (config.steps / 10)) * (1 - step / config.steps)
        with torch.no_grad():  # a step of Adam is proportional to its rate
            for name, p in parameters.items():
                p.copy_(torch.lerp(before[name], p, share.view(-1, *[1] * (p.ndim - 1))))
    with torch.no_grad():
        fresh = {seed: generator(2_000_000 + seed) for seed in (tuning_seed, *seeds)}
        x, y = _points(runs, fresh, config.tests, scales)
        errors = dict(zip(runs, (predict(parameters, x) - y).square().mean(-1).tolist(), strict=True))
    results = {}
    for target in TARGETS:
        # Not `min` alone: a diverged run is NaN, which compares as neither.
        finite = {r: errors[target, r, tuning_seed] for r in config.rates}
        rate = min(finite, key=lambda r: (finite[r] != finite[r], finite[r]))
        found = tuple(errors[target, rate, seed] for seed in seeds)
        if not all(e < float("inf") for e in found):
            raise P2KError(f"fit: errors {found} of {activation} on the {target} target: lower the rates")
        results[target] = RegressionResult(rate, found)
    return results


def _network(activation: str, hidden: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        maps = [nn.Linear(a, b) for a, b in ((INPUTS, hidden), (hidden, hidden), (hidden, 1))]
    act = ACTIVATIONS[activation]
    return nn.Sequential(maps[0], act(), maps[1], act(), maps[2])


def _moments(target: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a target over its inputs."""
    y = target(torch.randn(200_000, INPUTS, generator=generator(0)))
    return y.mean(), y.std()


def _points(
    runs: Sequence[tuple], sources: dict[int, torch.Generator], count: int, scales: dict
) -> tuple[Float[Tensor, "runs count 4"], Float[Tensor, "runs count"]]:
    """Inputs of each run's seed, and its target there."""
    drawn = {seed: torch.randn(count, INPUTS, generator=source) for seed, source in sources.items()}
    x = torch.stack([drawn[seed] for _, _, seed in runs])
    y = [
        (TARGETS[name](points) - scales[name][0]) / scales[name][1]
        for (name, _, _), points in zip(runs, x, strict=True)
    ]
    return x, torch.stack(y)
