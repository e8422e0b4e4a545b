"""Python source as data: a canonical form, the modules it imports, and the text without docstrings."""

import ast
import functools
import json
from pathlib import Path
from typing import Any


@functools.cache
def canonical(source: str) -> str:
    """Source as text that ignores layout, comments and docstrings and is equal on all Python versions.

    Text that is no Python (a cell with a magic) stands for itself.
    """
    try:
        return json.dumps(_dump(ast.parse(source)), separators=(",", ":"))
    except SyntaxError:
        return source


def import_closure(folder: Path, package: str, sources: list[str]) -> set[Path]:
    """Files of `package` below `folder` that the sources import, directly or not, anywhere in their text.

    Importing a module counts every package above it, because their `__init__.py` runs.
    """
    found: set[Path] = set()
    queue = [(source, "__main__") for source in sources]
    while queue:
        source, inside = queue.pop()
        for name in _imports(source, inside):
            base = folder / Path(*name.split("."))
            path = next((file for file in (base / "__init__.py", base.with_suffix(".py")) if file.is_file()), None)
            if name.partition(".")[0] != package or path is None or path in found:
                continue  # a foreign module, an attribute, or seen before
            found.add(path)
            home = name if path.name == "__init__.py" else name.rpartition(".")[0]
            queue.append((path.read_text(encoding="utf-8"), home))
    return found


def without_docstrings(source: str) -> str:
    """Cut every docstring and the blank line after it; a body that is only a docstring keeps it."""
    lines: list[str | None] = list(source.split("\n"))
    for node in ast.walk(ast.parse(source)):
        if _has_docstring(node) and len(node.body) > 1:
            start, end = node.body[0].lineno - 1, node.body[0].end_lineno
            end += end < len(lines) and lines[end] is not None and not lines[end].strip()
            lines[start:end] = [None] * (end - start)
    return "\n".join(line for line in lines if line is not None)


def _has_docstring(node: ast.AST) -> bool:
    holders = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    first = node.body[0] if isinstance(node, holders) and node.body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


def _dump(node: Any) -> Any:
    """Nested lists of a syntax tree. Empty fields are left out, because newer Pythons add such fields."""
    if isinstance(node, list):
        return [_dump(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    values = {name: value for name, value in ast.iter_fields(node) if name not in ("ctx", "kind", "type_comment")}
    if _has_docstring(node):
        values["body"] = node.body[1:]
    if not isinstance(node, ast.Constant):  # None and False are values there
        values = {name: value for name, value in values.items() if value is not None and value != []}
    return [type(node).__name__, {name: _dump(value) for name, value in sorted(values.items())}]


@functools.cache
def _imports(source: str, inside: str) -> set[str]:
    """Dotted names that a source in package `inside` may import, with the packages above them."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = inside.split(".")[: inside.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)}
