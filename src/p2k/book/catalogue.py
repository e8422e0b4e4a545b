"""The catalogue: one entry per paper, read from `book/catalogue.yml`, and the status that code computes from facts."""

import datetime
import json
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

import yaml

from p2k.book.notebook import equation_labels, read_notebook
from p2k.book.provenance import chapter_digest, read_provenance
from p2k.core.errors import P2KError

Status = Literal["planned", "derived", "verified", "reproduced", "benchmarked"]
Kind = Literal["method", "theory", "analysis", "system", "survey"]
# Floors on which a paper may have a module of its own; `notebook` is its chapter.
FLOORS = ("ops", "linalg", "nn", "losses", "optim", "models", "data", "experiments", "notebook")
SLUG = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")


class CatalogueError(P2KError):
    """An entry of `book/catalogue.yml` or `book/profiles.yml` is wrong; the message names file, slug and field."""


@dataclass(frozen=True)
class Paper:
    """One paper. `floors` is empty until its chapter is begun."""

    slug: str
    title: str
    part: str
    kind: Kind
    date: datetime.date | None = None
    wave: int | None = None
    code: str | None = None
    arxiv: str | None = None
    authors: tuple[str, ...] = ()
    bib: str | None = None
    floors: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """The slug as a module name: the same on every floor."""
        return self.slug.replace("-", "_")


@dataclass(frozen=True)
class Catalogue:
    """Parts and maps by key, papers by slug in book order, shared modules as floor -> stem -> reason."""

    parts: dict[str, str]
    maps: dict[str, str]
    papers: dict[str, Paper]
    shared: dict[str, dict[str, str]]

    def __getitem__(self, slug: str) -> Paper:
        if slug not in self.papers:
            raise CatalogueError(f"unknown chapter {slug!r}: `p2k list --all` shows the slugs of book/catalogue.yml")
        return self.papers[slug]

    @property
    def chapters(self) -> list[Paper]:
        """Papers whose chapter is begun, in book order."""
        return [paper for paper in self.papers.values() if "notebook" in paper.floors]


def find_root(start: Path | None = None) -> Path:
    """The checkout that holds `start` (default: P2K_ROOT, which the runner sets, else the working directory).

    Raises:
        P2KError: no folder above it has a `book/catalogue.yml`.
    """
    start = Path(start or os.environ.get("P2K_ROOT") or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "book" / "catalogue.yml").is_file():
            return folder
    raise P2KError(f"no book/catalogue.yml in {start} or above it: run this inside a checkout of From Paper to Kernel")


def load_catalogue(root: Path) -> Catalogue:
    """Read and validate `book/catalogue.yml`.

    Raises:
        CatalogueError: a field is missing, unknown or malformed.
    """
    raw = read_yaml(root / "book" / "catalogue.yml")
    for section in ("parts", "maps", "papers", "shared"):
        if not isinstance(raw.get(section), dict):
            raise CatalogueError(f"book/catalogue.yml: section {section!r} must be a mapping")
    papers = {slug: _paper(slug, entry, raw["parts"]) for slug, entry in raw["papers"].items()}
    return Catalogue(raw["parts"], raw["maps"], papers, raw["shared"])


def read_yaml(path: Path) -> dict:
    """Load a YAML mapping; CatalogueError where it is missing or malformed."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise CatalogueError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(raw, dict):
        raise CatalogueError(f"{path.name}: expected a mapping at the top, got {type(raw).__name__}")
    return raw


def chapter_status(root: Path, slug: str) -> Status:
    """The highest rung whose facts hold; a stale, hand-edited or unfinished chapter is `planned`.

    derived: every labelled equation has a passing claim or a reason. verified: the float64 claim, and for a chapter
    with a kernel the planted bugs. reproduced: a gpu or paper record. benchmarked: a benchmark made on a GPU.
    """
    run = read_provenance(root, slug)
    if run is None or run.digest != chapter_digest(root, slug, run.profile):
        return "planned"
    settled = {entry["label"] for entry in run.claims if entry["verdict"] != "failed"}
    labels = equation_labels(read_notebook(root, slug))
    if not labels or None in labels or not set(labels) <= settled:
        return "planned"
    has_kernel = "ops" in load_catalogue(root)[slug].floors
    proofs = {f"kernel:{slug}-float64", f"kernel:{slug}-mutants"} if has_kernel else {f"test:{slug}-float64"}
    passed = {entry["label"] for entry in run.claims if entry["verdict"] == "holds"}
    if not proofs <= passed:
        return "derived"
    records = [json.loads(path.read_text()) for path in sorted((root / "book" / "results" / slug).glob("*.json"))]
    if not any(record.get("profile") in ("gpu", "paper") for record in records):
        return "verified"
    on_gpu = [record for record in records if str(record.get("device", "")).startswith("cuda")]
    return "benchmarked" if any(record.get("kind") == "benchmark" for record in on_gpu) else "reproduced"


def _paper(slug: str, entry: dict, parts: dict[str, str]) -> Paper:
    """Validate one entry."""
    values = {"slug": slug, **(entry if isinstance(entry, dict) else {})}
    problems = {name: "unknown field" for name in values if name not in {field.name for field in fields(Paper)}}
    problems |= {name: "missing" for name in ("title", "part", "kind") if name not in values}
    tests = {
        "slug": lambda v: bool(SLUG.fullmatch(str(v))),
        "title": lambda v: isinstance(v, str) and bool(v.strip()),
        "part": lambda v: v in parts,
        "kind": lambda v: v in get_args(Kind),
        "date": lambda v: isinstance(v, datetime.date),
        "wave": lambda v: type(v) is int and v > 0,
        "code": lambda v: str(v).startswith("https://"),
        "arxiv": lambda v: isinstance(v, str) and bool(re.fullmatch(r"\d{4}\.\d{4,5}", v)),
        "authors": lambda v: isinstance(v, list) and all(isinstance(name, str) for name in v),
        "bib": lambda v: isinstance(v, str),
        "floors": lambda v: isinstance(v, list) and set(v) <= set(FLOORS),
    }
    problems |= {n: f"bad value {v!r}" for n, v in values.items() if n not in problems and not tests[n](v)}
    if problems:
        what = "; ".join(f"{name}: {problem}" for name, problem in problems.items())
        raise CatalogueError(f"book/catalogue.yml: {slug}: {what}")
    return Paper(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
