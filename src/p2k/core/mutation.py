"""Planted bugs: a test suite is believed once it has caught the bugs that were put in on purpose.

A mutant edits the source of a module in one place and is loaded beside the original. An edit that does not apply
raises, so a mutant cannot silently stop being one.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType

from p2k.core.interpreter import quick_calls

_serial = itertools.count()


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One planted bug.

    Args:
        find: text of the original source.
        replace: what takes its place.
        why: the mistake a programmer would have made.
        count: how often `find` occurs; every occurrence is replaced.
    """

    find: str
    replace: str
    why: str
    count: int = 1


def mutated_source(source: str, mutant: Mutant) -> str:
    """Apply the edit.

    Raises:
        ValueError: `find` does not occur exactly `count` times, or the edit changes nothing.
    """
    found = source.count(mutant.find)
    if found != mutant.count:
        raise ValueError(f"mutant {mutant.why!r}: expected {mutant.count} x {mutant.find!r}, found {found}")
    if mutant.find == mutant.replace:
        raise ValueError(f"mutant {mutant.why!r}: the edit changes nothing")
    return source.replace(mutant.find, mutant.replace)


@contextlib.contextmanager
def mutated(module: ModuleType, mutant: Mutant) -> Iterator[ModuleType]:
    """The module with the bug in it, loaded as a module of its own; the original stays as it is."""
    source = mutated_source(Path(module.__file__).read_text(), mutant)
    name = f"{module.__name__.rpartition('.')[2]}_mutant_{next(_serial)}"
    with tempfile.TemporaryDirectory() as folder:
        # Triton reads a program's source from its file, again at the first launch.
        path = Path(folder, f"{name}.py")
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = broken = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(broken)
            yield broken
        finally:
            del sys.modules[name]


def survivors(module: ModuleType, mutants: Iterable[Mutant], probe: Callable[[ModuleType], bool]) -> list[Mutant]:
    """The mutants that `probe` does not catch: it returns True when the module it is given is wrong.

    Raises:
        ValueError: the probe calls the unedited module wrong, so that it proves nothing; or an edit does not apply.
    """
    if probe(module):
        raise ValueError(f"the probe rejects {module.__name__} itself, so it cannot judge mutants of it")
    alive = []
    with quick_calls():
        for mutant in mutants:
            with mutated(module, mutant) as broken:
                if not probe(broken):
                    alive.append(mutant)
    return alive
