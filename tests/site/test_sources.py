"""What the pages are written from: bibliography, equations, glossary, table of contents."""

import re
from pathlib import Path

import pytest
import yaml
from pybtex.database import parse_file

ROOT = Path(__file__).parents[2]
BIBLIOGRAPHY = ROOT / "book" / "references.bib"
PAGES = sorted((ROOT / "book").rglob("*.md"))
# Works that have neither a DOI nor an arXiv id; looked for in November 2026.
WITHOUT_IDENTIFIER = {
    "wu2025afbo": "ICLR 2025, published on OpenReview only",
    "roy2007effective": "EUSIPCO 2007, proceedings without DOIs",
    "krizhevsky2009cifar": "a technical report of the University of Toronto",
    "holm1979": "Scandinavian Journal of Statistics 6, on JSTOR without a DOI",
}
ENTRIES = parse_file(str(BIBLIOGRAPHY)).entries


@pytest.mark.parametrize("key", list(ENTRIES))
def test_reference_has_a_doi_or_an_arxiv_id(key: str) -> None:
    fields = ENTRIES[key].fields
    doi = re.fullmatch(r"10\.\d{4,9}/\S+", fields.get("doi", ""))
    arxiv = fields.get("archiveprefix") == "arXiv" and re.fullmatch(r"\d{4}\.\d{4,5}", fields.get("eprint", ""))
    if key in WITHOUT_IDENTIFIER:
        assert not doi, f"{key} has a DOI now: take it off the list of exemptions"
        assert not arxiv, f"{key} has an arXiv id now: take it off the list of exemptions"
        assert fields["url"].startswith("https://")
    else:
        assert doi or arxiv, f"{key} needs a doi, or an eprint with archiveprefix = arXiv"


def test_exemptions_are_entries() -> None:
    assert set(WITHOUT_IDENTIFIER) <= set(ENTRIES)


def test_reference_keys_say_who_and_when() -> None:
    assert [key for key in ENTRIES if not re.fullmatch(r"[a-z]+\d{4}[a-z0-9]*", key)] == []
    wrong_year = [key for key, entry in ENTRIES.items() if entry.fields["year"] not in key]
    assert wrong_year == []


def test_every_source_of_a_docstring_is_in_the_bibliography() -> None:
    unknown = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for line in re.findall(r"^\s*Source:.+$", path.read_text(), flags=re.M):
            keys = re.findall(r"\b[a-z]+\d{4}[a-z0-9]*\b", re.sub(r"``.*?``", "", line))
            unknown += [f"{path.name}: {key}" for key in keys if key not in ENTRIES]
    assert unknown == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_displayed_equations_of_a_page_are_labelled(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    bare = re.findall(r"\$\$.+?\$\$(?!\s*\(eq:[\w-]+\))", text, flags=re.S)
    assert bare == []
    assert "{math}" not in text, "write displayed equations as $$ … $$ (eq:slug-name)"


def test_table_of_contents_names_every_page_once_and_nothing_else() -> None:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]
    files = PAGES + sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert sorted(listed) == sorted(path.relative_to(ROOT).with_suffix("").as_posix() for path in files)


def test_parts_of_the_table_of_contents_are_those_of_the_catalogue() -> None:
    catalogue = yaml.safe_load((ROOT / "book" / "catalogue.yml").read_text())
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    for part in toc["parts"]:
        for file in (chapter["file"] for chapter in part["chapters"]):
            slug = file.removeprefix("notebooks/")
            if file != slug:
                entry = (catalogue["papers"] | catalogue["maps"])[slug]
                assert part["caption"] == catalogue["parts"][entry["part"]]


def test_every_floor_with_code_has_a_page_of_the_reference() -> None:
    modules = [
        path for path in (ROOT / "src" / "p2k").rglob("*.py") if re.search(r"^(def|class) ", path.read_text(), re.M)
    ]
    floors = {path.relative_to(ROOT / "src" / "p2k").parts[0] for path in modules}
    pages = {path.stem: path.read_text() for path in (ROOT / "book" / "api").glob("*.md")}
    assert floors <= set(pages), "add book/api/<floor>.md, like its neighbours, and its entry in _toc.yml"
    assert all(f"% p2k-api: {floor}\n" in pages[floor] for floor in floors)


def test_glossary_is_sorted_and_every_term_is_explained() -> None:
    text = (ROOT / "book" / "glossary.md").read_text().split("```")[1]
    terms = re.findall(r"^([\w-].*)$", text.removeprefix("{glossary}"), flags=re.M)
    assert terms == sorted(terms, key=str.casefold)
    assert len(terms) == len(set(terms))
    for term in terms:
        explanation = text.split(f"\n{term}\n")[1].strip("\n").split("\n\n")[0]
        assert explanation.startswith("  "), f"{term} has no explanation"
        assert explanation.rstrip().endswith("."), f"{term}: not a sentence"


def test_pages_load_nothing_from_elsewhere() -> None:
    sources = [*PAGES, *(ROOT / "book" / "_static").glob("*.css"), *(ROOT / "book" / "_ext").glob("*.js")]
    loads = [path.name for path in sources if re.search(r"(src=|@import|url\()[\"']?https?:", path.read_text())]
    assert loads == []
