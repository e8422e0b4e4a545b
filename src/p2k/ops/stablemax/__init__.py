"""Cross-entropy with StableMax probabilities: rational functions and sums, no exponential and no maximum."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from p2k.core.backend import Backend, choose_backend
from p2k.core.checks import check_floating, check_same_device, check_shape
from p2k.ops.stablemax import reference, registration

__all__ = ["stablemax_loss"]


def stablemax_loss(
    logits: Float[Tensor, "*tokens classes"],
    target: Int64[Tensor, "*tokens"],
    *,
    ignore_index: int = -100,
    backend: Backend = "auto",
) -> Float[Tensor, "*tokens"]:
    """Minus the log of the target's StableMax probability, for each token.

    With ``s(z) = z + 1`` from 0 on and ``1 / (1 - z)`` below it is ``log(sum(s(logits))) - log(s(logits[target]))``.
    The reference computes in float64. The kernel computes in float32, from the sum over the other classes, which keeps
    the relative accuracy of small losses and of their gradients. Two runs agree bit for bit.

    Args:
        logits: one number per class; ``-inf`` takes a class out. A row with NaN or ``+inf`` has the loss NaN, as in
            torch's cross-entropy. At most 2**24 classes.
        target: class of each token, ``[*tokens]``. On a CPU every target is checked; elsewhere, and in compiled code,
            one out of range makes that token's loss and gradient NaN.
        ignore_index: a target that marks a token as absent: its loss and gradient are 0, whatever its logits hold.
        backend: `auto`, `torch` or `triton`.

    Returns:
        One loss per token, never below 0, in float32, in float64 for float64.

    Raises:
        ValueError: shapes or devices disagree, there is no class, or a target is out of range on a CPU.
        TypeError: `logits` is not floating point or `target` is not int64.
        BackendUnavailable: ``backend="triton"`` where Triton cannot run.

    Source: prieto2025grokking, eq:stablemax-loss, eq:stablemax-rest.
    Chapter: stablemax
    """
    op = "stablemax_loss"
    check_floating(op, logits=logits)
    check_same_device(op, logits=logits, target=target)
    if target.dtype != torch.int64:
        raise TypeError(f"{op}: target must be torch.int64, got {target.dtype}")
    if logits.ndim == 0 or not 0 < logits.shape[-1] <= 2**24:
        wanted = "a last dimension, the classes, between 1 and 2**24"
        raise ValueError(f"{op}: logits must have {wanted}, got shape {tuple(logits.shape)}")
    check_shape(op, "target", target, tuple(logits.shape[:-1]))
    chosen = choose_backend(backend, logits, op=op)
    plain = not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()
    if plain and target.device.type == "cpu":
        _check_range(op, target, logits.shape[-1], ignore_index)
    if chosen == "torch":
        return reference.cross_entropy(logits, target, ignore_index)
    return registration.stablemax_loss(logits, target, ignore_index)


def _check_range(op: str, target: Tensor, classes: int, ignore_index: int) -> None:
    """A CPU can afford to look at every target."""
    wrong = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if wrong.any():
        found = target[wrong][0].item()
        raise ValueError(f"{op}: target must be in [0, {classes}) or ignore_index {ignore_index}, got {found}")
