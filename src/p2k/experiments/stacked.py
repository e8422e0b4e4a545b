"""Train several seeds of one small model as one batch: their parameters are stacked and every step serves all.

A small model leaves a processor idle between its many small operations; stacking makes each of them larger. The runs
stay independent, because a sum of losses has the gradient of each loss in the parameters of its own replica and
AdamW works element by element.
"""

import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from p2k.core.errors import P2KError
from p2k.data import ImageData
from p2k.experiments.loop import Feed, TrainConfig, TrainResult
from p2k.nn.matching import decayed_names


def train_stacked(
    models: Sequence[nn.Module],
    data: ImageData,
    config: TrainConfig,
    *,
    seeds: Sequence[int],
    rates: Sequence[float] | None = None,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> list[TrainResult]:
    """Train all models in place as `loop.train` would train each by itself, in float32 and without checkpoints.

    Args:
        models: one per seed, of one architecture, with their own initial weights; at least one.
        data: as in `loop.train`; every seed sees its own order of it.
        config: settings shared by all.
        seeds: of order and augmentation, one per model.
        rates: peak learning rate of each model; None means ``config.learning_rate`` for all.
        device: where to train.
        progress: show a bar on standard error.

    Returns:
        One result per model; `seconds` is the duration of the whole batch divided by their number.

    Raises:
        ValueError: the numbers of models, seeds and rates differ.
        P2KError: a loss is not finite; the message names the seeds.
    """
    if not models or len(seeds) != len(models) or (rates is not None and len(rates) != len(models)):
        raise ValueError(
            f"train_stacked: needs one seed and one rate per model, got {len(models)} models, {len(seeds)} seeds, "
            f"{None if rates is None else len(rates)} rates"
        )
    start, device = time.perf_counter(), torch.device(device)
    for model in models:
        model.to(device).train()
    stack = _Stack(models, config, [config.learning_rate] * len(models) if rates is None else rates)
    feed, losses = Feed(data, config, device), []
    for epoch in tqdm(range(config.epochs), unit="epoch", leave=False, disable=not progress):
        batches = zip(*(feed.epoch(seed, epoch) for seed in seeds), strict=True)
        for batch, parts in enumerate(batches):
            images, labels = (torch.stack(tensors) for tensors in zip(*parts, strict=True))
            losses.append(stack.step(images, labels, config.rate_factor(epoch * feed.steps + batch, feed.steps)))
        _check_finite(losses[-feed.steps :], seeds, epoch)
    stack.write_back(models)
    curves = torch.stack(losses, dim=1).double().cpu()
    hits = [[feed.correct(model, split) for split in ("val", "test")] for model in models]
    seconds = (time.perf_counter() - start) / len(models)
    return [
        TrainResult(curve, val.double().mean().item(), test.double().mean().item(), test, seconds)
        for curve, (val, test) in zip(curves, hits, strict=True)
    ]


class _Stack:
    """Stacked parameters of all replicas, their loss and their optimizer."""

    def __init__(self, models: Sequence[nn.Module], config: TrainConfig, rates: Sequence[float]) -> None:
        self.template, self.config = models[0], config
        self.parameters, self.buffers = stack_module_state(list(models))
        # A step of AdamW is proportional to its rate, so replicas with lower rates take a share of the fastest one's.
        self.peak, highest = max(rates), max(rates)
        self.shares = None if min(rates) == highest else [rate / highest for rate in rates]
        names = decayed_names(self.template)
        decayed = [p for name, p in self.parameters.items() if name in names]
        kept = [p for name, p in self.parameters.items() if name not in names]
        groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": kept, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.peak, fused=True)

    def step(self, images: Tensor, labels: Tensor, factor: float) -> Tensor:
        """One step of every replica on its own batch, ``[replicas, batch, ...]``; returns each loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * factor
        # The fused attention has no batching rule; plain products have.
        with sdpa_kernel(SDPBackend.MATH):
            losses = vmap(self._loss, randomness="different")(self.parameters, self.buffers, images, labels)
        self.optimizer.zero_grad(set_to_none=True)
        losses.sum().backward()
        self._update()
        return losses.detach()

    def _loss(
        self, parameters: dict[str, Tensor], buffers: dict[str, Tensor], images: Tensor, labels: Tensor
    ) -> Tensor:
        logits = functional_call(self.template, (parameters, buffers), (images,))
        return F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)

    @torch.no_grad()
    def _update(self) -> None:
        if self.shares is None:
            self.optimizer.step()
            return
        before = {name: p.clone() for name, p in self.parameters.items()}
        self.optimizer.step()
        for name, p in self.parameters.items():
            share = p.new_tensor(self.shares).view(-1, *[1] * (p.ndim - 1))
            p.copy_(torch.lerp(before[name], p, share))

    @torch.no_grad()
    def write_back(self, models: Sequence[nn.Module]) -> None:
        """Copy each replica's parameters into its model."""
        for i, model in enumerate(models):
            for name, p in model.named_parameters():
                p.copy_(self.parameters[name][i])


def _check_finite(losses: list[Tensor], seeds: Sequence[int], epoch: int) -> None:
    finite = torch.stack(losses, dim=1).isfinite().all(1).tolist()
    bad = [seed for seed, fine in zip(seeds, finite, strict=True) if not fine]
    if bad:
        raise P2KError(f"the training loss of seeds {bad} stopped being finite in epoch {epoch}: lower learning_rate")
