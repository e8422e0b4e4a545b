"""Does an attention find one key among many more than it was trained on? A needle without training, recall with it.

The needle: random unit keys, one of which has a given cosine with the query; what share of the weight does it get?
Recall: a sequence binds a few keys to values at random places among filler, and ends in queries for them. A model of
one layer learns it at one length and is tested at others. All seeds of an arm, and all rates of its tuning, train as
one batch; arms differ in the attention's function alone and share data, initial weights and order of both by seed.

Source: gao2025softplus.  Chapter: softplus-attention
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from p2k.core.checks import check_positive
from p2k.core.errors import P2KError
from p2k.core.seeding import generator
from p2k.experiments.statistics import PairedDifference, paired_difference
from p2k.models.gpt import ATTENTIONS, GPT, GPTConfig

ARMS = {
    "softmax": "sdpa",
    "softmax, log N": "log-length",
    "LSSA": "softplus",
    "LSSAR, p = 3": "reweighted-softplus-3",
    "LSSAR, p = 15": "reweighted-softplus",
}
VALUES = 8


def needle_mass(
    arm: str, length: int, *, cosine: float = 0.8, width: int = 64, samples: int = 32, seed: int = 0
) -> Float[Tensor, " samples"]:
    """Weight of one key with the given cosine to the query, among random directions; no training.

    Vectors have length ``sqrt(width)``, as after a normalisation, so that plain softmax scores are ``sqrt(width)``
    times the cosine.

    Args:
        arm: one of `ARMS`.
        length: keys that the query sees.
        cosine: of the needle, between -1 and 1.
        width: of the head.
        samples: independent rows.
        seed: of the directions.
    """
    source = generator(seed)
    query, other = torch.randn(2, samples, 1, width, generator=source, dtype=torch.float64)
    keys = torch.randn(samples, length, width, generator=source, dtype=torch.float64)
    query = F.normalize(query, dim=-1)
    across = F.normalize(other - (other * query).sum(-1, keepdim=True) * query, dim=-1)
    keys[:, :1] = cosine * query + math.sqrt(1 - cosine**2) * across
    query, keys = (math.sqrt(width) * F.normalize(x, dim=-1)[:, None] for x in (query, keys))
    value = torch.zeros(samples, 1, length, 1, dtype=torch.float64)
    value[:, :, 0] = 1
    return ATTENTIONS[ARMS[arm]](1, width)(query, keys, value, None).flatten()


@dataclass(frozen=True)
class RecallConfig:
    """Task, model and training.

    Args:
        length: tokens of a training sequence, at least three per binding.
        bindings: keys that a sequence binds, and queries at its end.
        batch_size: sequences per step.
        steps: of training, at least ten.
        rates: learning rates to choose from, the same for every arm.
        dim, heads: of the model's one layer, with rotary positions.
        longest: the longest sequence that the model is asked about.
    """

    length: int = 16
    bindings: int = 4
    batch_size: int = 16
    steps: int = 200
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1)
    dim: int = 32
    heads: int = 2
    longest: int = 256

    def __post_init__(self) -> None:
        check_positive("RecallConfig", batch_size=self.batch_size, bindings=self.bindings)
        if self.steps < 10 or not self.rates or self.length < 3 * self.bindings or self.longest < self.length:
            raise ValueError(f"RecallConfig: steps, rates, length and longest must fit each other, got {self}")

    def model(self, attention: str) -> GPTConfig:
        """Sizes of the model with the attention of that name."""
        vocabulary = VALUES * (1 + self.bindings) + self.bindings
        sizes = {"dim": self.dim, "depth": 1, "heads": self.heads, "positions": "rotary"}
        return GPTConfig(vocabulary, self.longest, attention=attention, **sizes)


@dataclass(frozen=True, eq=False)
class RecallResult:
    """What one arm recalls.

    Args:
        arm: its name.
        rate: the chosen learning rate.
        accuracy: share of queries answered rightly in percent, per test length one value per seed.
        loss: cross-entropy of the queries in nats, likewise.
    """

    arm: str
    rate: float
    accuracy: dict[int, tuple[float, ...]]
    loss: dict[int, tuple[float, ...]]

    def minus(self, other: "RecallResult", length: int, *, metric: str = "accuracy") -> PairedDifference:
        """Difference of accuracies in points, or of losses in nats, at one length, paired by seed."""
        return paired_difference(getattr(self, metric)[length], getattr(other, metric)[length])


def recall_batch(
    config: RecallConfig, *, count: int, length: int, source: torch.Generator
) -> tuple[Int[Tensor, "count length"], Int[Tensor, "count bindings"]]:
    """Sequences and the values that their last `bindings` tokens, the queries, ask for.

    Ids below `VALUES` are values, and filler; the next ``bindings * VALUES`` bind a key to a value; the last are
    queries. Each key is bound once, at a random place before the queries.
    """
    keys = config.bindings
    tokens = torch.randint(VALUES, (count, length), generator=source)
    places = torch.rand(count, length - keys, generator=source).argsort(-1)[:, :keys]
    bound = torch.randint(VALUES, (count, keys), generator=source)
    tokens.scatter_(1, places, VALUES * (1 + torch.arange(keys)) + bound)
    order = torch.rand(count, keys, generator=source).argsort(-1)
    tokens[:, -keys:] = VALUES * (1 + keys) + order
    return tokens, bound.gather(1, order)


def build_model(config: GPTConfig, seed: int) -> GPT:
    """A model of this chapter, the same for every attention of one seed.

    Matrices start with variance one over their inputs: the model's own start, 0.02 everywhere, leaves a layer this
    narrow on a plateau for long. All are drawn from one stream, so that no two share numbers.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(config)
        for linear in (module for module in model.modules() if isinstance(module, nn.Linear)):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.normal_(model.token_embedding.weight, std=config.dim**-0.5)
    return model


class _Stack:
    """Replicas of one model, each with its own seed and learning rate, as one batch."""

    def __init__(self, config: RecallConfig, attention: str, seeds: Sequence[int], device: torch.device) -> None:
        self.config, self.device = config, device
        models = [build_model(config.model(attention), seed).to(device) for seed in seeds]
        self.template = models[0]
        self.parameters, self.buffers = stack_module_state(models)

    def answers(self, tokens: Int[Tensor, "replicas count length"]) -> Float[Tensor, "replicas count bindings vocab"]:
        """Logits at the queries."""

        def one(parameters: dict, buffers: dict, tokens: Tensor) -> Tensor:
            return functional_call(self.template, (parameters, buffers), (tokens,))[:, -self.config.bindings :]

        # The fused attention has no batching rule; plain products have.
        with sdpa_kernel(SDPBackend.MATH):
            return vmap(one)(self.parameters, self.buffers, tokens.to(self.device))

    def losses(self, tokens: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """(cross-entropy, share of right answers) of each replica."""
        logits, values = self.answers(tokens), values.to(self.device)
        each = F.cross_entropy(logits.flatten(0, 2), values.flatten(), reduction="none")
        return each.unflatten(0, (len(tokens), -1)).mean(1), (logits.argmax(-1) == values).double().mean((1, 2))

    def train(self, seeds: Sequence[int], rates: Sequence[float]) -> None:
        """AdamW with linear warm-up over a tenth of the steps, then half a cosine to zero."""
        config, highest = self.config, max(rates)
        optimizer = torch.optim.AdamW(self.parameters.values(), lr=highest, weight_decay=0.0, fused=True)
        share = torch.tensor([rate / highest for rate in rates], device=self.device)
        sources, warm = [generator(1_000_000 + seed) for seed in seeds], config.steps // 10
        for step in range(config.steps):
            factor = (step + 1) / warm if step < warm else math.cos(math.pi / 2 * (step - warm) / (config.steps - warm))
            optimizer.param_groups[0]["lr"] = highest * (factor if step < warm else factor**2)
            batch = [recall_batch(config, count=config.batch_size, length=config.length, source=s) for s in sources]
            loss, _ = self.losses(*(torch.stack(part) for part in zip(*batch, strict=True)))
            optimizer.zero_grad(set_to_none=True)
            loss.sum().backward()
            # Without weight decay a step of AdamW is proportional to its rate.
            before = [p.detach().clone() for p in self.parameters.values()]
            optimizer.step()
            with torch.no_grad():
                for p, old in zip(self.parameters.values(), before, strict=True):
                    p.copy_(old + (p - old) * share.view(-1, *[1] * (p.ndim - 1)))
        if not bool(loss.isfinite().all()):
            raise P2KError(f"recall: the loss of seeds {list(seeds)} stopped being finite: lower the rates")

    def swap(self, attention: str) -> None:
        """Give the trained layer another attention; none of ours has parameters."""
        heads, dim = self.config.heads, self.config.dim
        self.template.blocks[0].attend = ATTENTIONS[attention](heads, dim // heads)

    @torch.no_grad()
    def test(self, seeds: Sequence[int], *, count: int, length: int) -> tuple[list[float], list[float]]:
        """(losses, accuracies in percent) of all replicas on sequences that no training seed draws."""
        sources = [generator(2_000_000 + seed) for seed in seeds]
        batch = [recall_batch(self.config, count=count, length=length, source=source) for source in sources]
        loss, right = self.losses(*(torch.stack(part) for part in zip(*batch, strict=True)))
        return loss.double().tolist(), (100 * right).tolist()


def recall(
    arm: str,
    config: RecallConfig,
    *,
    seeds: Sequence[int],
    tuning_seeds: Sequence[int],
    lengths: Sequence[int],
    tests: int,
    swaps: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> list[RecallResult]:
    """Choose the arm's learning rate at the training length, train it with each seed, and test it at all lengths.

    One result for the arm, and one per swap: the same trained weights under another attention, without more training.

    Args:
        arm: one of `ARMS`.
        config: task, model and training.
        seeds: of the report, at least two; of initial weights and data.
        tuning_seeds: those that choose the rate, disjoint from `seeds`.
        lengths: tokens of the test sequences, at most ``config.longest``.
        tests: test sequences per seed and length.
        swaps: arms whose attention the trained weights are tested with as well.
        device: where to train.

    Raises:
        ValueError: an unknown arm, or overlapping seeds.
        P2KError: a loss is not finite.
    """
    if not {arm, *swaps} <= set(ARMS) or set(seeds) & set(tuning_seeds):
        raise ValueError(f"recall: arm must be one of {list(ARMS)} and the seeds disjoint, got {arm!r}, {seeds}")
    device, rate = torch.device(device), config.rates[0]
    if len(config.rates) > 1:
        pairs = [(r, seed) for r in config.rates for seed in tuning_seeds]
        rates, tried = zip(*pairs, strict=True)
        stack = _Stack(config, ARMS[arm], tried, device)
        stack.train(tried, rates)
        losses, _ = stack.test(tried, count=64, length=config.length)
        scores = {r: sum(x for (own, _), x in zip(pairs, losses, strict=True) if own == r) for r in config.rates}
        rate = min(scores, key=scores.get)
    stack = _Stack(config, ARMS[arm], seeds, device)
    stack.train(seeds, [rate] * len(seeds))
    results = []
    for tested in (arm, *swaps):
        stack.swap(ARMS[tested])
        found = {length: stack.test(seeds, count=tests, length=length) for length in lengths}
        loss, accuracy = ({n: tuple(pair[i]) for n, pair in found.items()} for i in (0, 1))
        results.append(RecallResult(arm if tested == arm else f"{arm}, tested as {tested}", rate, accuracy, loss))
    return results
