"""An output layer of D classes whose exact SGD step under a spherical loss costs O(d^2) per item, whatever D is.

Letters: W [D, d] the weight, kept as ``W = V U + 1 (w + r)^T`` with V [D, d] `rows`, U [d, d] `factor`, its inverse
`inverse`, w [d] `mean_row` the mean of W's rows, r [d] `shift` minus the mean row of V U, and ``Q = C^T C`` `gram` of
the centred weight ``C = W - 1 w^T``. H [B, d] hidden vectors as rows, eta learning rate.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from p2k.core.checks import check_floating, check_positive
from p2k.core.errors import P2KError
from p2k.linalg.spherical import SphericalStatistics, check_targets

_WIDE = (torch.float32, torch.float64)


class Drift(NamedTuple):
    """How far rounding has moved the redundant parts of a `FactoredOutput` from what they stand for.

    Args:
        inverse: Frobenius norm of ``U U^-1 - I`` over the root of d.
        gram: relative Frobenius error of the stored gram matrix.
        mean: mean row of the centred weight, relative to its root mean square row.
        condition: ``|U| |U^-1| / d`` in Frobenius norms, 1 after a refactorisation; bounds the condition from below.
    """

    inverse: float
    gram: float
    mean: float
    condition: float


class _Pending(NamedTuple):
    """One forward pass that awaits its step; `probe.grad` receives the derivatives in the three statistics."""

    h: Tensor
    index: Tensor
    targets: Tensor
    probe: Tensor


class FactoredOutput(nn.Module):
    """Bias-free linear output layer that is trained by plain SGD without ever computing its outputs.

    ``statistics = layer(hidden, target)``; any loss of `p2k.losses.z_loss` on them; ``loss.backward()``, which also
    sends the gradient on into `hidden`; ``layer.step(learning_rate)``. The weight then equals that of a dense layer
    after a step of SGD without momentum, up to rounding. The layer holds buffers and no parameters, because another
    optimizer's step on a factor would break the product; momentum and Adam have no exact factored form.

    Args:
        in_features: width d of the hidden vectors, ``>= 1``.
        classes: number of outputs D, ``>= 1``.
        refactor_every: steps between two repairs, each O(D d^2); None leaves repairs to `condition_limit`.
        condition_limit: `Drift.condition` beyond which a step repairs at once, ``> 1``.
        device, dtype: of `rows`, float32 (the default) or float64.
        factor_dtype: of the small matrices; float64 where the device has it, since rounding accumulates in them.

    Raises:
        ValueError: a size or limit is out of range.
        TypeError: a dtype is neither float32 nor float64.

    Source: vincent2015sparse, eq:z-loss-factored.
    Chapter: z-loss
    """

    def __init__(
        self,
        in_features: int,
        classes: int,
        *,
        refactor_every: int | None = 10_000,
        condition_limit: float = 1e4,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        factor_dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        op = "FactoredOutput"
        check_positive(op, in_features=in_features, classes=classes)
        check_positive(op, refactor_every=1 if refactor_every is None else refactor_every)
        if not condition_limit > 1:
            raise ValueError(f"{op}: condition_limit must be > 1, got {condition_limit}")
        for name, given in (("dtype", dtype), ("factor_dtype", factor_dtype)):
            if given not in _WIDE:
                raise TypeError(f"{op}: {name} must be float32 or float64, got {given}: half types lose small steps")
        self.in_features, self.classes = in_features, classes
        self.refactor_every, self.condition_limit = refactor_every, condition_limit
        self._pending: list[_Pending] = []
        d, small = in_features, {"device": device, "dtype": factor_dtype}
        self.register_buffer("rows", torch.empty(classes, d, device=device, dtype=dtype))
        for name, shape in {"factor": (d, d), "inverse": (d, d), "gram": (d, d), "mean_row": d, "shift": d}.items():
            self.register_buffer(name, torch.zeros(shape, **small))
        self.register_buffer("steps", torch.zeros((), device=device, dtype=torch.int64))
        self.register_load_state_dict_post_hook(lambda module, _: module.discard())
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weight as `torch.nn.Linear` does, uniform within one over the root of d."""
        bound = 1 / math.sqrt(self.in_features)
        self.set_weight(torch.empty_like(self.rows).uniform_(-bound, bound, generator=generator))

    @property
    def weight(self) -> Float[Tensor, "classes in_features"]:
        """The dense weight, computed from the factors in O(D d^2); writing to it changes nothing: see `set_weight`."""
        return (self._centred() + self.mean_row).to(self.rows.dtype)

    @torch.no_grad()
    def set_weight(self, weight: Float[Tensor, "classes in_features"]) -> None:
        """Start from a dense weight of shape ``[classes, in_features]``; steps that are pending are discarded."""
        if weight.shape != self.rows.shape:
            raise ValueError(f"set_weight: weight must have shape {tuple(self.rows.shape)}, got {tuple(weight.shape)}")
        self.discard()
        self.shift.zero_()
        self.mean_row.zero_()
        self._set_centred(weight.to(self.factor.dtype))

    def forward(
        self, hidden: Float[Tensor, "*items in_features"], target: Int[Tensor, "*items"], *, ignore_index: int = -100
    ) -> SphericalStatistics:
        """The statistics of ``hidden @ weight.T`` in O(d^2) per item, differentiable in `hidden`.

        In training mode with gradients enabled the pass is remembered until `step` or `discard`.

        Raises:
            ValueError: a shape disagrees.
            TypeError: `hidden` is not floating point, `target` no integers, or the factors were cast to a half type.
        """
        op = "FactoredOutput"
        check_floating(op, hidden=hidden)
        if self.factor.dtype not in _WIDE or self.rows.dtype not in _WIDE:
            raise TypeError(f"{op}: buffers must stay float32 or float64, got {self.rows.dtype}")
        if hidden.ndim == 0 or hidden.shape[-1] != self.in_features:
            raise ValueError(f"{op}: hidden must be [*items, {self.in_features}], got {tuple(hidden.shape)}")
        check_targets(op, target, tuple(hidden.shape[:-1]))
        counted = target != ignore_index
        h = torch.where(counted[..., None], hidden.to(self.factor.dtype), 0.0).reshape(-1, self.in_features)
        index = torch.where(counted, target.long(), 0).reshape(-1)
        with torch.no_grad():
            targets = self.rows[index].to(self.factor.dtype) @ self.factor + self.shift
        numbers = torch.stack([h @ self.mean_row, ((h @ self.gram) * h).sum(-1).clamp(min=0), (h * targets).sum(-1)])
        if self.training and torch.is_grad_enabled():
            probe = torch.zeros_like(numbers).requires_grad_()
            self._pending.append(_Pending(h.detach(), index, targets, probe))
            numbers = numbers + probe
        numbers = numbers.to(torch.promote_types(hidden.dtype, torch.float32)).view(3, *target.shape)
        return SphericalStatistics(self.classes, *numbers, counted)

    def logits(self, hidden: Float[Tensor, "*items in_features"]) -> Float[Tensor, "*items classes"]:
        """All outputs, in O(D d) per item: for ranking, not for training."""
        h = hidden.to(self.factor.dtype)
        offset = h @ (self.mean_row + self.shift)
        return ((h @ self.factor.mT).to(self.rows.dtype) @ self.rows.mT + offset[..., None].to(self.rows.dtype)).to(
            torch.promote_types(hidden.dtype, torch.float32)
        )

    def discard(self) -> None:
        """Forget the passes that no step has used."""
        self._pending = []

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """``W <- W - learning_rate * gradient`` of everything that was sent backward since the last step.

        Args:
            learning_rate: ``>= 0`` and finite.

        Raises:
            ValueError: the rate is out of range.
            P2KError: a forward pass has not been followed by `backward`, or its gradient is not finite. The layer
                is as before, and the passes are still pending: see `discard`.

        Source: vincent2015sparse, eq:z-loss-update.
        Chapter: z-loss
        """
        check_positive("step", zero_allowed=True, learning_rate=learning_rate)
        if not self._pending:
            return
        if any(item.probe.grad is None for item in self._pending):
            raise P2KError("step: a forward pass has no gradient yet: call backward on its loss, or discard()")
        grads = torch.cat([item.probe.grad for item in self._pending], 1)
        if not grads.isfinite().all():
            raise P2KError(
                "step: the gradient is not finite; the layer is unchanged: lower learning_rate, or discard()"
            )
        H, index, targets = (torch.cat([item[part] for item in self._pending]) for part in range(3))
        common, beta, gamma = grads[0] / self.classes, 2 * grads[1, :, None], grads[2, :, None]
        self.discard()
        self._update(H, index, targets, learning_rate * common, learning_rate * beta, learning_rate * gamma)
        self.steps += 1
        if self.refactor_every is not None and self.steps.item() % self.refactor_every == 0:
            self.refactor()

    def _update(self, H: Tensor, index: Tensor, targets: Tensor, common: Tensor, beta: Tensor, gamma: Tensor) -> None:
        """Apply ``C <- C M - P E`` and ``w <- w - H^T common``, where ``M = I - H^T beta H`` and E holds gamma * H.

        The coefficients contain the learning rate, P centres over classes, and row c of E sums the items of class c.
        """
        bH, gH = beta * H, gamma * H
        total = gH.sum(0)
        self.mean_row -= common @ H
        # Q first: it needs the target rows of the weight before the step.
        cross = targets.mT @ gH
        cross -= bH.mT @ (H @ cross)
        gram = self.gram - (self.gram @ H.mT) @ bH
        gram -= bH.mT @ (H @ gram)
        same = (index[:, None] == index).to(H.dtype)
        gram += gH.mT @ (same @ gH) - torch.outer(total, total) / self.classes - cross - cross.mT
        self.gram.copy_(0.5 * (gram + gram.mT))
        self.shift += total / self.classes - (self.shift @ H.mT) @ bH
        factor = self.factor - (self.factor @ H.mT) @ bH
        inverse = self._inverse_after(H, bH)
        spoilt = not factor.norm() * inverse.norm() <= self.condition_limit * self.in_features
        if spoilt:  # M is singular or nearly so: take it into the rows, whose own step needs no inverse then.
            self.rows.copy_(self.rows.to(factor.dtype) @ factor)
            factor = inverse = torch.eye(self.in_features, dtype=factor.dtype, device=factor.device)
        self.factor.copy_(factor)
        self.inverse.copy_(inverse)
        self.rows.index_add_(0, index, (gH @ inverse).to(self.rows.dtype), alpha=-1)
        if spoilt:
            self.refactor()

    def _inverse_after(self, H: Tensor, bH: Tensor) -> Tensor:
        """``M^-1 U^-1`` by Woodbury's identity, or by one factorisation of M where there are many items."""
        if len(H) < self.in_features:
            small = torch.eye(len(H), dtype=H.dtype, device=H.device) - bH @ H.mT
            solved, _ = torch.linalg.solve_ex(small, bH @ self.inverse)
            return self.inverse + H.mT @ solved
        M = torch.eye(self.in_features, dtype=H.dtype, device=H.device) - bH.mT @ H
        return torch.linalg.solve_ex(M, self.inverse)[0]

    @torch.no_grad()
    def refactor(self) -> None:
        """Repair: multiply the factors out, start again from ``U = I`` and recompute every redundant part, O(D d^2)."""
        self._set_centred(self._centred())

    def _centred(self) -> Tensor:
        return self.rows.to(self.factor.dtype) @ self.factor + self.shift

    def _set_centred(self, centred: Tensor) -> None:
        """Store a weight whose mean row stands in `mean_row` up to what is left in `centred`."""
        left = centred.mean(0)
        self.mean_row += left
        self.rows.copy_(centred - left)
        # The stored rows are rounded; the redundant parts describe these.
        stored = self.rows.to(self.factor.dtype)
        mean = stored.mean(0)
        self.mean_row += mean
        self.shift.copy_(-mean)
        self.factor.copy_(torch.eye(self.in_features))
        self.inverse.copy_(self.factor)
        self.gram.copy_((stored - mean).mT @ (stored - mean))

    @torch.no_grad()
    def drift(self) -> Drift:
        """Compare the redundant parts with what the factors say, in O(D d^2)."""
        centred = self._centred().double()
        exact = (centred - centred.mean(0)).mT @ (centred - centred.mean(0))
        tiny = torch.finfo(torch.float64).tiny
        unit = self.factor.double() @ self.inverse.double() - torch.eye(self.in_features).to(self.factor).double()
        return Drift(
            inverse=unit.norm().item() / math.sqrt(self.in_features),
            gram=((self.gram.double() - exact).norm() / exact.norm().clamp(min=tiny)).item(),
            mean=(centred.mean(0).norm() * math.sqrt(self.classes) / centred.norm().clamp(min=tiny)).item(),
            condition=(self.factor.norm() * self.inverse.norm()).item() / self.in_features,
        )

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, classes={self.classes}, refactor_every={self.refactor_every}"
