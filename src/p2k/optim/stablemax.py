"""Gradients orthogonal to their weights: a wrapper for any torch optimizer.

Letters: w weight tensor, g its gradient.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from p2k.core.checks import check_floating, check_same_device, check_shape
from p2k.core.errors import P2KError
from p2k.linalg.projection import project_off

__all__ = ["OrthoGrad", "orthogonal_gradient"]

# What is left of a gradient below this share of it, in units of its dtype's round-off, is rounding and no direction.
NOISE = 16


@torch.no_grad()
def orthogonal_gradient(gradient: Float[Tensor, "*shape"], weight: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The part of a gradient orthogonal to its weight, as one vector, stretched to the length of the gradient.

    Args:
        gradient: of the loss in `weight`; half precision is computed in float32 and rounded once.
        weight: shape and dtype of `gradient`; a zero weight has no direction, and the gradient passes whole.

    Returns:
        A new tensor. Zero where the gradient is parallel to the weight up to rounding, and so always for a tensor of
        one element. NaN and inf make the whole result NaN.

    Raises:
        ValueError: shapes or devices disagree.
        TypeError: a tensor is not floating point or the dtypes disagree.

    Source: prieto2025grokking, eq:stablemax-orthograd.
    Chapter: stablemax
    """
    op = "orthogonal_gradient"
    check_floating(op, gradient=gradient, weight=weight)
    check_same_device(op, gradient=gradient, weight=weight)
    check_shape(op, "weight", weight, tuple(gradient.shape))
    if gradient.numel() == 0:
        return gradient.clone()
    wide = torch.promote_types(gradient.dtype, torch.float32)
    g, w = gradient.reshape(-1).to(wide), weight.reshape(-1).to(wide)
    # Of unit size, so that no square leaves the dtype's range. A second projection takes away what the first left.
    size, w = _largest(g), w / _largest(w)
    unit = g / size
    kept = project_off(project_off(unit, w), w)
    length, left = unit.norm(), kept.norm()
    noise = left <= NOISE * torch.finfo(wide).eps * length
    stretched = kept * torch.where(noise, 0.0, length / torch.where(noise, 1.0, left)) * size
    return stretched.to(gradient.dtype).view_as(gradient)


def _largest(vector: Tensor) -> Tensor:
    """The largest magnitude, 1 for a zero vector."""
    largest = vector.abs().amax()
    return torch.where(largest == 0, 1.0, largest)


class OrthoGrad(Optimizer):
    """Let an optimizer see each gradient without its part along the weight.

    It is the wrapped optimizer in every other respect: `param_groups`, `state`, `state_dict` and `defaults` are its
    own, so schedulers and checkpoints work and a checkpoint fits with or without the wrapper. A closure's gradients
    are projected each time it is evaluated. After `step` every parameter has the gradient tensor that `backward` left,
    unchanged.

    Args:
        optimizer: any optimizer. Its weight decay and momentum are left alone: what is orthogonal is the gradient, not
            the update. A parameter group with ``orthogonal=False`` is left out, as it should be for tensors of one
            element, which otherwise never move.

    Raises:
        TypeError: `optimizer` is no torch optimizer.
        P2KError: on `step`, a gradient is sparse or complex.

    Source: prieto2025grokking, eq:stablemax-orthograd.
    Chapter: stablemax
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"OrthoGrad: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        # Not the base class's own set-up: that would register the parameters a second time.
        self.__setstate__({"optimizer": optimizer})

    @property
    def param_groups(self) -> list[dict]:
        """The wrapped optimizer's parameter groups."""
        return self.optimizer.param_groups

    @property
    def state(self) -> dict:
        """The wrapped optimizer's state."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict:
        """The wrapped optimizer's defaults."""
        return self.optimizer.defaults

    def __getstate__(self) -> dict:
        """Pickle the wrapped optimizer only."""
        return {"optimizer": self.optimizer}

    def __repr__(self) -> str:
        return f"OrthoGrad({self.optimizer!r})"

    def state_dict(self) -> dict:
        """The wrapped optimizer's state dict."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict) -> None:
        """Load a state dict of the wrapped optimizer's kind."""
        self.optimizer.load_state_dict(state_dict)

    def add_param_group(self, param_group: dict) -> None:
        """Add a group to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all parameters."""
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of the wrapped optimizer on projected gradients; returns the closure's loss."""
        found: dict[Tensor, Tensor] = {}

        def projected() -> float:
            loss = closure()
            self._project(found)
            return loss

        try:
            if closure is None:
                self._project(found)
                return self.optimizer.step()
            return self.optimizer.step(projected)
        finally:
            for parameter, gradient in found.items():
                parameter.grad = gradient

    def _project(self, found: dict[Tensor, Tensor]) -> None:
        """Put projected gradients in place, and note in `found` those they replace."""
        for group in self.param_groups:
            for parameter in group["params"] if group.get("orthogonal", True) else ():
                gradient = parameter.grad
                if gradient is None:
                    continue
                if gradient.is_sparse or gradient.is_complex():
                    kind = "sparse" if gradient.is_sparse else "complex"
                    raise P2KError(f"OrthoGrad: gradients must be dense and real, got a {kind} one")
                found[parameter] = gradient
                parameter.grad = orthogonal_gradient(gradient, parameter.detach())
