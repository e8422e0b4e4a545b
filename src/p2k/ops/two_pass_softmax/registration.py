"""The row programs as torch ops: opaque and traceable under torch.compile, a thin autograd function in eager mode.

The dispatcher costs an eager call more than a small kernel itself, so eager mode goes around it. The kernel module,
and with it Triton, is imported by the first call.

Chapter: two-pass-softmax
"""

import torch
from torch import Tensor

from p2k.core.errors import P2KError


@torch.library.custom_op("p2k::softmax_rows_forward", mutates_args=())
def forward_op(x: Tensor, program: str) -> Tensor:
    """Softmax over the last dimension by the program `pair`, `online` or `three_pass`."""
    from p2k.ops.two_pass_softmax import kernel

    return kernel.forward(x, program)


@torch.library.custom_op("p2k::softmax_rows_backward", mutates_args=())
def backward_op(grad: Tensor, y: Tensor) -> Tensor:
    """Gradient of the argument from the upstream gradient and the softmax."""
    return _launch_backward(grad, y)


def _launch_backward(grad: Tensor, y: Tensor) -> Tensor:
    from p2k.ops.two_pass_softmax import kernel

    return kernel.backward(grad, y)


def _refuse(ctx, *_) -> None:
    raise P2KError("two_pass_softmax: the Triton kernel has no second derivative; use backend='torch' for one")


forward_op.register_fake(lambda x, program: x.new_empty(x.shape))
backward_op.register_fake(lambda grad, y: y.new_empty(y.shape))
forward_op.register_autograd(
    lambda ctx, grad: (backward_op(grad, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(output),
)
backward_op.register_autograd(_refuse)


class _Eager(torch.autograd.Function):
    """The launchers without the dispatcher."""

    @staticmethod
    def forward(ctx, x: Tensor, program: str) -> Tensor:
        from p2k.ops.two_pass_softmax import kernel

        y = kernel.forward(x, program)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        # Under create_graph the op takes over: it knows how to refuse, should a second derivative be asked for.
        run = backward_op if torch.is_grad_enabled() else _launch_backward
        return run(grad, *ctx.saved_tensors), None


def softmax(x: Tensor, program: str = "pair") -> Tensor:
    """Softmax over the last dimension by one of the three row programs, differentiable once."""
    run = forward_op if torch.compiler.is_compiling() else _Eager.apply
    return run(x, program)
