"""Fair comparisons of policy losses: one grid of learning rates for all, chosen on seeds that are not reported."""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime

from tqdm.auto import tqdm

from p2k.core.device import device_name, versions
from p2k.data.arithmetic import ArithmeticData
from p2k.experiments.records import ResultRecord
from p2k.experiments.rlvr import RLVRConfig, RLVRResult, train_policy, warm_start
from p2k.experiments.rlvr_arms import Arm
from p2k.models.gpt import GPT


@dataclass(frozen=True, eq=False)
class Comparison:
    """What `compare_arms` found.

    Args:
        learning_rates: chosen for each arm.
        tuning: per arm the mean score at each learning rate.
        results: per arm one result per reported seed, in the order of the seeds.
        seeds: reported.
    """

    learning_rates: Mapping[str, float]
    tuning: Mapping[str, Mapping[float, float]]
    results: Mapping[str, Sequence[RLVRResult]]
    seeds: tuple[int, ...]

    def values(self, metric: str) -> dict[str, list[float]]:
        """Per arm one number per seed: an accuracy of `RLVRResult` by name, or an entry of its `sampled`."""
        return {name: [_read(result, metric) for result in results] for name, results in self.results.items()}


def warm_starts(data: ArithmeticData, config: RLVRConfig, seeds: Iterable[int]) -> dict[int, GPT]:
    """The start of every seed. It hangs on the task and on `preset` and the `warm_` settings of `config` alone."""
    return {seed: warm_start(data, replace(config, seed=seed)) for seed in seeds}


def run_arm(
    arm: Arm, data: ArithmeticData, config: RLVRConfig, starts: Mapping[int, GPT], learning_rate: float
) -> list[RLVRResult]:
    """Train one method from each seed's warm start."""
    return [
        train_policy(deepcopy(start), data, arm, replace(config, seed=seed, learning_rate=learning_rate))
        for seed, start in starts.items()
    ]


def tune(
    arms: Sequence[Arm],
    data: ArithmeticData,
    config: RLVRConfig,
    *,
    learning_rates: Sequence[float],
    seeds: Sequence[int],
    metric: str = "pass@1",
    starts: Mapping[int, GPT] | None = None,
    progress: bool = False,
) -> dict[str, dict[float, float]]:
    """Mean score of every arm at every learning rate; every arm gets every rate and every seed.

    Args:
        arms: methods.
        data: task.
        config: common settings; its seed and learning rate are replaced.
        learning_rates: the grid.
        seeds: used here only.
        metric: see `Comparison.values`; the default is measured on training problems with fresh samples, because a
            rollout's own reward is biased where groups are resampled.
        starts: from `warm_starts`, to share them between studies; None makes those of `seeds`.
        progress: show a bar.

    Raises:
        ValueError: a seed has no start.
    """
    starts = _of_seeds(starts, seeds) or warm_starts(data, config, seeds)
    scores: dict[str, dict[float, float]] = {arm.name: {} for arm in arms}
    for arm in tqdm(arms, disable=not progress, desc="tuning"):
        for rate in learning_rates:
            found = [_read(result, metric) for result in run_arm(arm, data, config, starts, rate)]
            scores[arm.name][rate] = sum(found) / len(found)
    return scores


def compare_arms(
    arms: Sequence[Arm],
    data: ArithmeticData,
    config: RLVRConfig,
    *,
    seeds: Sequence[int],
    tuning: Mapping[str, Mapping[float, float]],
    tuning_seeds: Sequence[int],
    starts: Mapping[int, GPT] | None = None,
    progress: bool = False,
) -> Comparison:
    """Run every arm at its best learning rate on fresh seeds; arms of a seed share its warm start.

    Args:
        arms: methods.
        data: task.
        config: common settings.
        seeds: reported.
        tuning: from `tune`, the same rates for every arm.
        tuning_seeds: those `tune` was given.
        starts: from `warm_starts`, to share them between studies; None makes those of `seeds`.
        progress: show a bar.

    Raises:
        ValueError: seeds overlap, an arm was not tuned, the arms had different grids, or a seed has no start.
    """
    if set(seeds) & set(tuning_seeds):
        raise ValueError(f"compare_arms: tuning seeds must not be reported: {sorted(set(seeds) & set(tuning_seeds))}")
    missing = [arm.name for arm in arms if arm.name not in tuning]
    if missing or len({tuple(sorted(tuning[arm.name])) for arm in arms}) != 1:
        raise ValueError(f"compare_arms: every arm needs the same grid of learning rates; not tuned: {missing}")
    chosen = {arm.name: max(tuning[arm.name], key=tuning[arm.name].get) for arm in arms}
    starts = _of_seeds(starts, seeds) or warm_starts(data, config, seeds)
    bar = tqdm(arms, disable=not progress, desc="arms")
    results = {arm.name: run_arm(arm, data, config, starts, chosen[arm.name]) for arm in bar}
    return Comparison(chosen, {arm.name: tuning[arm.name] for arm in arms}, results, tuple(seeds))


def _of_seeds(starts: Mapping[int, GPT] | None, seeds: Sequence[int]) -> dict[int, GPT]:
    if starts is not None and (missing := set(seeds) - set(starts)):
        raise ValueError(f"starts: one for every seed is needed, none for {sorted(missing)}")
    return {} if starts is None else {seed: starts[seed] for seed in seeds}


def to_records(
    comparison: Comparison, *, slug: str, experiment: str, profile: str, metrics: Sequence[str], device: str = "cpu"
) -> list[ResultRecord]:
    """One record per arm and metric, ready for `p2k.experiments.records.write_record`."""
    date, found = datetime.now(UTC).isoformat(timespec="seconds"), []
    for metric in metrics:
        for name, values in comparison.values(metric).items():
            results = comparison.results[name]
            config = asdict(results[0].config) | {"tuning": {str(k): v for k, v in comparison.tuning[name].items()}}
            config["stopped"] = [result.stopped for result in results]
            record = ResultRecord(
                slug=slug,
                experiment=experiment,
                arm=name,
                profile=profile,
                metric=metric,
                values=tuple(values),
                seeds=comparison.seeds,
                parameters=sum(tensor.numel() for tensor in results[0].state.values()),
                config=config,
                device=device_name(device),
                versions=versions(),
                date=date,
                seconds=sum(result.seconds for result in results),
            )
            found.append(record)
    return found


def _read(result: RLVRResult, metric: str) -> float:
    return result.sampled[metric] if metric in result.sampled else getattr(result, metric)
