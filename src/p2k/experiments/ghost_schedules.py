"""Step lengths set by the radius against fixed rates: SGD with momentum on the digits, from scratch.

The source replaces the learning rate by a target ratio r: every step has the length of r radius bounds. A controller
around a proposal that is always too long does exactly that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from p2k.experiments.ghosts_of_softmax import Digits, Trace, accuracy, batches, build_mlp
from p2k.optim.ghosts_of_softmax import RadiusController

__all__ = ["FIXED", "GRIDS", "RADIUS", "Schedules", "run_schedule", "schedule_study"]

FIXED, RADIUS = "fixed rate", "length from the radius"
# The source's candidates for each.
GRIDS = {FIXED: (0.005, 0.01, 0.1, 0.5), RADIUS: (0.5, 1.0, 2.0, 4.0)}
# With momentum the proposal is this rate times a direction that does not depend on it.
TOO_LONG = 1e4


@dataclass(frozen=True, eq=False)
class Schedules:
    """All runs by rule and candidate, one per seed, and the candidate that tuning chose for each rule."""

    runs: dict[tuple[str, float], list[Trace]]
    chosen: dict[str, float]

    def accuracy(self, rule: str, value: float | None = None) -> list[float]:
        """Final test accuracy of each seed in percent, of the chosen candidate unless one is given."""
        return [run.test_accuracy for run in self.runs[rule, self.chosen[rule] if value is None else value]]


def run_schedule(rule: str, value: float, data: Digits, *, seed: int, steps: int) -> Trace:
    """Train a new network; `Trace.ratios` holds the length of each step that was taken, in bounds.

    Args:
        rule: a key of `GRIDS`.
        value: the learning rate, or the ratio r of every step.
        data: trained on `train`.
        seed: of weights and batches.
        steps: number of updates.

    Raises:
        KeyError: unknown rule.
    """
    rate, limit = {FIXED: (value, 1e30), RADIUS: (TOO_LONG, value)}[rule]
    model = build_mlp(seed=seed, device=data.train[0].device, dtype=data.train[0].dtype)
    controller = RadiusController(torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9), model, max_ratio=limit)
    images, labels = data.train
    order = batches(len(labels), seed, images.device)
    losses, ratios = [], []
    for _ in range(steps):
        index = next(order)
        controller.zero_grad()
        loss = F.cross_entropy(model(images[index]), labels[index])
        loss.backward()
        controller.step(inputs=images[index])
        ratios.append(controller.last_ratio * controller.last_scale)
        losses.append(loss.detach())
    return Trace(torch.stack(losses).tolist(), accuracy(model, data.val), accuracy(model, data.test), ratios)


def schedule_study(data: Digits, *, seeds: Sequence[int], tuning_seeds: Sequence[int], steps: int) -> Schedules:
    """Both rules at every candidate on the reported seeds; `chosen` is the best on validation of the tuning seeds.

    Raises:
        ValueError: a tuning seed is also reported.
    """
    if set(seeds) & set(tuning_seeds):
        raise ValueError(f"schedule_study: tuning seeds must not be reported, got {seeds} and {tuning_seeds}")
    chosen: dict[str, float] = {}
    runs: dict[tuple[str, float], list[Trace]] = {}
    for rule, grid in GRIDS.items():
        score = {
            value: sum(run_schedule(rule, value, data, seed=s, steps=steps).val_accuracy for s in tuning_seeds)
            for value in grid
        }
        chosen[rule] = max(grid, key=score.__getitem__)
        for value in grid:
            runs[rule, value] = [run_schedule(rule, value, data, seed=s, steps=steps) for s in seeds]
    return Schedules(runs, chosen)
