"""Activations inside one small character-level language model, at equal parameters and an equal tuning budget.

All seeds of an arm are trained as one batch of stacked parameters, as in `stacked`, on windows of text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from p2k.core.errors import P2KError
from p2k.core.seeding import generator
from p2k.data.corpus import Corpus, sample_windows
from p2k.experiments.statistics import PairedDifference, paired_difference
from p2k.models.gpt import GPT, GPTConfig
from p2k.nn.matching import Match, decayed_names, match_hidden
from p2k.nn.polycom import build_feed_forward


@dataclass(frozen=True)
class TextConfig:
    """How a language model of this chapter is trained.

    Args:
        dim, depth, heads, context: of the `GPT`; its GELU arm has ``4 dim`` hidden units and sets the budget.
        batch: windows per step and seed.
        steps: of AdamW; the rate rises over the first tenth and falls to zero along a cosine.
        learning_rate: peak rate.
        weight_decay: of matrices.
    """

    dim: int = 32
    depth: int = 2
    heads: int = 2
    context: int = 32
    batch: int = 8
    steps: int = 200
    learning_rate: float = 3e-3
    weight_decay: float = 0.1

    def rate_factor(self, step: int) -> float:
        """Share of the peak rate in a step."""
        warm = max(1, self.steps // 10)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))


@dataclass(frozen=True, eq=False)
class TextResult:
    """All seeds of one arm: `losses` in nats per character on the reported windows, curves ``[seeds, steps]``."""

    arm: str
    match: Match
    config: TextConfig
    seeds: tuple[int, ...]
    losses: tuple[float, ...]
    curves: Tensor
    models: tuple[GPT, ...]

    def minus(self, other: "TextResult") -> PairedDifference:
        """Difference of losses in nats per character, paired by seed; ValueError when the seeds differ."""
        if self.seeds != other.seeds:
            raise ValueError(f"TextResult.minus: seeds must agree, got {self.seeds} and {other.seeds}")
        return paired_difference(self.losses, other.losses)


def held_out_windows(
    ids: Int[Tensor, " length"], context: int
) -> tuple[Int[Tensor, "count context+1"], Int[Tensor, "count context+1"]]:
    """Adjacent windows of a text, dealt in turn to choices (of a learning rate) and to the report."""
    windows = ids.unfold(0, context + 1, context)
    return windows[::2], windows[1::2]


def whole_model(config: TextConfig, vocab_size: int, arm: str, hidden: int) -> GPT:
    """One model of an arm.

    The first map of each feed-forward starts with variance one over its inputs: pre-activations then have unit size, as
    they have in a model of width 2,500 whose weights start at 0.02. At 0.02 and this width they would be 0.1.
    """
    sizes = {"dim": config.dim, "depth": config.depth, "heads": config.heads, "context": config.context}
    model = GPT(GPTConfig(vocab_size, **sizes), lambda dim: build_feed_forward(arm, dim, hidden))
    for block in model.blocks:
        nn.init.normal_(block.feed_forward.up.weight, std=config.dim**-0.5)
    return model


def match_arms(config: TextConfig, vocab_size: int, arms: Sequence[str]) -> dict[str, Match]:
    """Hidden width of each arm at which the whole model has the parameters of the GELU one, to half a per cent."""
    with torch.device("meta"):
        budget = sum(p.numel() for p in whole_model(config, vocab_size, "gelu", 4 * config.dim).parameters())
    return {arm: match_hidden(lambda h, arm=arm: whole_model(config, vocab_size, arm, h), budget) for arm in arms}


def build_paired(config: TextConfig, vocab_size: int, arm: str, *, hidden: int, seed: int) -> GPT:
    """A model whose tensors outside the feed-forwards start alike for all arms of one seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = whole_model(config, vocab_size, "gelu", 4 * config.dim).state_dict()
        torch.manual_seed(seed)
        built = whole_model(config, vocab_size, arm, hidden)
    built.load_state_dict({k: v for k, v in backbone.items() if ".feed_forward." not in k}, strict=False)
    return built


def train_text(
    models: Sequence[GPT],
    ids: Int[Tensor, " length"],
    config: TextConfig,
    *,
    seeds: Sequence[int],
    rates: Sequence[float] | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Tensor:
    """Train all models in place, each on windows of its own seed; return their losses, ``[models, steps]``.

    Args:
        models: of one architecture.
        ids: training text.
        config: settings shared by all.
        seeds: of the windows, one per model.
        rates: peak learning rate of each model; None means ``config.learning_rate``.
        device: where to train.
        progress: show a bar on standard error.

    Raises:
        ValueError: the numbers of models, seeds and rates differ.
        P2KError: a loss is not finite.
    """
    rates = [config.learning_rate] * len(models) if rates is None else list(rates)
    if not models or not len(models) == len(seeds) == len(rates):
        raise ValueError(
            f"train_text: needs one seed and one rate per model, got {len(models)}, {len(seeds)} and {len(rates)}"
        )
    template = models[0]
    parameters, _ = stack_module_state([model.to(device).train() for model in models])
    decayed = decayed_names(template)
    groups = [[p for name, p in parameters.items() if (name in decayed) == side] for side in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": config.weight_decay}, {"params": groups[1], "weight_decay": 0.0}],
        lr=max(rates), betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    sources, curves = [generator(seed) for seed in seeds], []

    def loss(values: dict[str, Tensor], windows: Tensor) -> Tensor:
        logits = functional_call(template, values, (windows[:, :-1],))
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    for step in tqdm(range(config.steps), unit="step", leave=False, disable=not progress):
        drawn = [sample_windows(ids, count=config.batch, length=config.context, source=source) for source in sources]
        # The fused attention has no batching rule; plain products have.
        with sdpa_kernel(SDPBackend.MATH):
            losses = vmap(loss)(parameters, torch.stack(drawn).to(device))
        optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        _step(optimizer, parameters, [rate * config.rate_factor(step) for rate in rates])
        curves.append(losses.detach())
    if not curves[-1].isfinite().all():
        raise P2KError(f"train_text: losses {curves[-1].tolist()} after {config.steps} steps: lower learning_rate")
    with torch.no_grad():
        for i, model in enumerate(models):
            for name, p in model.named_parameters():
                p.copy_(parameters[name][i])
    return torch.stack(curves, dim=1).cpu()


@torch.no_grad()
def _step(optimizer: torch.optim.Optimizer, parameters: dict[str, Tensor], rates: Sequence[float]) -> None:
    """A step at each replica's own rate: AdamW's is proportional to it, so slower replicas take a share."""
    highest = max(rates)
    for group in optimizer.param_groups:
        group["lr"] = highest
    if min(rates) == highest:
        optimizer.step()
        return
    before = {name: p.clone() for name, p in parameters.items()}
    optimizer.step()
    for name, p in parameters.items():
        share = p.new_tensor([rate / highest for rate in rates]).view(-1, *[1] * (p.ndim - 1))
        p.copy_(torch.lerp(before[name], p, share))


@torch.no_grad()
def text_loss(model: GPT, windows: Int[Tensor, "count context+1"]) -> float:
    """Mean loss of the next character in nats."""
    windows = windows.to(model.head_weight.device)
    logits = model.eval()(windows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()


def compare_activations(
    corpus: Corpus,
    config: TextConfig,
    *,
    arms: Sequence[str],
    seeds: Sequence[int],
    rates: Sequence[float],
    tuning_seeds: Sequence[int],
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, TextResult]:
    """Train every arm with the same seeds, each at the learning rate that its own tuning runs prefer.

    Args:
        corpus: `train` is trained on; windows of `val` are dealt in turn to choices and to the report.
        config: settings; the learning rate is replaced by the chosen one.
        arms: names of feed-forwards.
        seeds: reported seeds.
        rates: candidates.
        tuning_seeds: seeds of the choice, not among the reported ones.
        device: where to train.
        progress: show bars on standard error.

    Raises:
        ValueError: there is no rate or seed, or tuning and report share a seed.
    """
    if not rates or not tuning_seeds or not seeds or set(seeds) & set(tuning_seeds):
        raise ValueError(
            f"compare_activations: needs rates, seeds and other tuning seeds, got {rates}, {seeds}, {tuning_seeds}"
        )
    choices, report = held_out_windows(corpus.val, config.context)
    results = {}
    for arm, match in match_arms(config, corpus.vocab_size, arms).items():

        def build(over: Sequence[int], arm: str = arm, hidden: int = match.hidden) -> list[GPT]:
            return [build_paired(config, corpus.vocab_size, arm, hidden=hidden, seed=seed) for seed in over]

        pairs = [(rate, seed) for rate in rates for seed in tuning_seeds]
        options = {"device": device, "progress": progress}
        tried = build([seed for _, seed in pairs])
        train_text(tried, corpus.train, config, seeds=[s for _, s in pairs], rates=[r for r, _ in pairs], **options)
        scores = dict.fromkeys(rates, 0.0)
        for (rate, _), model in zip(pairs, tried, strict=True):
            scores[rate] += text_loss(model, choices)
        chosen = replace(config, learning_rate=min(scores, key=scores.get))
        models = build(seeds)
        curves = train_text(models, corpus.train, chosen, seeds=seeds, **options)
        losses = tuple(text_loss(model, report) for model in models)
        results[arm] = TextResult(arm, match, chosen, tuple(seeds), losses, curves, tuple(models))
    return results
