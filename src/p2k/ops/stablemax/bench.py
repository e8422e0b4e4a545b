"""Sizes at which StableMax cross-entropy is measured, beside torch's softmax cross-entropy of the same logits.

Bytes are those of the fused form: forward reads the logits once, backward reads them and writes their gradient; a
token has a label, a loss and three float32 numbers. The reference computes in float64, as the authors' code does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from p2k.core.benchmark import Cost, Workload
from p2k.ops.stablemax import stablemax_loss

# (tokens, classes): modular addition, ImageNet, and two vocabularies.
SIZES = [(5107, 113), (8192, 1000), (8192, 50257), (8192, 128256)]
SIZES_CPU = [(1024, 113), (1024, 4096)]


def workloads(device: torch.device, *, quick: bool) -> list[Workload]:
    """Workloads for a device, small ones first, one in float32 on a GPU; `quick` keeps one."""
    cuda = device.type == "cuda"
    sizes, dtype = (SIZES if cuda else SIZES_CPU)[: 1 if quick else None], torch.bfloat16 if cuda else torch.float32
    found = [_loss(*size, dtype, cuda) for size in sizes]
    return found + [_loss(*size, torch.float32, cuda) for size in SIZES[2:3] if cuda and not quick]


def _loss(tokens: int, classes: int, dtype: torch.dtype, fused: bool) -> Workload:
    elements = tokens * classes

    def make_inputs(source, device, dtype) -> tuple[Tensor, ...]:
        logits = torch.randn(tokens, classes, generator=source, device=device, dtype=dtype)
        return logits, torch.randint(0, classes, (tokens,), generator=source, device=device)

    return Workload(
        op="stablemax",
        shape={"tokens": tokens, "classes": classes},
        dtype=dtype,
        make_inputs=make_inputs,
        kernel=(lambda *inputs: stablemax_loss(*inputs, backend="triton")) if fused else None,
        reference=lambda *inputs: stablemax_loss(*inputs, backend="torch"),
        forward=Cost(bytes=elements * dtype.itemsize + 24 * tokens, flops=14 * elements),
        backward=Cost(bytes=2 * elements * dtype.itemsize + 24 * tokens, flops=8 * elements),
        peers={"softmax": lambda logits, target: F.cross_entropy(logits.float(), target, reduction="none")},
        strangers=("softmax",),
    )
