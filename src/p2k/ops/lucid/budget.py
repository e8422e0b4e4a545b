"""What the compile check compiles: every program of the solve as its launcher would start it, per head width
(a mask costs registers, so there is one; the forward programs are the same for every width).

`budget.json` beside this file holds what each may use.
`python -m p2k.core.compile_check p2k.ops.lucid.budget` measures.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch


def load() -> dict:
    """The recorded budget: versions it was measured with, and one entry per kernel."""
    return json.loads(Path(__file__).with_name("budget.json").read_text())


def cases() -> Iterator[tuple[str, tuple[int, ...], Callable]]:
    """Name, compute capabilities and launch of every case, on tensors without data."""
    yield "forward 64 masked", (80, 90, 100), _call(64, masked=True)
    yield "backward 64 masked", (80, 90, 100), _call(64, masked=True, backward=True)
    yield "backward 128", (80, 90, 100), _call(128, backward=True)


def _call(width: int, *, masked: bool = False, backward: bool = False) -> Callable:
    def call():
        from p2k.ops.lucid import kernel

        u, v = (torch.empty(8, 12, 512, width, device="meta") for _ in range(2))
        live = torch.empty(8, 12, 512, device="meta") if masked else None
        if backward:
            inverse = torch.empty(kernel.inverse_shape(u), device="meta")
            kernel.backward(v, u, live, v, inverse, 8.0, True)
        else:
            kernel.forward(u, v, live, 8.0)

    return call
