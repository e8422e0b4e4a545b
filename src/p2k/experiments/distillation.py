"""Distil a known Gaussian teacher into a tanh MLP: knowledge distillation against anchored list losses.

The world is a two-dimensional double integrator (position and velocity pushed by an acceleration); the teacher is a
linear-Gaussian controller, so every divergence has a closed form. Each state offers a list of actions drawn from the
teacher; a method sees the teacher's density on them. Knowledge distillation is matched correctly: student and teacher
are compared as distributions on the same list and at the same temperature 1, with a uniform anchor, so its optimum is
the teacher. Runs of all seeds are one stack of models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from p2k.core.seeding import generator
from p2k.losses.adpo import adpo_loss
from p2k.losses.anchors import build_anchor
from p2k.losses.targets import softmax_target

STATE, ACTION, WIDTH = 4, 2, 32
TEACHER_STD, TIME_STEP, HORIZON = 0.3, 0.1, 60
# Acceleration = -(1.0 position + 1.5 velocity): stable and slightly under-damped.
GAIN = torch.tensor([[1.0, 0.0, 1.5, 0.0], [0.0, 1.0, 0.0, 1.5]])
Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Distiller:
    """A way to learn from the teacher's density on a list of actions.

    Args:
        name: for tables.
        anchor: name and options of `p2k.losses.anchors.build_anchor`.
        tau: temperature of the anchored list policy.
    """

    name: str
    anchor: str
    tau: float = 1.0
    anchor_options: Mapping[str, float] = field(default_factory=dict)


DISTILLERS = (
    Distiller("kd", "uniform"),
    Distiller("self-anchor", "fixed"),
    Distiller("self-anchor-0.3", "fixed", 0.3),
    Distiller("ema", "ema", anchor_options={"decay": 0.99}),
)


@dataclass(frozen=True)
class Distilled:
    """Per seed: mean return (negative cost) of the student, and KL(teacher || student) on states the teacher visits."""

    name: str
    returns: tuple[float, ...]
    divergences: tuple[float, ...]


def teacher_mean(states: Float[Tensor, "*batch state"]) -> Float[Tensor, "*batch action"]:
    """The teacher's mean action."""
    return -states @ GAIN.T


def initial_students(seeds: Sequence[int]) -> dict[str, Tensor]:
    """Stacked MLPs 4 -> 32 -> 2 with tanh, and a log-deviation per action that starts at log 0.5."""
    stacks: dict[str, list[Tensor]] = {}
    for seed in seeds:
        random = generator(seed)
        shapes = {"0.weight": (STATE, WIDTH), "0.bias": (1, WIDTH), "1.weight": (WIDTH, ACTION), "1.bias": (1, ACTION)}
        for name, shape in shapes.items():
            fan_in = STATE if name.startswith("0") else WIDTH
            stacks.setdefault(name, []).append((2 * torch.rand(shape, generator=random) - 1) * fan_in**-0.5)
        stacks.setdefault("log_std", []).append(torch.full((1, ACTION), 0.5).log())
    return {name: torch.stack(values) for name, values in stacks.items()}


def student_mean(parameters: Parameters, states: Float[Tensor, "seeds batch state"]) -> Tensor:
    """The students' mean actions, ``[seeds, batch, action]``."""
    hidden = torch.baddbmm(parameters["0.bias"], states, parameters["0.weight"]).tanh()
    return torch.baddbmm(parameters["1.bias"], hidden, parameters["1.weight"])


def gaussian_logp(actions: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of a diagonal Gaussian without its constant ``log(2 pi) / 2`` per dimension, which no list sees."""
    return (-0.5 * ((actions - mean) / log_std.exp()).square() - log_std).sum(-1)


def distil(
    distiller: Distiller,
    seeds: Sequence[int],
    *,
    steps: int = 400,
    batch: int = 64,
    candidates: int = 8,
    learning_rate: float = 3e-2,
) -> Distilled:
    """Train one student per seed and measure it.

    Args:
        distiller: the method.
        seeds: of students, states and candidate actions; all methods see the same.
        steps: optimizer steps.
        batch: states per step.
        candidates: actions per state, ``>= 2``.
        learning_rate: of Adam, with a cosine decay to zero.

    Raises:
        ValueError: fewer than two candidates: their list distribution would say nothing.

    Source: wang2025adpo, section on distillation; the task is ours, MuJoCo is not used.
    Chapter: adpo
    """
    if candidates < 2:
        raise ValueError(f"distil: candidates must be at least 2, got {candidates}")
    start = initial_students(seeds)
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
    kept = distiller.anchor != "uniform"
    anchor = build_anchor(distiller.anchor, start if kept else None, **distiller.anchor_options)
    optimizer = torch.optim.Adam(parameters.values(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    randoms = [generator(seed + 1_000_003) for seed in seeds]
    teacher_log_std = torch.tensor(TEACHER_STD).log()
    for _ in range(steps):
        states = torch.stack([torch.randn(batch, STATE, generator=random) for random in randoms])
        noise = torch.stack([torch.randn(batch, candidates, ACTION, generator=random) for random in randoms])
        mean = teacher_mean(states)[..., None, :]
        # Proposals twice as wide as the teacher: the list must hold good and bad actions.
        actions = mean + 2 * TEACHER_STD * noise
        target = softmax_target(gaussian_logp(actions, mean, teacher_log_std))

        def logps(other: Parameters, states: Tensor = states, actions: Tensor = actions) -> Tensor:
            own = student_mean(other, states)[..., None, :]
            return gaussian_logp(actions, own, other["log_std"][..., None, :])

        current = logps(parameters)
        losses, _ = adpo_loss(current, anchor.reference(current, logps), target, tau=distiller.tau, reduction="none")
        optimizer.zero_grad()
        losses.mean(-1).sum().backward()
        optimizer.step()
        schedule.step()
        anchor.step(parameters)
    return measure(distiller.name, {name: tensor.detach() for name, tensor in parameters.items()}, seeds)


@torch.no_grad()
def measure(name: str, parameters: Parameters, seeds: Sequence[int], *, episodes: int = 64) -> Distilled:
    """Roll students and teacher out from common starts with common noise."""
    visited = rollout(None, seeds, episodes)[1]
    mean, log_std = student_mean(parameters, visited), parameters["log_std"]
    ratio = torch.tensor(TEACHER_STD).log() - log_std
    distance = (teacher_mean(visited) - mean) / log_std.exp()
    divergence = (0.5 * (2 * ratio).exp() + 0.5 * distance.square() - 0.5 - ratio).sum(-1).mean(-1)
    returns = rollout(parameters, seeds, episodes)[0]
    return Distilled(name, tuple(returns.tolist()), tuple(divergence.tolist()))


@torch.no_grad()
def rollout(parameters: Parameters | None, seeds: Sequence[int], episodes: int) -> tuple[Tensor, Tensor]:
    """Mean return per seed and the states visited, ``[seeds, episodes * horizon, state]``; None is the teacher."""
    draws = [torch.randn(HORIZON + 2, episodes, ACTION, generator=generator(seed + 2_000_003)) for seed in seeds]
    noise = torch.stack(draws, 1)
    state = torch.cat((noise[0], noise[1]), -1)
    cost, visited = torch.zeros(len(seeds), episodes), []
    for step in range(HORIZON):
        visited.append(state)
        mean = teacher_mean(state) if parameters is None else student_mean(parameters, state)
        std = TEACHER_STD if parameters is None else parameters["log_std"].exp()
        action = mean + std * noise[step + 2]
        position, velocity = state.split(ACTION, -1)
        cost = cost + position.square().sum(-1) + 0.1 * action.square().sum(-1)
        velocity = velocity + TIME_STEP * action
        state = torch.cat((position + TIME_STEP * velocity, velocity), -1)
    return -cost.mean(-1), torch.cat(visited, 1)
