"""The kernels as torch ops: opaque and traceable under torch.compile, a thin autograd function in eager mode.

`torch.compile` sees the ops only: it needs neither Triton nor a device to trace them. The kernel module, and with it
Triton, is imported by the first call.

Chapter: polycom
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.library import CustomOpDef

from p2k.core.errors import P2KError

# Result, and what the backward pass reads of the forward pass.
Saved = tuple[Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op("p2k::poly_norm_forward", mutates_args=())
def norm_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Saved:
    """Result and saved row numbers of `poly_norm`."""
    from p2k.ops.polycom import kernel

    return kernel.norm_forward(x, weight, bias, eps)


@torch.library.custom_op("p2k::poly_relu_forward", mutates_args=())
def relu_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Saved:
    """Result of `poly_relu`, and an empty tensor."""
    from p2k.ops.polycom import kernel

    return kernel.relu_forward(x, weight, bias)


@torch.library.custom_op("p2k::poly_norm_backward", mutates_args=())
def norm_backward(grad: Tensor, x: Tensor, weight: Tensor, saved: Tensor, needs: Sequence[bool]) -> Gradients:
    """Gradients of `poly_norm`, an empty tensor for each that is not needed."""
    from p2k.ops.polycom import kernel

    return _present(grad, kernel.norm_backward(grad, x, weight, saved, needs))


@torch.library.custom_op("p2k::poly_relu_backward", mutates_args=())
def relu_backward(grad: Tensor, x: Tensor, weight: Tensor, saved: Tensor, needs: Sequence[bool]) -> Gradients:
    """Gradients of `poly_relu`, an empty tensor for each that is not needed."""
    from p2k.ops.polycom import kernel

    return _present(grad, kernel.relu_backward(grad, x, weight, saved, needs))


def _present(grad: Tensor, gradients: Sequence[Tensor | None]) -> Gradients:
    """An op returns tensors only: an empty one stands for a gradient that was not asked for."""
    return tuple(grad.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _fake_norm_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Saved:
    saved = x.new_empty(4, x.numel() // x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))
    return x.new_empty(x.shape), saved


def _fake_relu_forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Saved:
    return x.new_empty(x.shape), x.new_empty(4, 0, dtype=torch.promote_types(x.dtype, torch.float32))


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, saved: Tensor, needs: Sequence[bool]) -> Gradients:
    like = ((x, x.shape), (weight, weight.shape), (weight, ()))
    return _present(grad, [y.new_empty(shape) if need else None for (y, shape), need in zip(like, needs, strict=True)])


class Activation:
    """One activation: its two ops, its two launchers, and how a call picks between them.

    Args:
        name: public name, for messages.
        prefix: name of its launchers in the kernel module, before `_forward` and `_backward`.
        forward: op that takes x, weight, bias and further numbers.
        backward: op that takes the upstream gradient, x, weight, what forward saved, and one flag per gradient.
        fake: shapes of the forward op's results.
    """

    def __init__(self, name: str, prefix: str, forward: CustomOpDef, backward: CustomOpDef, *, fake: Callable):
        self.name, self.prefix, self.forward, self.backward = name, prefix, forward, backward
        forward.register_fake(fake)
        backward.register_fake(_fake_backward)
        forward.register_autograd(self._op_backward, setup_context=self._setup)
        backward.register_autograd(self._refuse)

    def __call__(self, *inputs) -> Tensor:
        """Run the activation on x, weight, bias and what else its op takes."""
        if torch.compiler.is_compiling():
            return self.forward(*inputs)[0]
        return _Eager.apply(*inputs, self)

    def launcher(self, direction: str) -> Callable:
        """The kernel module's function for one direction."""
        from p2k.ops.polycom import kernel

        return getattr(kernel, f"{self.prefix}_{direction}")

    def gradients(self, ctx, grad: Tensor, run: Callable) -> tuple[Tensor | None, ...]:
        """One gradient per input, None where none is needed."""
        needs = list(ctx.needs_input_grad[:3])
        found = run(grad, *ctx.saved_tensors, needs)
        kept = (gradient if need else None for gradient, need in zip(found, needs, strict=True))
        return *kept, *(None for _ in range(ctx.others))

    def save(self, ctx, inputs: Sequence, saved: Tensor) -> None:
        """Keep x, the coefficients and a few numbers per row."""
        ctx.save_for_backward(inputs[0], inputs[1], saved)
        ctx.others = len(inputs) - 3

    def _setup(self, ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(output[1])
        self.save(ctx, inputs, output[1])

    def _op_backward(self, ctx, grad: Tensor, *_) -> tuple[Tensor | None, ...]:
        return self.gradients(ctx, grad, self.backward)

    def _refuse(self, ctx, *_) -> None:
        raise P2KError(f"{self.name}: the Triton kernel has no second derivative; use backend='torch' for one")


class _Eager(torch.autograd.Function):
    """The launchers without the dispatcher."""

    @staticmethod
    def forward(ctx, *arguments) -> Tensor:
        *inputs, activation = arguments
        out, saved = activation.launcher("forward")(*inputs)
        activation.save(ctx, inputs, saved)
        ctx.activation = activation
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Under create_graph the op takes over: it knows how to refuse, should a second derivative be asked for.
        activation = ctx.activation
        run = activation.backward if torch.is_grad_enabled() else activation.launcher("backward")
        return *activation.gradients(ctx, grad, run), None


poly_norm = Activation("poly_norm", "norm", norm_forward, norm_backward, fake=_fake_norm_forward)
poly_relu = Activation("poly_relu", "relu", relu_forward, relu_backward, fake=_fake_relu_forward)
