"""The digest moves with everything that can change an output, and says what moved."""

import nbformat
import pytest

from p2k.book.check import check_chapter
from p2k.book.notebook import read_notebook
from p2k.book.provenance import changed_parts, chapter_digest, read_provenance
from p2k.core.errors import P2KError

LABELS = ["eq:tiny-double"]


@pytest.fixture
def notebook_path(root):
    path = root / "notebooks" / "tiny.ipynb"
    notebook = read_notebook(root, "tiny")
    notebook.cells[3].source = "from p2k.nn.tiny import double\ndouble(2)  # four"
    nbformat.write(notebook, path)
    return path


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_fresh_stamp_is_fresh(root, notebook_path, stamped):
    stamped(LABELS)
    assert changed_parts(root, "tiny") == []
    assert read_provenance(root, "tiny").digest == chapter_digest(root, "tiny", "cpu")


@pytest.mark.parametrize(("old", "new"), [("by hand", "by machine"), ("Twice x.", "x twice."), ("Doubling", "Two")])
def test_a_comment_or_docstring_makes_nothing_stale(root, notebook_path, stamped, old, new):
    stamped(LABELS)
    edit(root / "src" / "p2k" / "nn" / "tiny.py", old, new)
    assert changed_parts(root, "tiny") == []


def test_prose_makes_nothing_stale(root, notebook_path, stamped):
    stamped(LABELS)
    edit(notebook_path, "# Tiny", "# Tiny, again")
    assert changed_parts(root, "tiny") == []


@pytest.mark.parametrize(
    ("name", "old", "new", "changed"),
    [
        ("src/p2k/nn/tiny.py", "2 * x", "3 * x", "src/p2k/nn/tiny.py"),
        ("book/profiles.yml", "cpu: {seeds: 5}", "cpu: {seeds: 6}", "book/profiles.yml cpu"),
        ("notebooks/tiny.ipynb", "double(2)", "double(3)", "notebooks/tiny.ipynb code"),
    ],
)
def test_an_edit_is_named_with_its_chapter(root, notebook_path, stamped, name, old, new, changed):
    stamped(LABELS)
    edit(root / name, old, new)
    assert changed_parts(root, "tiny") == [changed]
    stale = [gap for gap in check_chapter(root, "tiny") if "stale" in gap]
    assert stale == [f"chapter tiny is stale, changed since its run: {changed}: p2k run tiny"]


def test_a_new_record_makes_the_page_that_draws_it_stale(root, notebook_path, stamped):
    stamped(LABELS)
    (root / "book" / "results" / "tiny").mkdir(parents=True)
    (root / "book" / "results" / "tiny" / "a.json").write_text("{}")
    assert changed_parts(root, "tiny") == ["book/results/tiny/a.json"]


def test_a_benchmark_of_the_op_counts_where_the_code_names_the_folder(root, notebook_path, stamped):
    folder = root / "book" / "results" / "benchmarks" / "cpu"
    folder.mkdir(parents=True)
    stamped(LABELS)
    (folder / "tiny-columns4.json").write_text("{}")
    assert changed_parts(root, "tiny") == []
    notebook = read_notebook(root, "tiny")
    notebook.cells[3].source += '\nfolder = "benchmarks"'
    nbformat.write(notebook, notebook_path)
    stamped(LABELS)
    assert changed_parts(root, "tiny") == []
    (folder / "tiny.part-columns4.json").write_text("{}")
    (folder / "tiny_bits-columns4.json").write_text("{}")
    assert changed_parts(root, "tiny") == ["book/results/benchmarks/cpu/tiny.part-columns4.json"]


def test_a_hand_edited_output_is_detected(root, notebook_path, stamped):
    stamped(LABELS)
    notebook = read_notebook(root, "tiny")
    notebook.cells[3].outputs = [nbformat.v4.new_output("stream", text="accuracy 99\n")]
    nbformat.write(notebook, notebook_path)
    assert changed_parts(root, "tiny") == ["notebooks/tiny.ipynb outputs"]


def test_another_profile_or_module_does_not_count(root, notebook_path, stamped):
    stamped(LABELS)
    edit(root / "book" / "profiles.yml", "gpu: {seeds: 5}", "gpu: {seeds: 9}")
    (root / "src" / "p2k" / "nn" / "helper.py").write_text("x = 1\n")
    assert changed_parts(root, "tiny") == []


def test_an_injected_cell_does_not_count(root, notebook_path):
    digest = chapter_digest(root, "tiny", "cpu")
    notebook = read_notebook(root, "tiny")
    notebook.cells.insert(2, nbformat.v4.new_code_cell("seeds = 1", metadata={"tags": ["injected-parameters"]}))
    nbformat.write(notebook, notebook_path)
    assert chapter_digest(root, "tiny", "cpu") == digest


def test_a_notebook_without_a_record_has_none(root):
    assert read_provenance(root, "tiny") is None
    assert read_provenance(root, "nope") is None
    assert changed_parts(root, "tiny") is None


def test_a_malformed_record_counts_as_none(root, stamped):
    stamped(LABELS, unknown=1)
    assert read_provenance(root, "tiny") is None


def test_a_file_that_is_no_notebook_is_refused(root, notebook_path):
    notebook_path.write_text("not json")
    with pytest.raises(P2KError, match="is not a notebook"):
        read_notebook(root, "tiny")
