"""The comparisons of the OQC chapter: two on a CPU, the paper's protocol on GPUs.

``python -m p2k.experiments.oqc --profile gpu --data DIR --out DIR`` runs the protocol, alone or under torchrun, resumes
where it stopped, and writes one record per arm.

Source: wang2026oqc.  Chapter: oqc
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from p2k.core.device import choose_device
from p2k.core.errors import P2KError
from p2k.data import ImageData
from p2k.data.cifar import load_cifar100
from p2k.data.digits import load_digits
from p2k.data.quad import make_quad, make_textures
from p2k.experiments.comparison import ArmResult, Sweep, build_paired, compare_arms, whole_model_match
from p2k.experiments.distributed import current_world, process_group
from p2k.experiments.loop import TrainConfig, train
from p2k.experiments.records import write_record
from p2k.models.vit import DIGITS, OQC_CIFAR100, ViTConfig, match_vit

DIGITS_ARMS = ("glu", "glu+aux", "glu+oqc", "glu+oqc-lr", "glu+oqc-static", "glu+oqc-dynamic")
SQUARES_ARMS = ("gelu", "gelu+squares", "gelu+squares-oqc", "gelu+squares-fixed")
GPU_ARMS = tuple(
    "afbo" + variant
    for variant in ("", "+aux", "+oqc", "+oqc-lr", "+oqc-lr-tied", "+oqc-static", "+oqc-dynamic", "+fixed")
)

# Four tokens of 4x4 pixels: with 2x2 patches the same accuracy takes about eight times as long.
DIGITS_MODEL = replace(DIGITS, patch_size=4)
QUAD_MODEL = ViTConfig(3, 1, 6, 6, dim=24, depth=1, heads=2, hidden=48, rank=8)
# Seeds of choices, never reported: `compare_arms` refuses one that is. On a GPU one of them has to do.
SWEEP_SEEDS = (1000, 1001)
GPU_CONFIG = TrainConfig(
    epochs=100, batch_size=256, learning_rate=1e-3, warmup_epochs=10, label_smoothing=0.1, crop_padding=4, flip=True
)
GPU_RATES = (5e-4, 1e-3, 2e-3)


def _cpu_config(epochs: int) -> TrainConfig:
    return TrainConfig(epochs=epochs, batch_size=128, warmup_epochs=min(1.0, epochs / 2))


def compare_on_digits(
    arms: Sequence[str] = DIGITS_ARMS,
    *,
    seeds: Sequence[int] = range(5),
    epochs: int = 16,
    rates: Sequence[float] = (3e-3, 1e-2),
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> list[ArmResult]:
    """The paper's variants on digits at the parameter count of the GLU host.

    Args:
        arms: names of feed-forward blocks.
        seeds: reported seeds.
        epochs: passes over 896 images, ``>= 1``.
        rates: learning rates from which each arm takes its best on the validation images with `SWEEP_SEEDS`.
        device: where to train.
        progress: show bars on standard error.
    """
    return compare_arms(
        match_vit(DIGITS_MODEL, arms),
        load_digits(),
        model=DIGITS_MODEL,
        config=_cpu_config(epochs),
        seeds=seeds,
        sweep=Sweep(tuple(rates), SWEEP_SEEDS),
        device=device,
        progress=progress,
    )


def squares_comparison(
    arms: Sequence[str] = SQUARES_ARMS,
    *,
    seeds: Sequence[int] = range(8),
    epochs: int = 10,
    train_images: int = 2048,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> list[ArmResult]:
    """Second-order features for one scalar per layer, with and without projection, on the second-order task.

    All arms have one hidden width and one learning rate: what differs between them is what is compared.

    Args:
        arms: names of feed-forward blocks.
        seeds: reported seeds.
        epochs: passes over the training images, ``>= 1``.
        train_images: size of the training set.
        device: where to train.
        progress: show bars on standard error.
    """
    budget = whole_model_match(QUAD_MODEL, arms[0]).parameters
    return compare_arms(
        {arm: whole_model_match(QUAD_MODEL, arm, budget) for arm in arms},
        make_quad(train=train_images),
        model=QUAD_MODEL,
        config=_cpu_config(epochs),
        seeds=seeds,
        sweep=Sweep((6e-3,), SWEEP_SEEDS),
        device=device,
        progress=progress,
    )


def paper_protocol(
    data: ImageData,
    out_dir: Path,
    *,
    model: ViTConfig = OQC_CIFAR100,
    config: TrainConfig = GPU_CONFIG,
    arms: Sequence[str] = GPU_ARMS,
    seeds: Sequence[int] = range(5),
    device: torch.device | str = "cuda",
) -> list[ArmResult]:
    """Every arm and seed in turn, matched to the first arm, at the learning rate that the first arm's sweep prefers.

    The rate is chosen for the host alone, on the validation images with a seed that is not reported. Each run keeps a
    checkpoint under `out_dir` and continues from it; each finished arm leaves a record there.

    Args:
        data: CIFAR-100 in the paper.
        out_dir: folder for checkpoints and records.
        model: architecture around the feed-forward block.
        config: settings; the learning rate is replaced by the chosen one.
        arms: names of feed-forward blocks, the host first.
        seeds: reported seeds.
        device: this process's device.

    Raises:
        P2KError: a loss is not finite, or a checkpoint is damaged or from another run.
    """
    matches = match_vit(model, arms, budget_of=arms[0], multiple_of=8)

    def run(arm: str, seed: int, settings: TrainConfig):
        built = build_paired(model, arm, hidden=matches[arm].hidden, seed=seed)
        folder = out_dir / "runs" / f"{arm}-{settings.learning_rate:g}-{seed}"
        return train(built, data, settings, device=device, seed=seed, out_dir=folder)

    def score(rate: float) -> float:
        found = run(arms[0], SWEEP_SEEDS[0], replace(config, learning_rate=rate)).val_accuracy
        # Processes may differ in the last image; they must not differ in the choice.
        return current_world().mean(torch.tensor(found, device=device)).item()

    chosen = replace(config, learning_rate=max(GPU_RATES, key=score))
    results = []
    for arm in arms:
        runs = tuple(run(arm, seed, chosen) for seed in seeds)
        seconds = sum(result.seconds for result in runs)
        result = ArmResult(arm, matches[arm], chosen, tuple(seeds), runs, (), seconds)
        if current_world().is_main:
            record = result.record(data.name, profile="gpu", model=model, data=data, device=device)
            write_record(out_dir / record.filename, record)
        results.append(result)
    return results


def load_gpu_data(name: str, root: Path) -> tuple[ImageData, ViTConfig]:
    """A data set of the gpu profile with the model around it; under torchrun one process downloads for all.

    Args:
        name: ``cifar100``, or ``textures``, which needs no download.
        root: folder of downloads.

    Raises:
        DatasetMissing: the set is neither there nor downloadable.
    """
    if name == "textures":
        return make_textures(), replace(OQC_CIFAR100, num_classes=16)
    world = current_world()
    data = load_cifar100(root) if world.is_main else None
    world.wait()
    return data or load_cifar100(root), OQC_CIFAR100


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status. Errors a user can mend are printed without a traceback."""
    options = _parser().parse_args(arguments)
    try:
        with process_group(choose_device(options.device)) as (world, device):
            data, model = load_gpu_data(options.data_set, options.data)
            warmup = min(GPU_CONFIG.warmup_epochs, options.epochs / 10)
            settings = {"epochs": options.epochs, "batch_size": options.batch_size, "warmup_epochs": warmup}
            config = replace(GPU_CONFIG, **settings)
            seeds = range(options.seeds)
            results = paper_protocol(data, options.out, model=model, config=config, seeds=seeds, device=device)
            for result in results if world.is_main else []:
                mean = sum(result.test_accuracy) / len(result.seeds)
                print(f"{result.arm:18} {result.match.parameters:>9,} parameters  {mean:6.2f} %")
    except (P2KError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m p2k.experiments.oqc", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--profile", choices=["gpu"], required=True, help="the paper's protocol; notebooks run the others"
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of downloads")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and records")
    parser.add_argument("--data-set", choices=["cifar100", "textures"], default="cifar100")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--epochs", type=int, default=GPU_CONFIG.epochs)
    parser.add_argument("--batch-size", type=int, default=GPU_CONFIG.batch_size, help="over all processes")
    parser.add_argument("--seeds", type=int, default=5, help="number of reported seeds")
    return parser


if __name__ == "__main__":
    sys.exit(main())
