"""What the compile check compiles: both row programs as their launchers would start them, per vocabulary and dtype.

`budget.json` beside this file holds what each may use: the output of
`python -m p2k.core.compile_check p2k.ops.linear_logp.budget` when it was last accepted.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

# Digits, a toy vocabulary in one tile, and a large one in tiles, which no wide load divides.
VOCABULARIES = (11, 1000, 50257)
TOKENS = 1024


def load() -> dict:
    """The recorded budget: versions it was measured with, and one entry per kernel."""
    return json.loads(Path(__file__).with_name("budget.json").read_text())


def cases() -> Iterator[tuple[str, tuple[int, ...], Callable]]:
    """Name, compute capabilities and launch of every case, on tensors without data."""
    for vocab in VOCABULARIES:
        yield f"fp32 {vocab}", (80, 90, 100) if vocab == 1000 else (80, 90), _rows(vocab, torch.float32)
    yield "bf16 50257 with bias", (80, 90), _rows(50257, torch.bfloat16, bias=True)


def _rows(vocab: int, dtype: torch.dtype, *, bias: bool = False) -> Callable:
    """Both passes over a chunk whose head has `dtype`: its logits are float32, their gradient is an operand again."""

    def call():
        from p2k.ops.linear_logp import chunked, kernel

        def buffer(dtype: torch.dtype) -> torch.Tensor:
            aligned = -(-vocab // chunked.ALIGNMENT) * chunked.ALIGNMENT
            return torch.empty(TOKENS, aligned, dtype=dtype, device="meta")[:, :vocab]

        logits, target = buffer(torch.float32), torch.empty(TOKENS, dtype=torch.int64, device="meta")
        numbers, grads = (torch.empty(count, 4 * TOKENS, device="meta")[:, :TOKENS] for count in (4, 3))
        biases = torch.empty(vocab, dtype=dtype, device="meta") if bias else None
        kernel.forward(logits, biases, target, 0.5, numbers)
        kernel.backward(logits, biases, target, numbers, grads, 0.5, buffer(dtype))

    return call
