"""A run is stored whole or not at all, with its claims, and without a trace of the machine."""

import os

import pytest

from p2k.book import runner
from p2k.book.catalogue import chapter_status
from p2k.book.notebook import read_notebook
from p2k.book.provenance import changed_parts, read_provenance
from p2k.core.errors import P2KError

NETWORK = """import os, pathlib, socket, sys
print(os.environ["OMP_NUM_THREADS"], os.environ["P2K_ROOT"] != os.getcwd(), list(pathlib.Path.cwd().iterdir()))
print("noise", file=sys.stderr)
socket.create_connection(("192.0.2.1", 80), timeout=1)"""


def test_a_run_stores_outputs_claims_and_provenance(root):
    environment = dict(os.environ)
    path = runner.run_chapter(root, "tiny")
    assert dict(os.environ) == environment
    assert path == root / "notebooks" / "tiny.ipynb"
    notebook = read_notebook(root, "tiny")
    assert [cell.id for cell in notebook.cells] == ["tiny-0", "tiny-1", "tiny-2", "tiny-3"]
    assert notebook.cells[3].outputs[-1].text == "cpu 5\n"
    assert [notebook.cells[number].execution_count for number in (1, 3)] == [1, 2]
    assert notebook.cells[3].metadata.tags == ["nbval-check-output"]
    assert "papermill" not in notebook.metadata
    run = read_provenance(root, "tiny")
    assert [entry["label"] for entry in run.claims] == ["eq:tiny-double", "test:tiny-float64"]
    assert run.profile == "cpu"
    assert 0 < run.seconds < 60
    assert "src/p2k/book/claims.py" not in run.parts  # this checkout has no such file
    assert changed_parts(root, "tiny") == []
    assert runner.stale_chapters(root) == []
    assert chapter_status(root, "tiny") == "verified"
    assert str(root) not in path.read_text()


def test_a_smoke_run_leaves_the_stored_chapter_alone(root, write_chapter):
    write_chapter(code="from pathlib import Path\nPath('left.txt').write_text('x')\nprint(profile, seeds)")
    before = (root / "notebooks" / "tiny.ipynb").read_bytes()
    path = runner.run_chapter(root, "tiny", "smoke")
    assert path == root / "runs" / "tiny" / "smoke" / "tiny.ipynb"
    assert "smoke 2" in path.read_text()
    assert (path.parent / "left.txt").is_file()
    assert (root / "notebooks" / "tiny.ipynb").read_bytes() == before


def test_a_failing_cell_and_a_closed_network_leave_the_old_file(root, write_chapter):
    path = write_chapter(code=NETWORK)
    before = path.read_bytes()
    message = r"^tiny: cell 4 \('import os, .*'\): ConnectionRefusedError: 192\.0\.2\.1: the network is closed"
    with pytest.raises(runner.ChapterFailed, match=message):
        runner.run_chapter(root, "tiny")
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["tiny.ipynb"]
    assert not (root / "runs").exists()


@pytest.mark.parametrize(
    ("slug", "options", "message"),
    [
        ("nope", {}, "unknown chapter 'nope'"),
        ("later-one", {}, "has no profile 'cpu' for 'later-one'"),
        ("tiny", {"profile": "huge"}, "profile must be smoke, cpu, gpu, got 'huge'"),
        ("tiny", {"device": "abacus"}, "device must be auto, cpu"),
        ("tiny", {"profile": "gpu", "device": "cpu"}, "gpu profile of 'tiny' needs a CUDA GPU, got device cpu"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(root, slug, options, message):
    with pytest.raises(P2KError, match=message):
        runner.run_chapter(root, slug, **options)


def test_a_parameter_that_the_notebook_does_not_declare_is_refused(root):
    (root / "book" / "profiles.yml").write_text("tiny:\n  cpu: {seeds: 5, steps: 1}\n")
    with pytest.raises(P2KError, match="does not declare steps"):
        runner.run_chapter(root, "tiny")


def test_only_a_gpu_run_records_results(root, monkeypatch):
    monkeypatch.setattr(runner, "_parameters", lambda *_: ({"seeds": 5}, "cpu"))
    monkeypatch.setattr(runner, "_execute", lambda root, slug, parameters, work, *_, **__: fake(root, slug, work))

    def fake(root, slug, work):
        (work / "digits.json").write_text("{}")
        return read_notebook(root, slug)

    runner.run_chapter(root, "tiny", "smoke")
    assert not (root / "book" / "results").exists()
    runner.run_chapter(root, "tiny", "gpu")
    assert (root / "book" / "results" / "tiny" / "digits.json").read_text() == "{}"


def test_a_chapter_that_was_never_run_is_stale(root):
    assert runner.stale_chapters(root) == ["tiny"]
