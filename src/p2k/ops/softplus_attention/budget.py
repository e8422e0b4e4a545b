"""What the compile check compiles: every program as its launcher would start it, per head width, dtype and mask.

`budget.json` beside this file holds what each may use.
`python -m p2k.core.compile_check p2k.ops.softplus_attention.budget` measures.

Chapter: softplus-attention
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

POWERS = {"plain": None, "reweighted": 15.0}


def load() -> dict:
    """The recorded budget: versions it was measured with, and one entry per kernel."""
    return json.loads(Path(__file__).with_name("budget.json").read_text())


def cases() -> Iterator[tuple[str, tuple[int, ...], Callable]]:
    """Name, compute capabilities and launch of every case, on tensors without data."""
    for kind, power in POWERS.items():
        yield f"{kind} bf16 64 causal", (80, 90) if power else (80, 90, 100), _call(64, torch.bfloat16, power)
        yield f"{kind} bf16 128 causal", (80, 90) if power else (90,), _call(128, torch.bfloat16, power)
        yield f"{kind} fp32 64 causal", (90,), _call(64, torch.float32, power)
    yield "plain bf16 64 bool mask", (90,), _call(64, torch.bfloat16, None, masked=True)


def _call(width: int, dtype: torch.dtype, power: float | None, *, masked: bool = False) -> Callable:
    def call():
        from p2k.ops.softplus_attention import kernel

        q, k, v, grad = (torch.empty(8, 12, 512, width, dtype=dtype, device="meta") for _ in range(4))
        mask = torch.empty(8, 1, 512, 512, dtype=torch.bool, device="meta") if masked else None
        saved = kernel.forward(q, k, v, mask, not masked, 4.0, power)
        kernel.backward(grad, (q, k, v), mask, saved, not masked, 4.0, power, [True] * 3)

    return call
