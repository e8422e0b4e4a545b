"""Polynomial composition activations: a cubic of normalised powers (PolyNorm), a cubic of ReLU (PolyReLU)."""

from jaxtyping import Float
from torch import Tensor

from p2k.core.backend import Backend, choose_backend
from p2k.core.checks import check_floating, check_positive, check_same_device, check_shape
from p2k.ops.polycom import reference, registration

__all__ = ["poly_norm", "poly_relu"]


def poly_norm(
    x: Float[Tensor, "*tokens width"],
    weight: Float[Tensor, "3"],
    bias: Float[Tensor, ""] | None = None,
    *,
    eps: float = 1e-6,
    backend: Backend = "auto",
) -> Float[Tensor, "*tokens width"]:
    """Weighted sum of a row's first three powers, each divided by its own root mean square.

    Computes ``bias + sum_i weight[i - 1] * x**i / sqrt(mean(x**(2 i)) + eps)`` for i = 1, 2, 3. Powers and sums are
    float32 for half-precision inputs. Rows of any finite size are safe.

    Args:
        x: pre-activations, any leading shape, float16, bfloat16, float32 or float64.
        weight: factors of x, x**2 and x**3, in this order (public code of the paper stores them the other way
            round), dtype of `x` or float32.
        bias: 0-d constant term, dtype of `weight`; None means 0.
        eps: added to each mean square, ``> 0``, without unit: it is the same number for all three powers.
        backend: `auto`, `torch` or `triton`.

    Returns:
        Tensor of the shape and dtype of `x`. NaN and inf stay in the row they came in.

    Raises:
        ValueError: a shape or device disagrees, the width is 0, or `eps` is not positive and finite.
        TypeError: a tensor is not floating point or the dtypes do not fit.
        BackendUnavailable: ``backend="triton"`` where Triton cannot run.

    Source: zhuo2025polycom, eq:polycom-polynorm.
    Chapter: polycom
    """
    op = "poly_norm"
    _check(op, x, weight, bias)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x must have a last dimension of at least 1, got shape {tuple(x.shape)}")
    check_positive(op, eps=eps)
    if choose_backend(backend, x, op=op) == "torch":
        return reference.poly_norm(x, weight, bias, eps)
    return registration.poly_norm(x, weight, bias, eps)


def poly_relu(
    x: Float[Tensor, "*shape"],
    weight: Float[Tensor, "3"],
    bias: Float[Tensor, ""] | None = None,
    *,
    backend: Backend = "auto",
) -> Float[Tensor, "*shape"]:
    """Cubic polynomial of ReLU, element by element: ``bias + sum_i weight[i - 1] * relu(x)**i`` for i = 1, 2, 3.

    Args:
        x: pre-activations of any shape, float16, bfloat16, float32 or float64.
        weight: factors of r, r**2 and r**3 with r = relu(x), dtype of `x` or float32.
        bias: 0-d constant term, dtype of `weight`; None means 0.
        backend: `auto`, `torch` or `triton`.

    Returns:
        Tensor of the shape and dtype of `x`; inf only where the result leaves its dtype, or float32.

    Raises:
        ValueError: a shape or device disagrees.
        TypeError: a tensor is not floating point or the dtypes do not fit.
        BackendUnavailable: ``backend="triton"`` where Triton cannot run.

    Source: zhuo2025polycom, eq:polycom-polyrelu.
    Chapter: polycom
    """
    op = "poly_relu"
    _check(op, x, weight, bias)
    if choose_backend(backend, x, op=op) == "torch":
        return reference.poly_relu(x, weight, bias)
    return registration.poly_relu(x, weight, bias)


def _check(op: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Shapes, devices and dtypes; the coefficients may stay in float32 beside a half-precision input."""
    check_floating(op, x=x)
    coefficients = {"weight": weight} | ({} if bias is None else {"bias": bias})
    check_floating(op, **coefficients)
    check_same_device(op, x=x, **coefficients)
    check_shape(op, "weight", weight, (reference.ORDER,))
    if bias is not None:
        check_shape(op, "bias", bias, ())
    if weight.dtype not in (x.dtype, reference.COEFFICIENTS):
        raise TypeError(f"{op}: weight must have dtype {x.dtype} like x, or torch.float32, got {weight.dtype}")
