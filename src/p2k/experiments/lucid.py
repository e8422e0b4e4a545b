"""Recall with plain and with preconditioned values: without training on correlated keys, and trained on many pairs.

The trained task shows key-value pairs, one token each, then asks for the value of every key in another order. All runs
of one attention (seeds and learning rates) are trained as one batch. Chapter: lucid
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from p2k.core.seeding import generator
from p2k.models.gpt import GPT, GPTConfig
from p2k.ops.lucid import precondition_values

# The same for all runs.
TEST_SEQUENCES = 128


def correlated_keys(count: int, width: int, common: float, *, seed: int) -> Tensor:
    """Keys of norm ``sqrt(width)`` with a shared direction of weight `common` in [0, 1], ``[1, 1, count, width]``."""
    source = generator(seed)
    shared = F.normalize(torch.randn(width, generator=source, dtype=torch.float64), dim=0)
    own = F.normalize(torch.randn(count, width, generator=source, dtype=torch.float64), dim=1)
    return (width**0.5 * F.normalize(common * shared + (1 - common**2) ** 0.5 * own, dim=1))[None, None]


@dataclass(frozen=True)
class Recall:
    """How well values are read back when each key is asked for at the end.

    Args:
        accuracy: share of keys whose read-out has its largest cosine with the right value.
        cosine: of each read-out with the right value, in the order of storage.
    """

    accuracy: float
    cosine: Tensor


def recall(keys: Tensor, values: Tensor, *, preconditioned: bool) -> Recall:
    """Ask softmax attention for every stored pair at once, after all of them were stored.

    Args:
        keys, values: ``[1, 1, n, D]`` and ``[1, 1, n, V]``.
        preconditioned: solve for the values first.

    Source: duvvuri2026lucid, eq:lucid-output.
    Chapter: lucid
    """
    stored = precondition_values(keys, values) if preconditioned else values
    read = F.scaled_dot_product_attention(keys, keys, stored)[0, 0]
    cosine = F.normalize(read, dim=1) @ F.normalize(values[0, 0], dim=1).T
    right = cosine.argmax(1) == torch.arange(len(read), device=read.device)
    return Recall(right.double().mean().item(), cosine.diagonal())


@dataclass(frozen=True)
class RecallTask:
    """Many pairs, then all keys again in random order; a pair is one token, its answer a class.

    Args:
        keys: different keys to draw from, at least `pairs`.
        values: different values.
        pairs: pairs per sequence, each key at most once.
    """

    keys: int
    values: int
    pairs: int

    @property
    def vocab(self) -> int:
        """Token ids: pairs first, questions after them; answers are the first `values` logits."""
        return self.keys * (self.values + 1)

    def sample(self, batch: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens ``[batch, 2 pairs]`` and the answers to the second half ``[batch, pairs]``."""
        noise = torch.rand(batch, self.keys, generator=source, device=source.device)
        key = noise.argsort(1)[:, : self.pairs]
        value = torch.randint(self.values, key.shape, generator=source, device=source.device)
        order = torch.rand(key.shape, generator=source, device=source.device).argsort(1)
        question = self.keys * self.values + key.gather(1, order)
        return torch.cat([key * self.values + value, question], 1), value.gather(1, order)


def train_recall(
    attention: str,
    task: RecallTask,
    *,
    config: dict[str, int],
    steps: int,
    seeds: Sequence[int],
    rates: Sequence[float],
    batch: int = 16,
    device: torch.device | str = "cpu",
) -> list[float]:
    """Train one GPT per (seed, rate) as one batch, and return the share of right answers of each.

    Args:
        attention: registered name.
        task: what to recall.
        config: dim, heads and depth of the GPT.
        steps: of Adam, rate warmed up over a tenth and decayed to zero on a cosine.
        seeds: of weights and data, one per run.
        rates: peak learning rate of each run.
        batch: sequences per step and run.
        device: where to train.

    Raises:
        ValueError: as many seeds as rates are needed, at least one.

    Chapter: lucid
    """
    if not seeds or len(seeds) != len(rates):
        raise ValueError(f"train_recall: needs a rate for each seed, got {len(seeds)} seeds, {len(rates)} rates")
    model = GPTConfig(task.vocab, 2 * task.pairs, attention=attention, tie_weights=False, **config)
    models = [_build(model, seed).to(device) for seed in seeds]
    parameters, buffers = stack_module_state(models)
    sources = [generator(seed + 10_000, device) for seed in seeds]
    # Adam's step is proportional to its rate: one optimizer at rate 1 and a share of its step per run.
    optimizer = torch.optim.Adam(parameters.values(), lr=1.0)
    share = torch.tensor(list(rates), device=device)

    def loss(parameters, tokens, answers):
        logits = functional_call(models[0], (parameters, buffers), (tokens,))[:, task.pairs :, : task.values]
        return F.cross_entropy(logits.flatten(0, 1), answers.flatten())

    for step in range(steps):
        tokens, answers = map(torch.stack, zip(*(task.sample(batch, source) for source in sources), strict=True))
        # The fused attention has no batching rule; plain products have.
        with sdpa_kernel(SDPBackend.MATH):
            losses = vmap(loss)(parameters, tokens, answers)
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        _step(optimizer, parameters, share * _schedule(step, steps))
    tokens, answers = task.sample(TEST_SEQUENCES, generator(1_000_000, device))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        logits = vmap(lambda p: functional_call(models[0], (p, buffers), (tokens,)))(parameters)
    found = logits[:, :, task.pairs :, : task.values].argmax(-1)
    return (found == answers).double().mean((1, 2)).tolist()


def tuned_recall(
    attention: str,
    task: RecallTask,
    *,
    rates: Sequence[float],
    tuning_seeds: Sequence[int],
    seeds: Sequence[int],
    **options: object,
) -> tuple[float, list[float]]:
    """Choose a rate by the mean over `tuning_seeds`, then return it with the accuracies of `seeds` trained at it."""
    pairs = [(seed, rate) for rate in rates for seed in tuning_seeds]
    tried = train_recall(attention, task, seeds=[s for s, _ in pairs], rates=[r for _, r in pairs], **options)
    score = {r: sum(a for a, (_, x) in zip(tried, pairs, strict=True) if x == r) for r in rates}
    best = max(score, key=score.get)
    return best, train_recall(attention, task, seeds=seeds, rates=[best] * len(seeds), **options)


def _build(config: GPTConfig, seed: int) -> GPT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT(config)


def _schedule(step: int, steps: int) -> float:
    warm = max(1, steps // 10)
    cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * (step - warm) / max(1, steps - warm))).item())
    return (step + 1) / warm if step < warm else cosine


@torch.no_grad()
def _step(optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor], rates: Tensor) -> None:
    before = {name: p.clone() for name, p in parameters.items()}
    optimizer.step()
    for name, p in parameters.items():
        p.copy_(torch.lerp(before[name], p, rates.view(-1, *[1] * (p.ndim - 1))))
