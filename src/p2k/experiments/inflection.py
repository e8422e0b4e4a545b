"""Under- and over-trained source models adapted to noisy digits: everything, nothing but the head, or LoRA somewhere.

Every seed has its own source model, its own diagnosis and its own layers. Arms of one seed start from one source model
and see the same batches. `p2k.experiments.inflection_text` holds the paper's own task.

Source: wang2025inflection.  Chapter: inflection
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from p2k.core.seeding import generator
from p2k.data import ImageData
from p2k.data.digits import load_digits
from p2k.experiments.diagnostics import LayerProfile, layer_movement, pooled_features, profile_layers
from p2k.experiments.loop import Feed, TrainConfig
from p2k.experiments.saturation import inflection_layers, saturation_index
from p2k.experiments.stacked import train_stacked
from p2k.experiments.statistics import PairedDifference, paired_difference
from p2k.models.vit import ViT, ViTConfig, build_vit
from p2k.nn.lora import LoraConfig, LoraLinear
from p2k.nn.lora_adapters import inject_adapter_in_model

MODEL = ViTConfig(8, 2, 1, 10, dim=16, depth=6, heads=2, hidden=32, rank=4, readout="last")
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["query_key_value"], modules_to_save=["head"])
HEAD, INFLECTION, RANDOM, ALL, FULL = "head only", "LoRA, inflection", "LoRA, random", "LoRA, all", "full"
ARMS = (HEAD, INFLECTION, RANDOM, ALL, FULL)
# The seed of the learning-rate choice; reported seeds start at 0.
SWEEP_SEED = 1000
RATES = (3e-3, 1e-2)
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
    movement: Tensor

    def difference(self, arm: str, other: str) -> PairedDifference:
        """Accuracy of `arm` minus that of `other` in points, paired by seed."""
        return paired_difference(self.accuracy[arm], self.accuracy[other])

    def gradient(self, side: str, summary: str) -> Tensor:
        """A summary of the per-example gradient norms, such as `median_gradient`, ``[seeds, layers]``."""
        return torch.stack([getattr(profile, summary) for profile in getattr(self, side)])


class Switch(nn.Module):
    """Multiplies by 0 or 1, so that adapters of all layers can be stacked although each model uses some."""

    def __init__(self, on: bool):
        super().__init__()
        self.register_buffer("on", torch.tensor(float(on)))

    def forward(self, x: Tensor) -> Tensor:
        """All or nothing."""
        return x * self.on


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
    seeds: Sequence[int] = range(5),
    shift: Shift | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> tuple[Regime, Regime]:
    """Run both regimes with all arms; each arm takes its learning rate by the same sweep on validation digits.

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
    return tuple(_run_regime(epochs, target, tuple(seeds), shift, torch.device(device)) for epochs in bar)


def _run_regime(epochs: int, target: TrainConfig, seeds: tuple[int, ...], shift: Shift, device: torch.device) -> Regime:
    everyone = (*seeds, SWEEP_SEED)
    sources = {seed: _fresh(seed) for seed in everyone}
    settings = replace(SOURCE, epochs=epochs)
    trained = train_stacked(
        list(sources.values()), shift.source, settings, seeds=everyone, device=device, progress=False
    )
    profiles = {side: [_profile(sources[s], getattr(shift, side), device) for s in everyone] for side in SIDES}
    chosen = [_choose(profile) for profile in profiles["target"]]
    drawn = [_others(layers, seed) for layers, seed in zip(chosen, everyone, strict=True)]
    every = tuple(range(MODEL.depth))
    places = {HEAD: [()] * len(everyone), INFLECTION: chosen, RANDOM: drawn, ALL: [every] * len(everyone), FULL: None}
    feed = Feed(shift.target, target, device)
    rates = _sweep(sources[SWEEP_SEED], places, shift.target, target, device)
    features = [pooled_features(sources[s], [feed.normalised(feed.data.test_images)]) for s in seeds]
    accuracy = {}
    for arms in ((HEAD, INFLECTION, RANDOM, ALL), (FULL,)):
        jobs = [(arm, i) for arm in arms for i in range(len(seeds))]
        models = [_adaptable(sources[seeds[i]], places[arm] and places[arm][i], seeds[i]) for arm, i in jobs]
        settings = {"seeds": [seeds[i] for _, i in jobs], "rates": [rates[arm] for arm, _ in jobs]}
        runs = train_stacked(models, shift.target, target, **settings, device=device, progress=False)
        for arm in arms:
            accuracy[arm] = tuple(100 * run.test_accuracy for run, job in zip(runs, jobs, strict=True) if job[0] == arm)
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
        movement=torch.stack(moved),
    )


SIDES = ("source", "target")


def _fresh(seed: int) -> ViT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_vit(MODEL, "gelu")


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


def _adaptable(source: ViT, layers: Sequence[int] | None, seed: int) -> nn.Module:
    """A copy to train: whole for None, else the head and adapters that are switched on in `layers`."""
    model = copy.deepcopy(source)
    if layers is None:
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LORA, model)
    for number, block in enumerate(model.blocks):
        for module in block.modules():
            if isinstance(module, LoraLinear):
                module.lora_dropout["default"] = Switch(number in layers)
    return model


def _sweep(source: ViT, places: dict, data: ImageData, config: TrainConfig, device: torch.device) -> dict[str, float]:
    """The rate with the best validation accuracy for each arm, tried with the sweep's source model."""
    rates = {}
    for arms in ((HEAD, INFLECTION, RANDOM, ALL), (FULL,)):
        jobs = [(arm, rate) for arm in arms for rate in RATES]
        models = [_adaptable(source, places[arm] and places[arm][-1], SWEEP_SEED) for arm, _ in jobs]
        tried = [rate for _, rate in jobs]
        order = [SWEEP_SEED] * len(jobs)
        runs = train_stacked(models, data, config, seeds=order, rates=tried, device=device, progress=False)
        for arm in arms:
            found = {rate: run.val_accuracy for (name, rate), run in zip(jobs, runs, strict=True) if name == arm}
            rates[arm] = max(found, key=found.get)
    return rates
