"""Reading and writing a chapter's notebook, and finding the displayed equations in it."""

import os
import re
from pathlib import Path

from nbformat import NotebookNode, read, writes
from nbformat.reader import NotJSONError

from p2k.core.errors import P2KError

_PLAIN_FENCE = re.compile(r"^(`{3,}|~{3,})(?!\{)[^\n]*\n.*?^\1[ \t]*$", re.M | re.S)
_INLINE_CODE = re.compile(r"`[^`\n]+`")
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
    path = notebook_path(root, slug)
    if not path.is_file():
        raise P2KError(f"chapter {slug!r} has no notebooks/{slug}.ipynb: `p2k new {slug}` writes one")
    try:
        return read(path, as_version=4)
    except (NotJSONError, ValueError) as error:
        raise P2KError(f"notebooks/{slug}.ipynb is not a notebook: {error}") from error


def write_atomic(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_notebook(path: Path, notebook: NotebookNode) -> None:
    """Write a notebook atomically, ending in a newline."""
    write_atomic(path, writes(notebook).rstrip("\n") + "\n")


def tagged(cell: NotebookNode, tag: str) -> bool:
    """True when a cell carries the tag."""
    return tag in cell.metadata.get("tags", [])


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells that belong to the chapter: all but papermill's injected ones."""
    return [cell for cell in notebook.cells if cell.cell_type == "code" and not tagged(cell, "injected-parameters")]


def prose(notebook: NotebookNode) -> str:
    """All markdown of a notebook, without plain code blocks and inline code."""
    text = "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return _INLINE_CODE.sub("", _PLAIN_FENCE.sub("", text))


def equation_labels(notebook: NotebookNode) -> list[str | None]:
    """The label of each displayed equation in reading order, None for an unlabelled one."""
    labels = []
    for match in _EQUATION.finditer(prose(notebook)):
        option = re.search(r"^[ \t]*:label:[ \t]*(\S+)", match["body"] or "", re.M)
        labels.append(option[1] if option else match["label"])
    return labels
