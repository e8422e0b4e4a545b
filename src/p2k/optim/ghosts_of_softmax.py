"""A step controller around any optimizer: no pair of logits moves apart by more than a set multiple of pi in one step.

The inner optimizer proposes a step, the logits' first-order change along it is measured on the batch, and the step is
shortened where the largest spread of these changes exceeds ``max_ratio * pi``. That is the norm clip
``min(1, radius / length)`` of the source: the length cancels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.optim import Optimizer

from p2k.core.checks import check_positive
from p2k.core.errors import P2KError
from p2k.linalg.ghosts_of_softmax import step_ratio

__all__ = ["RadiusController", "logit_change", "logit_change_by_difference"]

# (module, parameters at the start, step, inputs, output -> logits) -> first-order change of the logits
Measure = Callable[[nn.Module, dict[str, Tensor], dict[str, Tensor], tuple, Callable[[Any], Tensor]], Tensor]


def logit_change(
    module: nn.Module,
    parameters: dict[str, Tensor],
    step: dict[str, Tensor],
    inputs: tuple,
    logits: Callable[[Any], Tensor] = lambda output: output,
) -> Tensor:
    """First-order change of the logits over a step, exact: one Jacobian-vector product in forward mode.

    It costs about two forward passes in time and keeps no activations for a backward pass. Every operation of the
    module needs a forward-mode derivative.

    Args:
        module: evaluated in the mode it is in; its parameters, buffers and the random state are left alone.
        parameters: values by name at which to start.
        step: change of each of them.
        inputs: positional arguments of the module.
        logits: picks the logits, ``[..., classes]``, from the module's output.

    Source: sao2026ghosts, eq:ghosts-of-softmax-slopes.
    Chapter: ghosts-of-softmax
    """

    def run(values: dict[str, Tensor]) -> Tensor:
        return logits(functional_call(module, (values, _buffers(module)), inputs))

    with torch.random.fork_rng(devices=_devices(parameters)):
        return jvp(run, (parameters,), (step,))[1]


def logit_change_by_difference(
    module: nn.Module,
    parameters: dict[str, Tensor],
    step: dict[str, Tensor],
    inputs: tuple,
    logits: Callable[[Any], Tensor] = lambda output: output,
) -> Tensor:
    """The same by a forward difference: two passes without gradients, for modules without forward-mode derivatives.

    The difference is taken over a stretch of ``sqrt(eps)`` of the parameters' length, so about half the digits hold.
    Dropout draws the same mask in both passes. Arguments as in `logit_change`.

    Source: sao2026ghosts, eq:ghosts-of-softmax-slopes.
    Chapter: ghosts-of-softmax
    """
    length, size = (math.hypot(*(t.norm().item() for t in group.values())) for group in (step, parameters))
    if length == 0:
        stretch = 0.0
    else:
        stretch = math.sqrt(torch.finfo(next(iter(step.values())).dtype).eps) * max(size, 1.0) / length
    found = []
    for share in (0.0, stretch):
        values = {name: value + share * step[name] for name, value in parameters.items()}
        with torch.no_grad(), torch.random.fork_rng(devices=_devices(parameters)):
            found.append(logits(functional_call(module, (values, _buffers(module)), inputs)))
    return (found[1] - found[0]) / (stretch or 1.0)


class RadiusController(Optimizer):
    """Let `optimizer` propose a step and shorten it to `max_ratio` radii of the softmax's Taylor series.

    Parameter groups and state are those of the inner optimizer, so schedulers may be attached to either. A step within
    the limit is left exactly as the inner optimizer made it. The inner state (momenta) does not learn of a shortened
    step. Memory: one copy of the parameters and, while it is measured, two of the step. Time: one `measure`, and two
    numbers fetched from the device, however many parameters there are.

    Args:
        optimizer: any optimizer of dense real parameters.
        module: the model that holds every optimized parameter and maps a batch to logits.
        max_ratio: largest step in units of the radius bound, ``> 0`` and finite; 1 is the source's.
        logits: picks the logits, ``[..., classes]`` with two classes or more, from the module's output. Leave out
            padded tokens here: the largest spread decides.
        measure: `logit_change` or `logit_change_by_difference`.
        reduce: applied to a 0-d tensor, the step's ratio up to a factor that replicas share. Under data parallelism
            pass an all-reduce with MAX, or the replicas drift apart.

    Raises:
        TypeError: `optimizer` is no Optimizer, or a parameter is complex.
        ValueError: `max_ratio` out of range, or an optimized parameter that is not the module's.

    Source: sao2026ghosts, eq:ghosts-of-softmax-controller.
    Chapter: ghosts-of-softmax
    """

    def __init__(
        self,
        optimizer: Optimizer,
        module: nn.Module,
        *,
        max_ratio: float = 1.0,
        logits: Callable[[Any], Tensor] = lambda output: output,
        measure: Measure = logit_change,
        reduce: Callable[[Tensor], Tensor] = lambda ratio: ratio,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"RadiusController: optimizer must be a torch Optimizer, got {type(optimizer).__name__}")
        check_positive("RadiusController", max_ratio=max_ratio)
        self.optimizer, self.module, self.max_ratio = optimizer, module, max_ratio
        self._logits, self._measure, self._reduce = logits, measure, reduce
        #: Ratio that the last step would have had, NaN before the first; and the share of it that was taken.
        self.last_ratio, self.last_scale = math.nan, 1.0
        _check_parameters(module, optimizer.param_groups)
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self._share_state()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None, *, inputs: Tensor | Sequence[Any] = ()) -> Any:
        """Take one controlled step and return what the inner optimizer's step returns.

        Args:
            closure: handed to the inner optimizer.
            inputs: the batch that the gradient came from: a tensor, or the module's positional arguments.

        Raises:
            ValueError: no inputs, or logits that are not ``[..., classes]`` with two classes and an example.
            RuntimeError: a gradient is sparse.
            P2KError: the proposed step or the logits are not finite; the parameters are put back first.
        """
        inputs = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
        if not inputs:
            raise ValueError("RadiusController.step: inputs must hold the batch, got none")
        owned = {id(p) for group in self.param_groups for p in group["params"]}
        live = {name: p for name, p in self.module.named_parameters() if id(p) in owned}
        if any(p.grad is not None and p.grad.layout != torch.strided for p in live.values()):
            raise RuntimeError("RadiusController does not support sparse gradients")
        start = {name: p.detach().clone() for name, p in live.items()}
        result = self.optimizer.step(closure)
        change = {name: p.detach() - start[name] for name, p in live.items()}
        self.last_ratio = self._ratio(live, start, change, inputs)
        self.last_scale = min(1.0, self.max_ratio / self.last_ratio) if self.last_ratio > 0 else 1.0
        if self.last_ratio > self.max_ratio:
            for name, p in live.items():
                p.copy_(start[name] + self.last_scale * change[name])
        return result

    def _ratio(
        self, live: dict[str, Tensor], start: dict[str, Tensor], change: dict[str, Tensor], inputs: tuple
    ) -> float:
        """Length of the proposed step in radii; puts the parameters back before it raises."""
        size = _largest(change)
        if size == 0:
            return 0.0
        ratio = math.nan
        if math.isfinite(size):
            # The derivative is linear in the step: a step of size 1 cannot overflow on the way.
            unit = {name: t / size for name, t in change.items()}
            moved = self._measure(self.module, start, unit, inputs, self._logits)
            if not moved.is_floating_point() or moved.ndim < 1 or moved.shape[-1] < 2 or moved.numel() == 0:
                self._restore(live, start)
                raise ValueError(
                    f"RadiusController.step: logits must be floating point [..., classes] with two classes and an "
                    f"example, got {moved.dtype} {tuple(moved.shape)}"
                )
            ratio = size * self._reduce(step_ratio(moved)).item()
        if not math.isfinite(ratio):
            self._restore(live, start)
            raise P2KError(
                "RadiusController.step: the proposed step or the logits are not finite; the parameters are as before "
                "the step, the inner optimizer's state may not be"
            )
        return ratio

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to the inner optimizer; errors as in the constructor."""
        if self.__dict__.get("_sharing"):
            group = dict(param_group)
            single = isinstance(group["params"], Tensor)
            group["params"] = [group["params"]] if single else list(group["params"])
            _check_parameters(self.module, [group])
            self.optimizer.add_param_group(group)
        else:
            super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, and `max_ratio` under the key ``controller``."""
        return {**self.optimizer.state_dict(), "controller": {"max_ratio": self.max_ratio}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or of the inner optimizer's alone."""
        inner = {key: value for key, value in state_dict.items() if key != "controller"}
        self.optimizer.load_state_dict(inner)
        self.max_ratio = state_dict.get("controller", {}).get("max_ratio", self.max_ratio)
        self._share_state()

    def __getstate__(self) -> dict[str, Any]:
        """Everything, where torch's own keeps the groups and the state only: copies stay whole."""
        return dict(self.__dict__)

    def _share_state(self) -> None:
        # One list and one mapping for both, so that a scheduler or a checkpoint of either sees the same.
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state
        self._sharing = True

    @staticmethod
    def _restore(live: dict[str, Tensor], start: dict[str, Tensor]) -> None:
        for name, p in live.items():
            p.copy_(start[name])


def _check_parameters(module: nn.Module, groups: Sequence[dict[str, Any]]) -> None:
    known = {id(p) for p in module.parameters()}
    for p in (p for group in groups for p in group["params"]):
        if p.is_complex():
            raise TypeError(f"RadiusController: parameters must be real, got {p.dtype}")
        if id(p) not in known:
            raise ValueError(f"RadiusController: a parameter of shape {tuple(p.shape)} is not in the module")


def _largest(tensors: dict[str, Tensor]) -> float:
    """Largest modulus of an entry, NaN if any is NaN, in one transfer from the device; 0 without entries."""
    sizes = [t.abs().amax() for t in tensors.values() if t.numel()]
    return torch.stack([size.to(sizes[0].device) for size in sizes]).amax().item() if sizes else 0.0


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    """Copies, so that a batch norm in training mode updates its running statistics once per step and not twice."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def _devices(parameters: dict[str, Tensor]) -> list[torch.device]:
    return sorted({p.device for p in parameters.values() if p.device.type == "cuda"}, key=str)
