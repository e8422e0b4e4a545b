"""Twelve noisy-preference bandits: four corruptions of a known reward, each light, medium and heavy.

The paper names the corruptions and difficulties but not their constants; the constants below are our reconstruction.
A context x is 16 standard normal numbers, an item's clean reward is ``2 W2 tanh(1.5 W1 x)`` with a random teacher
(16 -> 32 -> 8, rows scaled by the square root of their fan-in) that is drawn anew for each seed. Training shows 4 of
the 8 items per context with corrupted rewards; testing uses clean rewards of all 8 at unshifted contexts.

Scenarios of one seed share teacher, contexts, items and random draws, and differ in the corruption only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from p2k.core.seeding import generator

CONTEXT, HIDDEN, ITEMS = 16, 32, 8


@dataclass(frozen=True)
class Scenario:
    """One corruption of the rewards r of a list.

    Args:
        family: ``outliers``, ``shift``, ``flips`` or ``cauchy``.
        difficulty: ``light``, ``medium`` or ``heavy``.
        noise: deviation of the normal noise added to each reward.
        outliers: probability that a reward moves by plus or minus 5.
        shift: c; contexts move by c / 2 in every coordinate and item k's rewards by c b_k, b standard normal.
        flips: probability that a whole list changes sign.
        cauchy: scale of Cauchy noise added to each reward.
    """

    family: str
    difficulty: str
    noise: float = 0.0
    outliers: float = 0.0
    shift: float = 0.0
    flips: float = 0.0
    cauchy: float = 0.0

    @property
    def name(self) -> str:
        """Such as ``flips-heavy``."""
        return f"{self.family}-{self.difficulty}"


SCENARIOS = (
    Scenario("outliers", "light", noise=0.5, outliers=0.05),
    Scenario("outliers", "medium", noise=1.0, outliers=0.10),
    Scenario("outliers", "heavy", noise=1.5, outliers=0.20),
    Scenario("shift", "light", noise=0.5, shift=0.5),
    Scenario("shift", "medium", noise=0.5, shift=1.0),
    Scenario("shift", "heavy", noise=0.5, shift=1.5),
    Scenario("flips", "light", flips=0.1),
    Scenario("flips", "medium", flips=0.2),
    Scenario("flips", "heavy", flips=0.3),
    Scenario("cauchy", "light", cauchy=0.3),
    Scenario("cauchy", "medium", cauchy=0.6),
    Scenario("cauchy", "heavy", cauchy=1.0),
)


@dataclass(frozen=True, eq=False)
class PreferenceData:
    """Training and test data of several environments (scenario x seed), all scenarios of a seed in a row.

    Args:
        scenarios, seeds: of each environment.
        warm_contexts, warm_best: clean data for the reference policy: contexts and their best items.
        contexts: one batch per training step, as the scenario shows them.
        items: the candidates of each context.
        rewards: their corrupted rewards.
        test_contexts, test_rewards: clean contexts with the clean rewards of all items.
    """

    scenarios: tuple[Scenario, ...]
    seeds: tuple[int, ...]
    warm_contexts: Float[Tensor, "warm environments batch context"]
    warm_best: Int[Tensor, "warm environments batch"]
    contexts: Float[Tensor, "steps environments batch context"]
    items: Int[Tensor, "steps environments batch candidates"]
    rewards: Float[Tensor, "steps environments batch candidates"]
    test_contexts: Float[Tensor, "environments test context"]
    test_rewards: Float[Tensor, "environments test items"]


def make_preferences(
    scenarios: Sequence[Scenario] = SCENARIOS,
    seeds: Sequence[int] = range(10),
    *,
    steps: int = 150,
    batch: int = 32,
    candidates: int = 4,
    warm_steps: int = 30,
    test: int = 512,
) -> PreferenceData:
    """Draw the data of every scenario with every seed; an environment does not depend on which others are drawn.

    Args:
        scenarios: corruptions, at least one.
        seeds: teachers and data, at least one.
        steps: training batches.
        batch: contexts per batch.
        candidates: items shown per context, from 2 to 8.
        warm_steps: batches of clean data for the reference policy.
        test: clean contexts for evaluation.

    Raises:
        ValueError: no scenario or seed, or a size out of range.

    Source: wang2025adpo, section on noisy preferences; constants are ours.
    Chapter: adpo
    """
    if not scenarios or not seeds or min(steps, batch, warm_steps, test) < 1 or not 2 <= candidates <= ITEMS:
        raise ValueError(
            f"make_preferences: needs scenarios, seeds, sizes >= 1 and 2 <= candidates <= {ITEMS}, got "
            f"{len(scenarios)} scenarios, {len(seeds)} seeds, {steps=}, {batch=}, {warm_steps=}, {test=}, {candidates=}"
        )
    columns: dict[str, list[Tensor]] = {}
    for seed in seeds:
        random = generator(seed)
        teacher = _Teacher(random)
        warm = torch.randn(warm_steps, batch, CONTEXT, generator=random)
        base = torch.randn(steps, batch, CONTEXT, generator=random)
        items = torch.rand(steps, batch, ITEMS, generator=random).argsort(-1)[..., :candidates]
        tests = torch.randn(test, CONTEXT, generator=random)
        shared = {"warm_contexts": warm, "warm_best": teacher(warm).argmax(-1), "items": items}
        shared |= {"test_contexts": tests, "test_rewards": teacher(tests)}
        for scenario in scenarios:
            contexts = base + 0.5 * scenario.shift
            clean = teacher(contexts) + scenario.shift * teacher.item_bias
            # Common random numbers: the scenarios of a seed corrupt with the same draws.
            noise = generator(seed + 1_000_003)
            training = {"contexts": contexts, "rewards": _corrupt(clean.gather(-1, items), scenario, noise)}
            for name, tensor in {**shared, **training}.items():
                columns.setdefault(name, []).append(tensor)
    data = {name: torch.stack(column, 0 if name.startswith("test") else 1) for name, column in columns.items()}
    return PreferenceData(
        scenarios=tuple(scenario for _ in seeds for scenario in scenarios),
        seeds=tuple(seed for seed in seeds for _ in scenarios),
        **data,
    )


class _Teacher:
    """The clean reward of all items, and the fixed bias that the shift scenarios add to each item."""

    def __init__(self, random: torch.Generator) -> None:
        self.first = torch.randn(CONTEXT, HIDDEN, generator=random) / CONTEXT**0.5
        self.second = torch.randn(HIDDEN, ITEMS, generator=random) / HIDDEN**0.5
        self.item_bias = torch.randn(ITEMS, generator=random)

    def __call__(self, contexts: Float[Tensor, "*batch context"]) -> Float[Tensor, "*batch items"]:
        return 2 * (1.5 * contexts @ self.first).tanh() @ self.second


def _corrupt(
    rewards: Float[Tensor, "steps batch candidates"], scenario: Scenario, random: torch.Generator
) -> Float[Tensor, "steps batch candidates"]:
    """Apply the scenario's noise to clean rewards (the shift has been applied before)."""
    uniform, jump, lists = (torch.rand(rewards.shape, generator=random) for _ in range(3))
    normal = torch.randn(rewards.shape, generator=random)
    noisy = rewards + scenario.noise * normal
    noisy = noisy + 5 * torch.where(jump < 0.5, -1.0, 1.0) * (uniform < scenario.outliers)
    noisy = torch.where(lists[..., :1] < scenario.flips, -noisy, noisy)
    if scenario.cauchy:
        noisy = noisy + scenario.cauchy * torch.tan(torch.pi * (uniform - 0.5))
    return noisy
