"""The chunk loop as torch ops: opaque and traceable under torch.compile, a thin autograd function in eager mode.

The loop never enters a compiled graph, where every number of chunks would be a graph of its own.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from p2k.core.errors import P2KError
from p2k.ops.linear_logp import chunked

Results = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op("p2k::linear_logp_forward", mutates_args=())
def forward(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: float, ignore_index: int,
    size: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Log-probability, log-sum-exp, entropy, and four numbers per token for the backward pass."""
    return chunked.forward(hidden, weight, target, bias, temperature, ignore_index, size, backend)


@torch.library.custom_op("p2k::linear_logp_backward", mutates_args=())
def backward(  # noqa: PLR0913 - an op names its tensors one by one
    grads: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, numbers: Tensor,
    temperature: float, ignore_index: int, size: int, backend: str, needs: Sequence[bool],
) -> Results:  # fmt: skip
    """Gradients of (hidden, weight, bias), an empty tensor for each that is not needed."""
    found = chunked.backward(
        grads, hidden, weight, target, bias, numbers, temperature, ignore_index, size, backend, needs
    )
    return tuple(hidden.new_empty(0) if gradient is None else gradient for gradient in found)


@forward.register_fake
def _fake_forward(hidden: Tensor, weight: Tensor, target: Tensor, *_) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    results = (hidden.new_empty(target.shape, dtype=wide) for _ in range(3))
    return *results, hidden.new_empty(4, target.numel(), dtype=wide)


@backward.register_fake
def _fake_backward(
    grads: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *rest
) -> Results:
    needs = rest[-1]
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return tuple(hidden.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True))


def linear_logp(hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *options) -> Results:
    """The three results; `options` are temperature, ignore_index, chunk size and backend."""
    if torch.compiler.is_compiling():
        return forward(hidden, weight, target, bias, *options)[:3]
    return _Eager.apply(hidden, weight, target, bias, *options)[:3]


def _save(ctx, inputs: Sequence, output: Sequence) -> None:
    """Keep the inputs and four numbers per token."""
    *tensors, temperature, ignore_index, size, backend = inputs
    ctx.mark_non_differentiable(output[3])
    ctx.save_for_backward(*tensors, output[3])
    ctx.options = temperature, ignore_index, size, backend


def _gradients(ctx, run, grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """One gradient per input, None where none is needed."""
    needs = [ctx.needs_input_grad[position] for position in (0, 1, 3)]
    found = run(torch.stack(grads[:3]), *ctx.saved_tensors, *ctx.options, needs)
    hidden, weight, bias = (gradient if need else None for gradient, need in zip(found, needs, strict=True))
    return hidden, weight, None, bias, None, None, None, None


def _op_backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
    return _gradients(ctx, backward, grads)


def _refuse(ctx, *_) -> None:
    raise P2KError(
        "linear_logp: the chunked form has no second derivative; p2k.ops.linear_logp.reference.linear_logp has one"
    )


forward.register_autograd(_op_backward, setup_context=_save)
backward.register_autograd(_refuse)


class _Eager(torch.autograd.Function):
    """The loop without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        output = chunked.forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Under create_graph the op takes over: it knows how to refuse, should a second derivative be asked for.
        return _gradients(ctx, backward if torch.is_grad_enabled() else chunked.backward, grads)
