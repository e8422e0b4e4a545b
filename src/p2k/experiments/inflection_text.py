"""The paper's own task: BERT on SST-2, adapted to Rotten Tomatoes, with the diagnosis and the control it lacks.

``python -m p2k.experiments.inflection_text --out DIR`` needs a network or local copies of model and data, and a GPU to
finish in reasonable time. It leaves one record per regime and arm. Sentences of the target's test part are removed from
the source: SST was annotated on them.

Source: wang2025inflection.  Chapter: inflection
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from p2k.core.checks import require
from p2k.core.device import choose_device, device_name, versions
from p2k.core.errors import DatasetMissing, P2KError
from p2k.core.seeding import generator
from p2k.data.sentiment import Sentences, load_sentiment
from p2k.experiments.diagnostics import profile_layers, transformer_layers
from p2k.experiments.records import ResultRecord, write_record
from p2k.experiments.saturation import inflection_layers, saturation_index
from p2k.nn.lora import LoraConfig
from p2k.nn.lora_adapters import inject_adapter_in_model

TOP, FULL = "top two layers", "full"
ARMS = ("head only", "LoRA, inflection", "LoRA, random", "LoRA, all", TOP, FULL)
SWEEP_SEED = 1000
RATES = (2e-5, 6e-5, 2e-4, 6e-4)


@dataclass(frozen=True)
class TextConfig:
    """Settings that the paper does not state; ours.

    Args:
        model: name or folder of the pre-trained encoder.
        under, over: source epochs of the regimes.
        target_epochs: of adaptation.
        batch_size: sentences per step.
        length: tokens at which a sentence is cut.
        source_rate: learning rate on the source.
        rank: of the adapters, on queries, keys and values.
        warmup: share of the steps with a rising learning rate.
    """

    model: str = "bert-base-uncased"
    under: int = 1
    over: int = 8
    target_epochs: int = 3
    batch_size: int = 32
    length: int = 128
    source_rate: float = 2e-5
    rank: int = 16
    warmup: float = 0.1


@dataclass(eq=False)
class ArmRun:
    """What one arm of one regime has found so far."""

    values: list[float] = field(default_factory=list)
    rate: float = 0.0
    parameters: int = 0


def load_model(config: TextConfig) -> nn.Module:
    """The pre-trained encoder with a fresh two-class head, attention through torch's fused call.

    Raises:
        MissingDependency: transformers is not installed.
        DatasetMissing: neither a network nor a local copy of the weights.
    """
    transformers = require("transformers", extra="text", purpose="BERT")
    kind = transformers.AutoModelForSequenceClassification
    try:
        return kind.from_pretrained(config.model, num_labels=2, attn_implementation="sdpa")
    except OSError as error:
        raise DatasetMissing(
            f"the weights of {config.model} could not be loaded. Run once with a network, or pass --model FOLDER"
        ) from error


def fit(
    model: nn.Module, data: Sentences, *, epochs: int, rate: float, config: TextConfig, seed: int, device: torch.device
) -> None:
    """Train the parameters that require a gradient: AdamW, linear warm-up and decay, gradient norm clipped at 1."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.01)
    total = epochs * math.ceil(len(data) / config.batch_size)
    rise = max(1, round(config.warmup * total))
    factor = lambda step: min((step + 1) / rise, (total - step) / max(1, total - rise))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    model.to(device).train()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for inputs, labels in _batches(data, config, epochs, seed, device):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = F.cross_entropy(_logits(model, inputs).float(), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, data: Sentences, *, config: TextConfig, device: torch.device) -> float:
    """Percent of sentences classified correctly."""
    model.to(device).eval()
    hits = 0
    for rows in torch.arange(len(data)).split(4 * config.batch_size):
        inputs, labels = data.take(rows, device)
        hits += int((_logits(model, inputs).argmax(-1) == labels).sum())
    return 100 * hits / len(data)


def choose_layers(model: nn.Module, data: Sentences, *, config: TextConfig, device: torch.device) -> list[int]:
    """The paper's diagnosis on target training sentences: maxima of the index with their neighbours."""
    rows = torch.arange(min(512, len(data))).split(config.batch_size)
    batches = (data.take(part, device) for part in rows)
    found = profile_layers(model.to(device), batches, predict=_logits, valid=lambda inputs: inputs[1].bool())
    return inflection_layers(saturation_index(found.mean_entropy, found.batch_gradient), skip_top=0.25)


def prepare(source: nn.Module, arm: str, layers: Sequence[int], *, config: TextConfig, seed: int) -> nn.Module:
    """A copy to train: all of it, or the head and in these layers all parameters of the top arm, adapters of others."""
    model = copy.deepcopy(source)
    if arm == FULL:
        return model
    if arm == TOP or not layers:
        model.requires_grad_(False)
        for part in (*(transformer_layers(model)[layer] for layer in layers), model.classifier):
            part.requires_grad_(True)
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = {"target_modules": ["query", "key", "value"], "modules_to_save": ["classifier"]}
        numbers = {"r": config.rank, "lora_alpha": 2 * config.rank, "lora_dropout": 0.05}
        return inject_adapter_in_model(LoraConfig(**numbers, **settings, layers_to_transform=list(layers)), model)


def run_regime(
    epochs: int,
    parts: Sequence[Sentences],
    *,
    config: TextConfig,
    seeds: Sequence[int],
    device: torch.device,
    load: Callable[[TextConfig], nn.Module] = load_model,
) -> dict[str, ArmRun]:
    """One amount of source training: every seed and arm, rates chosen on validation sentences with `SWEEP_SEED`."""
    source_data, train, val, test = parts
    runs = {arm: ArmRun() for arm in ARMS}
    for seed in tqdm((SWEEP_SEED, *seeds), desc=f"{epochs} source epochs", leave=False):
        torch.manual_seed(seed)
        source = load(config)
        fit(source, source_data, epochs=epochs, rate=config.source_rate, config=config, seed=seed, device=device)
        places = _places(
            len(transformer_layers(source)), choose_layers(source, train, config=config, device=device), seed
        )
        for arm, run in runs.items():
            tried = {}
            for rate in RATES if seed == SWEEP_SEED else (run.rate,):
                model = prepare(source, arm, places[arm], config=config, seed=seed)
                run.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
                fit(model, train, epochs=config.target_epochs, rate=rate, config=config, seed=seed, device=device)
                part = val if seed == SWEEP_SEED else test
                tried[rate] = accuracy(model, part, config=config, device=device)
            if seed == SWEEP_SEED:
                run.rate = max(tried, key=tried.get)
            else:
                run.values.append(tried[run.rate])
    return runs


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status. Errors a user can mend are printed without a traceback."""
    parser = argparse.ArgumentParser(
        prog="python -m p2k.experiments.inflection_text", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the records")
    parser.add_argument("--model", default=TextConfig.model, help="name or folder of the encoder")
    parser.add_argument("--seeds", type=int, default=10, help="number of reported seeds")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    options = parser.parse_args(arguments)
    try:
        device, config = choose_device(options.device), TextConfig(model=options.model)
        parts = load_sentiment(config.model, length=config.length)
        for name, epochs in (("under", config.under), ("over", config.over)):
            start = time.perf_counter()
            runs = run_regime(epochs, parts, config=config, seeds=range(options.seeds), device=device)
            for arm, run in runs.items():
                seconds = time.perf_counter() - start
                record = _record(name, arm, run, config=config, device=device, seconds=seconds)
                write_record(options.out / record.filename, record)
                print(f"{name:6} {arm:18} {run.parameters:>11,} trained  {sum(run.values) / len(run.values):6.2f} %")
    except (P2KError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _places(depth: int, chosen: Sequence[int], seed: int) -> dict[str, Sequence[int]]:
    """Layers of each arm; the control draws as many, from the others first."""
    order = torch.randperm(depth, generator=generator(seed)).tolist()
    random = sorted(sorted(order, key=lambda layer: layer in chosen)[: len(chosen)])
    every = range(depth)
    return dict(zip(ARMS, ((), chosen, random, every, every[-2:], every), strict=True))


def _record(
    regime: str, arm: str, run: ArmRun, *, config: TextConfig, device: torch.device, seconds: float
) -> ResultRecord:
    return ResultRecord(
        slug="inflection",
        experiment=f"text-{regime}",
        arm=arm,
        profile="gpu",
        metric="test_accuracy",
        values=run.values,
        seeds=tuple(range(len(run.values))),
        parameters=run.parameters,
        config={**asdict(config), "rate": run.rate},
        device=device_name(device),
        versions=versions(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=seconds,
    )


def _logits(model: nn.Module, inputs: tuple[Tensor, Tensor]) -> Tensor:
    return model(input_ids=inputs[0], attention_mask=inputs[1]).logits


def _batches(
    data: Sentences, config: TextConfig, epochs: int, seed: int, device: torch.device
) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Every epoch in an order of its own, fixed by the seed."""
    rng = generator(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(data), generator=rng).split(config.batch_size):
            yield data.take(rows, device)


if __name__ == "__main__":
    sys.exit(main())
