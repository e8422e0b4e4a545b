"""The solve as torch ops: opaque and traceable under torch.compile, thin autograd functions in eager mode.

Both forms are behind the same op, `fused` says which: the loop over blocks in torch would otherwise be unrolled into
the graph, once per length. The kernel module, and with it Triton, is imported by the first call that needs it.

Chapter: lucid
"""

import torch
from torch import Tensor

from p2k.core.errors import P2KError
from p2k.ops.lucid import blocked


@torch.library.custom_op("p2k::lucid_forward", mutates_args=())
def forward_op(u: Tensor, v: Tensor, live: Tensor | None, strength: float, fused: bool) -> tuple[Tensor, Tensor]:
    """w, and what the backward pass keeps besides: the inverse diagonal blocks, or an empty tensor."""
    if not fused:
        return blocked.substitute(u, v, live, strength).contiguous().clone(), u.new_empty(0)
    from p2k.ops.lucid import kernel

    return kernel.forward(u, v, live, strength)


@forward_op.register_fake
def _(u, v, live, strength, fused):
    if not fused:
        return v.new_empty(v.shape), u.new_empty(0)
    from p2k.ops.lucid import kernel

    return v.new_empty(v.shape), u.new_empty(kernel.inverse_shape(u))


@torch.library.custom_op("p2k::lucid_backward", mutates_args=())
def backward_op(
    grad: Tensor,
    u: Tensor,
    live: Tensor | None,
    w: Tensor,
    inverse: Tensor,
    strength: float,
    need_keys: bool,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of u and v; an empty tensor stands for no gradient."""
    du, dv = _run_backward(grad, u, live, w, inverse, strength, need_keys, fused)
    return grad.new_empty(0) if du is None else du, dv


def _run_backward(grad, u, live, w, inverse, strength, need_keys, fused) -> tuple[Tensor | None, Tensor]:
    if fused:
        from p2k.ops.lucid import kernel

        return kernel.backward(grad, u, live, w, inverse, strength, need_keys)
    y = blocked.substitute(u, grad, live, strength, transposed=True).contiguous().clone()
    return blocked.key_gradient(u, w, y, live, strength) if need_keys else None, y


@backward_op.register_fake
def _(grad, u, live, w, inverse, strength, need_keys, fused):
    return u.new_empty(u.shape if need_keys else (0,)), grad.new_empty(grad.shape)


def _save(ctx, inputs, output) -> None:
    u, _, live, ctx.strength, ctx.fused = inputs
    ctx.save_for_backward(u, live, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad: Tensor, run) -> tuple:
    u, live, w, inverse = ctx.saved_tensors
    du, dv = run(grad, u, live, w, inverse, ctx.strength, ctx.needs_input_grad[0], ctx.fused)
    needs = ctx.needs_input_grad
    return du if needs[0] else None, dv if needs[1] else None, None, None, None


def _op_backward(ctx, grad, _):
    return _gradients(ctx, grad, backward_op)


def _refuse(ctx, *_):
    raise P2KError("lucid: the Triton kernel has no second derivative; use backend='torch' for one")


forward_op.register_autograd(_op_backward, setup_context=lambda ctx, inputs, output: _save(ctx, inputs, output))
backward_op.register_autograd(_refuse)


class _Eager(torch.autograd.Function):
    """The launchers without the dispatcher."""

    @staticmethod
    def forward(ctx, u, v, live, strength):
        from p2k.ops.lucid import kernel

        output = kernel.forward(u, v, live, strength)
        _save(ctx, (u, v, live, strength, True), output)
        return output

    @staticmethod
    def backward(ctx, grad, _):
        # Under create_graph the op takes over: it knows how to refuse, should a second derivative be asked for.
        return _gradients(ctx, grad, backward_op if torch.is_grad_enabled() else _run_backward)[:4]


def solve(u: Tensor, v: Tensor, live: Tensor | None, strength: float, *, fused: bool) -> Tensor:
    """w of T w = v, by the kernel where `fused`, else by blocks in torch."""
    if torch.compiler.is_compiling():
        return forward_op(u, v, live, strength, fused)[0]
    return _Eager.apply(u, v, live, strength)[0] if fused else blocked.solve(u, v, live, strength)
