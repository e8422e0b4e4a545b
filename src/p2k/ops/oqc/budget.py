"""What the compile check compiles: every OQC program as its launcher would start it, per width and dtype.

`budget.json` beside this file holds what each may use: the output of
`python -m p2k.core.compile_check p2k.ops.oqc.budget` when it was last accepted.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

# The paper's rank, an odd width that no wide load divides, a small and a large feed-forward, and a row in tiles.
WIDTHS = {"bf16": (56, 57, 512, 3072, 8192), "fp16": (512,), "fp32": (56, 8192)}
RANKS = (56, 57, 8192)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOKENS = 4096


def load() -> dict:
    """The recorded budget: versions it was measured with, and one entry per kernel."""
    return json.loads(Path(__file__).with_name("budget.json").read_text())


def cases() -> Iterator[tuple[str, tuple[int, ...], Callable]]:
    """Name, compute capabilities and launch of every case, on tensors without data."""
    for name, widths in WIDTHS.items():
        for width in widths:
            archs = (80, 90, 100) if (name, width) == ("bf16", 512) else (80, 90)
            yield f"inject {name} {width}", archs, _inject(width, DTYPES[name])
            if width in RANKS:
                yield f"rank {name} {width}", archs, _rank(width, DTYPES[name])


def _inject(width: int, dtype: torch.dtype) -> Callable:
    def call():
        from p2k.ops.oqc import kernel

        grad, main, aux = (torch.empty(TOKENS, width, dtype=dtype, device="meta") for _ in range(3))
        gate, pre_gate = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((TOKENS, 1), (width,)))
        _, c, inverse = kernel.inject_forward(main, aux, gate, pre_gate, 1e-6)
        kernel.inject_backward(grad, main, aux, gate, pre_gate, c, inverse, [True] * 4)

    return call


def _rank(width: int, dtype: torch.dtype) -> Callable:
    def call():
        from p2k.ops.oqc import kernel

        grad, left, right, host = (torch.empty(TOKENS, width, dtype=dtype, device="meta") for _ in range(4))
        weight, gate = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((width,), (TOKENS, 1)))
        _, c, inverse = kernel.rank_forward(left, right, host, weight, gate, 1e-6, 1e-6)
        kernel.rank_backward(grad, left, right, host, weight, gate, c, inverse, 1e-6, [True] * 5)

    return call
