"""The kernel as torch ops: opaque and traceable under torch.compile, a thin autograd function in eager mode.

The dispatcher costs an eager call more than a small kernel itself, so eager mode goes around it. The kernel module,
and with it Triton, is imported by the first call.

Chapter: stablemax
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from p2k.core.errors import P2KError


@torch.library.custom_op("p2k::stablemax_forward", mutates_args=())
def forward_op(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The loss of each token, and three numbers per token for the way back."""
    from p2k.ops.stablemax import kernel

    return kernel.forward(logits, target, ignore_index)


@torch.library.custom_op("p2k::stablemax_backward", mutates_args=())
def backward_op(grad: Tensor, logits: Tensor, target: Tensor, numbers: Tensor, ignore_index: int) -> Tensor:
    """Gradient of the logits."""
    from p2k.ops.stablemax import kernel

    return kernel.backward(grad, logits, target, numbers, ignore_index)


@forward_op.register_fake
def _fake_forward(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    accumulated = torch.promote_types(logits.dtype, torch.float32)
    loss = logits.new_empty(target.shape, dtype=accumulated)
    return loss, logits.new_empty(3, target.numel(), dtype=accumulated)


@backward_op.register_fake
def _fake_backward(grad: Tensor, logits: Tensor, *_) -> Tensor:
    return logits.new_empty(logits.shape)


def _launch_backward(*arguments) -> Tensor:
    from p2k.ops.stablemax import kernel

    return kernel.backward(*arguments)


def _save(ctx, inputs: Sequence, outputs: Sequence[Tensor]) -> None:
    """Keep the inputs and three numbers per token."""
    logits, target, ctx.ignore_index = inputs
    ctx.save_for_backward(logits, target, outputs[1])
    ctx.mark_non_differentiable(outputs[1])


def _gradients(ctx, grad: Tensor, run: Callable) -> tuple[Tensor, None, None]:
    return run(grad, *ctx.saved_tensors, ctx.ignore_index), None, None


def _op_backward(ctx, grad: Tensor, *_) -> tuple[Tensor, None, None]:
    return _gradients(ctx, grad, backward_op)


def _refuse(ctx, *_) -> None:
    raise P2KError("stablemax_loss: the Triton kernel has no second derivative; use backend='torch' for one")


forward_op.register_autograd(_op_backward, setup_context=lambda ctx, inputs, output: _save(ctx, inputs, output))
backward_op.register_autograd(_refuse)


class _Eager(torch.autograd.Function):
    """The launchers without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs) -> tuple[Tensor, Tensor]:
        from p2k.ops.stablemax import kernel

        outputs = kernel.forward(*inputs)
        _save(ctx, inputs, outputs)
        return outputs

    @staticmethod
    def backward(ctx, grad: Tensor, *_) -> tuple[Tensor, None, None]:
        # Under create_graph the op takes over: it knows how to refuse, should a second derivative be asked for.
        return _gradients(ctx, grad, backward_op if torch.is_grad_enabled() else _launch_backward)


def stablemax_loss(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The loss of each token by the kernel."""
    run = forward_op if torch.compiler.is_compiling() else _Eager.apply
    return run(logits, target, ignore_index)[0]
