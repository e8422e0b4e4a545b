"""What the compile check compiles: every program as its launcher would start it, per dtype and option.

`budget.json` beside this file holds what each may use: the output of
`python -m p2k.core.compile_check p2k.ops.cut_cross_entropy.budget` when it was last accepted.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

TOKENS, VOCAB, DIM = 1024, 32768, 2048


def load() -> dict:
    """The recorded budget: versions it was measured with, and one entry per kernel."""
    return json.loads(Path(__file__).with_name("budget.json").read_text())


def cases() -> Iterator[tuple[str, tuple[int, ...], Callable]]:
    """Name, compute capabilities and launch of every case, on tensors without data."""
    yield "bf16 exact", (80, 90, 100), _call(torch.bfloat16)
    options = {"epsilon": 2.0**-12, "sort": True, "softcap": 30.0, "bias": True}
    yield "bf16 filtered, sorted, capped", (80, 90), _call(torch.bfloat16, **options)
    yield "fp32 filtered, sorted", (80, 90), _call(torch.float32, epsilon=2.0**-28, sort=True)


def _call(
    dtype: torch.dtype, *, epsilon: float = 0.0, sort: bool = False, softcap: float | None = None, bias: bool = False
) -> Callable:
    def call():
        from p2k.ops.cut_cross_entropy import kernel, tiles

        hidden, weight = (torch.empty(rows, DIM, dtype=dtype, device="meta") for rows in (TOKENS, VOCAB))
        biases = torch.empty(VOCAB, dtype=dtype, device="meta") if bias else None
        code, grads = torch.empty(TOKENS, dtype=torch.int64, device="meta"), torch.empty(2, TOKENS, device="meta")
        tile, needs = tiles.tile_of(dtype), [True, True, bias]
        numbers = kernel.forward(hidden, weight, code, biases, softcap)
        kernel.backward(grads, hidden, weight, code, biases, numbers, softcap, epsilon, sort, True, needs, tile)

    return call
