"""A small model, adapter settings and inputs that the LoRA tests share."""

import torch
from torch import nn

from p2k.core.tolerance import tolerance

FLOAT32 = tolerance(torch.float32, dot=True)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return x + torch.tanh(self.query(x)) * self.value(x)


class Model(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList([Attention() for _ in range(3)])})
        self.classifier = nn.Linear(8, 4)

    def forward(self, x):
        for layer in self.encoder["layer"]:
            x = layer(x)
        return self.classifier(x)


BOTH = ["query", "value"]
CONFIGS = {
    "plain": {"r": 2, "target_modules": BOTH, "lora_alpha": 6},
    "regular expression": {"r": 2, "target_modules": r".*layer\.[02]\.query"},
    "some layers": {"r": 2, "target_modules": BOTH, "layers_to_transform": [0, 2]},
    "one layer": {"r": 2, "target_modules": BOTH, "layers_to_transform": 1, "layers_pattern": "layer"},
    "patterns": {
        "r": 2, "target_modules": BOTH, "rank_pattern": {"0.query": 5, r"layer\.2\.value": 1},
        "alpha_pattern": {"value": 3},
    },
    "rank-stabilised": {"r": 4, "target_modules": ["value"], "use_rslora": True, "lora_alpha": 5},
    "head": {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"]},
    "excluded": {"r": 2, "target_modules": BOTH, "exclude_modules": ["1.query"]},
    "dropout": {"r": 2, "target_modules": BOTH, "lora_dropout": 0.4},
    "no layers named": {"r": 2, "target_modules": BOTH, "layers_to_transform": []},
}  # fmt: skip


def randomised(parameters):
    """Adapters that do something: B is not zero."""
    torch.manual_seed(1)
    for parameter in parameters:
        parameter.data.normal_()


def inputs(*shape):
    return torch.randn(*shape, 8, generator=torch.Generator().manual_seed(2))
