"""Argument checks shared by the public functions. A message has the form `op: what was expected, what came`."""

import importlib
from types import ModuleType

from torch import Tensor

from p2k.core.errors import MissingDependency


def check_floating(op: str, **tensors: Tensor) -> None:
    """Raise TypeError unless every tensor has a floating dtype and all dtypes agree."""
    names = list(tensors)
    first = tensors[names[0]]
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {tensor.dtype}")
        if tensor.dtype != first.dtype:
            raise TypeError(f"{op}: {name} must have dtype {first.dtype} like {names[0]}, got {tensor.dtype}")


def check_same_device(op: str, **tensors: Tensor) -> None:
    """Raise ValueError unless all tensors live on one device."""
    names = list(tensors)
    first = tensors[names[0]]
    for name, tensor in tensors.items():
        if tensor.device != first.device:
            raise ValueError(f"{op}: {name} must be on {first.device} like {names[0]}, got {tensor.device}")


def check_shape(op: str, name: str, tensor: Tensor, *expected: tuple[int, ...]) -> None:
    """Raise ValueError unless `tensor` has one of the expected shapes."""
    if tuple(tensor.shape) not in expected:
        wanted = " or ".join(str(shape) for shape in expected)
        raise ValueError(f"{op}: {name} must have shape {wanted}, got {tuple(tensor.shape)}")


def check_positive(op: str, *, zero_allowed: bool = False, **values: float) -> None:
    """Raise ValueError unless every value is a finite number above zero (or zero, where allowed)."""
    for name, value in values.items():
        if not (value > 0 or (zero_allowed and value == 0)) or value == float("inf"):
            bound = ">= 0" if zero_allowed else "> 0"
            raise ValueError(f"{op}: {name} must be {bound} and finite, got {value}")


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional module or raise MissingDependency with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = f"{purpose} needs {module.partition('.')[0]}, which is not installed: pip install 'p2k[{extra}]'"
        raise MissingDependency(message) from error
