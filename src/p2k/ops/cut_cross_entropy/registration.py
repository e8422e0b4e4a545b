"""Both passes as torch ops: opaque and traceable under torch.compile, a thin autograd function in eager mode.

Chapter: cut-cross-entropy
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from p2k.core.errors import P2KError
from p2k.ops.cut_cross_entropy import reference
from p2k.ops.cut_cross_entropy.tiles import ABSENT, UNKNOWN, tile_of

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def stage_of(backend: str) -> ModuleType:
    """The module whose `forward` and `backward` run."""
    if backend == "torch":
        return reference
    from p2k.ops.cut_cross_entropy import kernel

    return kernel


def exact_products(hidden: Tensor) -> torch.autocast:
    """Autocast off: operands have been cast, and what the passes widened must stay wide."""
    return torch.autocast(hidden.device.type, enabled=False)


def _forward(  # noqa: PLR0913 - an op names its tensors one by one
    hidden: Tensor, weight: Tensor, code: Tensor, bias: Tensor | None, softcap: float | None, epsilon: float,
    sort: bool, filter_weight: bool, backend: str,
) -> Tensor:  # fmt: skip
    with exact_products(hidden):
        return stage_of(backend).forward(hidden, weight, code, bias, softcap)


def _backward(  # noqa: PLR0913 - an op names its tensors one by one
    grads: Tensor, hidden: Tensor, weight: Tensor, code: Tensor, bias: Tensor | None, numbers: Tensor,
    softcap: float | None, epsilon: float, sort: bool, filter_weight: bool, backend: str, needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    run, tile = stage_of(backend).backward, tile_of(hidden.dtype)
    with exact_products(hidden):
        return run(grads, hidden, weight, code, bias, numbers, softcap, epsilon, sort, filter_weight, needs, tile)


@torch.library.custom_op("p2k::cut_cross_entropy_forward", mutates_args=())
def forward_op(  # noqa: PLR0913 - an op names its tensors one by one
    hidden: Tensor, weight: Tensor, code: Tensor, bias: Tensor | None, softcap: float | None, epsilon: float,
    sort: bool, filter_weight: bool, backend: str,
) -> Tensor:  # fmt: skip
    """The numbers ``[3, tokens]``: target's logit, largest logit, log of the sum above it."""
    return _forward(hidden, weight, code, bias, softcap, epsilon, sort, filter_weight, backend)


@forward_op.register_fake
def _(hidden, *rest):
    return hidden.new_empty(3, hidden.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32))


@torch.library.custom_op("p2k::cut_cross_entropy_backward", mutates_args=())
def backward_op(  # noqa: PLR0913 - an op names its tensors one by one
    grads: Tensor, hidden: Tensor, weight: Tensor, code: Tensor, bias: Tensor | None, numbers: Tensor,
    softcap: float | None, epsilon: float, sort: bool, filter_weight: bool, backend: str, needs: Sequence[bool],
) -> Gradients:  # fmt: skip
    """Gradients of (hidden, weight, bias), empty where not needed, and the tiles that were kept."""
    *found, kept = _backward(
        grads, hidden, weight, code, bias, numbers, softcap, epsilon, sort, filter_weight, backend, needs
    )
    return *(hidden.new_empty(0) if gradient is None else gradient for gradient in found), kept


@backward_op.register_fake
def _(grads, hidden, weight, *rest):
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    found = (hidden.new_empty(shape if need else (0,)) for shape, need in zip(shapes, rest[-1], strict=True))
    grid = (-(-x.shape[0] // size) for x, size in zip((hidden, weight), tile_of(hidden.dtype), strict=True))
    return *found, hidden.new_empty(*grid, dtype=torch.bool)


def _save(ctx, inputs: Sequence, output: Tensor) -> None:
    """Keep the inputs and three numbers per token."""
    hidden, weight, code, bias, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, code, bias, output)


def _gradients(ctx, grad: Tensor, run) -> tuple[Tensor | None, ...]:
    """One gradient per input, None where none is needed.

    The loss is peak + log sum - picked: of the three numbers' gradients the first is minus the loss's, the third that
    of log-sum-exp and the loss's together; that of the peak is the same as the third's and carries nothing new.
    """
    needs = [ctx.needs_input_grad[position] for position in (0, 1, 3)]
    code = ctx.saved_tensors[2]
    grads = torch.stack((-grad[0], grad[2] + grad[0])).masked_fill(code == ABSENT, 0.0).contiguous()
    grads[0].masked_fill_(code == UNKNOWN, torch.nan)
    found = run(grads, *ctx.saved_tensors, *ctx.options, needs)[:3]
    hidden, weight, bias = (gradient if need else None for gradient, need in zip(found, needs, strict=True))
    return hidden, weight, None, bias, None, None, None, None, None


def _refuse(ctx, *_) -> None:
    raise P2KError(
        "cut_cross_entropy: the tiled form has no second derivative; "
        "p2k.ops.cut_cross_entropy.reference.cut_cross_entropy has one"
    )


forward_op.register_autograd(lambda ctx, grad: _gradients(ctx, grad, backward_op), setup_context=_save)
backward_op.register_autograd(_refuse)


class _Eager(torch.autograd.Function):
    """The launchers without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs) -> Tensor:
        output = _forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Under create_graph the op takes over: it knows how to refuse, should a second derivative be asked for.
        return _gradients(ctx, grad, backward_op if torch.is_grad_enabled() else _backward)


def numbers(*inputs) -> Tensor:
    """The numbers per token, with gradients."""
    return (forward_op if torch.compiler.is_compiling() else _Eager.apply)(*inputs)
