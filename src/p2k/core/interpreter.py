"""Triton's CPU interpreter without the work that it repeats."""

import contextlib
import functools
import inspect
from collections.abc import Iterator


@contextlib.contextmanager
def quick_calls() -> Iterator[None]:
    """Patch `triton.language` once per launch here, not again at every call of a helper inside a program.

    The interpreter replaces the language's operations while a kernel runs, and looks through all of them again
    whenever a program calls another function: a third of its time in programs with small helpers. Results are the
    same bit for bit. Without Triton, or with a version that is built otherwise, this does nothing.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:
        interpreter = None
    if not hasattr(interpreter, "_LangPatchScope"):
        yield
        return
    patch, language = interpreter._patch_lang, interpreter.tl

    @functools.cache
    def modules_of(function) -> list:
        values = [value for value in function.__globals__.values() if inspect.ismodule(value)]
        return [value for value in values if value in (language, language.core)]

    @functools.wraps(patch)
    def patch_what_is_not(function):
        # A replaced operation is no longer marked as one of the language's own.
        if any(language.core.is_builtin(module.load) for module in modules_of(function)):
            return patch(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = patch_what_is_not
    try:
        yield
    finally:
        interpreter._patch_lang = patch
