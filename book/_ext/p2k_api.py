"""The package reference: one page per floor, written from the package at build time and linked to the chapters."""

import ast
import re
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import nested_parse_with_titles

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


class PackageReference(SphinxDirective):
    """`{p2k-api} <floor>`: a table of what the floor offers, then every module with its members."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Write the page as MyST with embedded autodoc and parse it in place."""
        modules = public_modules(Path(self.env.srcdir), self.arguments[0])
        text = []
        for name, path in modules:
            members = [f"      ~{name}.{item.name}" for item in public_definitions(path)]
            # A package may re-export names; each is documented once, where it is defined.
            automodule = [f".. automodule:: {name}", "   :members:", "   :ignore-module-all:", "   :show-inheritance:"]
            table = [".. autosummary::", "   :nosignatures:", "", *(line[3:] for line in members)] if members else []
            text += [f"## `{name}`", "", "```{eval-rst}", *automodule, "```", ""]
            if len(members) > 2:
                text[-2:-2] = ["", *table]
        self.env.p2k_live = getattr(self.env, "p2k_live", set()) | {self.env.docname}
        section = nodes.section(document=self.state.document)
        self.content = type(self.content)("\n".join(text).splitlines(), source=self.get_source_info()[0])
        nested_parse_with_titles(self.state, self.content, section)
        return section.children


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
    """Register the directive and the docstring links, which run after napoleon (priority 500)."""
    app.add_directive("p2k-api", PackageReference)
    app.connect("autodoc-process-docstring", link_docstring, priority=600)
    return {"version": "1", "parallel_read_safe": False}
