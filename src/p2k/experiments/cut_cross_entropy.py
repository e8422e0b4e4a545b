"""What gradient filtering skips and what it drops, what a loss without logits saves, and training with the filter.

Chapter: cut-cross-entropy
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from p2k.core.seeding import generator
from p2k.core.traffic import peak_memory
from p2k.losses.cut_cross_entropy import linear_cross_entropy
from p2k.ops.cut_cross_entropy import filtered_gradients


@dataclass(frozen=True)
class Head:
    """A random head with its tokens: hidden states, weight, bias and targets drawn from its own softmax."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor


@dataclass(frozen=True)
class FilterEffect:
    """What one threshold does to the gradients of a summed loss.

    Args:
        skipped: share of tiles that are left out.
        mass: probability in skipped tiles, mean over tokens.
        hidden_error, weight_error: relative Frobenius errors of the two gradients.
        weight_rows_error: median over the vocabulary of the relative error of a row of the weight's gradient.
        silent: share of the vocabulary whose row of the weight gets no gradient at all.
    """

    skipped: float
    mass: float
    hidden_error: float
    weight_error: float
    weight_rows_error: float
    silent: float


def random_head(
    tokens: int, vocab: int, *, dim: int = 32, peakiness: float = 1.0, seed: int = 0, device: str = "cpu"
) -> Head:
    """Gaussian hidden states and weight, a Zipf bias in random order, all logits times `peakiness`; 0 is uniform."""
    source = generator(seed, device)
    hidden = torch.randn(tokens, dim, generator=source, device=device)
    weight = peakiness * torch.randn(vocab, dim, generator=source, device=device) / dim**0.5
    ranks = torch.randperm(vocab, generator=source, device=device) + 1.0
    bias = -peakiness * ranks.log()
    target = torch.cat(
        [torch.multinomial((part @ weight.T + bias).softmax(-1), 1, generator=source) for part in hidden.split(128)]
    )
    return Head(hidden, weight, bias, target[:, 0])


def filter_effect(head: Head, *, filter_eps: float, sort_vocab: bool, tile: tuple[int, int]) -> FilterEffect:
    """Compare filtered with exact gradients of a head, both summed over its tokens.

    Args:
        head: tokens and weights.
        filter_eps: the threshold.
        sort_vocab: order the vocabulary by mean logit.
        tile: tokens and vocabulary entries of a tile.
    """
    # The reference takes tiles of any size, on any device.
    options = {"tile": tile, "backend": "torch"}
    inputs = {"hidden": head.hidden, "weight": head.weight, "target": head.target, "bias": head.bias, **options}
    exact = filtered_gradients(**inputs)
    found = filtered_gradients(**inputs, filter_eps=filter_eps, sort_vocab=sort_vocab)
    rows = (found.weight - exact.weight).norm(dim=1) / exact.weight.norm(dim=1).clamp_min(1e-30)
    return FilterEffect(
        skipped=1 - found.kept.double().mean().item(),
        mass=dropped_mass(head, found.kept, sort_vocab=sort_vocab, tile=tile),
        hidden_error=_relative(found.hidden, exact.hidden),
        weight_error=_relative(found.weight, exact.weight),
        weight_rows_error=rows.median().item(),
        silent=(found.weight == 0).all(1).double().mean().item(),
    )


def dropped_mass(head: Head, kept: Tensor, *, sort_vocab: bool, tile: tuple[int, int]) -> float:
    """Probability that lies in skipped tiles, mean over tokens; the target's own tile counts like any other."""
    order = torch.arange(len(head.weight), device=head.weight.device)
    if sort_vocab:
        order = (head.weight @ head.hidden.mean(0) + head.bias).argsort(stable=True)
    weight, bias, mass = head.weight[order], head.bias[order], 0.0
    for hidden, keep in zip(head.hidden.split(tile[0]), kept, strict=True):
        p = (hidden @ weight.T + bias).softmax(-1)
        mass += (p * ~keep.repeat_interleave(tile[1])[: len(weight)]).sum().item()
    return mass / len(head.hidden)


def memory_of_losses(tokens: int, vocab: int, *, dim: int = 16, seed: int = 0, device: str = "cpu") -> dict[str, int]:
    """Bytes beyond the inputs that loss and gradients hold at most, per way to compute them, by torch operations.

    Returns:
        `stored` (torch, all logits), `exact` (this package's default), `filtered` (tiles in torch), and `gradients`,
        the bytes of the results themselves, below which nothing can go.
    """
    head = random_head(tokens, vocab, dim=dim, seed=seed, device=device)
    leaves = head.hidden.requires_grad_(), head.weight.requires_grad_()
    ways = {
        "stored": lambda h, w: F.cross_entropy(F.linear(h, w), head.target),
        "exact": lambda h, w: linear_cross_entropy(h, w, head.target),
        "filtered": lambda h, w: linear_cross_entropy(h, w, head.target, filter_eps=2.0**-12),
    }
    found = {name: peak_memory(lambda loss=loss: torch.autograd.grad(loss(*leaves), leaves)) for name, loss in
             ways.items()}  # fmt: skip
    return found | {"gradients": sum(leaf.nbytes for leaf in leaves)}


@dataclass(frozen=True)
class Language:
    """A bigram language: token frequencies and, per token, the distribution of the next and its running sum."""

    frequency: Tensor
    following: Tensor
    cumulative: Tensor

    def sample(self, tokens: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens and what follows each."""
        token = torch.multinomial(self.frequency, tokens, replacement=True, generator=source)
        rank = torch.searchsorted(
            self.cumulative[token], torch.rand(tokens, 1, generator=source, device=source.device)
        )[:, 0]
        return token, rank.clamp_max(len(self.frequency) - 1)


@dataclass(frozen=True)
class Training:
    """One run of `train_bigram`.

    Args:
        excess: cross-entropy above the language's entropy, in nats per token.
        skipped: share of tiles left out at each step.
        rare: probability that the model gives to the rarer half of the vocabulary, over what the language gives it.
    """

    excess: float
    skipped: list[float]
    rare: float


@dataclass(frozen=True)
class Arm:
    """How gradients are computed: threshold (0 is exact), and which of them the filter touches."""

    filter_eps: float = 0.0
    filter_weight: bool = True
    filter_hidden: bool = True


def make_language(vocab: int, *, rank: int = 8, seed: int = 0, device: str = "cpu") -> Language:
    """Zipf frequencies in random order, and a low-rank log-bilinear preference of each token for the next."""
    source = generator(seed, device)
    left, right = (torch.randn(vocab, rank, generator=source, device=device) for _ in range(2))
    prior = -(torch.randperm(vocab, generator=source, device=device) + 1.0).log()
    following = (left @ right.T / rank**0.5 + prior).softmax(-1)
    return Language(prior.softmax(0), following, following.cumsum(-1))


def train_bigram(
    language: Language, arm: Arm, *, rate: float, steps: int, seed: int, tokens: int = 128, dim: int = 16,
    tile: tuple[int, int] = (32, 32),
) -> Training:  # fmt: skip
    """Train an embedding and a head from scratch with Adam on samples of the language; one seed, one arm.

    Initial weights and samples depend on the seed alone, so runs of one seed are paired.

    Args:
        language: what to learn.
        arm: exact or filtered gradients; the vocabulary is sorted where it is filtered.
        rate: learning rate, constant.
        steps: of `tokens` fresh samples each.
        seed: of initial weights and samples.
        tokens, dim, tile: batch, width, and tile of the filter.
    """
    device, vocab = language.frequency.device, len(language.frequency)
    source = generator(seed, device)
    embedding, weight = (0.1 * torch.randn(vocab, dim, generator=source, device=device) for _ in range(2))
    parameters = [embedding, weight, torch.zeros(vocab, device=device)]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    skipped = []
    for _ in range(steps):
        token, target = language.sample(tokens, source)
        inputs = {"hidden": embedding[token], "weight": weight, "target": target, "bias": parameters[2]}
        inputs |= {"tile": tile, "backend": "torch"}
        filtering = {"filter_eps": arm.filter_eps, "sort_vocab": arm.filter_eps > 0}
        found = filtered_gradients(**inputs, **filtering, filter_weight=arm.filter_weight)
        hidden = found.hidden if arm.filter_hidden else filtered_gradients(**inputs).hidden
        embedding.grad = torch.zeros_like(embedding).index_add_(0, token, hidden / tokens)
        weight.grad, parameters[2].grad = found.weight / tokens, found.bias / tokens
        optimizer.step()
        skipped.append(1 - found.kept.double().mean().item())
    return _score(language, parameters, skipped)


def _score(language: Language, parameters: Sequence[Tensor], skipped: list[float]) -> Training:
    """Against the language itself, over all pairs of tokens."""
    embedding, weight, bias = parameters
    log_q = (embedding @ weight.T + bias).log_softmax(-1)
    divergence = (language.following * (language.following.log() - log_q)).sum(-1)
    rare = language.frequency.argsort()[: len(language.frequency) // 2]
    mass, true = (language.frequency @ p[:, rare].sum(1) for p in (log_q.exp(), language.following))
    return Training((language.frequency @ divergence).item(), skipped, (mass / true).item())


def tuned_rate(language: Language, arm: Arm, rates: Sequence[float], *, seeds: Sequence[int], **options) -> float:
    """The learning rate with the least mean excess over `seeds`, which no reported run uses."""

    def mean_excess(rate: float) -> float:
        return sum(train_bigram(language, arm, rate=rate, seed=seed, **options).excess for seed in seeds)

    return min(rates, key=mean_excess)


def _relative(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm().clamp_min(1e-30)).item()
