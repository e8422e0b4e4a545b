"""The kernel as torch ops: opaque and traceable under torch.compile, a thin autograd function in eager mode.

The dispatcher costs an eager call more than a small kernel itself, so eager mode goes around it. The kernel module,
and with it Triton, is imported by the first call. A power of None means no re-weighting.

Chapter: softplus-attention
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from p2k.core.errors import P2KError


@torch.library.custom_op("p2k::softplus_attention_forward", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, power: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward launcher: output, inverse lengths of queries and keys, and three numbers per row."""
    from p2k.ops.softplus_attention import kernel

    return kernel.forward(q, k, v, mask, is_causal, scale, power)


@forward_op.register_fake
def _(q, k, v, mask, is_causal, scale, power):
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = (0,) if power is None else q.shape[:-1]
    shapes = (q.shape[:-1], k.shape[:-1], q.shape[:-1], rows, rows)
    return q.new_empty((*q.shape[:-1], v.shape[-1])), *(q.new_empty(shape, dtype=wide) for shape in shapes)


@torch.library.custom_op("p2k::softplus_attention_backward", mutates_args=())
def backward_op(
    grad: Tensor,
    qkv: Sequence[Tensor],
    mask: Tensor | None,
    saved: Sequence[Tensor],
    is_causal: bool,
    scale: float,
    power: float | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward launcher; `saved` are the outputs of the forward op. An empty tensor stands for no gradient."""
    from p2k.ops.softplus_attention import kernel

    gradients = kernel.backward(grad, qkv, mask, saved, is_causal, scale, power, needs)
    return tuple(grad.new_empty(0) if gradient is None else gradient for gradient in gradients)


@backward_op.register_fake
def _(grad, qkv, mask, saved, *options):
    needs = options[-1]
    wanted = (needs[0], needs[1] or needs[2], needs[1] or needs[2])
    return tuple(grad.new_empty(x.shape if want else (0,)) for x, want in zip(qkv, wanted, strict=True))


def _launch_backward(*arguments) -> tuple[Tensor | None, ...]:
    from p2k.ops.softplus_attention import kernel

    return kernel.backward(*arguments)


def _save(ctx, inputs: Sequence, outputs: Sequence[Tensor]) -> None:
    """Keep what the backward pass reads: the inputs, the output and the numbers of rows and keys."""
    q, k, v, mask, ctx.is_causal, ctx.scale, ctx.power = inputs
    ctx.save_for_backward(q, k, v, mask, *outputs)
    ctx.mark_non_differentiable(*outputs[1:])


def _gradients(ctx, grad: Tensor, run: Callable) -> tuple[Tensor | None, ...]:
    """One gradient per input of the forward op, None where none is needed."""
    q, k, v, mask, *saved = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    found = run(grad, (q, k, v), mask, saved, ctx.is_causal, ctx.scale, ctx.power, needs)
    return *(x if need else None for x, need in zip(found, needs, strict=True)), None, None, None, None


def _op_backward(ctx, grad, *_):
    return _gradients(ctx, grad, backward_op)


def _refuse(ctx, *_):
    raise P2KError("softplus_attention: the Triton kernel has no second derivative; use backend='torch' for one")


forward_op.register_autograd(_op_backward, setup_context=lambda ctx, inputs, output: _save(ctx, inputs, output))
backward_op.register_autograd(_refuse)


class _Eager(torch.autograd.Function):
    """The launchers without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        from p2k.ops.softplus_attention import kernel

        outputs = kernel.forward(*inputs)
        _save(ctx, inputs, outputs)
        return outputs

    @staticmethod
    def backward(ctx, grad, *_):
        # Under create_graph the op takes over: it knows how to refuse, should a second derivative be asked for.
        return _gradients(ctx, grad, backward_op if torch.is_grad_enabled() else _launch_backward)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float, power: float | None
) -> Tensor:
    """Attention by the kernel."""
    run = forward_op if torch.compiler.is_compiling() else _Eager.apply
    return run(q, k, v, mask, is_causal, scale, power)[0]
