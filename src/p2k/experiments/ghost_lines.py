"""A trained network along one step, real and complex: its true zeros and poles, its Taylor series, its damage.

The network has two linear layers with an activation between them. Where the activation extends to complex arguments,
as tanh does, so do the logits at ``theta + t d`` as a function of t.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from p2k.core.seeding import generator
from p2k.experiments.ghosts_of_softmax import BATCH, Digits, build_mlp, train
from p2k.linalg.ghosts_of_softmax import logit_spread, radius_bound
from p2k.linalg.partition_zeros import Function, nearest_zeros
from p2k.optim.ghosts_of_softmax import logit_change

__all__ = [
    "Damage",
    "Line",
    "activation_poles",
    "calibrate",
    "descent",
    "flip_rankings",
    "line_taylor",
    "one_step_damage",
    "random_direction",
    "ranking_quality",
    "temperature_onsets",
    "true_partition",
]


@dataclass(frozen=True, eq=False)
class Line:
    """A network and a unit direction in its parameters, with the logits and their slopes on some examples.

    Args:
        module: the network; `parameters` are its own.
        parameters, direction: by name.
        images, labels: the examples.
        logits, slopes: ``[count, classes]`` at the start, and their derivative along the direction.
    """

    module: nn.Sequential
    parameters: dict[str, Tensor]
    direction: dict[str, Tensor]
    images: Tensor
    labels: Tensor
    logits: Tensor
    slopes: Tensor

    @property
    def bound(self) -> float:
        """The batch's radius bound, pi over the largest spread."""
        return radius_bound(self.slopes).min().item()

    def only(self, example: int) -> "Line":
        """The same line seen by one example."""
        one = slice(example, example + 1)
        kept = {name: getattr(self, name)[one] for name in ("images", "labels", "logits", "slopes")}
        return replace(self, **kept)

    def at(self, steps: Tensor) -> Tensor:
        """Logits ``[steps, count, classes]`` at real or complex distances along the direction."""
        p, d = self.parameters, self.direction
        # The first layer is linear in the step, so its two parts are computed once for all of them.
        start, slope = (F.linear(self.images, part["0.weight"], part["0.bias"]) for part in (p, d))
        t = steps[:, None, None]
        hidden = self.module[1](start + t * slope)
        fixed, moving = (hidden @ part["2.weight"].to(hidden.dtype).mT + part["2.bias"] for part in (p, d))
        return fixed + t * moving


def descent(module: nn.Sequential, images: Tensor, labels: Tensor, *, temperature: float = 1.0) -> Line:
    """The line of steepest descent of the mean cross-entropy on these examples."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    loss = F.cross_entropy(module(images) / temperature, labels)
    slopes = torch.autograd.grad(loss, list(module.parameters()))
    return _line(module, dict(zip(parameters, [-g for g in slopes], strict=True)), images, labels)


def random_direction(module: nn.Sequential, images: Tensor, labels: Tensor, *, seed: int) -> Line:
    """A line in a direction drawn from the sphere."""
    rng = generator(seed)
    drawn = {n: torch.randn(p.shape, generator=rng).to(p) for n, p in module.named_parameters()}
    return _line(module, drawn, images, labels)


def _line(module: nn.Sequential, direction: dict[str, Tensor], images: Tensor, labels: Tensor) -> Line:
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    length = math.hypot(*(d.norm().item() for d in direction.values()))
    unit = {name: d / length for name, d in direction.items()}
    slopes = logit_change(module, parameters, unit, (images,))
    with torch.no_grad():
        return Line(module, parameters, unit, images, labels, module(images), slopes)


def true_partition(line: Line, example: int) -> Function:
    """The network's own partition function along the line for one example, with its derivative by a difference.

    Both are divided by ``exp`` of the largest real part of a logit, as in `p2k.linalg.partition_zeros.partition`.
    """
    one, reach = line.only(example), 1e-6 * line.bound

    def function(points: Tensor) -> tuple[Tensor, Tensor]:
        near = torch.cat([points, points + reach, points - reach])
        logits = one.at(near)[:, 0]
        here, ahead, behind = (part for part in logits.chunk(3))
        size = here.real.amax(-1, keepdim=True)
        value, plus, minus = ((z - size).exp().sum(-1) for z in (here, ahead, behind))
        return value, (plus - minus) / (2 * reach)

    return function


def activation_poles(line: Line, example: int) -> Tensor:
    """Complex steps at which a hidden tanh of the example has a pole, the nearest one of each unit.

    The pre-activation ``h + t h'`` of unit j is linear in t, and tanh has its poles at odd multiples of ``i pi / 2``.
    """
    weight, bias = (line.parameters[name] for name in ("0.weight", "0.bias"))
    speed, drift = (line.direction[name] for name in ("0.weight", "0.bias"))
    x = line.images[example]
    start, slope = weight @ x + bias, speed @ x + drift
    moves = slope != 0
    return torch.complex(-start[moves], torch.full_like(start[moves], math.pi / 2)) / slope[moves]


def line_taylor(line: Line, *, radius: float, order: int, points: int = 256) -> Tensor:
    """Taylor coefficients of the mean true loss along the line, orders 0 to `order`, by Cauchy's integral on a circle.

    Args:
        line: in float64.
        radius: of the circle; no singularity may lie inside or on it.
        order: last order, below half of `points`.
        points: on the circle.
    """
    circle = radius * torch.exp(2j * math.pi * torch.arange(points, dtype=torch.float64) / points)
    logits = line.at(circle.to(line.logits.device))
    size = logits.real.amax(-1, keepdim=True)
    total = (logits - size).exp().sum(-1)
    # The branch of the logarithm that is continuous along the circle, and real where it starts.
    angle = total.angle()
    turn = torch.remainder(angle[1:] - angle[:-1] + math.pi, 2 * math.pi) - math.pi
    phase = torch.cat([angle[:1], angle[:1] + turn.cumsum(0)])
    target = logits.gather(-1, line.labels.expand(points, -1)[..., None])[..., 0]
    loss = torch.complex(total.abs().log() + size[..., 0], phase) - target
    found = torch.fft.fft(loss.mean(1)).real / points
    return found[: order + 1] / radius ** torch.arange(order + 1, dtype=torch.float64, device=found.device)


@dataclass(frozen=True, eq=False)
class Damage:
    """What a step does, per length: mean loss over its start, accuracy in percent, share of changed predictions."""

    loss_ratio: Tensor
    accuracy: Tensor
    flips: Tensor


def one_step_damage(line: Line, steps: Tensor, *, temperature: float = 1.0) -> Damage:
    """Loss, accuracy and changed predictions on the line's own examples at real distances `steps`."""
    logits = line.at(steps.to(line.logits.dtype))
    labels = line.labels.expand(len(steps), -1)
    loss = F.cross_entropy((logits / temperature).transpose(1, 2), labels, reduction="none").mean(1)
    start = F.cross_entropy(line.logits / temperature, line.labels)
    guess = logits.argmax(-1)
    flips = (guess != line.logits.argmax(-1)).double().mean(1)
    return Damage(loss / start, 100 * (guess == labels).double().mean(1), flips)


def calibrate(line: Line) -> Tensor:
    """Exact over bounded radius of each example, ``rho* / (pi / spread)``, at least 1: how careful the bound is."""
    return nearest_zeros(line.logits, line.slopes).abs() * logit_spread(line.slopes).double() / math.pi


def ranking_quality(score: Tensor, event: Tensor) -> float:
    """Probability that an example with the event has the higher score than one without (area under the ROC curve).

    Raises:
        ValueError: the event happens to all or to none.
    """
    count = int(event.sum())
    if count in (0, len(event)):
        raise ValueError(f"ranking_quality: the event must happen to some examples, got {count} of {len(event)}")
    order = (score[:, None] > score).double().sum(1) + 0.5 * (score[:, None] == score).double().sum(1) - 0.5
    return ((order[event].sum() - count * (count - 1) / 2) / (count * (len(event) - count))).item()


def flip_rankings(line: Line, *, ratio: float) -> dict[str, float]:
    """How well four scores, known before a step of `ratio` bounds, rank the examples whose prediction it changes.

    ``spread`` is that of the slopes, ``exact`` the nearness of the exact zero, ``margin`` the lack of a margin at the
    start, and ``linear`` the lack of one that linear logits predict for the end. Each is a `ranking_quality`;
    ``share`` is the share of examples whose prediction changes.

    Raises:
        ValueError: the step changes no prediction, or all.
    """
    step = ratio * line.bound
    chosen = line.logits.argmax(-1, keepdim=True)
    end = line.at(torch.tensor([step]).to(line.logits))[0]

    def lack(logits: Tensor) -> Tensor:
        others = logits.scatter(1, chosen, -math.inf).amax(1)
        return others - logits.gather(1, chosen)[:, 0]

    scores = {
        "spread": logit_spread(line.slopes),
        "exact": -nearest_zeros(line.logits, line.slopes).abs(),
        "margin": lack(line.logits),
        "linear": lack(line.logits + step * line.slopes),
    }
    flips = lack(end) > 0
    found = {name: ranking_quality(score.double(), flips) for name, score in scores.items()}
    return found | {"share": flips.double().mean().item()}


def temperature_onsets(
    data: Digits, *, seed: int, temperatures: Sequence[float], steps: int, threshold: float
) -> dict[str, list[float]]:
    """log10 of the step at which one descent step multiplies the loss by `threshold`, in three units, per temperature.

    ``raw`` is the length, ``radius`` the length over the bound at that temperature, and ``rms`` the root mean square
    change of the logits over the temperature, a unit that knows nothing of zeros.

    Args:
        data: a network is trained per temperature on its `train` part, and judged on the first 256 images of it.
        seed: of weights and batches.
        temperatures: the loss sees the logits divided by these.
        steps: training steps.
        threshold: of the loss ratio, ``> 1``.
    """
    found: dict[str, list[float]] = {"raw": [], "radius": [], "rms": []}
    for temperature in temperatures:
        model = build_mlp(seed=seed, device=data.train[0].device, dtype=data.train[0].dtype)
        train(model, data, seed=seed, steps=steps, temperature=temperature)
        line = descent(model, *(part[:256] for part in data.train), temperature=temperature)
        bound = temperature * line.bound
        grid = bound * torch.logspace(-1.5, 3, 91, device=line.logits.device)
        over = one_step_damage(line, grid, temperature=temperature).loss_ratio >= threshold
        onset = grid[over.int().argmax()].item() if over.any() else math.nan
        centred = line.slopes - line.slopes.mean(-1, keepdim=True)
        rms = centred.square().mean().sqrt().item() / temperature
        for unit, size in {"raw": 1.0, "radius": bound, "rms": 1 / rms}.items():
            found[unit].append(math.log10(onset / size))
    return found


def first_batch(data: Digits, seed: int) -> tuple[Tensor, Tensor]:
    """A batch of training digits, drawn by seed."""
    index = torch.randperm(len(data.train[1]), generator=generator(seed))[:BATCH].to(data.train[1].device)
    return data.train[0][index], data.train[1][index]
