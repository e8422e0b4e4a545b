"""Count what a Triton program loads and stores, element by element, while the interpreter runs it."""

from collections.abc import Callable
from unittest import mock


def count_elements(call: Callable[[], object]) -> tuple[int, int]:
    """Elements that `call` reads from and writes to memory through Triton programs; masked ones do not count.

    Needs interpreter mode. What torch itself moves in `call` is not seen: `p2k.core.traffic` counts that.
    """
    from triton.runtime.interpreter import InterpreterBuilder

    counted = {"read": 0, "written": 0}

    def counting(kind: str, method: Callable, position: int) -> Callable:
        def wrapped(self, *arguments):
            counted[kind] += int(arguments[position].data.sum())
            return method(self, *arguments)

        return wrapped

    with mock.patch.multiple(
        InterpreterBuilder,
        create_masked_load=counting("read", InterpreterBuilder.create_masked_load, 1),
        create_masked_store=counting("written", InterpreterBuilder.create_masked_store, 2),
    ):
        call()
    return counted["read"], counted["written"]
