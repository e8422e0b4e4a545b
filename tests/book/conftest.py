"""A small checkout with one chapter, cheap enough to run for real."""

from dataclasses import asdict
from pathlib import Path

import nbformat
import pytest

from p2k.book.provenance import Provenance, chapter_parts, digest_of

CATALOGUE = """parts:
  A: "First part"
  B: "Second part"
maps:
  chart:
    title: "Several papers on one page"
    part: B
shared:
  nn: {helper: "used by two chapters"}
papers:
  tiny:
    title: "A tiny paper"
    part: A
    kind: method
    date: 2026-01-02
    arxiv: "2601.00001"
    authors: ["A. Author"]
    bib: author2026tiny
    floors: [nn, notebook]
  # kept as it is
  later-one:
    title: "A later paper"
    part: B
    kind: theory
    arxiv: "2601.00002"
"""
TOC = (
    "format: jb-book\nroot: book/intro\nparts:\n  - caption: First part\n    chapters:\n      - file: notebooks/tiny\n"
)
BIB = "@article{author2026tiny,\n  title = {A tiny paper},\n  eprint = {2601.00001},\n}\n"
MODULE = '"""Doubling.\n\nChapter: tiny\n"""\n\n\ndef double(x):\n    """Twice x."""\n    return 2 * x  # by hand\n'
TEXT = "$$y = 2x$$ (eq:tiny-double)"
CODE = """from p2k.book.claims import claim
from p2k.core.seeding import generator
claim("eq:tiny-double", 2 * 3.0, 6.0)
claim("test:tiny-float64", 1.0 + 1e-15, 1.0, 1e-13)
print(profile, seeds)"""


def store(root: Path, *, code: str = CODE) -> Path:
    """Store a chapter that was never run."""
    cells = [
        nbformat.v4.new_markdown_cell("# Tiny\n\narXiv: 2601.00001", id="tiny-0"),
        nbformat.v4.new_code_cell('profile = "cpu"\nseeds = 5', id="tiny-1", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_markdown_cell(TEXT, id="tiny-2"),
        nbformat.v4.new_code_cell(code, id="tiny-3"),
    ]
    kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    path = root / "notebooks" / "tiny.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernelspec}), path)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkout in a folder of its own: package sources only as far as the digest needs them."""
    texts = {
        "book/catalogue.yml": CATALOGUE,
        "book/profiles.yml": "tiny:\n  smoke: {seeds: 2}\n  cpu: {seeds: 5}\n  gpu: {seeds: 5}\n",
        "book/references.bib": BIB,
        "_toc.yml": TOC,
        "src/p2k/nn/tiny.py": MODULE,
        "src/p2k/nn/helper.py": "",
        "tests/nn/test_tiny.py": "",
    }
    for name, text in texts.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "notebooks").mkdir()
    store(tmp_path)
    return tmp_path


@pytest.fixture
def stamped(root: Path):
    """Function that stores the chapter as if a run had made these claims, without a kernel."""

    def stamp(labels: list[str], *, verdict: str = "holds", seconds: float = 1.0, **changes) -> None:
        notebook = nbformat.read(root / "notebooks" / "tiny.ipynb", as_version=4)
        parts = chapter_parts(root, "tiny", "cpu", notebook)
        claims = [{"label": label, "verdict": verdict, "tolerance": "", "note": ""} for label in labels]
        record = Provenance("cpu", "cpu", "a CPU", {}, "2026-01-02", seconds, digest_of(parts), (), parts)
        notebook.metadata["p2k"] = {**asdict(record), "claims": claims, **changes}
        nbformat.write(notebook, root / "notebooks" / "tiny.ipynb")

    return stamp


@pytest.fixture
def write_chapter(root: Path):
    """Function that stores the chapter with other code."""
    return lambda code: store(root, code=code)
