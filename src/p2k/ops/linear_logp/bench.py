"""Sizes at which log-probabilities of a head are measured, and the memory that the chunked form saves.

Bytes are those of the chunked form: a product reads its operands once and writes its result, the row stage reads every
float32 logit once and in the backward pass writes its gradient. The backward pass recomputes the logits: 8 operations
per logit and hidden channel in all, against 6 where the logits are stored.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from p2k.core.benchmark import Cost, Workload
from p2k.core.peers import peer
from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors
from p2k.core.traffic import peak_memory
from p2k.ops.linear_logp import linear_logp

# (tokens, vocabulary, hidden width): a toy, a small head, and the heads of two current language models.
SIZES = [(4096, 32, 256), (8192, 32768, 2048), (8192, 128256, 4096), (7680, 151936, 2048)]
SIZES_CPU = [(1024, 4096, 64), (4096, 32768, 64)]


def cut_cross_entropy_logp(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Apple's kernel without its filter, which leaves out small gradients."""
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, target, reduction="none", filter_eps=None)


def workloads(device: torch.device, *, quick: bool) -> list[Workload]:
    """Workloads for a device, small ones first, one in float32 on a GPU; `quick` keeps one."""
    cuda = device.type == "cuda"
    sizes, dtype = (SIZES if cuda else SIZES_CPU)[: 1 if quick else None], torch.bfloat16 if cuda else torch.float32
    found = [_head(*size, dtype, cuda) for size in sizes]
    return found + [_head(*size, torch.float32, cuda) for size in SIZES[1:2] if cuda and not quick]


def _head(tokens: int, vocab: int, dim: int, dtype: torch.dtype, fused: bool) -> Workload:
    logits, operands = tokens * vocab, (tokens + vocab) * dim
    others = peer("cut-cross-entropy", "p2k.ops.linear_logp.bench:cut_cross_entropy_logp") if fused else {}

    def make_inputs(source, device, dtype) -> tuple[Tensor, ...]:
        hidden = torch.randn(tokens, dim, generator=source, device=device, dtype=dtype)
        weight = torch.randn(vocab, dim, generator=source, device=device, dtype=dtype) / dim**0.5
        return hidden, weight, torch.randint(0, vocab, (tokens,), generator=source, device=device)

    return Workload(
        op="linear_logp",
        shape={"tokens": tokens, "vocab": vocab, "dim": dim},
        dtype=dtype,
        make_inputs=make_inputs,
        kernel=(lambda *inputs: linear_logp(*inputs, backend="triton").logp) if fused else None,
        reference=stored_logp,
        forward=Cost(bytes=operands * dtype.itemsize + 8 * logits, flops=2 * logits * dim),
        backward=Cost(bytes=3 * operands * dtype.itemsize + (12 + 2 * dtype.itemsize) * logits, flops=6 * logits * dim),
        peers={"chunked": lambda *inputs: linear_logp(*inputs, backend="torch").logp} | others,
        dot=True,
    )


def stored_logp(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Log-probabilities by way of all logits, as a training loop usually has them."""
    return -F.cross_entropy(F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32)), target,
                            reduction="none")  # fmt: skip


def measure_memory(tokens: int = 4096, vocab: int = 32768, dim: int = 16, *, seed: int = 0) -> dict[str, float]:
    """Bytes beyond the inputs that one forward and backward pass holds on a CPU, with the logits stored and chunked.

    The stored form computes log-probabilities only, the chunked form log-sum-exp and entropy with them. Gradients are
    those of the summed log-probabilities, in float32; the truth is the stored form in float64, some tokens at a time.

    Returns:
        `stored_bytes`, `chunked_bytes`, `ratio` (chunked over stored), and the relative Frobenius errors of the
        chunked form: `hidden_error`, `weight_error`.
    """
    source = generator(seed)
    hidden, weight = (torch.randn(rows, dim, generator=source, device="cpu") / dim**0.25 for rows in (tokens, vocab))
    target = torch.randint(0, vocab, (tokens,), generator=source, device="cpu")
    leaves = hidden.requires_grad_(), weight.requires_grad_()
    gradients = []

    def run(function) -> None:
        gradients[:] = torch.autograd.grad(function(*leaves, target).sum(), leaves)

    stored = peak_memory(run, stored_logp)
    gradients.clear()
    chunked = peak_memory(run, lambda *inputs: linear_logp(*inputs, backend="torch").logp)
    errors = [relative_errors(*pair)[0] for pair in zip(gradients, _truth(hidden, weight, target), strict=True)]
    return {
        "stored_bytes": stored,
        "chunked_bytes": chunked,
        "ratio": chunked / stored,
        "hidden_error": errors[0],
        "weight_error": errors[1],
    }


def _truth(hidden: Tensor, weight: Tensor, target: Tensor, size: int = 256) -> tuple[Tensor, Tensor]:
    """Float64 gradients of the summed log-probabilities, which is a sum over tokens."""
    wide = weight.detach().double().requires_grad_()
    parts, total = [], torch.zeros_like(wide)
    for tokens, targets in zip(hidden.detach().double().split(size), target.split(size), strict=True):
        logp = stored_logp(tokens.requires_grad_(), wide, targets)
        part, whole = torch.autograd.grad(logp.sum(), (tokens, wide))
        parts.append(part)
        total += whole
    return torch.cat(parts), total
