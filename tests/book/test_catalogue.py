"""The catalogue is read with errors that name slug and field; status follows from facts."""

import json

import pytest

from p2k.book.catalogue import chapter_status, find_root, load_catalogue
from p2k.book.notebook import equation_labels, read_notebook
from p2k.core.errors import P2KError


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_papers_are_read_in_book_order(root):
    catalogue = load_catalogue(root)
    assert [paper.slug for paper in catalogue.chapters] == ["tiny"]
    assert catalogue["tiny"].date == "2026-01-02"
    assert catalogue["later-one"].stem == "later_one"
    assert catalogue["later-one"].floors == ()


def begin_the_map(root, bib="[author2026tiny]"):
    replace(root / "book" / "catalogue.yml", "    part: B\n", f"    part: B\n    bib: {bib}\n    floors: [notebook]\n")


def test_a_map_is_a_chapter_without_floors_behind_the_papers_of_its_part(root):
    catalogue = load_catalogue(root)
    assert [entry.slug for entry in catalogue.entries] == ["tiny", "later-one", "chart"]
    assert catalogue["chart"].kind == "map"
    begin_the_map(root)
    assert [entry.slug for entry in load_catalogue(root).chapters] == ["tiny", "chart"]
    assert list(load_catalogue(root)["chart"].bib) == ["author2026tiny"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  chart:", "  tiny:", "tiny: a paper and a map have this name"),
        ("    part: B\n", "    part: Z\n", r"maps\.chart\.part: 'Z' is no part"),
        ("    part: B\n", "    part: B\n    floors: [nn, notebook]\n", r"maps\.chart\.floors"),
        ("    part: B\n", "    part: B\n    bib: author2026tiny\n", r"maps\.chart\.bib"),
        ("    part: B\n", '    part: B\n    arxiv: "2601.00003"\n', r"maps\.chart"),
    ],
)
def test_a_bad_map_is_named(root, old, new, message):
    replace(root / "book" / "catalogue.yml", old, new)
    with pytest.raises(P2KError, match=message):
        load_catalogue(root)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: theory", "kind: theroy", r"papers\.later-one\.kind: 'theroy' is not one of"),
        ("part: B\n    kind: theory", "part: Z\n    kind: theory", r"papers\.later-one\.part: 'Z' is no part"),
        ("    kind: theory\n", "", r"papers\.later-one: 'kind' is a required property"),
        ("kind: theory", "kinds: theory", "kinds"),
        ("2601.00002", "arXiv", r"papers\.later-one\.arxiv"),
        ("2026-01-02", "soon", r"papers\.tiny\.date"),
        ("floors: [nn,", "floors: [attic,", r"papers\.tiny\.floors\.0: 'attic'"),
        ("  later-one:", "  Later_One:", "Later_One"),
        ("shared:", "common:", "common"),
        ("parts:\n", "parts: [\n", "cannot be read"),
    ],
)
def test_a_bad_entry_is_named(root, old, new, message):
    replace(root / "book" / "catalogue.yml", old, new)
    with pytest.raises(P2KError, match=message):
        load_catalogue(root)


def test_an_unknown_slug_is_named(root):
    with pytest.raises(P2KError, match="unknown chapter 'nope'"):
        load_catalogue(root)["nope"]


def test_the_root_is_found_from_below_and_from_the_runner(root, monkeypatch, tmp_path_factory):
    monkeypatch.delenv("P2K_ROOT", raising=False)
    assert find_root(root / "src" / "p2k") == root
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    with pytest.raises(P2KError, match="inside a checkout"):
        find_root()
    monkeypatch.setenv("P2K_ROOT", str(root))
    assert find_root() == root


def test_status_climbs_with_the_facts(root, stamped):
    assert chapter_status(root, "tiny") == "planned"
    stamped([])
    assert chapter_status(root, "tiny") == "planned"
    stamped(["eq:tiny-double"])
    assert chapter_status(root, "tiny") == "derived"
    stamped(["eq:tiny-double", "test:tiny-float64"])
    assert chapter_status(root, "tiny") == "verified"
    record = {"profile": "gpu", "experiment": "digits"}
    folder = root / "book" / "results" / "tiny"
    folder.mkdir(parents=True)
    (folder / "a.json").write_text(json.dumps(record))
    assert chapter_status(root, "tiny") == "planned"  # the page was stored before the record
    stamped(["eq:tiny-double", "test:tiny-float64"])
    assert chapter_status(root, "tiny") == "reproduced"
    (folder / "b.json").write_text(json.dumps({**record, "experiment": "benchmark-forward"}))
    stamped(["eq:tiny-double", "test:tiny-float64"])
    assert chapter_status(root, "tiny") == "benchmarked"


def test_a_chapter_with_a_kernel_is_verified_by_its_kernel_claims(root, stamped):
    replace(root / "book" / "catalogue.yml", "floors: [nn,", "floors: [ops, nn,")
    stamped(["eq:tiny-double", "test:tiny-float64", "kernel:tiny-float64"])
    assert chapter_status(root, "tiny") == "derived"
    stamped(["eq:tiny-double", "kernel:tiny-float64", "kernel:tiny-mutants"])
    assert chapter_status(root, "tiny") == "verified"


def test_a_reason_settles_an_equation_but_proves_nothing(root, stamped):
    stamped(["eq:tiny-double", "test:tiny-float64"], verdict="no claim")
    assert chapter_status(root, "tiny") == "derived"


def test_equations_are_found_with_and_without_labels(root):
    notebook = read_notebook(root, "tiny")
    notebook.cells[2].source = "\n".join(
        [
            "$$a$$ (eq:tiny-a)",
            "$$\nb\n$$",
            "````{prf:theorem}\n```{math}\n:label: eq:tiny-c\nc\n```\n````",
            "```python\n'$$no$$'\n```",
            "`$$no$$`",
        ]
    )
    assert equation_labels(notebook) == ["eq:tiny-a", None, "eq:tiny-c"]
