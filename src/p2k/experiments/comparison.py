"""Arms of one architecture compared at one budget: matched widths, paired seeds, one sweep for all, frozen records."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

import torch
from torch import Tensor, nn

from p2k.core.device import device_name, versions
from p2k.data import ImageData
from p2k.experiments.loop import TrainConfig, TrainResult
from p2k.experiments.records import ResultRecord
from p2k.experiments.stacked import train_stacked
from p2k.experiments.statistics import PairedDifference, paired_difference
from p2k.models.vit import ViT, ViTConfig, build_vit
from p2k.nn.matching import Match, count_parameters


@dataclass(frozen=True)
class Sweep:
    """A choice of learning rate on the validation images, the same for every arm.

    Args:
        rates: candidates, at least one; with one there is nothing to choose and nothing is run.
        seeds: at least one, disjoint from the reported seeds.
    """

    rates: tuple[float, ...]
    seeds: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class ArmResult:
    """All seeds of one arm.

    Args:
        arm: name of the feed-forward block.
        match: hidden width, parameters of the whole model, and their distance from the budget.
        config: settings with the chosen learning rate.
        seeds: in the order of `runs`.
        runs: one result per seed.
        models: the trained models, one per seed; empty where they were not kept.
        seconds: wall-clock duration of the reported seeds.
    """

    arm: str
    match: Match
    config: TrainConfig
    seeds: tuple[int, ...]
    runs: tuple[TrainResult, ...]
    models: tuple[nn.Module, ...]
    seconds: float

    @property
    def test_accuracy(self) -> tuple[float, ...]:
        """Test accuracy of each seed in percent."""
        return tuple(100 * run.test_accuracy for run in self.runs)

    @property
    def test_correct(self) -> Tensor:
        """Correctness of each seed on each test image, bool ``[seeds, images]``."""
        return torch.stack([run.test_correct for run in self.runs])

    def minus(self, other: "ArmResult") -> PairedDifference:
        """Difference of test accuracies in points, paired by seed; ValueError when the seeds differ."""
        if self.seeds != other.seeds:
            raise ValueError(f"ArmResult.minus: seeds must agree, got {self.seeds} and {other.seeds}")
        return paired_difference(self.test_accuracy, other.test_accuracy)

    def record(
        self, experiment: str, *, profile: str, model: ViTConfig, data: ImageData, device: torch.device | str = "cpu"
    ) -> ResultRecord:
        """The frozen record of this arm, metric ``test_accuracy`` in percent."""
        settings = {
            "training": asdict(self.config),
            "model": asdict(model),
            "hidden": self.match.hidden,
            "data": {"name": data.name, "checksum": data.checksum},
        }
        return ResultRecord(
            slug="oqc",
            experiment=experiment,
            arm=self.arm,
            profile=profile,
            metric="test_accuracy",
            values=self.test_accuracy,
            seeds=self.seeds,
            parameters=self.match.parameters,
            config=settings,
            device=device_name(device),
            versions=versions(),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            seconds=self.seconds,
        )


def build_paired(model: ViTConfig, arm: str, *, hidden: int, seed: int) -> ViT:
    """A model whose tensors outside the feed-forward blocks start alike for all arms of one seed.

    The backbone's weights are taken from the plain GELU model of that seed. The global random state is left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build_vit(model, "gelu").state_dict()
        torch.manual_seed(seed)
        built = build_vit(model, arm, hidden=hidden)
    shared = {name: tensor for name, tensor in backbone.items() if ".feed_forward." not in name}
    built.load_state_dict(shared, strict=False)
    return built


def whole_model_match(model: ViTConfig, arm: str, budget: int | None = None) -> Match:
    """The width of `model` as a match: what an arm costs when it is not matched."""
    with torch.device("meta"):
        parameters = count_parameters(build_vit(model, arm))
    return Match(model.hidden, parameters, 0.0 if budget is None else parameters / budget - 1)


def compare_arms(
    matches: dict[str, Match],
    data: ImageData,
    *,
    model: ViTConfig,
    config: TrainConfig,
    seeds: Sequence[int],
    sweep: Sweep,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> list[ArmResult]:
    """Train every arm with the same seeds, each at the learning rate that its sweep prefers.

    Args:
        matches: hidden width of each arm.
        data: choices are made on its `val` part, numbers reported on `test`.
        model: architecture around the feed-forward block.
        config: settings; the learning rate is replaced by the chosen one.
        seeds: reported seeds, of initial weights and data order, at least one.
        sweep: candidate rates and the seeds they are tried with.
        device: where to train.
        progress: show bars on standard error.

    Raises:
        ValueError: the sweep has no rate or seed, or shares a seed with the report.
    """
    if not sweep.rates or not sweep.seeds or not seeds or set(sweep.seeds) & set(seeds):
        raise ValueError(
            f"compare_arms: needs seeds, and rates with seeds of their own, got {tuple(seeds)} and {sweep}"
        )
    results = []
    for arm, match in matches.items():

        def build(over: Sequence[int], arm: str = arm, hidden: int = match.hidden) -> list[ViT]:
            return [build_paired(model, arm, hidden=hidden, seed=seed) for seed in over]

        pairs = [(rate, seed) for rate in sweep.rates for seed in sweep.seeds] if len(sweep.rates) > 1 else []
        chosen = replace(config, learning_rate=sweep.rates[0])
        if pairs:
            rates, tried = zip(*pairs, strict=True)
            runs = train_stacked(build(tried), data, config, seeds=tried, rates=rates, device=device, progress=progress)
            score = {
                rate: sum(r.val_accuracy for (x, _), r in zip(pairs, runs, strict=True) if x == rate) for rate in rates
            }
            chosen = replace(config, learning_rate=max(score, key=score.get))
        models = build(seeds)
        runs = train_stacked(models, data, chosen, seeds=seeds, device=device, progress=progress)
        seconds = sum(run.seconds for run in runs)
        results.append(ArmResult(arm, match, chosen, tuple(seeds), tuple(runs), tuple(models), seconds))
    return results
