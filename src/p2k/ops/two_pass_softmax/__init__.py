"""Softmax that reads its input twice instead of three times: no maximum, every exponential a (mantissa, exponent)."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from p2k.core.backend import choose_backend
from p2k.core.checks import check_floating
from p2k.core.errors import BackendUnavailable
from p2k.ops.two_pass_softmax import reference, registration

__all__ = ["two_pass_softmax"]


def two_pass_softmax(
    x: Float[Tensor, "*rows columns"], *, backend: Literal["auto", "torch", "triton", "native"] = "auto"
) -> Float[Tensor, "*rows columns"]:
    """Softmax over the last dimension without subtracting the maximum.

    Results hold to a few units of rounding for ``|x| <= 1e5``. Beyond, the kernels' argument reduction loses digits,
    one or two of them by 1e6, and from about 3e6 on they can be wrong. Arguments below -1e9 count as ``-inf``.
    A single column gives 1, up to one rounding with `native` and `triton`, which multiply by a reciprocal.
    ``-inf`` gives 0; a row of only ``-inf``, or one with ``+inf`` or NaN, gives NaN, as in `torch.softmax`.

    Args:
        x: any leading shape, float16, bfloat16, float32 or float64, at least one column.
        backend: `auto` is `triton` on a CUDA tensor that the kernel takes and `torch`, the reference, elsewhere;
            `native` is vector code for a float32 tensor on a CPU, compiled on its first use.

    Returns:
        Tensor of the shape and dtype of `x`.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: `x` has no columns, or an unknown backend.
        BackendUnavailable: `native` on another dtype or device, or without a compiler; `triton` where it cannot run.

    Source: dukhan2020twopass, eq:two-pass-softmax-merge.
    Chapter: two-pass-softmax
    """
    op = "two_pass_softmax"
    check_floating(op, x=x)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x must have a last dimension of at least 1, got shape {tuple(x.shape)}")
    if backend not in ("auto", "torch", "triton", "native"):
        raise ValueError(f"{op}: backend must be 'auto', 'torch', 'triton' or 'native', got {backend!r}")
    if backend == "native":
        return _native(op, x)
    if choose_backend(backend, x, op=op) == "torch":
        return reference.two_pass_softmax(x)
    return registration.softmax(x)


def _native(op: str, x: Tensor) -> Tensor:
    if x.dtype != torch.float32 or x.device.type != "cpu":
        raise BackendUnavailable(f"{op}: backend='native' takes float32 on a CPU, got {x.dtype} on {x.device.type}")
    from p2k.ops.two_pass_softmax.native import NativeSoftmax

    return NativeSoftmax.apply(x)
