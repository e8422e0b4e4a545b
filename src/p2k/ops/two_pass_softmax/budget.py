"""What the compile check compiles: the row programs as their launchers would start them, per width and dtype.

`budget.json` beside this file holds what each may use: the output of
`python -m p2k.core.compile_check p2k.ops.two_pass_softmax.budget` when it was last accepted.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

# An odd width that no wide load divides, the widest resident rows of both directions, and a vocabulary read in tiles.
# The other two programs are compared with the pairs in float32.
WIDTHS = {"bf16": (57, 32768, 128256), "fp32": (4096, 32768, 128256)}
BACKWARD = {"bf16": (57, 16384), "fp32": (16384, 128256)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ROWS = 4096


def load() -> dict:
    """The recorded budget: versions it was measured with, and one entry per kernel."""
    return json.loads(Path(__file__).with_name("budget.json").read_text())


def cases() -> Iterator[tuple[str, tuple[int, ...], Callable]]:
    """Name, compute capabilities and launch of every case, on tensors without data."""
    for name, widths in WIDTHS.items():
        for width in widths:
            archs = (80, 90, 100) if (name, width) == ("fp32", 4096) else (80, 90)
            yield f"{name} {width}", archs, _forward(width, DTYPES[name], "pair")
            for program in ("online", "three_pass") if name == "fp32" else ():
                yield f"{name} {width}", (90,), _forward(width, DTYPES[name], program)
    for name, widths in BACKWARD.items():
        for width in widths:
            archs = (80, 90, 100) if (name, width) == ("bf16", 16384) else (80, 90)
            yield f"{name} {width}", archs, _backward(width, DTYPES[name])


def _forward(width: int, dtype: torch.dtype, program: str) -> Callable:
    def call():
        from p2k.ops.two_pass_softmax import kernel

        kernel.forward(torch.empty(ROWS, width, dtype=dtype, device="meta"), program)

    return call


def _backward(width: int, dtype: torch.dtype) -> Callable:
    def call():
        from p2k.ops.two_pass_softmax import kernel

        grad, y = (torch.empty(ROWS, width, dtype=dtype, device="meta") for _ in range(2))
        kernel.backward(grad, y)

    return call
