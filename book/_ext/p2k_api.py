"""The package reference: one page per floor, written from the package at build time and linked to the chapters."""

import ast
import functools
import re
from pathlib import Path

from p2k_live import mark_live
from sphinx.application import Sphinx

# Launchers and jitted programs stand behind the public function of their op; chapters show their source.
INTERNAL = {"kernel", "registration", "__main__"}
# In the order in which a method is built.
FLOORS = ("ops", "linalg", "nn", "losses", "optim", "models", "data", "experiments", "core", "book")


def public_modules(root: Path, floor: str) -> list[tuple[str, Path]]:
    """Return (dotted name, file) of every public module on one floor, packages before their modules."""
    source = root / "src"
    found = {}
    for path in (source / "p2k" / floor).rglob("*.py"):
        parts = path.relative_to(source).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        if not any(part in INTERNAL or part.startswith("_") for part in parts):
            found[".".join(parts)] = path
    return sorted(found.items())


def public_definitions(path: Path) -> list[ast.FunctionDef | ast.ClassDef]:
    """Return the documented public functions and classes that a file defines at its top level."""
    return _documented(path.read_text(encoding="utf8"))


# Every chapter's card asks for all files of the package.
@functools.cache
def _documented(source: str) -> list[ast.FunctionDef | ast.ClassDef]:
    kinds = (ast.FunctionDef, ast.ClassDef)
    body = ast.parse(source).body
    return [item for item in body if isinstance(item, kinds) and item.name[0] != "_" and ast.get_docstring(item)]


def chapter_objects(root: Path, slug: str) -> list[str]:
    """Return the dotted names of all documented objects whose docstring says `Chapter: <slug>`."""
    wanted = re.compile(rf"^Chapter:\s*{re.escape(slug)}\.?$", re.MULTILINE)
    modules = [module for floor in FLOORS for module in public_modules(root, floor)]
    return [
        f"{name}.{item.name}"
        for name, path in modules
        for item in public_definitions(path)
        if wanted.search(ast.get_docstring(item))
    ]


def write_reference(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace the line `% p2k-api: <floor>` of a page by a table of what the floor offers and its modules."""
    if floor := re.search(r"^% p2k-api: (\w+)$", source[0], re.M):
        mark_live(app.env, docname)
        source[0] = source[0].replace(floor[0], reference_page(Path(app.srcdir), floor[1]))


def reference_page(root: Path, floor: str) -> str:
    """Return MyST with embedded autodoc for one floor."""
    contents = [(name, public_definitions(path)) for name, path in public_modules(root, floor)]
    contents = [(name, items) for name, items in contents if items]
    summary = [f"   {name}.{item.name}" for name, items in contents for item in items]
    if not summary:
        return "Nothing stands on this floor yet."
    text = ["```{eval-rst}", ".. autosummary::", "   :nosignatures:", "", *summary, "```", ""]
    for name, _ in contents:
        # A package may re-export names; each is documented once, where it is defined.
        automodule = [f".. automodule:: {name}", "   :members:", "   :ignore-module-all:", "   :show-inheritance:"]
        text += [f"## {name}", "", "```{eval-rst}", *automodule, "```", ""]
    return "\n".join(text)


def link_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Turn the `Source:` and `Chapter:` lines of a docstring into fields with links."""
    pages = app.env.found_docs

    def source(match: re.Match) -> str:
        return ":Source: " + _link_source(" ".join(match[1].split()), pages)

    def chapter(match: re.Match) -> str:
        page = f"notebooks/{match[1]}"
        return "\n:Chapter: " + (f":doc:`/{page}`" if page in pages else match[1])

    text = re.sub(r"^Source:\s(.+?)(?=\s+Chapter:|\n\s*\n|\Z)", source, "\n".join(lines), flags=re.M | re.S)
    lines[:] = re.sub(r"[ \t]*\bChapter:[ \t]*([\w-]+)\.?[ \t]*$", chapter, text, flags=re.M).split("\n")


def _link_source(text: str, pages: set[str]) -> str:
    """Link the citation keys and the labels of built chapters in a sentence; code in it stays as it is."""
    built = tuple(f"eq:{page.removeprefix('notebooks/')}-" for page in pages if page.startswith("notebooks/"))

    def role(match: re.Match) -> str:
        if match["key"]:
            return f":cite:t:`{match['key']}`"
        label = match["label"]
        return f"equation :eq:`{label}`" if label.startswith(built) else f"``{label}``"

    parts = re.split(r"(``.*?``)", text)
    parts[::2] = [re.sub(r"(?P<key>\b[a-z]+\d{4}[a-z0-9]*\b)|(?P<label>eq:[\w-]+)", role, part) for part in parts[::2]]
    return "".join(parts)


def setup(app: Sphinx) -> dict:
    """Register the hooks; docstring links come after napoleon, which has priority 500."""
    app.connect("source-read", write_reference)
    app.connect("autodoc-process-docstring", link_docstring, priority=600)
    return {"version": "1", "parallel_read_safe": False}
