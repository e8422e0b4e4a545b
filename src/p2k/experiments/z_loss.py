"""Ranking the next word of a generated language after training with a spherical loss or with log-softmax.

Letters: D words, d width of the hidden vector, a sharpness and b location of the Z-loss.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from p2k.core.seeding import generator
from p2k.data.zipf import make_zipf_language
from p2k.experiments.statistics import PairedDifference, paired_difference
from p2k.losses.z_loss import squared_error_of, taylor_softmax_loss, taylor_softmax_of, z_loss, z_loss_of
from p2k.nn.z_loss import FactoredOutput

METRICS = ("top1", "top5", "top10", "mrr")
# Ranks of words by frequency; hits of the ten best guesses are counted in each band.
BANDS = {"head": slice(0, 10), "middle": slice(10, 100), "tail": slice(100, None)}
Setting = Mapping[str, float]


@dataclass(frozen=True)
class Arm:
    """One way to train the output layer.

    Args:
        loss: `softmax` (dense only), `z`, `taylor` or `squared` (factored only).
        output: `factored` (exact SGD through the factors), `sgd` or `adam` on a dense weight.
        settings: candidates for tuning; every one has a ``rate``, those of the Z-loss also ``a`` and ``b``.
    """

    loss: str
    output: str
    settings: tuple[Setting, ...]


@dataclass(frozen=True)
class Task:
    """Sizes of one run.

    Args:
        words: vocabulary D.
        width: d, hidden units; the output layer also sees a constant.
        steps: of training, each on `batch` positions.
        batch: positions per step.
        heldout: contexts on which rankings are scored.
        body_rate: Adam's learning rate for everything below the output layer, the same in every arm.
        final_rate: share of this rate and of the output's that is left at the end of the run, reached linearly,
            between 0 and 1; 1 is a constant rate.
    """

    words: int = 1000
    width: int = 24
    steps: int = 250
    batch: int = 128
    heldout: int = 512
    body_rate: float = 0.03
    final_rate: float = 0.0


@dataclass(frozen=True, eq=False)
class Study:
    """What the comparison found.

    Args:
        chosen: the setting of each arm.
        tuning: score of every setting on the tuning seeds, per arm.
        scores: per arm and metric (`METRICS` and `BANDS`) one value per reported seed, in percent.
        best: what the true probabilities would score, per metric and seed, in percent.
        scale: per arm the norm of the output weight at the end over that at the start, per seed.
    """

    chosen: Mapping[str, Setting]
    tuning: Mapping[str, Sequence[float]]
    scores: Mapping[str, Mapping[str, list[float]]]
    best: Mapping[str, list[float]]
    scale: Mapping[str, list[float]]

    def difference(self, first: str, second: str, metric: str) -> PairedDifference:
        """Paired difference in percentage points, positive where `first` ranks better."""
        return paired_difference(self.scores[first][metric], self.scores[second][metric])


def ranking_scores(logits: Float[Tensor, "items words"], truth: Float[Tensor, "items words"]) -> dict[str, float]:
    """Expected top-k hits and reciprocal rank in percent, if the next word is drawn from `truth`.

    No word is sampled, so that the only noise is that of training. `BANDS` split the hits of `top10`.
    """
    order = logits.argsort(1, descending=True)
    ordered = truth.gather(1, order).mean(0)
    hits = torch.zeros_like(truth).scatter(1, order[:, :10], 1.0) * truth
    ranks = torch.arange(1, truth.shape[1] + 1, dtype=truth.dtype, device=truth.device)
    found = {name: ordered[: int(name[3:])].sum() for name in METRICS[:-1]} | {"mrr": (ordered / ranks).sum()}
    found |= {name: hits[:, band].sum(1).mean() for name, band in BANDS.items()}
    return {name: 100 * value.item() for name, value in found.items()}


class _Body(nn.Module):
    """Embeddings of the last two words and one hidden layer, with a constant appended to its output."""

    def __init__(self, task: Task, rng: torch.Generator) -> None:
        super().__init__()
        drawn = torch.randn(2, task.words, task.width, generator=rng, dtype=torch.float64)
        self.embedding = nn.Parameter(drawn / task.width**0.5)
        self.bias = nn.Parameter(torch.zeros(task.width, dtype=torch.float64))

    def forward(self, contexts: Int[Tensor, "items 2"]) -> Float[Tensor, "items width+1"]:
        """Hidden vectors."""
        h = torch.tanh(sum(F.embedding(contexts[:, i], self.embedding[i]) for i in range(2)) + self.bias)
        return F.pad(h, (0, 1), value=1.0)


def _loss(arm: Arm, setting: Setting) -> Callable[..., Tensor]:
    """The arm's loss: of the statistics in a factored layer, of outputs and targets otherwise."""
    shape = {"sharpness": setting["a"], "location": setting["b"]} if arm.loss == "z" else {}
    factored = {"z": z_loss_of, "taylor": taylor_softmax_of, "squared": squared_error_of}
    dense = {"z": z_loss, "taylor": taylor_softmax_loss, "softmax": F.cross_entropy}
    return partial((factored if arm.output == "factored" else dense)[arm.loss], **shape)


@dataclass(frozen=True, eq=False)
class Corpus:
    """What the runs of one seed share: the texts they see, the contexts they are judged on, the random start.

    Args:
        texts: one word per column for every position of a batch.
        heldout: contexts of the ranking.
        truth: distribution of the next word in each.
        seed: of all of it, the weights at the start included.
    """

    texts: Int[Tensor, "batch words"]
    heldout: Int[Tensor, "items 2"]
    truth: Float[Tensor, "items words"]
    seed: int


def make_corpus(task: Task, seed: int) -> Corpus:
    """Draw a language and its texts."""
    language, rng = make_zipf_language(seed, words=task.words), generator(seed)
    texts = language.sample(task.batch, task.steps + 2, rng)
    heldout = language.sample(task.heldout, 12, rng)[:, -2:]
    return Corpus(texts, heldout, language.probabilities(heldout), seed)


def train(
    arm: Arm, setting: Setting, corpus: Corpus, task: Task, *, device: torch.device | str = "cpu"
) -> tuple[dict[str, float], float]:
    """Train once in float64; return the scores, and the norm of the output weight over that at the start."""
    rng = generator(corpus.seed)
    body = _Body(task, rng).to(device)
    output = FactoredOutput(task.width + 1, task.words, dtype=torch.float64)
    output.reset_parameters(rng)
    output.to(device)
    start = output.weight
    dense = None if arm.output == "factored" else nn.Parameter(start.clone())
    optimizers = [torch.optim.Adam(body.parameters(), lr=task.body_rate, fused=True)]
    if dense is not None:
        kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
        optimizers.append(kinds[arm.output]([dense], lr=setting["rate"], fused=True))
    decays = [torch.optim.lr_scheduler.LinearLR(o, 1.0, task.final_rate, task.steps) for o in optimizers]
    loss_of, texts = _loss(arm, setting), corpus.texts.to(device)
    for step in range(task.steps):
        h, target = body(texts[:, step : step + 2]), texts[:, step + 2]
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss = loss_of(output(h, target)) if dense is None else loss_of(h @ dense.T, target)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        output.step(setting["rate"] * (1 - (1 - task.final_rate) * step / task.steps))
        for decay in decays:
            decay.step()
    with torch.no_grad():
        weight = output.weight if dense is None else dense
        logits = (body(corpus.heldout.to(device)) @ weight.T).double().cpu()
    return ranking_scores(logits, corpus.truth), (weight.norm() / start.norm()).item()


def run_study(
    arms: Mapping[str, Arm],
    *,
    seeds: Sequence[int],
    tuning_seeds: Sequence[int],
    task: Task,
    metric: str = "mrr",
    device: torch.device | str = "cpu",
) -> Study:
    """Choose each arm's setting on the tuning seeds, then train it on the reported ones; a seed has its own language.

    Args:
        arms: by name, all with the same number of settings.
        seeds: reported, at least two; disjoint from `tuning_seeds`.
        metric: one of `METRICS`, which chooses.

    Raises:
        ValueError: budgets differ, seeds overlap, or an unknown metric.

    Source: debrebisson2016zloss; the task is ours.
    Chapter: z-loss
    """
    if len({len(arm.settings) for arm in arms.values()}) != 1:
        raise ValueError("run_study: every arm must have the same number of settings")
    if set(seeds) & set(tuning_seeds):
        raise ValueError(f"run_study: tuning seeds must not be reported, both hold {set(seeds) & set(tuning_seeds)}")
    if metric not in METRICS:
        raise ValueError(f"run_study: metric must be one of {METRICS}, got {metric!r}")
    corpora = {seed: make_corpus(task, seed) for seed in (*seeds, *tuning_seeds)}
    run = partial(train, task=task, device=device)
    chosen, tuning, scores, scale = {}, {}, {}, {}
    for name, arm in arms.items():
        tried = [[run(arm, setting, corpora[seed])[0][metric] for seed in tuning_seeds] for setting in arm.settings]
        tuning[name] = [sum(values) / len(values) for values in tried]
        chosen[name] = arm.settings[max(range(len(tried)), key=lambda i: tuning[name][i])]
        found = [run(arm, chosen[name], corpora[seed]) for seed in seeds]
        scores[name] = {m: [result[0][m] for result in found] for m in (*METRICS, *BANDS)}
        scale[name] = [result[1] for result in found]
    ideal = [ranking_scores(corpora[seed].truth, corpora[seed].truth) for seed in seeds]
    best = {m: [result[m] for result in ideal] for m in (*METRICS, *BANDS)}
    return Study(chosen, tuning, scores, best, scale)


def seconds_per_step(
    step: Callable[[], object], *, repeats: int, calls: int, device: torch.device | str = "cpu"
) -> list[float]:
    """Seconds of one call, `repeats` times the mean over `calls`, after one call that warms up.

    On a CPU these are the process's own processor seconds, which other jobs on the machine do not lengthen much; on a
    GPU they are seconds by the clock, up to the end of the device's work.
    """
    cuda = torch.device(device).type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    step()
    found = []
    for _ in range(repeats):
        if cuda:
            torch.cuda.synchronize(device)
        start = clock()
        for _ in range(calls):
            step()
        if cuda:
            torch.cuda.synchronize(device)
        found.append((clock() - start) / calls)
    return found
