"""What the compile check compiles: both activations as their launchers would start them, per width and dtype.

`budget.json` beside this file holds what each may use: the output of
`python -m p2k.core.compile_check p2k.ops.polycom.budget` when it was last accepted.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

# An odd width that no wide load divides, a small and a large feed-forward, and a row in tiles.
WIDTHS = {"bf16": (57, 512, 3072, 8192), "fp16": (512,), "fp32": (512, 8192)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS = 4096


def load() -> dict:
    """The recorded budget: versions it was measured with, and one entry per kernel."""
    return json.loads(Path(__file__).with_name("budget.json").read_text())


def cases() -> Iterator[tuple[str, tuple[int, ...], Callable]]:
    """Name, compute capabilities and launch of every case, on tensors without data."""
    for name, widths in WIDTHS.items():
        for width in widths:
            archs = (80, 90, 100) if (name, width) == ("bf16", 3072) else (80, 90)
            yield f"norm {name} {width}", archs, _call(width, DTYPES[name], "norm")
        yield f"relu {name}", (80, 90), _call(512, DTYPES[name], "relu")


def _call(width: int, dtype: torch.dtype, prefix: str) -> Callable:
    def call():
        from p2k.ops.polycom import kernel

        grad, x = (torch.empty(TOKENS, width, dtype=dtype, device="meta") for _ in range(2))
        weight, bias = (torch.empty(shape, dtype=torch.float32, device="meta") for shape in ((3,), ()))
        scalars = (1e-6,) if prefix == "norm" else ()
        _, saved = getattr(kernel, f"{prefix}_forward")(x, weight, bias, *scalars)
        getattr(kernel, f"{prefix}_backward")(grad, x, weight, saved, [True] * 3)

    return call
