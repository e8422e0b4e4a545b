"""The package reference: one page per floor, written from the package at build time and linked to the chapters."""

import ast
import re
from pathlib import Path

from sphinx.application import Sphinx

# Launchers and jitted programs stand behind the public function of their op; chapters show their source.
INTERNAL = {"kernel", "__main__"}
CITATION_KEY = re.compile(r"[a-z]+\d{4}\w*")


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
    body = ast.parse(path.read_text(encoding="utf8")).body
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [item for item in body if isinstance(item, kinds) and item.name[0] != "_" and ast.get_docstring(item)]


def chapter_objects(root: Path, slug: str) -> list[str]:
    """Return the dotted names of all documented objects whose docstring says `Chapter: <slug>`."""
    wanted = re.compile(rf"^Chapter:\s*{re.escape(slug)}\.?$", re.MULTILINE)
    floors = sorted(path.name for path in (root / "src" / "p2k").iterdir() if path.is_dir())
    modules = [module for floor in floors for module in public_modules(root, floor)]
    return [
        f"{name}.{item.name}"
        for name, path in modules
        for item in public_definitions(path)
        if wanted.search(ast.get_docstring(item))
    ]


def write_reference(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace the line `% p2k-api: <floor>` of a page by a table of what the floor offers and its modules."""
    source[0] = re.sub(
        r"^% p2k-api: (\w+)$", lambda match: reference_page(Path(app.srcdir), match[1]), source[0], flags=re.M
    )


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


def reference_pages(app: Sphinx, env: object, added: set, changed: set, removed: set) -> list[str]:
    """Name the pages to read again at every build: new modules appear on them."""
    return sorted(docname for docname in env.found_docs if docname.startswith("book/api/"))


def _source_role(env: object, item: str) -> str:
    """A citation key, an equation label of a built chapter, or the words as they stand."""
    if CITATION_KEY.fullmatch(item):
        return f":cite:t:`{item}`"
    slugs = (doc.removeprefix("notebooks/") for doc in env.found_docs if doc.startswith("notebooks/"))
    if any(item.startswith(f"eq:{slug}-") for slug in slugs):
        return f"equation :eq:`{item}`"
    return f"``{item}``" if item.startswith("eq:") else item


def link_docstring(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Turn the `Source:` and `Chapter:` lines of a docstring into fields with links."""
    linked = []
    for line in lines:
        if not re.match(r"(Source|Chapter):", line):
            linked.append(line)
            continue
        source = re.search(r"Source:\s*(.+?)\.(?:\s|$)", line)
        chapter = re.search(r"Chapter:\s*([\w-]+)", line)
        if source:
            linked.append(":Source: " + ", ".join(_source_role(app.env, item) for item in source[1].split(", ")))
        if chapter:
            page = f"notebooks/{chapter[1]}"
            linked.append(f":Chapter: :doc:`/{page}`" if page in app.env.found_docs else f":Chapter: {chapter[1]}")
    lines[:] = linked


def setup(app: Sphinx) -> dict:
    """Register the hooks; docstring links come after napoleon, which has priority 500."""
    app.connect("source-read", write_reference)
    app.connect("env-get-outdated", reference_pages)
    app.connect("autodoc-process-docstring", link_docstring, priority=600)
    return {"version": "1", "parallel_read_safe": False}
