"""The kernel as torch ops: opaque and traceable under torch.compile, a thin autograd function in eager mode.

The dispatcher costs an eager call more than a small kernel itself, so eager mode goes around it. The kernel module,
and with it Triton, is imported by the first call.

Chapter: inflection
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from p2k.core.errors import P2KError


@torch.library.custom_op("p2k::attention_entropy_forward", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward launcher: output and, per row, entropy, largest score and log of the sum relative to it."""
    from p2k.ops.attention_entropy import kernel

    return kernel.forward(q, k, v, mask, is_causal, scale)


@forward_op.register_fake
def _(q, k, v, mask, is_causal, scale):
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*q.shape[:-1], v.shape[-1])), *(q.new_empty(q.shape[:-1], dtype=wide) for _ in range(3))


@torch.library.custom_op("p2k::attention_entropy_backward", mutates_args=())
def backward_op(
    grad: Tensor,
    grad_entropy: Tensor | None,
    qkv: Sequence[Tensor],
    mask: Tensor | None,
    rows: Sequence[Tensor],
    is_causal: bool,
    scale: float,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward launcher; `rows` are the outputs of the forward op. An empty tensor stands for no gradient."""
    from p2k.ops.attention_entropy import kernel

    gradients = kernel.backward(grad, grad_entropy, qkv, mask, rows, is_causal, scale, needs)
    return tuple(grad.new_empty(0) if gradient is None else gradient for gradient in gradients)


@backward_op.register_fake
def _(grad, grad_entropy, qkv, mask, rows, *options):
    needs = options[-1]
    wanted = (needs[0], needs[1] or needs[2], needs[1] or needs[2])
    return tuple(grad.new_empty(x.shape if want else (0,)) for x, want in zip(qkv, wanted, strict=True))


def _launch_backward(*arguments) -> tuple[Tensor | None, ...]:
    from p2k.ops.attention_entropy import kernel

    return kernel.backward(*arguments)


def _save(ctx, inputs: Sequence, outputs: Sequence[Tensor]) -> None:
    """Keep what the backward pass reads: the inputs, the output and three numbers per row."""
    q, k, v, mask, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, mask, *outputs)
    ctx.mark_non_differentiable(*outputs[2:])
    # None instead of zeros: without a gradient of the entropy the kernel does plain attention's work.
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad: Tensor | None, grad_entropy: Tensor | None, run: Callable) -> tuple[Tensor | None, ...]:
    """One gradient per input of the forward op, None where none is needed."""
    q, k, v, mask, *rows = ctx.saved_tensors
    grad = torch.zeros_like(rows[0]) if grad is None else grad
    needs = list(ctx.needs_input_grad[:3])
    found = run(grad, grad_entropy, (q, k, v), mask, rows, ctx.is_causal, ctx.scale, needs)
    return *(x if need else None for x, need in zip(found, needs, strict=True)), None, None, None


def _op_backward(ctx, grad, grad_entropy, *_):
    return _gradients(ctx, grad, grad_entropy, backward_op)


def _refuse(ctx, *_):
    raise P2KError("attention_entropy: the Triton kernel has no second derivative; use backend='torch' for one")


forward_op.register_autograd(_op_backward, setup_context=lambda ctx, inputs, output: _save(ctx, inputs, output))
backward_op.register_autograd(_refuse)


class _Eager(torch.autograd.Function):
    """The launchers without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        from p2k.ops.attention_entropy import kernel

        outputs = kernel.forward(*inputs)
        _save(ctx, inputs, outputs)
        return outputs

    @staticmethod
    def backward(ctx, grad, grad_entropy, *_):
        # Under create_graph the op takes over: it knows how to refuse, should a second derivative be asked for.
        return _gradients(ctx, grad, grad_entropy, backward_op if torch.is_grad_enabled() else _launch_backward)


def attention_entropy(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and entropy by the kernel."""
    run = forward_op if torch.compiler.is_compiling() else _Eager.apply
    out, entropy, *_ = run(q, k, v, mask, is_causal, scale)
    return out, entropy
