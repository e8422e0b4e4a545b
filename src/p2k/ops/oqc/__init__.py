"""Orthogonal quadratic complements: project an auxiliary vector off the main one, token by token, and inject it."""

from jaxtyping import Float
from torch import Tensor

from p2k.core.backend import Backend, choose_backend
from p2k.core.checks import check_floating, check_positive, check_same_device, check_shape
from p2k.ops.oqc import reference, registration

__all__ = ["project_and_inject", "rank_project"]


def project_and_inject(
    main: Float[Tensor, "*tokens width"],
    aux: Float[Tensor, "*tokens width"],
    gate: Float[Tensor, ""] | Float[Tensor, "*tokens 1"] | None = None,
    *,
    pre_gate: Float[Tensor, " width"] | None = None,
    eps: float = 1e-6,
    backend: Backend = "auto",
) -> Float[Tensor, "*tokens width"]:
    """Add to each main vector the gated part of its auxiliary vector that is orthogonal to it.

    Computes ``main + gate * (a - c * main)`` with ``a = pre_gate * aux`` and
    ``c = <a, main> / (<main, main> + eps)``. The added part keeps an inner product of
    ``<a, main> * eps / (<main, main> + eps)`` with the main vector: exactly zero for ``eps = 0``.

    Args:
        main: dominant hidden vector of each token, any leading shape, float16, bfloat16, float32 or float64.
        aux: auxiliary vector of each token, shape and dtype of `main`.
        gate: factor on the projected part, a 0-d tensor or one number per token ``[*tokens, 1]``; None means 1.
            A gate per channel would destroy the orthogonality here, so it is not accepted: see `pre_gate`.
        pre_gate: factor per channel on `aux` before the projection, ``[width]``; None means 1.
        eps: added to the squared norm of `main`, ``>= 0``, in the units of ``main ** 2``. With ``eps = 0`` a zero
            main vector has no direction and its auxiliary vector passes whole.
        backend: `auto`, `torch` or `triton`.

    Returns:
        Tensor of the shape and dtype of `main`. NaN and inf stay in the token they came in.

    Raises:
        ValueError: shapes or devices disagree, `width` is 0, or `eps` is negative or not finite.
        TypeError: a tensor is not floating point or the dtypes disagree.
        BackendUnavailable: ``backend="triton"`` where Triton cannot run.

    Source: wang2026oqc, eq:oqc-inject.
    Chapter: oqc
    """
    op = "project_and_inject"
    tensors = {"main": main, "aux": aux, "gate": gate, "pre_gate": pre_gate}
    _check(op, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    check_shape(op, "aux", aux, tuple(main.shape))
    if gate is not None:
        check_shape(op, "gate", gate, (), (*main.shape[:-1], 1))
    if pre_gate is not None:
        check_shape(op, "pre_gate", pre_gate, (main.shape[-1],))
    check_positive(op, zero_allowed=True, eps=eps)
    if choose_backend(backend, main, op=op) == "torch":
        return reference.project_and_inject(main, aux, gate, pre_gate, eps)
    return registration.project_and_inject(main, aux, gate, pre_gate, eps)


def rank_project(
    left: Float[Tensor, "*tokens rank"],
    right: Float[Tensor, "*tokens rank"],
    host: Float[Tensor, "*tokens rank"],
    weight: Float[Tensor, " rank"],
    gate: Float[Tensor, ""] | Float[Tensor, "*tokens 1"] | None = None,
    *,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    backend: Backend = "auto",
) -> Float[Tensor, "*tokens rank"]:
    """Quadratic features in rank space, normalised, projected off the host's rank-space vector, gated.

    Computes ``gate * (f - c * host)`` with ``f = weight * s / sqrt(mean(s ** 2) + norm_eps)``, ``s = left * right``
    and ``c = <f, host> / (<host, host> + eps)``.

    Args:
        left: first factor map of each token, any leading shape.
        right: second factor map, like `left`.
        host: main vector mapped into rank space, like `left`.
        weight: RMS-norm weight, ``[rank]``.
        gate: factor on the result, a 0-d tensor or ``[*tokens, 1]``; None means 1.
        eps: added to the squared norm of `host`, ``>= 0``.
        norm_eps: added to the mean square of ``left * right``, ``> 0``.
        backend: `auto`, `torch` or `triton`.

    Returns:
        Tensor of the shape and dtype of `left`.

    Raises:
        ValueError: shapes or devices disagree, the rank is 0, or an epsilon is out of range.
        TypeError: a tensor is not floating point or the dtypes disagree.
        BackendUnavailable: ``backend="triton"`` where Triton cannot run.

    Source: wang2026oqc, eq:oqc-rank.
    Chapter: oqc
    """
    op = "rank_project"
    tensors = {"left": left, "right": right, "host": host, "weight": weight, "gate": gate}
    _check(op, {name: tensor for name, tensor in tensors.items() if tensor is not None})
    check_shape(op, "right", right, tuple(left.shape))
    check_shape(op, "host", host, tuple(left.shape))
    check_shape(op, "weight", weight, (left.shape[-1],))
    if gate is not None:
        check_shape(op, "gate", gate, (), (*left.shape[:-1], 1))
    check_positive(op, zero_allowed=True, eps=eps)
    check_positive(op, norm_eps=norm_eps)
    if choose_backend(backend, left, op=op) == "torch":
        return reference.rank_project(left, right, host, weight, gate, eps, norm_eps)
    return registration.rank_project(left, right, host, weight, gate, eps, norm_eps)


def _check(op: str, tensors: dict[str, Tensor]) -> None:
    """Checks that both ops share: one dtype, one device, at least one channel."""
    check_floating(op, **tensors)
    check_same_device(op, **tensors)
    name, first = next(iter(tensors.items()))
    if first.ndim == 0 or first.shape[-1] == 0:
        raise ValueError(f"{op}: {name} must have a last dimension of at least 1, got shape {tuple(first.shape)}")
