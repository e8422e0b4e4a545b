"""The kernels as torch ops: opaque and traceable under torch.compile, a thin autograd function in eager mode.

The dispatcher costs an eager call tens of microseconds, more than a small kernel itself, so eager mode goes around
it. `torch.compile` sees the ops only: it needs neither Triton nor a device to trace them. The kernel module, and with
it Triton, is imported by the first call.

Chapter: oqc
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.library import CustomOpDef

from p2k.core.errors import P2KError

Saved = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op("p2k::inject_forward", mutates_args=())
def inject_forward(main: Tensor, aux: Tensor, gate: Tensor | None, pre_gate: Tensor | None, eps: float) -> Saved:
    """Result, c and 1 / n of `project_and_inject`."""
    from p2k.ops.oqc import kernel

    return kernel.inject_forward(main, aux, gate, pre_gate, eps)


@torch.library.custom_op("p2k::inject_backward", mutates_args=())
def inject_backward(
    grad: Tensor, main: Tensor, aux: Tensor, gate: Tensor | None, pre_gate: Tensor | None, c: Tensor, inverse: Tensor,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `project_and_inject`, an empty tensor for each that is not needed."""
    from p2k.ops.oqc import kernel

    return _present(grad, kernel.inject_backward(grad, main, aux, gate, pre_gate, c, inverse, needs))


@torch.library.custom_op("p2k::rank_forward", mutates_args=())
def rank_forward(
    left: Tensor, right: Tensor, host: Tensor, weight: Tensor, gate: Tensor | None, eps: float, norm_eps: float
) -> Saved:
    """Result, c and 1 / n of `rank_project`."""
    from p2k.ops.oqc import kernel

    return kernel.rank_forward(left, right, host, weight, gate, eps, norm_eps)


@torch.library.custom_op("p2k::rank_backward", mutates_args=())
def rank_backward(  # noqa: PLR0913 - an op names its tensors one by one
    grad: Tensor, left: Tensor, right: Tensor, host: Tensor, weight: Tensor, gate: Tensor | None, c: Tensor,
    inverse: Tensor, norm_eps: float, needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `rank_project`, an empty tensor for each that is not needed."""
    from p2k.ops.oqc import kernel

    return _present(grad, kernel.rank_backward(grad, left, right, host, weight, gate, c, inverse, norm_eps, needs))


def _present(grad: Tensor, gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """An op returns tensors only: an empty one stands for a gradient that was not asked for."""
    return tuple(grad.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _fake_forward(main: Tensor, *_) -> Saved:
    saved = torch.promote_types(main.dtype, torch.float32)
    c, inverse = (main.new_empty(main.shape[:-1], dtype=saved) for _ in range(2))
    return main.new_empty(main.shape), c, inverse


def _fake_backward(grad: Tensor, *rest) -> tuple[Tensor, ...]:
    *inputs, needs = rest
    shapes = (tensor.shape if need else (0,) for tensor, need in zip(inputs, needs, strict=False))
    return tuple(grad.new_empty(shape) for shape in shapes)


class Stage:
    """One row stage: its two ops, its two launchers, and how a call picks between them.

    Args:
        name: public name, for messages.
        prefix: name of its launchers in the kernel module, before `_forward` and `_backward`.
        forward: op that takes the stage's tensors, then its scalars, the projection's epsilon first.
        backward: op that takes the upstream gradient, the tensors, c, 1 / n, the scalars but the projection's epsilon
            (1 / n carries it), and one flag per tensor.
        tensors: how many tensors the stage takes.
    """

    def __init__(self, name: str, prefix: str, forward: CustomOpDef, backward: CustomOpDef, *, tensors: int):
        self.name, self.prefix, self.tensors = name, prefix, tensors
        self.forward, self.backward = forward, backward
        forward.register_fake(_fake_forward)
        backward.register_fake(_fake_backward)
        forward.register_autograd(self._op_backward, setup_context=self._setup)
        backward.register_autograd(self._refuse)

    def __call__(self, *inputs) -> Tensor:
        """Run the stage on its tensors, then its scalars."""
        if torch.compiler.is_compiling():
            return self.forward(*inputs)[0]
        return _Eager.apply(*inputs, self)

    def launcher(self, direction: str) -> Callable:
        """The kernel module's function for one direction."""
        from p2k.ops.oqc import kernel

        return getattr(kernel, f"{self.prefix}_{direction}")

    def save(self, ctx, inputs: Sequence, c: Tensor, inverse: Tensor) -> None:
        """Keep what the backward pass reads: the inputs and two numbers per token."""
        ctx.save_for_backward(*inputs[: self.tensors], c, inverse)
        ctx.scalars = inputs[self.tensors :]

    def gradients(self, ctx, grad: Tensor, run: Callable) -> tuple[Tensor | None, ...]:
        """One gradient per input, None where none is needed."""
        needs = list(ctx.needs_input_grad[: self.tensors])
        gradients = run(grad, *ctx.saved_tensors, *ctx.scalars[1:], needs)
        kept = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
        return *kept, *(None for _ in ctx.scalars)

    def _setup(self, ctx, inputs, output) -> None:
        ctx.mark_non_differentiable(*output[1:])
        self.save(ctx, inputs, *output[1:])

    def _op_backward(self, ctx, grad: Tensor, *_) -> tuple[Tensor | None, ...]:
        return self.gradients(ctx, grad, self.backward)

    def _refuse(self, ctx, *_) -> None:
        raise P2KError(f"{self.name}: the Triton kernel has no second derivative; use backend='torch' for one")


class _Eager(torch.autograd.Function):
    """The launchers without the dispatcher."""

    @staticmethod
    def forward(ctx, *arguments) -> Tensor:
        *inputs, stage = arguments
        out, c, inverse = stage.launcher("forward")(*inputs)
        stage.save(ctx, inputs, c, inverse)
        ctx.stage = stage
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Under create_graph the op takes over: it knows how to refuse, should a second derivative be asked for.
        stage = ctx.stage
        run = stage.backward if torch.is_grad_enabled() else stage.launcher("backward")
        return *stage.gradients(ctx, grad, run), None


project_and_inject = Stage("project_and_inject", "inject", inject_forward, inject_backward, tensors=4)
rank_project = Stage("rank_project", "rank", rank_forward, rank_backward, tensors=5)
