"""Cross-entropy of a linear head without its logits, with gradients that may leave out what is negligible."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from p2k.core.autocast import as_linear_operand
from p2k.core.backend import Backend, choose_backend
from p2k.core.checks import check_floating, check_positive, check_same_device, check_shape
from p2k.core.errors import P2KError
from p2k.ops.cut_cross_entropy import reference, registration
from p2k.ops.cut_cross_entropy.tiles import codes

__all__ = ["CutCrossEntropy", "FilteredGradients", "cut_cross_entropy", "default_filter_eps", "filtered_gradients"]


class CutCrossEntropy(NamedTuple):
    """Two numbers per token in nats: minus the target's log-probability, and log-sum-exp of the logits."""

    loss: Float[Tensor, "*tokens"]
    logsumexp: Float[Tensor, "*tokens"]


class FilteredGradients(NamedTuple):
    """Gradients of a summed loss, and which tiles entered them."""

    hidden: Float[Tensor, "*tokens dim"]
    weight: Float[Tensor, "vocab dim"]
    bias: Float[Tensor, " vocab"] | None
    kept: Bool[Tensor, "token_tiles vocab_tiles"]


def default_filter_eps(dtype: torch.dtype) -> float:
    """The paper's threshold for operands of this dtype: a 32nd of its machine epsilon, 2**-12 for bfloat16.

    Source: wijmans2025cut, eq:cut-cross-entropy-threshold.
    Chapter: cut-cross-entropy
    """
    return torch.finfo(dtype).eps / 32


def cut_cross_entropy(  # noqa: PLR0913 - the arguments of torch's cross_entropy and the filter's
    hidden: Float[Tensor, "*tokens dim"],
    weight: Float[Tensor, "vocab dim"],
    target: Int64[Tensor, "*tokens"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    filter_eps: float = 0.0,
    sort_vocab: bool = False,
    filter_weight: bool = True,
    backend: Backend = "auto",
) -> CutCrossEntropy:
    """Cross-entropy of each token and its log-sum-exp, tile by tile, with no logit in memory on a GPU.

    The loss is exact. With `filter_eps` the backward pass leaves out every tile of logits in which no entry of
    ``softmax - onehot`` reaches it, before the upstream gradient is multiplied in; tiles depend on the dtype. Where
    log-sum-exp has a gradient, no entry of softmax may reach it either. Without a filter gradients are exact too, and
    `p2k.ops.linear_logp` is the usual choice.

    Args:
        hidden: hidden state of each token, floating; autocast treats it as `torch.nn.functional.linear` does.
        weight: weight of the head, dtype of `hidden`.
        target: class of each token. A CPU checks the range; elsewhere, and in compiled code, a target outside makes
            that token's loss, and gradients that the filter keeps, NaN.
        bias: bias of the head, dtype of `hidden`.
        softcap: c of ``c tanh(z / c)``, ``> 0``; None leaves the logits alone.
        ignore_index: a target that marks a token as absent: its results and gradients are 0.
        filter_eps: threshold in ``[0, 1)``; 0 keeps everything. `default_filter_eps` has the paper's.
        sort_vocab: let entries with like mean logits share tiles in the backward pass.
        filter_weight: False exempts the gradients of `weight` and `bias` from the filter.
        backend: `auto`, `torch` or `triton`. Torch holds the logits of one tile of tokens at a time.

    Returns:
        Two tensors ``[*tokens]`` in float32, in float64 for float64.

    Raises:
        ValueError: shapes or devices disagree, or a size, an option or, on a CPU, a target is out of range.
        TypeError: a tensor is not floating point, the dtypes disagree, or `target` is not int64.
        P2KError: a filter under a `torch.func` transform.
        BackendUnavailable: ``backend="triton"`` where Triton cannot run.

    Source: wijmans2025cut, eq:cut-cross-entropy-loss, eq:cut-cross-entropy-filter.
    Chapter: cut-cross-entropy
    """
    op = "cut_cross_entropy"
    hidden, weight, bias = (as_linear_operand(tensor) for tensor in (hidden, weight, bias))
    _check(op, hidden, weight, target, bias, softcap, filter_eps)
    chosen = choose_backend(backend, hidden, op=op)
    if not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            if filter_eps > 0:
                raise P2KError(f"{op}: a filtered gradient is no derivative, so no torch.func transform takes it")
            return CutCrossEntropy(*reference.cut_cross_entropy(hidden, weight, target, bias, softcap, ignore_index))
        _check_range(op, target, len(weight), ignore_index)
    options = (softcap, filter_eps, sort_vocab, filter_weight, chosen)
    return CutCrossEntropy(*_results(hidden, weight, target, bias, ignore_index, options))


def _results(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, ignore_index: int, options: tuple
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp in the shape of the target."""
    code, flat = codes(target, len(weight), ignore_index), hidden.reshape(-1, hidden.shape[-1])
    picked, peak, log_sum = registration.numbers(flat, weight, code, bias, *options)
    # In this order the loss keeps its digits when all logits are far from 0.
    return ((peak - picked) + log_sum).view(target.shape), (peak + log_sum).view(target.shape)


def filtered_gradients(  # noqa: PLR0913 - the arguments of the op
    hidden: Float[Tensor, "*tokens dim"],
    weight: Float[Tensor, "vocab dim"],
    target: Int64[Tensor, "*tokens"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    filter_eps: float = 0.0,
    sort_vocab: bool = False,
    filter_weight: bool = True,
    tile: tuple[int, int] | None = None,
    backend: Backend = "auto",
) -> FilteredGradients:
    """Gradients of the summed loss and the map of kept tiles, without autograd: what the filter does, to look at.

    Args:
        hidden, weight, target, bias, softcap, ignore_index, filter_eps, sort_vocab, filter_weight, backend: as for
            `cut_cross_entropy`.
        tile: tokens and vocabulary entries of a tile; by default the kernel's. Under `triton`, powers of 2.

    Raises:
        ValueError, TypeError, BackendUnavailable: as `cut_cross_entropy`.

    Source: wijmans2025cut, eq:cut-cross-entropy-filter.
    Chapter: cut-cross-entropy
    """
    op = "filtered_gradients"
    _check(op, hidden, weight, target, bias, softcap, filter_eps)
    _check_range(op, target, len(weight), ignore_index)
    stage = registration.stage_of(choose_backend(backend, hidden, op=op))
    tile = registration.tile_of(hidden.dtype) if tile is None else tile
    code, flat = codes(target, len(weight), ignore_index), hidden.detach().reshape(-1, hidden.shape[-1])
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    options = (softcap, filter_eps, sort_vocab, filter_weight, [True, True, bias is not None], tile)
    with registration.exact_products(hidden):
        numbers = stage.forward(flat, weight, code, bias, softcap)
        grads = torch.zeros_like(numbers[:2])
        grads[0] = 1.0
        *found, kept = stage.backward(grads, flat, weight, code, bias, numbers, *options)
    return FilteredGradients(found[0].view(hidden.shape), found[1], found[2], kept)


def _check(
    op: str, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, softcap: float | None, eps: float
) -> None:
    """Dtypes, devices, shapes and options."""
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
    if softcap is not None:
        check_positive(op, softcap=softcap)
    if not 0 <= eps < 1:
        raise ValueError(f"{op}: filter_eps must be in [0, 1), got {eps}")


def _check_range(op: str, target: Tensor, vocab: int, ignore_index: int) -> None:
    """A CPU can afford to look at every target."""
    wrong = ((target < 0) | (target >= vocab)) & (target != ignore_index)
    if target.device.type == "cpu" and wrong.any():
        found = target[wrong][0].item()
        raise ValueError(f"{op}: target must be in [0, {vocab}) or ignore_index {ignore_index}, got {found}")
