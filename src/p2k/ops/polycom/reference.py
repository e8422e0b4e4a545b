"""Polynomial composition activations in plain torch: the specification.

Letters of the paper and of this file: a coefficients a_1, a_2, a_3 of the powers, b constant term a_0 (the bias of
public code), x pre-activation, g upstream gradient, rho_i = 1 / sqrt(mean(x^(2i)) + eps), S_i = <g, x^i>.
Shape suffixes: T tokens (any leading shape), M width of a row.

Half-precision inputs are computed in float32 and rounded once; float64 stays float64. A row is divided by a power of
two before its powers are taken, which no finite result sees: see `exponent`.

Source: zhuo2025polycom, eq:polycom-polyrelu, eq:polycom-polynorm.  Chapter: polycom
"""

import torch
from torch import Tensor

ORDER = 3
# What a mixed-precision model keeps its coefficients in.
COEFFICIENTS = torch.float32
# 2^-126 is the smallest normal float32, so that dividing by 2^126 is exact.
LARGEST_EXPONENT = 126


def _wide(tensor: Tensor) -> Tensor:
    """Float32 for the half types, unchanged otherwise: x^3 leaves float16 at |x| = 41."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def exponent(x_TM: Tensor) -> Tensor:
    """The power of two that brings a row below 2 in size, ``[T, 1]``; 1 for a row that is there already.

    Sixth powers leave float32 at ``|x| = 2.6e6``. Since x^i / RMS(x^i) does not change when x and eps^(1 / 2i) are
    divided by the same number, dividing first is the same function; a power of two makes it the same to the last bit.
    It is a constant to autograd for the same reason.
    """
    largest = x_TM.detach().abs().amax(-1, keepdim=True).clamp_min(1.0)
    return torch.exp2(-torch.log2(largest).floor().clamp_max(LARGEST_EXPONENT))


def poly_norm(x_TM: Tensor, a_3: Tensor, b: Tensor | None, eps: float) -> Tensor:
    """b + sum_i a_i x^i / sqrt(mean(x^(2i)) + eps), i = 1, 2, 3, row by row."""
    wide = _wide(x_TM)
    down_T1 = exponent(wide)
    y_TM = wide * down_T1
    power, out = torch.ones_like(y_TM), torch.zeros_like(y_TM)
    for i in range(1, ORDER + 1):
        power = power * y_TM
        rho_T1 = (power.square().mean(-1, keepdim=True) + eps * down_T1 ** (2 * i)).rsqrt()
        out = out + a_3[i - 1].to(wide.dtype) * power * rho_T1
    return (out if b is None else out + b.to(wide.dtype)).to(x_TM.dtype)


def poly_relu(x: Tensor, a_3: Tensor, b: Tensor | None) -> Tensor:
    """b + sum_i a_i relu(x)^i, i = 1, 2, 3, element by element."""
    r = _wide(x).relu()
    a = a_3.to(r.dtype)
    out = r * (a[0] + r * (a[1] + r * a[2]))
    return (out if b is None else out + b.to(r.dtype)).to(x.dtype)


def poly_norm_backward(g_TM: Tensor, x_TM: Tensor, a_3: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Closed-form gradients (dx, da, db) of `poly_norm`, in the paper's order and without the scaling of rows.

    dx = sum_i i a_i rho_i x^(i-1) (g - rho_i^2 mean(g x^i) x^i),  da_i = sum_rows rho_i <g, x^i>,  db = sum g.

    Source: eq:polycom-backward.
    """
    dx, da = torch.zeros_like(x_TM), []
    for i in range(1, ORDER + 1):
        power = x_TM**i
        rho_T1 = (power.square().mean(-1, keepdim=True) + eps).rsqrt()
        along_T1 = rho_T1.square() * (g_TM * power).mean(-1, keepdim=True)
        dx = dx + i * a_3[i - 1] * rho_T1 * x_TM ** (i - 1) * (g_TM - along_T1 * power)
        da.append((g_TM * power * rho_T1).sum())
    return dx, torch.stack(da), g_TM.sum()


def poly_relu_backward(g: Tensor, x: Tensor, a_3: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Closed-form gradients (dx, da, db) of `poly_relu`.

    dx = g [x > 0] sum_i i a_i r^(i-1),  da_i = sum g r^i,  db = sum g, with r = relu(x).

    Source: eq:polycom-relu-backward.
    """
    r = x.relu()
    dx = g * (x > 0) * (a_3[0] + r * (2 * a_3[1] + r * 3 * a_3[2]))
    return dx, torch.stack([(g * r**i).sum() for i in range(1, ORDER + 1)]), g.sum()
