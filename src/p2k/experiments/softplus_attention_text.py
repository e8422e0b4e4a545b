"""The paper's own measure on a small scale: a character model far beyond its training length; and the long runs.

``python -m p2k.experiments.softplus_attention_text --out DIR`` trains what the page cannot afford and leaves one record
per arm: character models, and recall with four times the page's steps.

Every length is scored on the same characters: a block of held-out text is cut into windows of each length, so that a
longer window only gives its characters more context.

Source: gao2025softplus.  Chapter: softplus-attention
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from p2k.core.device import device_name, versions
from p2k.data.corpus import Corpus, load_corpus
from p2k.experiments import softplus_attention as study
from p2k.experiments.polycom import TextConfig, held_out_windows, text_loss, train_text
from p2k.experiments.records import ResultRecord, write_record
from p2k.models.gpt import ATTENTIONS, GPT, GPTConfig

# Trained as LSSA, tested with the second stage as well: an early version of the paper adds it without retraining.
SWAPS = {"LSSA": ("LSSAR, p = 3", "LSSAR, p = 15")}


@dataclass(frozen=True)
class ExtrapolationConfig:
    """How a character model of this chapter is trained and tested.

    Args:
        length: characters of a training window.
        factors: test lengths as multiples of `length`, ascending.
        rates: learning rates to choose from, the same for every arm.
        dim, heads, depth: of the model, with rotary positions.
        batch, steps: as in `TextConfig`.
    """

    length: int = 64
    factors: tuple[int, ...] = (1, 2, 4, 8, 16)
    rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1)
    dim: int = 32
    heads: int = 2
    depth: int = 1
    batch: int = 8
    steps: int = 250

    def model(self, vocab_size: int, attention: str) -> GPTConfig:
        """Sizes of the model with the attention of that name."""
        sizes = {"dim": self.dim, "heads": self.heads, "depth": self.depth, "positions": "rotary"}
        return GPTConfig(vocab_size, self.length * self.factors[-1], attention=attention, **sizes)


def losses_by_length(model: GPT, blocks: Int[Tensor, "count block+1"], lengths: Sequence[int]) -> dict[int, float]:
    """Mean loss in nats of the characters of `blocks`, read in windows of each length, a divisor of the block's."""
    if any((blocks.shape[1] - 1) % length for length in lengths):
        raise ValueError(f"losses_by_length: lengths must divide {blocks.shape[1] - 1}, got {list(lengths)}")
    return {length: text_loss(model, blocks.unfold(1, length + 1, length).flatten(0, 1)) for length in lengths}


def extrapolate(
    arm: str,
    corpus: Corpus,
    config: ExtrapolationConfig,
    *,
    seeds: Sequence[int],
    tuning_seeds: Sequence[int],
    device: torch.device | str = "cpu",
) -> list[study.RecallResult]:
    """Choose the arm's rate at the training length, train it with each seed, and measure its loss at all lengths.

    One result for the arm, and one per swap of `SWAPS`; its `accuracy` is empty.

    Args:
        arm: one of `ARMS` of the recall study.
        corpus: `train` is trained on; blocks of `val` are dealt in turn to the choice and to the report.
        config: task, model and training.
        seeds: of the report; of initial weights and windows.
        tuning_seeds: those that choose the rate, disjoint from `seeds`.
        device: where to train.

    Raises:
        ValueError: an unknown arm, or overlapping seeds.
    """
    if arm not in study.ARMS or set(seeds) & set(tuning_seeds):
        raise ValueError(f"extrapolate: arm must be one of {list(study.ARMS)} and the seeds disjoint, got {arm!r}")
    lengths = [config.length * factor for factor in config.factors]
    choices, report = held_out_windows(corpus.val, lengths[-1])
    training = TextConfig(context=config.length, batch=config.batch, steps=config.steps, weight_decay=0.0)
    sizes = config.model(corpus.vocab_size, study.ARMS[arm])

    def train(over: Sequence[tuple[float, int]]) -> list[GPT]:
        rates, chosen = zip(*over, strict=True)
        models = [study.build_model(sizes, seed) for seed in chosen]
        train_text(models, corpus.train, training, seeds=chosen, rates=rates, device=device, progress=False)
        return models

    scores = dict.fromkeys(config.rates, 0.0)
    pairs = [(rate, seed) for rate in config.rates for seed in tuning_seeds]
    for (rate, _), model in zip(pairs, train(pairs), strict=True):
        scores[rate] += losses_by_length(model, choices, lengths[:1])[lengths[0]]
    rate = min(scores, key=scores.get)
    models, results = train([(rate, seed) for seed in seeds]), []
    for tested in (arm, *SWAPS.get(arm, ())):
        for model in models:
            for block in model.blocks:
                block.attend = ATTENTIONS[study.ARMS[tested]](config.heads, config.dim // config.heads)
        columns = [losses_by_length(model, report, lengths) for model in models]
        loss = {length: tuple(column[length] for column in columns) for length in lengths}
        results.append(study.RecallResult(arm if tested == arm else f"{arm}, tested as {tested}", rate, {}, loss))
    return results


def _record(experiment: str, result: study.RecallResult, config, seeds: Sequence[int], seconds: float) -> ResultRecord:
    """One arm: its values at the longest test, and at all lengths in the settings."""
    metric, found = ("accuracy", result.accuracy) if result.accuracy else ("loss", result.loss)
    by_length = {str(length): [float(f"{x:.5g}") for x in values] for length, values in found.items()}
    vocab = config.model("sdpa") if experiment == "recall" else config.model(load_corpus().vocab_size, "sdpa")
    return ResultRecord(
        slug="softplus-attention",
        experiment=experiment,
        arm=result.arm,
        profile="cpu",
        metric=metric,
        values=list(found.values())[-1],
        seeds=tuple(seeds),
        parameters=sum(p.numel() for p in GPT(vocab).parameters()),
        config={**asdict(config), "chosen_rate": result.rate, "tuning_seeds": [1000], "by_length": by_length},
        device=device_name(),
        versions=versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 1),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the long arms and write their records."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--only", choices=("text", "recall"), help="one of the two experiments")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps, to try the program out")
    parser.add_argument("--seeds", type=int, default=6)
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    seeds, corpus = range(100, 100 + options.seeds), load_corpus(val_share=0.2)
    text = ExtrapolationConfig(steps=max(10, int(250 * options.scale)))
    recall = study.RecallConfig(steps=max(10, int(800 * options.scale)))
    lengths = [recall.length * 2**i for i in range(5)]
    for arm in study.ARMS:
        if options.only != "recall":
            start = time.perf_counter()
            found = extrapolate(arm, corpus, text, seeds=seeds, tuning_seeds=(1000,))
            for result in found:
                write_record(options.out, _record("text", result, text, seeds, time.perf_counter() - start))
        if options.only != "text":
            start = time.perf_counter()
            settings = {"seeds": seeds, "tuning_seeds": (1000,), "lengths": lengths, "tests": 32}
            for result in study.recall(arm, recall, swaps=SWAPS.get(arm, ()), **settings):
                write_record(options.out, _record("recall", result, recall, seeds, time.perf_counter() - start))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
