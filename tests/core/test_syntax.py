"""The canonical form sees code and nothing else; the closure finds every import."""

import shutil
import subprocess
import sys

import pytest

from p2k.core import syntax

SOURCE = '''"""Module text."""
import math


class Box:
    """Class text."""

    def area(self, x: float = 1.0, *, unit=None) -> float:
        """Function text."""

        return math.pi * x**2 if not unit else f"{x!r:>8}{unit=}"  # why
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# why", "# other"),
        ("Function text", "Other text"),
        ('"""Class text."""', ""),
        ("Module text", "x"),
        ("\n\n", "\n"),
    ],
)
def test_canonical_ignores_comments_docstrings_and_layout(old, new):
    assert syntax.canonical(SOURCE.replace(old, new)) == syntax.canonical(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"), [("x**2", "x**3"), ("1.0", "True"), ("None", "False"), ("!r", "!s"), ("*, ", "")]
)
def test_canonical_sees_one_token(old, new):
    assert syntax.canonical(SOURCE.replace(old, new, 1)) != syntax.canonical(SOURCE)


def test_canonical_keeps_none_and_false_apart():
    assert len({syntax.canonical(f"x = {value}") for value in ("None", "False", "0", "''", "[]", "...")}) == 6


def test_canonical_returns_text_that_is_not_python():
    assert syntax.canonical("%matplotlib inline") == "%matplotlib inline"


def test_canonical_is_equal_on_every_installed_python():
    script = f"import sys; sys.path.insert(0, {str(syntax.__file__.rpartition('/')[0])!r}); import syntax\n"
    script += f"print(syntax.canonical({SOURCE!r}))"
    pythons = {sys.executable} | {shutil.which(f"python3.{minor}") for minor in (11, 12, 13, 14)} - {None}
    runs = [subprocess.run([python, "-c", script], capture_output=True, text=True) for python in sorted(pythons)]
    outputs = {run.stdout.strip() for run in runs if run.returncode == 0}  # a version manager's shim may exist unused
    assert outputs == {syntax.canonical(SOURCE)}


def test_without_docstrings_keeps_the_code():
    text = syntax.without_docstrings(SOURCE)
    assert "text" not in text
    assert "# why" in text
    assert syntax.canonical(text) == syntax.canonical(SOURCE)


def test_without_docstrings_keeps_a_body_that_is_only_a_docstring():
    assert syntax.without_docstrings('def f():\n    """Text."""') == 'def f():\n    """Text."""'


@pytest.fixture
def package(tmp_path):
    texts = {
        "pkg/__init__.py": "",
        "pkg/a.py": "from pkg.sub import deep\n",
        "pkg/lazy.py": "",
        "pkg/sub/__init__.py": "from . import sibling\n",
        "pkg/sub/sibling.py": "def f():\n    from ..lazy import g\n",
        "pkg/sub/deep.py": "import os, foreign\n",
        "pkg/unused.py": "",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_import_closure_follows_relative_lazy_and_package_imports(package):
    found = syntax.import_closure(package, "pkg", ["%magic", "import numpy\nif True:\n    import pkg.a as short"])
    names = {path.relative_to(package).as_posix() for path in found}
    every = {"__init__", "a", "lazy", "sub/__init__", "sub/sibling", "sub/deep"}
    assert names == {f"pkg/{name}.py" for name in every}


def test_import_closure_of_nothing_is_empty(package):
    assert syntax.import_closure(package, "pkg", ["x = 1"]) == set()
