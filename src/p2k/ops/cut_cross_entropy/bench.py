"""Sizes at which the tiles are measured, beside all logits stored, the chunked op's peers, and with the filter at work.

Bytes are those of the tiled form: a forward pass reads the operands once, leaves three float32 per token and part, and
no logit; a backward pass reads them once per program and writes two float32 gradients. Without a filter the backward
pass computes the logits twice: 10 operations per logit and hidden channel in all, against 6 where they are stored. With
one it is 4, and 6 for the share of tiles that is kept; the cost below counts all of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from p2k.core.benchmark import Cost, Workload
from p2k.core.peers import peer
from p2k.ops.cut_cross_entropy import cut_cross_entropy

# (tokens, vocabulary, hidden width): a small head, and the heads of two current language models.
SIZES = [(1024, 4096, 512), (8192, 32768, 2048), (8192, 128256, 4096), (8192, 256000, 2304)]
SIZES_CPU = [(256, 1024, 32), (512, 4096, 32)]


def stored_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy by way of all logits, as a training loop usually has it."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return F.cross_entropy(F.linear(hidden, weight).to(wide), target, reduction="none")


def peer_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The paper's own kernel without its filter, where somebody has installed it."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden, weight, target, reduction="none", filter_eps=None)


def workloads(device: torch.device, *, quick: bool) -> list[Workload]:
    """Workloads for a device, small ones first; `quick` keeps one."""
    cuda = device.type == "cuda"
    sizes = SIZES if cuda else SIZES_CPU
    dtype = torch.bfloat16 if cuda else torch.float32
    return [_head(*size, dtype, cuda) for size in (sizes[:1] if quick else sizes)]


def _head(tokens: int, vocab: int, dim: int, dtype: torch.dtype, fused: bool) -> Workload:
    logits, operands = tokens * vocab, (tokens + vocab) * dim
    others = peer("cut-cross-entropy", "p2k.ops.cut_cross_entropy.bench:peer_loss") if fused else {}
    peers = {"tiles in torch": lambda *inputs: cut_cross_entropy(*inputs, backend="torch").loss} | others

    def make_inputs(source, device, dtype) -> tuple[Tensor, ...]:
        hidden = torch.randn(tokens, dim, generator=source, device=device, dtype=dtype)
        weight = torch.randn(vocab, dim, generator=source, device=device, dtype=dtype) / dim**0.5
        return hidden, weight, torch.randint(0, vocab, (tokens,), generator=source, device=device)

    return Workload(
        op="cut_cross_entropy",
        shape={"tokens": tokens, "vocab": vocab, "dim": dim},
        dtype=dtype,
        make_inputs=make_inputs,
        kernel=(lambda *inputs: cut_cross_entropy(*inputs, backend="triton").loss) if fused else None,
        reference=stored_loss,
        forward=Cost(bytes=operands * dtype.itemsize + 12 * tokens, flops=2 * logits * dim),
        backward=Cost(bytes=2 * operands * dtype.itemsize + 8 * operands, flops=8 * logits * dim),
        peers=peers,
        dot=True,
    )
