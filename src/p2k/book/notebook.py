"""Reading a chapter's notebook, and finding the displayed equations in it."""

import ast
import re
from pathlib import Path

from nbformat import NotebookNode, read
from nbformat.reader import NotJSONError

from p2k.core.errors import P2KError

_CODE = re.compile(r"^(`{3,}|~{3,})[^\s`{][^\n]*\n.*?^\1[ \t]*$|(?<!`)`[^`\n]+`(?!`)", re.M | re.S)
_EQUATION = re.compile(
    r"^[ \t]*(?P<fence>`{3,}|:{3,})\{math\}(?P<body>.*?)^[ \t]*(?P=fence)"
    r"|\$\$.+?\$\$(?:[ \t]*\((?P<label>[^)\s]+)\))?",
    re.M | re.S,
)


def notebook_path(root: Path, slug: str) -> Path:
    """Where a chapter's notebook is stored."""
    return root / "notebooks" / f"{slug}.ipynb"


def read_notebook(root: Path, slug: str) -> NotebookNode:
    """Read a chapter's stored notebook; P2KError where it is missing or not a notebook."""
    try:
        return read(notebook_path(root, slug), as_version=4)
    except FileNotFoundError as error:
        raise P2KError(f"chapter {slug!r} has no notebooks/{slug}.ipynb: `p2k new {slug}` writes one") from error
    except (NotJSONError, ValueError) as error:
        raise P2KError(f"notebooks/{slug}.ipynb is not a notebook: {error}") from error


def tagged(cell: NotebookNode, tag: str) -> bool:
    """True when a cell carries the tag."""
    return tag in cell.metadata.get("tags", [])


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells that belong to the chapter: all but papermill's injected ones."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and not tagged(cell, "injected-parameters")]


def prose(notebook: NotebookNode) -> str:
    """All markdown of a notebook."""
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def equation_labels(notebook: NotebookNode) -> list[str | None]:
    """The label of each displayed equation in reading order, None for an unlabelled one."""
    found = _EQUATION.finditer(_CODE.sub("", prose(notebook)))
    options = [(match, re.search(r"^[ \t]*:label:[ \t]*(\S+)", match["body"] or "", re.M)) for match in found]
    return [option[1] if option else match["label"] for match, option in options]


def declared(notebook: NotebookNode) -> dict[str, object]:
    """Names and literal values that the `parameters` cell assigns."""
    sources = [cell.source for cell in code_cells(notebook) if tagged(cell, "parameters")]
    try:
        assigned = [node for node in ast.parse("\n".join(sources)).body if isinstance(node, ast.Assign)]
        return {node.targets[0].id: ast.literal_eval(node.value) for node in assigned}
    except (SyntaxError, ValueError, AttributeError) as error:
        raise P2KError(f"the parameters cell must assign literals to names: {error}") from error
