"""Count the bytes that eager torch moves through memory and holds there, operation by operation."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Traffic:
    """Bytes read and written by a computation, and how many operations (kernel launches on a GPU) it took."""

    read: int
    written: int
    launches: int

    @property
    def total(self) -> int:
        return self.read + self.written


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.read = self.written = self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # A view describes memory differently and moves no byte.
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.read += _bytes(tree_leaves((args, kwargs)))
            self.written += _bytes(tree_leaves(result))
            self.launches += 1
        return result


def _bytes(leaves: list) -> int:
    """Bytes behind the tensors; a broadcast dimension (stride 0) is stored and moved once."""
    total = 0
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            elements = 1
            for size, stride in zip(leaf.shape, leaf.stride(), strict=True):
                elements *= size if stride else 1
            total += elements * leaf.element_size()
    return total


def count_traffic(function: Callable[..., object], *args: object) -> Traffic:
    """Run `function(*args)` and count what each eager operation reads and writes.

    Every operand counts once per operation, as it does when tensors exceed the cache. Run a backward pass inside
    `function` to have it counted too.
    """
    with _Counter() as counter, torch.enable_grad():
        function(*args)
    return Traffic(counter.read, counter.written, counter.launches)


class _LiveBytes(TorchDispatchMode):
    """Follow every storage made while active, until it is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in known:
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen[key] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self.live -= self.seen.pop(key, 0)


def peak_memory(function: Callable[..., object], *args: object) -> int:
    """Largest number of bytes that tensors made by `function(*args)` occupy at once, on any device.

    Inputs do not count, results do. Buffers that an operation allocates and frees inside itself are not seen.
    """
    with _LiveBytes() as live, torch.enable_grad():
        function(*args)
    return live.peak
