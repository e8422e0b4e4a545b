"""The catalogue: one entry per paper, read from `book/catalogue.yml`, and the status that code computes from facts."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

import jsonschema
import yaml

from p2k.book.notebook import equation_labels, read_notebook
from p2k.book.provenance import chapter_digest, read_provenance
from p2k.core.errors import P2KError

Status = Literal["planned", "derived", "verified", "reproduced", "benchmarked"]
# The catalogue is read again for every status, and the parser in C is ten times as fast.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Floors on which a paper may have a module of its own; `notebook` is its chapter.
FLOORS = ("ops", "linalg", "nn", "losses", "optim", "models", "data", "experiments", "notebook")


@dataclass(frozen=True)
class Paper:
    """One paper, or a map: a chapter about several papers, of kind `map`, with their keys as `bib` and no floor.

    `floors` is empty until the chapter is begun; `stem` is the slug as a module name.
    """

    slug: str
    title: str
    part: str
    kind: str
    date: str | None = None
    wave: int | None = None
    code: str | None = None
    arxiv: str | None = None
    authors: Sequence[str] = ()
    bib: str | Sequence[str] | None = None
    floors: Sequence[str] = ()
    stem = property(lambda self: self.slug.replace("-", "_"))


@dataclass(frozen=True)
class Catalogue:
    """Parts by key, papers and maps by slug in book order, shared modules as floor -> stem -> reason."""

    parts: dict[str, str]
    maps: dict[str, Paper]
    papers: dict[str, Paper]
    shared: dict[str, dict[str, str]]

    def __getitem__(self, slug: str) -> Paper:
        if slug not in (entries := self.papers | self.maps):
            raise P2KError(f"unknown chapter {slug!r}: `p2k list --all` shows the slugs of book/catalogue.yml")
        return entries[slug]

    @property
    def entries(self) -> list[Paper]:
        """All papers, part by part, and behind them the maps of the part."""
        order = list(self.parts)
        return sorted([*self.papers.values(), *self.maps.values()], key=lambda entry: order.index(entry.part))

    @property
    def chapters(self) -> list[Paper]:
        """Papers and maps whose chapter is begun, in book order."""
        return [entry for entry in self.entries if "notebook" in entry.floors]


def find_root(start: Path | None = None) -> Path:
    """The checkout around `start` (default: P2K_ROOT, which the runner sets, else the working directory)."""
    start = Path(start or os.environ.get("P2K_ROOT") or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "book" / "catalogue.yml").is_file():
            return folder
    raise P2KError(f"no book/catalogue.yml in {start} or above it: run this inside a checkout of From Paper to Kernel")


def load_catalogue(root: Path) -> Catalogue:
    """Read `book/catalogue.yml`; P2KError where a field is missing, unknown or malformed."""
    raw = read_yaml(root / "book" / "catalogue.yml")
    raw = json.loads(json.dumps(raw, default=str))  # YAML's dates as text
    schema = read_yaml(files("p2k.book") / "templates" / "catalogue.schema.yml")
    wrong = [
        f"{'.'.join(map(str, e.path))}: {e.message}" for e in jsonschema.Draft202012Validator(schema).iter_errors(raw)
    ]
    papers = {slug: Paper(slug, **entry) for slug, entry in raw["papers"].items()} if not wrong else {}
    maps = {slug: Paper(slug, kind="map", **entry) for slug, entry in raw["maps"].items()} if not wrong else {}
    wrong += [f"{slug}: a paper and a map have this name" for slug in papers.keys() & maps.keys()]
    for group, entries in {"papers": papers, "maps": maps}.items():
        unknown = [entry for entry in entries.values() if entry.part not in raw["parts"]]
        wrong += [f"{group}.{entry.slug}.part: {entry.part!r} is no part" for entry in unknown]
    if wrong:
        raise P2KError(f"book/catalogue.yml: {'; '.join(wrong)}")
    return Catalogue(raw["parts"], maps, papers, raw["shared"])


def read_yaml(path: Path) -> dict:
    """Load a YAML mapping; P2KError where it is missing or malformed."""
    try:
        return dict(yaml.load(path.read_text(encoding="utf-8"), Loader=LOADER))
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise P2KError(f"{path.name} cannot be read as a mapping: {error}") from error


def chapter_status(root: Path, slug: str) -> Status:
    """The highest rung whose facts hold; a stale, hand-edited or unfinished chapter is `planned`.

    derived: every labelled equation has a passing claim or a reason. verified: the float64 claim, and for a chapter
    with a kernel the planted bugs. reproduced: a gpu or paper record. benchmarked: a benchmark made on a GPU.
    """
    run = read_provenance(root, slug)
    if run is None or run.digest != chapter_digest(root, slug, run.profile):
        return "planned"
    labels = set(equation_labels(read_notebook(root, slug)))
    if not labels or not labels <= {entry["label"] for entry in run.claims}:
        return "planned"
    kernel = "ops" in load_catalogue(root)[slug].floors
    proofs = {f"kernel:{slug}-float64", f"kernel:{slug}-mutants"} if kernel else {f"test:{slug}-float64"}
    if not proofs <= {entry["label"] for entry in run.claims if entry["verdict"] == "holds"}:
        return "derived"
    records = [json.loads(path.read_text()) for path in sorted((root / "book" / "results" / slug).glob("*.json"))]
    records = [record for record in records if record["profile"] in ("gpu", "paper")]
    if all(record["experiment"].startswith("benchmark") for record in records):
        return "verified"
    return "benchmarked" if any(record["experiment"].startswith("benchmark") for record in records) else "reproduced"
