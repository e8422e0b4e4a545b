"""Each rule of a chapter can fail, and a complete chapter passes all of them."""

import nbformat
import pytest

from p2k.book.check import SECTIONS, check_book, check_chapter
from p2k.book.notebook import read_notebook

EXERCISE = "```{exercise}\n:label: ex-tiny-%d\nDo it.\n```\n```{solution} ex-tiny-%d\nDone.\n```"
SVG = nbformat.v4.new_output("display_data", data={"image/svg+xml": "<svg/>"})
TABLE = nbformat.v4.new_output("display_data", data={"text/markdown": "| quantity | gap | verdict |"})
FIGURE = {"mystnb": {"image": {"alt": "A line."}, "figure": {"caption": "It rises."}}}


@pytest.fixture
def complete(root, stamped):
    """Function that stores a complete chapter, changed by `change` before it is stamped."""

    def build(change=lambda notebook: None, **stamp):
        notebook, make = read_notebook(root, "tiny"), nbformat.v4
        names = [name for name in SECTIONS if name != "The kernel"]
        bodies = {"Where we differ, and why": "```{admonition} Here\nSize.\n```\n", "Exercises": ""}
        bodies["Exercises"] = "\n".join(EXERCISE % (number, number) for number in range(3))
        notebook.cells[0].source += " {cite}`author2026tiny`"
        notebook.cells += [make.new_markdown_cell(f"## {name}\n\n{bodies.get(name, '')}") for name in names]
        notebook.cells += [make.new_code_cell("x = 1", metadata={"tags": ["solution"]}) for _ in range(3)]
        notebook.cells.append(make.new_code_cell("draw()", metadata=FIGURE, outputs=[SVG, TABLE]))
        change(notebook)
        nbformat.write(notebook, root / "notebooks" / "tiny.ipynb")
        stamped(["eq:tiny-double"], **stamp)
        return check_chapter(root, "tiny")

    return build


def test_a_complete_chapter_lacks_nothing(complete):
    assert complete() == []


def last(notebook):
    return notebook.cells[-1]


def replace_text(old, new):
    def change(notebook):
        assert any(old in cell.source for cell in notebook.cells)
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)

    return change


def set_output(**data):
    return lambda notebook: last(notebook).outputs.append(nbformat.v4.new_output("display_data", data=data))


def set_stream(name, text):
    return lambda notebook: last(notebook).outputs.append(nbformat.v4.new_output("stream", name=name, text=text))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_text("# Tiny", "Tiny"), "no title, or no card"),
        (replace_text("2601.00001", "none"), "no title, or no card"),
        *[
            (replace_text(f"## {name}", "## Else"), f"section '## {name}' is missing")
            for name in SECTIONS
            if name != "The kernel"
        ],
        (replace_text("{admonition}", "{figure}"), "no box in 'Where we differ, and why'"),
        (replace_text("ex-tiny-0\nDo", "ex-tiny-0\nFILL: Do"), "fill in Do it."),
        (replace_text("```{exercise}\n:label: ex-tiny-2", "```{note}"), "2 exercises, 3 solutions and 3 code cells"),
        (replace_text("```{solution} ex-tiny-2", "```{note}"), "3 exercises, 2 solutions and 3 code cells"),
        (lambda notebook: notebook.cells[-2].metadata.clear(), "3 exercises, 3 solutions and 2 code cells"),
        (replace_text("eq:tiny-double)", "eq:other)"), "displayed equation with label eq:other"),
        (replace_text(" (eq:tiny-double)", ""), "displayed equation with label None"),
        (replace_text("(eq:tiny-double)", "(eq:tiny-half)"), "equation eq:tiny-half has neither claim nor reason"),
        (lambda notebook: last(notebook).outputs.pop(), "no results table with a verdict"),
        (lambda notebook: last(notebook).metadata.mystnb.pop("image"), "code cell 6 has a figure without alt"),
        (lambda notebook: last(notebook).metadata.mystnb.pop("figure"), "code cell 6 has a figure without caption"),
        (replace_text("seeds = 5", "seeds = 4"), "the parameters cell differs from the cpu profile"),
        (replace_text("draw()", "draw()\n" * 26), "code cell 6 is longer than 25 lines"),
        (replace_text("draw()", "def f():\n" + "    x = 1\n" * 10), "code cell 6 has f, longer than 10 lines"),
        (replace_text("draw()", "!pip install x"), "code cell 6 installs something"),
        (replace_text("draw()", "%time x"), "code cell 6 is not plain Python"),
        (set_stream("stderr", "warning"), "code cell 6 has an error or stderr output"),
        (set_stream("stdout", "in /home/me/x.py"), "code cell 6 shows an absolute path"),
        (set_output(**{"image/svg+xml": "x" * 200_001}), "code cell 6 has too large a image/svg+xml"),
        (set_output(**{"text/html": "x" * 1_000_001}), "larger than 1 MB"),
        (replace_text("author2026tiny", "nobody1900"), "book/references.bib: nobody1900 is missing"),
    ],
)
def test_each_rule_can_fail(complete, change, message):
    gaps = complete(change)
    assert any(message in gap for gap in gaps), gaps


def test_a_slow_run_and_another_profile_are_named(complete):
    assert complete(seconds=91.0) == ["chapter tiny took 91 s, expected at most 90"]
    assert complete(profile="smoke")[-1] == "chapter tiny has no stored run of the cpu profile: p2k run tiny"


def test_files_and_entries_are_looked_for(root, complete):
    complete()
    (root / "tests" / "nn" / "test_tiny.py").unlink()
    (root / "book" / "references.bib").write_text("@article{author2026tiny,\n  title = {x},\n}\n")
    (root / "book" / "profiles.yml").write_text("tiny:\n  smoke: {steps: 1}\n  cpu: {seeds: 5}\n")
    (root / "_toc.yml").write_text("parts: []\n")
    suffix = "is missing or has other parameters than cpu"
    assert check_chapter(root, "tiny") == [
        f"book/profiles.yml: tiny: profile smoke {suffix}",
        f"book/profiles.yml: tiny: profile gpu {suffix}",
        "_toc.yml: notebooks/tiny is missing",
        "tests/nn/test_tiny.py is missing",
        "book/references.bib: author2026tiny has neither doi nor eprint",
    ]


def test_the_book_names_orphans_and_absent_modules(root):
    assert check_book(root) == []
    (root / "src" / "p2k" / "nn" / "stray.py").write_text("")
    (root / "src" / "p2k" / "nn" / "helper.py").unlink()
    (root / "notebooks" / "stray.ipynb").write_text("{}")
    with (root / "book" / "profiles.yml").open("a") as profiles:
        profiles.write("stray: {}\n")
    (root / "_toc.yml").write_text("parts: []\n")
    assert check_book(root) == [
        "book/profiles.yml: stray: no chapter",
        "notebooks/stray.ipynb: no chapter or map of this name",
        "src/p2k/nn/helper: shared in book/catalogue.yml but missing",
        "src/p2k/nn/stray: in no paper's floors and not shared",
        "_toc.yml has the chapters [], the catalogue [('First part', 'tiny')]",
    ]


def test_a_map_needs_sources_and_a_notebook_but_no_arxiv_id(root, stamped):
    catalogue = root / "book" / "catalogue.yml"
    assert "book/catalogue.yml: chart: floors is missing" in check_chapter(root, "chart")
    catalogue.write_text(catalogue.read_text().replace("    part: B\n", "    part: B\n    floors: [notebook]\n", 1))
    notebook = read_notebook(root, "tiny")
    notebook.cells[0].source = "# Chart"
    nbformat.write(notebook, root / "notebooks" / "chart.ipynb")
    gaps = check_chapter(root, "chart")
    assert "book/catalogue.yml: chart: bib is missing" in gaps
    assert "_toc.yml: notebooks/chart is missing" in gaps
    assert not any(word in gap for gap in gaps for word in ("arXiv", "arxiv", "authors", "date"))
    catalogue.write_text(
        catalogue.read_text().replace("    floors: [notebook]\n", "    bib: [nobody2026]\n    floors: [notebook]\n", 1)
    )
    assert "book/references.bib: nobody2026 is missing" in check_chapter(root, "chart")
