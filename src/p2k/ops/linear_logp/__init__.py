"""Log-probability of given tokens, log-sum-exp and entropy straight from hidden states and the head's weight."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from p2k.core.autocast import as_linear_operand
from p2k.core.backend import Backend, choose_backend
from p2k.core.checks import check_floating, check_positive, check_same_device, check_shape
from p2k.ops.linear_logp import chunked, reference, registration

__all__ = ["LinearLogp", "linear_logp"]


class LinearLogp(NamedTuple):
    """Three numbers per token: of the target its log-probability, of the whole row log-sum-exp and entropy in nats."""

    logp: Float[Tensor, "*tokens"]
    logsumexp: Float[Tensor, "*tokens"]
    entropy: Float[Tensor, "*tokens"]


def linear_logp(
    hidden: Float[Tensor, "*tokens dim"],
    weight: Float[Tensor, "vocab dim"],
    target: Int64[Tensor, "*tokens"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> LinearLogp:
    """Log-softmax of a linear head at the target tokens, without ever holding the logits of all tokens.

    With ``z = (hidden @ weight.T + bias) / temperature`` computes ``z[target] - logsumexp(z)``, which is never above
    0, ``logsumexp(z)`` and the entropy of ``softmax(z)``. The backward pass recomputes the logits chunk by chunk and
    takes any gradient for each of the three results; inputs that need no gradient cost nothing there. Products of
    half types accumulate in float32, across chunks too. Two runs agree bit for bit.

    Args:
        hidden: hidden state of each token, floating; autocast treats it as `torch.nn.functional.linear` does.
        weight: weight of the head, dtype of `hidden`.
        target: token whose log-probability is wanted, ``[*tokens]``. On a CPU every target is checked; elsewhere, and
            in compiled code, one outside the vocabulary makes that token's `logp` and gradients NaN.
        bias: bias of the head, dtype of `hidden`; ``-inf`` takes a token out of the vocabulary.
        temperature: divides the logits, ``> 0``.
        ignore_index: a target that marks a token as absent: its three results and its gradients are 0, whatever its
            hidden state or upstream gradient holds. Absent tokens cost as much as others; index them away beforehand.
        chunk_size: tokens whose logits are held at once, ``>= 1``; by default 256 on a CPU, 1024 elsewhere.
        backend: `auto`, `torch` or `triton`. Under a `torch.func` transform `auto` and `torch` are the reference,
            which holds the logits of all tokens and has second derivatives; there are none elsewhere.

    Returns:
        Three tensors ``[*tokens]`` in float32, in float64 for float64. NaN and inf stay in the token they came in, and
        reach the gradient of `weight`.

    Raises:
        ValueError: shapes or devices disagree, a size of `weight` is 0, a target is out of range on a CPU,
            `temperature` is not positive and finite, or `chunk_size` is below 1.
        TypeError: a tensor is not floating point, the dtypes disagree, `target` is not int64, or `temperature` is a
            tensor, which would get no gradient.
        BackendUnavailable: ``backend="triton"`` where Triton cannot run.

    Source: wijmans2025cut.
    """
    op = "linear_logp"
    hidden, weight, bias = (as_linear_operand(tensor) for tensor in (hidden, weight, bias))
    _check(op, hidden, weight, target, bias)
    if isinstance(temperature, Tensor):
        raise TypeError(f"{op}: temperature must be a number, got a tensor; divide hidden and bias by a learned one")
    check_positive(op, temperature=temperature)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{op}: chunk_size must be at least 1, got {chunk_size}")
    chosen = choose_backend(backend, hidden, op=op)
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            return LinearLogp(*reference.linear_logp(hidden, weight, target, bias, temperature, ignore_index))
        if target.device.type == "cpu":
            _check_range(op, target, len(weight), ignore_index)
    size = chunk_size or chunked.CHUNK.get(hidden.device.type, chunked.CHUNK["cuda"])
    return LinearLogp(*registration.linear_logp(hidden, weight, target, bias, temperature, ignore_index, size, chosen))


def _check(op: str, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    """Dtypes, devices and shapes."""
    tensors = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    check_floating(op, **tensors)
    check_same_device(op, **tensors, target=target)
    if target.dtype != torch.int64:
        raise TypeError(f"{op}: target must be torch.int64, got {target.dtype}")
    if hidden.ndim == 0:
        raise ValueError(f"{op}: hidden must have a last dimension, got shape ()")
    if weight.ndim != 2 or 0 in weight.shape or weight.shape[1] != hidden.shape[-1]:
        wanted = f"(vocab, {hidden.shape[-1]}) with no size 0"
        raise ValueError(f"{op}: weight must have shape {wanted}, got {tuple(weight.shape)}")
    check_shape(op, "target", target, tuple(hidden.shape[:-1]))
    if bias is not None:
        check_shape(op, "bias", bias, (len(weight),))


def _check_range(op: str, target: Tensor, vocab: int, ignore_index: int) -> None:
    """A CPU can afford to look at every target."""
    wrong = ((target < 0) | (target >= vocab)) & (target != ignore_index)
    if wrong.any():
        found = target[wrong][0].item()
        raise ValueError(f"{op}: target must be in [0, {vocab}) or ignore_index {ignore_index}, got {found}")
