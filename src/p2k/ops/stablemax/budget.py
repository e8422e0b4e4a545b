"""What the compile check compiles: both StableMax programs as their launchers would start them, per classes and dtype.

`budget.json` beside this file holds what each may use: the output of
`python -m p2k.core.compile_check p2k.ops.stablemax.budget` when it was last accepted.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

# Digits, modular addition, one tile, and large vocabularies in tiles, of which one divides no wide load.
CLASSES = {"fp32": (10, 113, 1024, 128256), "bf16": (1024, 50257, 128256), "fp16": (113,)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS = 1024


def load() -> dict:
    """The recorded budget: versions it was measured with, and one entry per kernel."""
    return json.loads(Path(__file__).with_name("budget.json").read_text())


def cases() -> Iterator[tuple[str, tuple[int, ...], Callable]]:
    """Name, compute capabilities and launch of every case, on tensors without data."""
    for name, sizes in CLASSES.items():
        for classes in sizes:
            archs = (80, 90, 100) if (name, classes) == ("bf16", 50257) else (80, 90)
            yield f"{name} {classes}", archs, _rows(classes, DTYPES[name])


def _rows(classes: int, dtype: torch.dtype) -> Callable:
    """Both passes over a batch."""

    def call():
        from p2k.ops.stablemax import kernel

        logits = torch.empty(TOKENS, classes, dtype=dtype, device="meta")
        target = torch.empty(TOKENS, dtype=torch.int64, device="meta")
        loss, numbers = kernel.forward(logits, target, -100)
        kernel.backward(loss, logits, target, numbers, -100)

    return call
