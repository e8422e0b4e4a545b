"""Learning-rate spikes on the digits: plain Adam, two kinds of clipping and the radius controller, from one checkpoint.

Every arm continues the same trained network with the same batches; only the learning rate is multiplied. Clipping
bounds the gradient before Adam sees it, or the length of the step that Adam proposes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2k.core.seeding import generator
from p2k.data.digits import load_digits
from p2k.experiments.statistics import PairedDifference, paired_difference
from p2k.optim.ghosts_of_softmax import RadiusController

__all__ = [
    "GRIDS",
    "PLAIN",
    "Digits",
    "Spikes",
    "Trace",
    "build_mlp",
    "load",
    "run_arm",
    "spike_study",
    "train",
    "tune",
]

PLAIN, GRADIENT, UPDATE, CONTROLLER = "plain Adam", "gradient clipping", "update clipping", "controller"
# Four candidates each: bounds on the gradient's norm, on the step's norm, and on the step in radii.
GRIDS = {GRADIENT: (0.01, 0.1, 1.0, 10.0), UPDATE: (0.03, 0.1, 0.3, 1.0), CONTROLLER: (0.5, 1.0, 2.0, 4.0)}
BATCH, WARM_STEPS, RATE = 64, 50, 1e-3
Spike = tuple[float, int]  # factor on the learning rate, and for how many steps


@dataclass(frozen=True, eq=False)
class Digits:
    """Flat digits as float tensors ``[count, 64]`` with labels, by part."""

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Trace:
    """One run: training loss per step, final accuracies in percent, the controller's ratio per step where it ran."""

    losses: list[float]
    val_accuracy: float
    test_accuracy: float
    ratios: list[float] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Spikes:
    """All runs of the comparison by arm and spike, one per seed, and the settings that tuning chose."""

    runs: dict[tuple[str, Spike], list[Trace]]
    chosen: dict[str, float]

    def accuracy(self, arm: str, spike: Spike) -> list[float]:
        """Final test accuracy of each seed in percent."""
        return [run.test_accuracy for run in self.runs[arm, spike]]

    def difference(self, first: str, second: str, spike: Spike) -> PairedDifference:
        """Test accuracy of one arm minus another, in points, paired by seed."""
        return paired_difference(self.accuracy(first, spike), self.accuracy(second, spike))


def load(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Digits:
    """The digits, flattened, on one split for all seeds."""
    data = load_digits(0)

    def part(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return images.flatten(1).to(device, dtype), labels.to(device)

    return Digits(part(data.train_images, data.train_labels), part(*data.split("val")), part(*data.split("test")))


def build_mlp(
    activation: type[nn.Module] = nn.ReLU,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> nn.Sequential:
    """The source's network, 64-128-10, with torch's initial weights of one seed; the global random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Linear(64, 128, dtype=dtype), activation(), nn.Linear(128, 10, dtype=dtype)
    return nn.Sequential(*layers).to(device)


def batches(count: int, seed: int, device: torch.device | str) -> Iterator[Tensor]:
    """Indices of shuffled batches without end, the same on every device."""
    rng = generator(seed)
    while True:
        yield from torch.randperm(count, generator=rng).to(device).split(BATCH)[: count // BATCH]


def train(
    model: nn.Module, data: Digits, *, seed: int, steps: int, rate: float = RATE, temperature: float = 1.0
) -> torch.optim.Adam:
    """Plain Adam for a number of steps, in place; returns its optimizer.

    Args:
        model: maps ``[batch, 64]`` to logits.
        data: trained on its `train` part.
        seed: of the batches.
        steps: number of updates.
        rate: learning rate.
        temperature: the loss sees the logits divided by this.
    """
    images, labels = data.train
    # The fused update is the same arithmetic in one call.
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    order = batches(len(labels), seed, images.device)
    for _ in range(steps):
        index = next(order)
        optimizer.zero_grad()
        F.cross_entropy(model(images[index]) / temperature, labels[index]).backward()
        optimizer.step()
    return optimizer


def run_arm(
    arm: str,
    bound: float,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: Digits,
    *,
    spike: Spike,
    seed: int,
    steps: int,
) -> Trace:
    """Continue a trained network through a spike; the given model and optimizer are left alone.

    Args:
        arm: ``plain Adam`` or a key of `GRIDS`.
        bound: what the arm limits: gradient norm, step norm, or the step in radii; unused by plain Adam.
        model, optimizer: where to start, state included.
        data: trained on `train`.
        spike: factor on the learning rate from the first step on, and for how many steps.
        seed: of the batches.
        steps: number of updates in all.

    Raises:
        KeyError: unknown arm.
    """
    take = {PLAIN: _plain, GRADIENT: _clip_gradient, UPDATE: _clip_update, CONTROLLER: _controlled}[arm]
    model, optimizer = deepcopy((model, optimizer))
    factor, length = spike
    step = take(model, optimizer, bound)
    images, labels = data.train
    order = batches(len(labels), seed + 10_000, images.device)
    losses, ratios = [], []
    for number in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (factor if number < length else 1.0)
        index = next(order)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[index]), labels[index])
        loss.backward()
        ratios.append(step(images[index]))
        losses.append(loss.detach())
    return Trace(
        torch.stack(losses).tolist(), accuracy(model, data.val), accuracy(model, data.test), [*filter(None, ratios)]
    )


@torch.no_grad()
def accuracy(model: nn.Module, part: tuple[Tensor, Tensor]) -> float:
    """Share of images classified correctly, in percent."""
    images, labels = part
    return 100 * (model(images).argmax(-1) == labels).double().mean().item()


def tune(data: Digits, *, seeds: Sequence[int], spikes: Sequence[Spike], steps: int) -> dict[str, float]:
    """The bound of each arm with the best validation accuracy, averaged over tuning seeds and spikes.

    One bound has to serve with a spike and without, as it must in practice.

    Args:
        data: judged on its `val` part.
        seeds: disjoint from the reported ones.
        spikes: what to be ready for.
        steps: length of a run.
    """
    score = {(arm, bound): 0.0 for arm, grid in GRIDS.items() for bound in grid}
    for seed in seeds:
        start = checkpoint(data, seed)
        for arm, bound in score:
            for spike in spikes:
                score[arm, bound] += run_arm(arm, bound, *start, data, spike=spike, seed=seed, steps=steps).val_accuracy
    return {arm: max(grid, key=lambda bound, arm=arm: score[arm, bound]) for arm, grid in GRIDS.items()}


def spike_study(
    data: Digits,
    *,
    seeds: Sequence[int],
    spikes: Sequence[Spike],
    steps: int,
    tuning_seeds: Sequence[int],
    tuning_spikes: Sequence[Spike],
) -> Spikes:
    """Every arm through every spike, at the bound that tuning chose; the controller also at its untuned bound of 1.

    Args:
        data: digits.
        seeds: of initial weights and batches, reported.
        spikes: factors on the learning rate with their durations.
        steps: length of a run from the checkpoint on.
        tuning_seeds: seeds on which bounds are chosen.
        tuning_spikes: spikes on which bounds are chosen.

    Raises:
        ValueError: a tuning seed is also reported.
    """
    if set(seeds) & set(tuning_seeds):
        raise ValueError(f"spike_study: tuning seeds must not be reported, got {seeds} and {tuning_seeds}")
    chosen = tune(data, seeds=tuning_seeds, spikes=tuning_spikes, steps=steps)
    arms = {PLAIN: (PLAIN, math.inf), "controller, r = 1": (CONTROLLER, 1.0)}
    arms |= {f"{arm}, tuned": (arm, bound) for arm, bound in chosen.items()}
    runs: dict[tuple[str, Spike], list[Trace]] = {}
    for seed in seeds:
        start = checkpoint(data, seed)
        for spike in spikes:
            done: dict[tuple[str, float], Trace] = {}
            for name, arm in arms.items():
                if arm not in done:
                    done[arm] = run_arm(*arm, *start, data, spike=spike, seed=seed, steps=steps)
                runs.setdefault((name, spike), []).append(done[arm])
    return Spikes(runs, chosen)


def checkpoint(data: Digits, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network all arms of one seed start from."""
    model = build_mlp(seed=seed, device=data.train[0].device, dtype=data.train[0].dtype)
    return model, train(model, data, seed=seed, steps=WARM_STEPS)


def _plain(model: nn.Module, optimizer: torch.optim.Optimizer, bound: float) -> Callable[[Tensor], None]:
    def step(inputs: Tensor) -> None:
        optimizer.step()

    return step


def _clip_gradient(model: nn.Module, optimizer: torch.optim.Optimizer, bound: float) -> Callable[[Tensor], None]:
    def step(inputs: Tensor) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), bound)
        optimizer.step()

    return step


def _clip_update(model: nn.Module, optimizer: torch.optim.Optimizer, bound: float) -> Callable[[Tensor], None]:
    parameters = list(model.parameters())

    @torch.no_grad()
    def step(inputs: Tensor) -> None:
        start = [p.clone() for p in parameters]
        optimizer.step()
        length = torch.cat([(p - s).flatten() for p, s in zip(parameters, start, strict=True)]).norm()
        for p, s in zip(parameters, start, strict=True):
            p.copy_(s + (p - s) * (bound / length).clamp(max=1.0))

    return step


def _controlled(model: nn.Module, optimizer: torch.optim.Optimizer, bound: float) -> Callable[[Tensor], float]:
    controller = RadiusController(optimizer, model, max_ratio=bound)

    def step(inputs: Tensor) -> float:
        controller.step(inputs=inputs)
        return controller.last_ratio

    return step
