"""Train one image classifier: AdamW, warm-up and cosine, data on the device, resumable, alone or under torchrun."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from p2k.core.checks import check_positive
from p2k.core.errors import P2KError
from p2k.core.seeding import generator
from p2k.data import ImageData, as_float
from p2k.data.augment import normalise, random_crop, random_horizontal_flip
from p2k.experiments.checkpoint import load_checkpoint, run_fingerprint, save_checkpoint
from p2k.experiments.distributed import World, current_world
from p2k.nn.matching import decay_groups


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Args:
        epochs: passes over the training images, ``>= 1``.
        batch_size: images per step over all processes, ``>= 1``; an incomplete last batch is left out.
        learning_rate: peak of the schedule, ``> 0``.
        weight_decay: of matrices only, ``>= 0``.
        warmup_epochs: epochs of linear warm-up, ``0 <= warmup_epochs < epochs``.
        label_smoothing: ``0 <= label_smoothing < 1``.
        crop_padding: pixels of random shift, 0 for none.
        flip: mirror images at random.
        bfloat16: autocast to bfloat16 on a GPU; no effect on a CPU.

    Raises:
        ValueError: a setting is out of range.
    """

    epochs: int
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    warmup_epochs: float = 1.0
    label_smoothing: float = 0.0
    crop_padding: int = 0
    flip: bool = False
    bfloat16: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_positive("TrainConfig", epochs=self.epochs, batch_size=self.batch_size, learning_rate=self.learning_rate)
        check_positive("TrainConfig", zero_allowed=True, weight_decay=self.weight_decay, crop_padding=self.crop_padding)
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(f"TrainConfig: warmup_epochs must lie in [0, {self.epochs}), got {self.warmup_epochs}")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"TrainConfig: label_smoothing must lie in [0, 1), got {self.label_smoothing}")

    def steps_per_epoch(self, images: int) -> int:
        """Complete batches among `images`; ValueError when there is none."""
        if images < self.batch_size:
            raise ValueError(f"TrainConfig: batch_size must be at most the {images} images, got {self.batch_size}")
        return images // self.batch_size

    def rate_factor(self, step: int, steps_per_epoch: int) -> float:
        """Learning rate of a step as a share of its peak: linear warm-up, then half a cosine down to zero."""
        warmup, total = self.warmup_epochs * steps_per_epoch, self.epochs * steps_per_epoch
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


@dataclass(frozen=True, eq=False)
class TrainResult:
    """What a run leaves.

    Args:
        losses: training loss of each step, float64 ``[steps]`` on the CPU.
        val_accuracy: share of validation images classified correctly, 0..1.
        test_accuracy: likewise on the test images.
        test_correct: ``[test]`` bool on the CPU, in the order of the data.
        seconds: wall-clock duration of this call.
    """

    losses: Tensor
    val_accuracy: float
    test_accuracy: float
    test_correct: Tensor
    seconds: float


def train(
    model: nn.Module,
    data: ImageData,
    config: TrainConfig,
    *,
    device: torch.device | str = "cpu",
    seed: int,
    out_dir: Path | None = None,
    resume: bool = True,
    progress: bool = True,
) -> TrainResult:
    """Train `model` in place and evaluate it.

    The order of images and their augmentation depend on `seed` and the epoch only, so models trained with one seed
    see the same batches. Under torchrun, inside `process_group`, every process gets its share of each batch.

    Args:
        model: maps ``[N, C, H, W]`` to logits ``[N, classes]``; moved to `device`.
        data: normalised here with the statistics of its training images.
        config: settings.
        device: where data and model live.
        seed: of order, augmentation and dropout, not of the initial weights.
        out_dir: folder for a checkpoint after each epoch; None writes nothing.
        resume: continue from the checkpoint in `out_dir` if there is one.
        progress: show a bar on standard error.

    Raises:
        ValueError: the batch does not fit the data or the number of processes.
        P2KError: the loss is not finite, or the checkpoint is damaged or from another run.
    """
    start = time.perf_counter()
    device, world = torch.device(device), current_world()
    model.to(device)
    feed = Feed(data, config, device)
    optimizer = make_optimizer(model, config)
    mark = run_fingerprint(model, {**asdict(config), "seed": seed, "data": data.checksum})
    path = Path(out_dir) / "checkpoint.pt" if out_dir is not None else None
    with _own_random_state(seed, device):
        first, losses = _resume(path if resume else None, model, optimizer, mark)
        wrapped = world.wrap(model)
        quiet = not (progress and world.is_main)
        bar = tqdm(desc=f"seed {seed}", total=config.epochs, initial=first, unit="epoch", leave=False, disable=quiet)
        with bar:
            for epoch in range(first, config.epochs):
                new = _train_epoch(wrapped, optimizer, feed, world=world, seed=seed, epoch=epoch)
                losses = torch.cat([losses, new])
                if path is not None and world.is_main:
                    state = {"epoch": epoch + 1, "losses": losses}
                    save_checkpoint(path, model, optimizer, fingerprint=mark, progress=state)
                bar.set_postfix(loss=f"{new.mean().item():.3f}", refresh=False)
                bar.update()
    world.wait()
    val, test = (feed.correct(model, name) for name in ("val", "test"))
    seconds = time.perf_counter() - start
    return TrainResult(losses, val.double().mean().item(), test.double().mean().item(), test, seconds)


class Feed:
    """The data on a device as normalised batches, in an order fixed by seed and epoch."""

    def __init__(self, data: ImageData, config: TrainConfig, device: torch.device) -> None:
        self.data, self.config, self.device = data.to(device), config, device
        self.mean, self.std = self.data.channel_statistics()
        self.steps = config.steps_per_epoch(len(data.train_labels))

    def order(self, seed: int, epoch: int) -> Tensor:
        """Indices of an epoch's batches, ``[steps, batch]``, drawn on the CPU: the same on every device."""
        order = torch.randperm(len(self.data.train_labels), generator=generator(_mix(seed, epoch)))
        return order[: self.steps * self.config.batch_size].view(self.steps, -1).to(self.device)

    def epoch(self, seed: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Global batches of one epoch, augmented and normalised."""
        rng = generator(_mix(seed, epoch), self.device)
        for index in self.order(seed, epoch):
            images = self.data.train_images[index]
            if self.config.crop_padding:
                images = random_crop(images, self.config.crop_padding, rng)
            if self.config.flip:
                images = random_horizontal_flip(images, rng)
            yield self.normalised(images), self.data.train_labels[index]

    def normalised(self, images: Tensor) -> Tensor:
        """Images as float32 with zero mean and unit deviation per channel over the training set."""
        return normalise(as_float(images), self.mean, self.std)

    @torch.no_grad()
    def correct(self, model: nn.Module, split: str, *, batch_size: int = 1024) -> Tensor:
        """Which images of a split the model classifies correctly, bool on the CPU; leaves the model in eval mode."""
        model.eval()
        images, labels = self.data.split(split)
        hits = []
        for chunk, target in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            with mixed_precision(self.config, self.device):
                hits.append(model(self.normalised(chunk)).argmax(-1) == target)
        return torch.cat(hits).cpu()


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW whose decay spares vectors, scalars and gates."""
    return torch.optim.AdamW(decay_groups(model, config.weight_decay), lr=config.learning_rate)


def mixed_precision(config: TrainConfig, device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 on a GPU where the settings ask for it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.bfloat16 and device.type == "cuda")


def _train_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, feed: Feed, *, world: World, seed: int, epoch: int
) -> Tensor:
    """One pass over the data; returns the loss of each step over all processes."""
    model.train()
    config, losses = feed.config, []
    # Every process augments the whole batch and keeps its share: the numbers are then those of one process.
    for batch, (images, labels) in enumerate(feed.epoch(seed, epoch)):
        factor = config.rate_factor(epoch * feed.steps + batch, feed.steps)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * factor
        with mixed_precision(config, feed.device):
            # Autocast itself runs the cross-entropy in float32.
            logits = model(world.shard(images))
            loss = F.cross_entropy(logits, world.shard(labels), label_smoothing=config.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    # One transfer per epoch: asking for the number at each step would make a GPU wait.
    found = world.mean(torch.stack(losses)).double().cpu()
    if not found.isfinite().all():
        step = epoch * feed.steps + int(found.isfinite().logical_not().nonzero()[0])
        raise P2KError(
            f"the training loss became {found[step - epoch * feed.steps]} at step {step}: lower learning_rate"
        )
    return found


def _resume(
    path: Path | None, model: nn.Module, optimizer: torch.optim.Optimizer, fingerprint: str
) -> tuple[int, Tensor]:
    """First epoch to train and the losses before it, from the checkpoint if there is one."""
    if path is None or not path.exists():
        return 0, torch.zeros(0, dtype=torch.float64)
    state = load_checkpoint(path, model, optimizer, fingerprint=fingerprint)
    return state["epoch"], state["losses"]


@contextmanager
def _own_random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Seed dropout for the run and give the caller's random state back afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _mix(seed: int, epoch: int) -> int:
    """A seed for one epoch of one run; runs do not meet before a million epochs."""
    return seed * 1_000_003 + epoch
