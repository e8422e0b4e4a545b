"""The twelve-scenario comparison: tune every method on its own seeds with equal budgets, then report on fresh ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from p2k.data.preferences import SCENARIOS, Scenario, make_preferences
from p2k.experiments.bandit_training import METHODS, Method, evaluate, train, train_reference
from p2k.experiments.significance import Comparison, compare

# Metrics and whether more is better.
METRICS = {"win_mass": True, "top1": True, "regret": False}
Scores = Mapping[str, Float[Tensor, "seeds scenarios"]]


@dataclass(frozen=True, eq=False)
class BanditResult:
    """What the sweep found.

    Args:
        scenarios: names, the columns of the scores.
        seeds: of the reported runs, the rows of the scores.
        metric: by which settings were chosen.
        chosen: the setting of each method.
        tuning: mean of every metric on the tuning seeds, per method one entry per setting.
        scores: per method (and ``reference``, the start) every metric, ``[seeds, scenarios]``.
    """

    scenarios: tuple[str, ...]
    seeds: tuple[int, ...]
    metric: str
    chosen: Mapping[str, Mapping[str, float]]
    tuning: Mapping[str, Sequence[Mapping[str, float]]]
    scores: Mapping[str, Scores]

    def compare(self, first: str, second: str, metric: str | None = None) -> list[Comparison]:
        """Paired comparison of two methods in every scenario, Holm-corrected over the scenarios."""
        a, b = (self.scores[name][metric or self.metric].T.tolist() for name in (first, second))
        return compare(self.scenarios, a, b)

    def means(self) -> dict[str, dict[str, float]]:
        """Mean over scenarios and seeds of each metric, per method."""
        return {name: {m: values.mean().item() for m, values in scores.items()} for name, scores in self.scores.items()}


def run_bandits(
    methods: Sequence[Method] = METHODS,
    *,
    seeds: Sequence[int] = range(10),
    tuning_seeds: Sequence[int] = range(100, 104),
    scenarios: Sequence[Scenario] = SCENARIOS,
    metric: str = "win_mass",
    steps: int = 150,
    width: int = 32,
    progress: bool = False,
) -> BanditResult:
    """Choose each method's setting by its mean over scenarios and tuning seeds, then train it on the reported seeds.

    Args:
        methods: each with the same number of settings.
        seeds: reported; disjoint from `tuning_seeds`.
        tuning_seeds: only for the choice of settings.
        scenarios: corruptions to train under.
        metric: that chooses: `win_mass`, `top1` or `regret`.
        steps: optimizer steps of each run.
        width: of the policies' hidden layers.
        progress: show a bar.

    Raises:
        ValueError: seeds overlap, budgets differ, or an unknown metric.

    Source: wang2025adpo, section on noisy preferences; protocol and constants are ours.
    Chapter: adpo
    """
    if set(seeds) & set(tuning_seeds):
        raise ValueError(f"run_bandits: tuning seeds must not be reported, both hold {set(seeds) & set(tuning_seeds)}")
    if len({len(method.settings) for method in methods}) != 1:
        budgets = {method.name: len(method.settings) for method in methods}
        raise ValueError(f"run_bandits: every method needs the same number of settings, got {budgets}")
    if metric not in METRICS:
        raise ValueError(f"run_bandits: metric must be one of {list(METRICS)}, got {metric!r}")
    total = sum(len(method.settings) + 1 for method in methods)
    with tqdm(total=total, disable=not progress, desc="bandits") as bar:
        tuning_data = make_preferences(scenarios, tuning_seeds, steps=steps)
        start = train_reference(tuning_data, width=width)
        tuning: dict[str, list[dict[str, float]]] = {}
        for method in methods:
            for setting in method.settings:
                found = evaluate(tuning_data, train(tuning_data, start, method, setting))
                tuning.setdefault(method.name, []).append({name: v.mean().item() for name, v in found.items()})
                bar.update()
        chosen = {method.name: method.settings[_best(tuning[method.name], metric)] for method in methods}
        data = make_preferences(scenarios, seeds, steps=steps)
        start = train_reference(data, width=width)
        scores = {"reference": evaluate(data, start)}
        for method in methods:
            scores[method.name] = evaluate(data, train(data, start, method, chosen[method.name]))
            bar.update()
    shape = (len(seeds), len(scenarios))
    grid = {name: {m: v.view(shape) for m, v in found.items()} for name, found in scores.items()}
    names = tuple(scenario.name for scenario in scenarios)
    return BanditResult(names, tuple(seeds), metric, chosen, tuning, grid)


def _best(rows: Sequence[Mapping[str, float]], metric: str) -> int:
    """Place of the best setting; one whose training diverged to NaN is never chosen unless all did."""
    sign = 1 if METRICS[metric] else -1
    values = torch.tensor([sign * row[metric] for row in rows]).nan_to_num(nan=-torch.inf)
    return int(values.argmax())
