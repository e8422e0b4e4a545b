"""What the compile check compiles: every program as its launcher would start it, per head width, dtype and mask.

`budget.json` beside this file holds what each may use.
`python -m p2k.core.compile_check p2k.ops.attention_entropy.budget` measures.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

WIDTHS = (64, 128)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load() -> dict:
    """The recorded budget: versions it was measured with, and one entry per kernel."""
    return json.loads(Path(__file__).with_name("budget.json").read_text())


def cases() -> Iterator[tuple[str, tuple[int, ...], Callable]]:
    """Name, compute capabilities and launch of every case, on tensors without data."""
    for name, dtype in DTYPES.items():
        for width in WIDTHS:
            archs = (80, 90, 100) if (name, width) == ("bf16", 64) else (80, 90)
            yield f"{name} {width}", archs, _call(width, dtype)
    yield "bf16 256", (80, 90), _call(256, torch.bfloat16)
    yield "bf16 64 causal", (80, 90), _call(64, torch.bfloat16, is_causal=True)
    yield "bf16 64 additive mask", (80, 90), _call(64, torch.bfloat16, mask_type=torch.bfloat16)
    yield "bf16 64 bool mask", (80, 90), _call(64, torch.bfloat16, mask_type=torch.bool)
    yield "bf16 64 plain backward", (80, 90), _call(64, torch.bfloat16, entropy_gradient=False)


def _call(
    width: int,
    dtype: torch.dtype,
    *,
    is_causal: bool = False,
    mask_type: torch.dtype | None = None,
    entropy_gradient: bool = True,
) -> Callable:
    def call():
        from p2k.ops.attention_entropy import kernel

        q, k, v, grad = (torch.empty(8, 12, 512, width, dtype=dtype, device="meta") for _ in range(4))
        mask = None if mask_type is None else torch.empty(8, 1, 512, 512, dtype=mask_type, device="meta")
        out, entropy, *rest = kernel.forward(q, k, v, mask, is_causal, 0.125)
        grad_entropy = torch.empty_like(entropy) if entropy_gradient else None
        needs = [True] * 3
        kernel.backward(grad, grad_entropy, (q, k, v), mask, (out, entropy, *rest), is_causal, 0.125, needs)

    return call
