"""The arms of the comparison on noisy digits: which parameters of a copy of the source model each of them trains.

Source: wang2025inflection.  Chapter: inflection
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from p2k.models.vit import ViT, ViTConfig, build_vit
from p2k.nn.lora import LoraConfig, LoraLinear
from p2k.nn.lora_adapters import inject_adapter_in_model

MODEL = ViTConfig(8, 2, 1, 10, dim=16, depth=6, heads=2, hidden=32, rank=4, readout="last")
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["query_key_value"], modules_to_save=["head"])
HEAD, INFLECTION, RANDOM, ALL = "head only", "LoRA, inflection", "LoRA, random", "LoRA, all"
TOP, FULL = "top two layers", "full"
# Arms of a group train the same parameters, some of them multiplied by 0, and so can be stacked.
GROUPS = ((HEAD, INFLECTION, RANDOM, ALL), (TOP,), (FULL,))
ARMS = sum(GROUPS, ())


@dataclass(frozen=True)
class Job:
    """One model to adapt.

    Args:
        arm: one of `ARMS`.
        seed: of the source model, the adapters and the order of the data.
        layers: that train.
        rate: learning rate.
    """

    arm: str
    seed: int
    layers: tuple[int, ...]
    rate: float


class Switch(nn.Module):
    """Multiplies by 0 or 1, so that adapters of all layers can be stacked although each model uses some."""

    def __init__(self, on: bool):
        super().__init__()
        self.register_buffer("on", torch.tensor(float(on)))

    def forward(self, x: Tensor) -> Tensor:
        """All or nothing."""
        return x * self.on


def make_source(seed: int) -> ViT:
    """An untrained source model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_vit(MODEL, "gelu")


def make_adaptable(source: ViT, job: Job) -> nn.Module:
    """A copy to train: some layers whole, or the head and adapters that are switched on in some layers."""
    model = copy.deepcopy(source)
    if job.arm == FULL:
        return model
    if job.arm == TOP:
        model.requires_grad_(False)
        for part in (*(model.blocks[layer] for layer in job.layers), model.readout, model.head):
            part.requires_grad_(True)
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.seed)
        inject_adapter_in_model(LORA, model)
    for number, block in enumerate(model.blocks):
        for module in block.modules():
            if isinstance(module, LoraLinear):
                module.lora_dropout["default"] = Switch(number in job.layers)
    return model


def trained_parameters(model: nn.Module) -> int:
    """Number of parameters that a model adapts, without those of adapters that are switched off."""
    off = [m for m in model.modules() if isinstance(m, LoraLinear) and not m.lora_dropout["default"].on]
    idle = sum(p.numel() for layer in off for p in layer.parameters() if p.requires_grad)
    return sum(p.numel() for p in model.parameters() if p.requires_grad) - idle
