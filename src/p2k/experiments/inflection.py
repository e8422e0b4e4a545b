"""Under- and over-trained source models adapted to noisy digits: whole, at the top, at the head, or by LoRA somewhere.

Every seed has its own source model, its own diagnosis and its own layers. Arms of one seed start from one source model
and see the same batches. `p2k.experiments.inflection_text` holds the paper's own task.

Source: wang2025inflection.  Chapter: inflection
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from p2k.core.seeding import generator
from p2k.data import ImageData
from p2k.data.digits import load_digits
from p2k.experiments.diagnostics import LayerProfile, layer_movement, pooled_features, profile_layers
from p2k.experiments.inflection_arms import (
    ALL,
    FULL,
    GROUPS,
    HEAD,
    INFLECTION,
    MODEL,
    RANDOM,
    TOP,
    Job,
    make_adaptable,
    make_source,
    trained_parameters,
)
from p2k.experiments.loop import Feed, TrainConfig, TrainResult
from p2k.experiments.saturation import inflection_layers, saturation_index
from p2k.experiments.stacked import train_stacked
from p2k.experiments.statistics import PairedDifference, paired_difference
from p2k.models.vit import ViT

# The seed of the learning-rate choice, which is not reported.
SWEEP_SEED = 1000
RATES = (3e-3, 1e-2, 3e-2)
SOURCE = TrainConfig(epochs=40, batch_size=32, learning_rate=6e-3, weight_decay=0.0)
TARGET = TrainConfig(epochs=5, batch_size=20, learning_rate=3e-3, weight_decay=0.0)


@dataclass(frozen=True, eq=False)
class Shift:
    """Clean digits to learn from, and other digits under noise to adapt to."""

    source: ImageData
    target: ImageData


@dataclass(frozen=True, eq=False)
class Regime:
    """One amount of source training, all arms and seeds.

    Args:
        epochs: of source training.
        seeds: reported seeds.
        source_accuracy: of each source model on clean test digits, in percent.
        unadapted: accuracy of each source model on the target's test digits, in percent.
        on_source, on_target: profile of each source model on training digits of either side.
        layers: inflection layers of each seed.
        random: layers of the control, as many, none of them an inflection layer where there are enough others.
        rates: learning rate of each arm.
        accuracy: target test accuracy of each arm and seed in percent.
        parameters: trained by each arm, mean over seeds.
        single: target test accuracy in percent with adapters in one layer only, at the rate of the inflection arm,
            ``[seeds, layers]``; None where it was not measured.
        movement: 1 - CKA of each layer during full fine-tuning, ``[seeds, layers]``.
    """

    epochs: int
    seeds: tuple[int, ...]
    source_accuracy: tuple[float, ...]
    unadapted: tuple[float, ...]
    on_source: tuple[LayerProfile, ...]
    on_target: tuple[LayerProfile, ...]
    layers: tuple[tuple[int, ...], ...]
    random: tuple[tuple[int, ...], ...]
    rates: dict[str, float]
    accuracy: dict[str, tuple[float, ...]]
    parameters: dict[str, float]
    single: Tensor | None
    movement: Tensor

    def difference(self, arm: str, other: str) -> PairedDifference:
        """Accuracy of `arm` minus that of `other` in points, paired by seed."""
        return paired_difference(self.accuracy[arm], self.accuracy[other])

    def gradient(self, side: str, summary: str) -> Tensor:
        """A summary of the per-example gradient norms, such as `median_gradient`, ``[seeds, layers]``."""
        return torch.stack([getattr(profile, summary) for profile in getattr(self, side)])


def make_shift(noise: float = 0.12, *, source: int = 384, target: int = 200) -> Shift:
    """Digits in two disjoint halves, the target under Gaussian noise; test digits are in neither training set.

    Args:
        noise: standard deviation in units of full ink, ``>= 0``.
        source: number of source training images.
        target: number of target training images.
    """
    digits = load_digits(0, train=source + target, val=240, test=600)

    def noisy(images: Tensor, seed: int) -> Tensor:
        return images + noise * torch.randn(images.shape, generator=generator(seed))

    parts = digits.train_images.split([source, target]), digits.train_labels.split([source, target])
    clean = replace(digits, name="digits-source", train_images=parts[0][0], train_labels=parts[1][0], checksum="")
    shifted = replace(
        digits,
        name="digits-target",
        train_images=noisy(parts[0][1], 1),
        train_labels=parts[1][1],
        val_images=noisy(digits.val_images, 2),
        test_images=noisy(digits.test_images, 3),
        checksum="",
    )
    return Shift(clean, shifted)


def compare_regimes(
    *,
    under: int = 10,
    over: int = 40,
    adapt: int = 5,
    seeds: Sequence[int] = range(10, 15),
    shift: Shift | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> tuple[Regime, Regime]:
    """Run both regimes with all arms; each arm takes its learning rate by the same sweep on validation digits.

    In the over-trained regime every layer is also adapted by itself, to see whether the index foretells the gain.

    Args:
        under, over: epochs of source training, ``>= 2``.
        adapt: epochs of adaptation, ``>= 1``.
        seeds: reported seeds, at least two, without `SWEEP_SEED`.
        shift: the data; None makes the default one.
        device: where to train.
        progress: show bars on standard error.

    Raises:
        ValueError: the seeds are too few or hold the sweep's.

    Source: wang2025inflection, eq:inflection-interaction.
    Chapter: inflection
    """
    if len(seeds) < 2 or SWEEP_SEED in seeds:
        raise ValueError(f"compare_regimes: at least two seeds, none of them {SWEEP_SEED}, got {tuple(seeds)}")
    shift = make_shift() if shift is None else shift
    bar = tqdm((under, over), unit="regime", leave=False, disable=not progress)
    target = replace(TARGET, epochs=adapt, warmup_epochs=min(1.0, adapt / 2))
    options = target, tuple(seeds), shift, torch.device(device)
    return tuple(_run_regime(epochs, *options, probe=epochs == over) for epochs in bar)


def _run_regime(
    epochs: int, target: TrainConfig, seeds: tuple[int, ...], shift: Shift, device: torch.device, *, probe: bool
) -> Regime:
    everyone = (*seeds, SWEEP_SEED)
    sources = {seed: make_source(seed) for seed in everyone}
    settings = replace(SOURCE, epochs=epochs)
    trained = train_stacked(
        list(sources.values()), shift.source, settings, seeds=everyone, device=device, progress=False
    )
    profiles = {side: [_profile(sources[s], getattr(shift, side), device) for s in everyone] for side in SIDES}
    chosen = [_choose(profile) for profile in profiles["target"]]
    drawn = [_others(layers, seed) for layers, seed in zip(chosen, everyone, strict=True)]
    every = tuple(range(MODEL.depth))
    same = {HEAD: (), ALL: every, TOP: every[-2:], FULL: every}
    places = {arm: dict.fromkeys(everyone, layers) for arm, layers in same.items()}
    places |= {arm: dict(zip(everyone, found, strict=True)) for arm, found in ((INFLECTION, chosen), (RANDOM, drawn))}
    rates = _sweep(sources, places, shift.target, target, device)
    feed = Feed(shift.target, target, device)
    features = [pooled_features(sources[s], [feed.normalised(feed.data.test_images)]) for s in seeds]
    alone = [Job(INFLECTION, seed, (layer,), rates[INFLECTION]) for seed in seeds for layer in every if probe]
    accuracy, parameters, single = {}, {}, None
    for group in GROUPS:
        jobs = [Job(arm, seed, places[arm][seed], rates[arm]) for arm in group for seed in seeds]
        jobs += alone if INFLECTION in group else []
        models, runs = _adapt(jobs, sources, shift.target, target, device)
        found = [100 * run.test_accuracy for run in runs]
        for i, arm in enumerate(group):
            rows = slice(i * len(seeds), (i + 1) * len(seeds))
            accuracy[arm] = tuple(found[rows])
            parameters[arm] = sum(map(trained_parameters, models[rows])) / len(seeds)
        if INFLECTION in group and probe:
            single = torch.tensor(found[-len(alone) :], dtype=torch.float64).view(len(seeds), -1)
    moved = [
        layer_movement(before, pooled_features(model, [feed.normalised(feed.data.test_images)]), components=16)
        for before, model in zip(features, models, strict=True)
    ]
    return Regime(
        epochs=epochs,
        seeds=seeds,
        source_accuracy=tuple(100 * run.test_accuracy for run in trained[:-1]),
        unadapted=tuple(100 * feed.correct(sources[s], "test").double().mean().item() for s in seeds),
        on_source=tuple(profiles["source"][:-1]),
        on_target=tuple(profiles["target"][:-1]),
        layers=tuple(chosen[:-1]),
        random=tuple(drawn[:-1]),
        rates=rates,
        accuracy=accuracy,
        parameters=parameters,
        single=single,
        movement=torch.stack(moved),
    )


SIDES = ("source", "target")


def _profile(model: ViT, data: ImageData, device: torch.device) -> LayerProfile:
    """On training images: a diagnosis comes before adaptation and must not see test images."""
    feed = Feed(data, TARGET, device)
    images, labels = feed.data.train_images[:200], feed.data.train_labels[:200]
    return profile_layers(model, [(feed.normalised(images), labels)])


def _choose(profile: LayerProfile) -> tuple[int, ...]:
    """The maxima of the index alone: with neighbours they would fill most of six layers."""
    index = saturation_index(profile.mean_entropy, profile.batch_gradient)
    return tuple(inflection_layers(index, dilation=0))


def _others(chosen: Sequence[int], seed: int) -> tuple[int, ...]:
    """As many layers, drawn at random from the rest, then from the chosen ones."""
    order = torch.randperm(MODEL.depth, generator=generator(seed)).tolist()
    return tuple(sorted(sorted(order, key=lambda layer: layer in chosen)[: len(chosen)]))


def _adapt(
    jobs: Sequence[Job], sources: dict[int, ViT], data: ImageData, config: TrainConfig, device: torch.device
) -> tuple[list[nn.Module], list[TrainResult]]:
    models = [make_adaptable(sources[job.seed], job) for job in jobs]
    options = {"seeds": [job.seed for job in jobs], "rates": [job.rate for job in jobs]}
    return models, train_stacked(models, data, config, **options, device=device, progress=False)


def _sweep(
    sources: dict[int, ViT], places: dict, data: ImageData, config: TrainConfig, device: torch.device
) -> dict[str, float]:
    """The rate with the best validation accuracy for each arm, tried with the sweep's source model."""
    rates = {}
    for group in GROUPS:
        jobs = [Job(arm, SWEEP_SEED, places[arm][SWEEP_SEED], rate) for arm in group for rate in RATES]
        _, runs = _adapt(jobs, sources, data, config, device)
        for arm in group:
            found = {job.rate: run.val_accuracy for job, run in zip(jobs, runs, strict=True) if job.arm == arm}
            rates[arm] = max(found, key=found.get)
    return rates
