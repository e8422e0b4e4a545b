"""Grokking on modular addition: losses and optimizers that do or do not stop at the edge of float precision.

All seeds of an arm train as one batch of matrix products. Their weights stay tensors of their own, because an optimizer
that projects looks at one weight tensor at a time.

``python -m p2k.experiments.stablemax --out DIR`` trains `LONG_ARMS` for `LONG` and writes one record per arm, with its
curves under `config`: about ten minutes on one core.

Source: prieto2025grokking.  Chapter: stablemax
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from p2k.core.device import device_name, versions
from p2k.core.seeding import generator
from p2k.data.modular import make_modular
from p2k.experiments.records import ResultRecord, write_record
from p2k.losses.stablemax import rest_cross_entropy, stablemax_cross_entropy
from p2k.optim.stablemax import OrthoGrad


@dataclass(frozen=True)
class Task:
    """Modular addition for a bias-free ReLU network on pairs of one-hot residues, trained on all pairs at once.

    Args:
        modulus: number of residues.
        train_fraction: share of the pairs for training.
        hidden: widths of the hidden layers.
        steps: full-batch steps.
        every: steps between two measurements.
    """

    modulus: int = 113
    train_fraction: float = 0.4
    hidden: tuple[int, ...] = (200, 200)
    steps: int = 300
    every: int = 10


@dataclass(frozen=True)
class Arm:
    """A loss and an optimizer.

    Args:
        loss: `softmax16`, `softmax32`, `softmax64` (in that precision), `rest` (softmax over the other classes first,
            in float32) or `stablemax`.
        orthogonal: project every gradient off its weight.
        weight_decay: of AdamW.
        rate: learning rate.
        beta2: decay of AdamW's second moment.
    """

    loss: str = "softmax32"
    orthogonal: bool = False
    weight_decay: float = 0.0
    rate: float = 0.01
    beta2: float = 0.99


@dataclass(frozen=True, eq=False)
class Curves:
    """What was measured, each ``[seeds, measurements]``.

    Args:
        steps: of the measurements.
        train, test: accuracy, between 0 and 1.
        collapsed: share of the training examples whose loss is exactly 0 in the arm's own arithmetic.
        silent: share of the training examples whose loss sends exactly no gradient to the logit of the label.
        alignment: cosine between the descent direction and the weights, over all of them.
        norm: length of all weights.
        seconds: wall-clock duration of all seeds together.
    """

    steps: Tensor
    train: Tensor
    test: Tensor
    collapsed: Tensor
    silent: Tensor
    alignment: Tensor
    norm: Tensor
    seconds: float


def _softmax(dtype: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """Losses per example from logits rounded to `dtype`, as the authors' code has them."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        log_p = F.log_softmax(logits.to(dtype), -1)
        return -log_p.gather(-1, labels[..., None])[..., 0]

    return loss


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "softmax16": _softmax(torch.float16),
    "softmax32": _softmax(torch.float32),
    "softmax64": _softmax(torch.float64),
    "rest": lambda logits, labels: rest_cross_entropy(logits, labels, reduction="none"),
    "stablemax": lambda logits, labels: stablemax_cross_entropy(logits, labels, reduction="none"),
}


# The task that a CPU affords: 576 of 961 pairs, 24,000 weights per network.
SMALL = Task(modulus=31, train_fraction=0.6, hidden=(128, 128), steps=300, every=10)
LONG = Task(modulus=31, train_fraction=0.6, hidden=(128, 128), steps=10_000, every=200)
# Rates were chosen on seeds 1000 to 1002, which are not reported.
SHORT_ARMS = {
    "softmax, float16": Arm("softmax16"),
    "softmax, float32": Arm(),
    "weight decay": Arm(weight_decay=1.0, rate=0.03),
    "⊥Grad": Arm(orthogonal=True),
}
LONG_ARMS = {
    "softmax-float32": Arm("softmax32", rate=0.03),
    "softmax-float64": Arm("softmax64", rate=0.03),
    "softmax-rest": Arm("rest", rate=0.03),
    "stablemax": Arm("stablemax", rate=0.03),
}


class Replicas:
    """Networks of several seeds, each on a split of its own.

    Args:
        task: sizes.
        seeds: one network each, of its initial weights and of its split.
        device: where the tensors live.
    """

    def __init__(self, task: Task, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        tables = [make_modular(task.modulus, train_fraction=task.train_fraction, seed=seed) for seed in seeds]
        parts = {
            "train": [(table.one_hot(table.train_pairs), table.train_labels) for table in tables],
            "test": [(table.one_hot(table.test_pairs), table.test_labels) for table in tables],
        }
        self.parts = {
            part: [torch.stack(tensors).to(device) for tensors in zip(*pairs, strict=True)]
            for part, pairs in parts.items()
        }
        widths = (2 * task.modulus, *task.hidden, task.modulus)
        self.layers = [[] for _ in widths[1:]]
        for seed in seeds:
            source = generator(seed)
            for layer, (fan_in, fan_out) in zip(self.layers, zip(widths, widths[1:], strict=False), strict=True):
                # torch's own initialisation of a linear layer.
                weight = torch.empty(fan_in, fan_out).uniform_(-1, 1, generator=source) / math.sqrt(fan_in)
                layer.append(weight.to(device).requires_grad_())

    @property
    def weights(self) -> list[Tensor]:
        """All weight tensors."""
        return [weight for layer in self.layers for weight in layer]

    def logits(self, part: str) -> Tensor:
        """Logits of `train` or `test`, ``[seeds, examples, classes]``."""
        x = self.parts[part][0]
        for layer in self.layers[:-1]:
            x = torch.bmm(x, torch.stack(layer)).relu()
        return torch.bmm(x, torch.stack(self.layers[-1]))

    @torch.no_grad()
    def accuracy(self, part: str) -> Tensor:
        """Accuracy of each seed."""
        return (self.logits(part).argmax(-1) == self.parts[part][1]).double().mean(-1)


def train_arm(
    arm: Arm,
    task: Task,
    *,
    seeds: Sequence[int] = range(5),
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Curves:
    """Train all seeds of one arm and measure them on the way.

    Args:
        arm: loss and optimizer.
        task: sizes.
        seeds: of weights and splits.
        device: where to train.
        progress: show a bar on standard error.

    Source: prieto2025grokking.
    Chapter: stablemax
    """
    start = time.perf_counter()
    nets, loss_of = Replicas(task, seeds, device), LOSSES[arm.loss]
    optimizer = torch.optim.AdamW(
        nets.weights, lr=arm.rate, betas=(0.9, arm.beta2), eps=1e-25, weight_decay=arm.weight_decay, fused=True
    )
    stepper = OrthoGrad(optimizer) if arm.orthogonal else optimizer
    rows = []
    for step in tqdm(range(task.steps + 1), unit="step", leave=False, disable=not progress):
        logits = nets.logits("train")
        losses = loss_of(logits, nets.parts["train"][1])
        stepper.zero_grad()
        # A mean over examples, a sum over seeds: each seed has the gradient it would have alone.
        losses.mean(-1).sum().backward(inputs=nets.weights)
        if step % task.every == 0:
            rows.append(_measure(nets, loss_of, logits.detach()))
        stepper.step()
    columns = [torch.stack(column, -1).double().cpu() for column in zip(*rows, strict=True)]
    return Curves(torch.arange(0, task.steps + 1, task.every), *columns, time.perf_counter() - start)


def _measure(nets: Replicas, loss_of: Callable, logits: Tensor) -> tuple[Tensor, ...]:
    """One number per seed for each curve; the gradients of the step are there."""
    labels = nets.parts["train"][1]
    train = (logits.argmax(-1) == labels).double().mean(-1)
    losses = loss_of(leaf := logits.clone().requires_grad_(), labels)
    (slope,) = torch.autograd.grad(losses.sum(), leaf)
    silent = (slope.gather(-1, labels[..., None])[..., 0] == 0).double().mean(-1)
    collapsed = (losses == 0).double().mean(-1)
    pairs = [[(w.detach().flatten(), w.grad.flatten()) for w in column] for column in zip(*nets.layers, strict=True)]
    weight, gradient = (torch.stack([torch.cat([pair[i] for pair in net]) for net in pairs]) for i in (0, 1))
    alignment = F.cosine_similarity(-gradient.double(), weight.double(), dim=-1, eps=1e-300)
    return train, nets.accuracy("test"), collapsed, silent, alignment, weight.norm(dim=-1)


def record(name: str, arm: Arm, task: Task, seeds: Sequence[int], curves: Curves, device: str = "cpu") -> ResultRecord:
    """Final test accuracies of an arm as a record; its curves stand in the settings, rounded."""
    measured = {
        key: [[float(f"{value:.4g}") for value in row] for row in getattr(curves, key).tolist()]
        for key in ("train", "test", "collapsed", "silent", "alignment", "norm")
    }
    widths = (2 * task.modulus, *task.hidden, task.modulus)
    return ResultRecord(
        slug="stablemax",
        experiment="modular-addition",
        arm=name,
        profile="cpu",
        metric="test_accuracy",
        values=curves.test[:, -1].tolist(),
        seeds=tuple(seeds),
        parameters=sum(a * b for a, b in zip(widths, widths[1:], strict=False)),
        config={"arm": asdict(arm), "task": asdict(task), "steps": curves.steps.tolist(), "curves": measured},
        device=device_name(device),
        versions=versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(curves.seconds, 1),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the long arms and write their records."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--steps", type=int, default=LONG.steps)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    task = Task(LONG.modulus, LONG.train_fraction, LONG.hidden, options.steps, min(LONG.every, options.steps))
    for name, arm in LONG_ARMS.items():
        curves = train_arm(arm, task, seeds=range(options.seeds))
        write_record(options.out, record(name, arm, task, range(options.seeds), curves))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
