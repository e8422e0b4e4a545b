"""`p2k new` writes all of a chapter or nothing, and `p2k check` then lists exactly what is left to do."""

import subprocess
import sys

import pytest
import yaml

from p2k.book import scaffold
from p2k.book.catalogue import load_catalogue
from p2k.book.check import check_book, check_chapter, toc_chapters
from p2k.core.errors import P2KError

# Everything that a fresh chapter `demo` on the floors ops and nn lacks.
EXPECTED = """book/catalogue.yml: demo: title is missing
book/catalogue.yml: demo: authors is missing
book/catalogue.yml: demo: date is missing
book/catalogue.yml: demo: arxiv is missing
book/catalogue.yml: demo: bib is missing
src/p2k/ops/demo/__init__.py: fill in what the operation computes.; one sentence, arguments, errors, Source and Chapter.
src/p2k/ops/demo/reference.py: fill in the paper's equations
src/p2k/ops/demo/kernel.py: fill in the Triton kernel
tests/ops/test_demo.py: fill in comparison with a closed form or a float64 reference; wrong shapes, dtypes and values
src/p2k/nn/demo.py: fill in what this module holds.; the method on floor nn
tests/nn/test_demo.py: fill in comparison with a closed form or a float64 reference; wrong shapes, dtypes and values
notebooks/demo.ipynb: no title, or no card with the paper's arXiv id below it
notebooks/demo.ipynb: fill in the paper's title
notebooks/demo.ipynb: fill in one sentence that says what the method does
notebooks/demo.ipynb: fill in authors, date and what the reader needs first. arXiv: FILL: arXiv id
notebooks/demo.ipynb: fill in a figure that shows what goes wrong without the method
notebooks/demo.ipynb: fill in definitions, propositions and proofs, each displayed equation labelled and claimed
notebooks/demo.ipynb: fill in the source of the package, shown beside its equation
notebooks/demo.ipynb: fill in bytes and operations, the source, the check against float64, resources, measurements
notebooks/demo.ipynb: fill in the smallest honest setting, seeds, intervals and the results table
notebooks/demo.ipynb: fill in why it works, or why it does not here
notebooks/demo.ipynb: fill in a box with deviations, ambiguities and slips
notebooks/demo.ipynb: fill in one to derive, one to implement, one to break the method, with executed solutions
notebooks/demo.ipynb: fill in versions, device, seeds, seconds and references
notebooks/demo.ipynb: no box in 'Where we differ, and why'
notebooks/demo.ipynb: 0 exercises, 0 solutions and 0 code cells tagged solution, expected at least 3 of each
notebooks/demo.ipynb: no displayed equation
notebooks/demo.ipynb: no results table with a verdict
chapter demo has no stored run of the cpu profile: p2k run demo""".splitlines()


def snapshot(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_new_chapter_lacks_exactly_what_is_left_to_fill(root):
    scaffold.new_chapter(root, "demo")
    assert check_chapter(root, "demo") == EXPECTED
    assert check_book(root) == []


def test_a_known_paper_keeps_its_entry_and_the_files_their_comments(root):
    written = scaffold.new_chapter(root, "later-one", floors=("losses",))
    paper = load_catalogue(root)["later-one"]
    assert (paper.title, paper.part, paper.floors) == ("A later paper", "B", ["losses", "notebook"])
    assert "  # kept as it is\n" in (root / "book" / "catalogue.yml").read_text()
    captions = [part["caption"] for part in yaml.safe_load((root / "_toc.yml").read_text())["parts"]]
    assert captions == ["First part", "Second part"]
    assert check_book(root) == []
    assert root / "src" / "p2k" / "losses" / "later_one.py" in written
    notebook = (root / "notebooks" / "later-one.ipynb").read_text()
    assert "# A later paper" in notebook
    assert "2601.00002" in notebook
    assert "## The kernel" not in notebook


def test_a_map_is_a_notebook_and_its_entries(root):
    written = scaffold.new_chapter(root, "chart")
    assert [path.name for path in written] == ["chart.ipynb", "catalogue.yml", "profiles.yml", "_toc.yml"]
    assert check_book(root) == []
    assert load_catalogue(root)["chart"].floors == ["notebook"]


def test_the_toc_keeps_the_order_of_the_parts(root):
    with (root / "_toc.yml").open("a") as toc:
        toc.write("  - caption: Reference\n    chapters:\n      - file: book/glossary\n")
    scaffold.new_chapter(root, "later-one", floors=("nn",))
    captions = [part["caption"] for part in yaml.safe_load((root / "_toc.yml").read_text())["parts"]]
    assert captions == ["First part", "Second part", "Reference"]


@pytest.mark.parametrize("slug", ["demo", "later-one"])
def test_a_paper_stands_before_the_maps_of_its_part(root, slug):
    scaffold.new_chapter(root, "chart")
    scaffold.new_chapter(root, slug, floors=("nn",), part="B")
    assert toc_chapters(root) == [("First part", "tiny"), ("Second part", slug), ("Second part", "chart")]
    assert check_book(root) == []


def test_a_paper_stands_where_the_catalogue_has_it(root):
    scaffold.new_chapter(root, "newest", floors=("nn",), part="B")
    scaffold.new_chapter(root, "later-one", floors=("nn",))
    assert [slug for _, slug in toc_chapters(root)] == ["tiny", "later-one", "newest"]
    assert check_book(root) == []


def test_the_new_tests_fail_until_they_are_filled(root):
    scaffold.new_chapter(root, "demo", floors=("nn",))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(root / "tests/nn/test_demo.py")]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert "2 failed" in run.stdout


@pytest.mark.parametrize(
    ("slug", "options", "message"),
    [
        ("Demo", {}, "slug must be lower-case"),
        ("../demo", {}, "slug must be lower-case"),
        ("1demo", {}, "slug must be lower-case"),
        ("demo-", {}, "slug must be lower-case"),
        ("demo", {"floors": ("attic",)}, "expected floors among"),
        ("demo", {"part": "Z"}, "expected floors among"),
        ("tiny", {}, "is begun already"),
        ("helper", {}, "src/p2k/nn/helper.py"),
    ],
)
def test_nothing_is_written_for_a_bad_request(root, slug, options, message):
    before = snapshot(root)
    with pytest.raises(P2KError, match=message):
        scaffold.new_chapter(root, slug, **options)
    assert snapshot(root) == before


def test_a_failure_half_way_undoes_everything(root, monkeypatch):
    before, write = snapshot(root), scaffold.write_atomic

    def fail_at_toc(path, text):
        if path.name == "_toc.yml" and "demo" in text:
            raise OSError("disk full")
        write(path, text)

    monkeypatch.setattr(scaffold, "write_atomic", fail_at_toc)
    with pytest.raises(OSError, match="disk full"):
        scaffold.new_chapter(root, "demo")
    assert snapshot(root) == before
