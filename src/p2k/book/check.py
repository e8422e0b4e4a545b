"""What a chapter, and the book as a whole, still lack."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

from nbformat import NotebookNode

from p2k.book.catalogue import FLOORS, Paper, load_catalogue, read_yaml
from p2k.book.notebook import code_cells, declared, equation_labels, notebook_path, prose, read_notebook, tagged
from p2k.book.provenance import changed_parts, read_provenance
from p2k.book.runner import PROFILES, RUN_PARAMETERS

# The sections of a chapter after its title and card; the kernel only where there is one.
SECTIONS = ("The problem", "Derivation", "From mathematics to code", "The kernel", "Experiment", "Mechanism")
SECTIONS += ("Where we differ, and why", "Exercises", "Colophon")
# Seconds of a stored run: a minute of a quiet core, and half as much again for a busy hour.
LONGEST_RUN = 90
_ABSOLUTE = re.compile(r"(?<![\w.:/~-])(/(home|root|Users|tmp|usr|opt|var|mnt|work)/|[A-Z]:\\)")
_LIMITS = {"image/svg+xml": 200_000, "image/png": 270_000, "text/html": 410_000}  # PNG is stored as base64


def check_chapter(root: Path, slug: str) -> list[str]:
    """One sentence per thing that the chapter still lacks; empty when it is complete. Unknown slug: P2KError."""
    paper = load_catalogue(root)[slug]
    gaps = [*_entry_gaps(root, paper), *_floor_gaps(root, paper)]
    if not notebook_path(root, slug).is_file():
        return [*gaps, f"notebooks/{slug}.ipynb is missing"]
    notebook = read_notebook(root, slug)
    cited = re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", prose(notebook))
    keys = {key.strip() for group in cited for key in group.split(",")}
    keys |= {paper.bib} - {None} if not isinstance(paper.bib, list) else {*paper.bib}
    found = [gap for rule in (_prose_gaps, _claim_gaps, _parameter_gaps) for gap in rule(root, paper, notebook)]
    for number, cell in enumerate(code_cells(notebook), start=1):
        found += [f"code cell {number} {gap}" for gap in (*_code_gaps(cell.source), *_output_gaps(root, cell))]
    gaps += [*_citation_gaps(root, keys), *(f"notebooks/{slug}.ipynb: {gap}" for gap in found)]
    if (run := read_provenance(root, slug)) is None or run.profile != "cpu":
        return [*gaps, f"chapter {slug} has no stored run of the cpu profile: p2k run {slug}"]
    if changed := changed_parts(root, slug):
        gaps += [f"chapter {slug} is stale, changed since its run: {', '.join(changed)}: p2k run {slug}"]
    slow = run.seconds > LONGEST_RUN
    return gaps + ([f"chapter {slug} took {run.seconds:.0f} s, expected at most {LONGEST_RUN}"] if slow else [])


def check_book(root: Path) -> list[str]:
    """One sentence per module, notebook, profile or toc entry without an owner, and per owner without a module."""
    catalogue, gaps = load_catalogue(root), []
    for floor in FLOORS[:-1]:
        folder, shared = root / "src" / "p2k" / floor, {*catalogue.shared.get(floor, {})}
        found = {p.stem for p in folder.glob("*.py")} - {"__init__"} | {
            p.parent.name for p in folder.glob("*/__init__.py")
        }
        owned = {paper.stem for paper in catalogue.papers.values() if floor in paper.floors}
        gaps += [f"src/p2k/{floor}/{stem}: in no paper's floors and not shared" for stem in found - owned - shared]
        gaps += [f"src/p2k/{floor}/{stem}: shared in book/catalogue.yml but missing" for stem in shared - found]
    chapters = [paper.slug for paper in catalogue.chapters]
    stored = {path.stem for path in (root / "notebooks").glob("*.ipynb")}
    gaps += [f"notebooks/{slug}.ipynb: no chapter or map of this name" for slug in stored - {*chapters}]
    unknown = read_yaml(root / "book/profiles.yml").keys() - {*chapters}
    gaps += [f"book/profiles.yml: {slug}: no chapter" for slug in unknown]
    wanted = [(catalogue.parts[paper.part], paper.slug) for paper in catalogue.chapters]
    listed = toc_chapters(root)
    return sorted(gaps) + ([] if listed == wanted else [f"_toc.yml has the chapters {listed}, the catalogue {wanted}"])


def toc_chapters(root: Path) -> list[tuple[str, str]]:
    """(caption, slug) of each notebook in `_toc.yml`, in page order."""
    parts = read_yaml(root / "_toc.yml").get("parts", [])
    pages = [(part.get("caption", ""), page.get("file", "")) for part in parts for page in part.get("chapters", [])]
    return [(caption, file.removeprefix("notebooks/")) for caption, file in pages if file.startswith("notebooks/")]


def floor_files(root: Path, stem: str, floor: str) -> tuple[list[Path], Path]:
    """The source files of a chapter on one floor, and their test."""
    base, test = root / "src" / "p2k" / floor / stem, root / "tests" / floor / f"test_{stem}.py"
    operation = [base / name for name in ("__init__.py", "reference.py", "kernel.py")]
    return operation if floor == "ops" else [base.with_suffix(".py")], test


def _entry_gaps(root: Path, paper: Paper) -> Iterator[str]:
    wanted = (
        ("title", "bib", "floors") if paper.kind == "map" else ("title", "authors", "date", "arxiv", "bib", "floors")
    )
    for field in wanted:
        if not getattr(paper, field) or "FILL" in str(getattr(paper, field)):
            yield f"book/catalogue.yml: {paper.slug}: {field} is missing"
    profiles = read_yaml(root / "book" / "profiles.yml").get(paper.slug) or {}
    for profile in PROFILES:
        if not profiles.get(profile) or {*profiles[profile]} != {*(profiles.get("cpu") or {})}:
            yield f"book/profiles.yml: {paper.slug}: profile {profile} is missing or has other parameters than cpu"
    if paper.slug not in {slug for _, slug in toc_chapters(root)}:
        yield f"_toc.yml: notebooks/{paper.slug} is missing"


def _citation_gaps(root: Path, keys: set[str]) -> Iterator[str]:
    path = root / "book" / "references.bib"
    entries = re.split(r"^@\w+\{", path.read_text(encoding="utf-8") if path.is_file() else "", flags=re.M)
    for key in sorted(keys):
        entry = next((text for text in entries if text.startswith(f"{key},")), "")
        # A work that has neither says so in its addendum; a test keeps the list of them.
        if not re.search(r"^\s*(doi|eprint|addendum)\s*=", entry, re.M | re.I):
            yield f"book/references.bib: {key} {'has neither doi nor eprint' if entry else 'is missing'}"


def _floor_gaps(root: Path, paper: Paper) -> Iterator[str]:
    for floor in (name for name in paper.floors if name != "notebook"):
        files, test = floor_files(root, paper.stem, floor)
        for path in [*files, *(sorted(test.parent.glob(f"test_{paper.stem}*.py")) or [test])]:
            name = path.relative_to(root).as_posix()
            if not path.is_file():
                yield f"{name} is missing"
            elif marks := re.findall(r"\bFILL: ([^\"\n]+)", path.read_text(encoding="utf-8")):
                yield f"{name}: fill in {'; '.join(marks)}"


def _prose_gaps(root: Path, paper: Paper, notebook: NotebookNode) -> Iterator[str]:
    text = prose(notebook)
    card, *sections = re.split(r"^## +", text, flags=re.M)
    bodies = {section.partition("\n")[0].strip(): section for section in sections}
    if not card.startswith("# ") or (paper.kind != "map" and (not paper.arxiv or paper.arxiv not in card)):
        yield "no title, or no card with the paper's arXiv id below it"
    wanted = [name for name in SECTIONS if name != "The kernel" or "ops" in paper.floors]
    yield from (f"section '## {name}' is missing" for name in wanted if name not in bodies)
    yield from (f"fill in {mark}" for mark in re.findall(r"\bFILL: ([^\n]+)", text))
    if not re.search(r"\{(admonition|note|warning|important)\}", bodies.get(SECTIONS[-3], "")):
        yield "no box in 'Where we differ, and why'"
    exercises, solutions = (len(re.findall(rf"\{{{word}(?:-start)?\}}", text)) for word in ("exercise", "solution"))
    executed = sum(tagged(cell, "solution") for cell in code_cells(notebook))
    if exercises < 3 or min(solutions, executed) < exercises:
        counts = f"{exercises} exercises, {solutions} solutions and {executed} code cells tagged solution"
        yield f"{counts}, expected at least 3 of each"


def _claim_gaps(root: Path, paper: Paper, notebook: NotebookNode) -> Iterator[str]:
    settled = {entry["label"] for entry in notebook.metadata.get("p2k", {}).get("claims", [])}
    labels = equation_labels(notebook)
    if not labels:
        yield "no displayed equation"
    for label in labels:
        if label is None or not re.fullmatch(rf"eq:{paper.slug}-[\w-]+", label):
            yield f"displayed equation with label {label}, expected eq:{paper.slug}-..."
        elif label not in settled:
            yield f"equation {label} has neither claim nor reason"
    outputs = [output for cell in code_cells(notebook) for output in cell.get("outputs", [])]
    if not any("| verdict |" in str(output.get("data", {}).get("text/markdown")) for output in outputs):
        yield "no results table with a verdict"


def _parameter_gaps(root: Path, paper: Paper, notebook: NotebookNode) -> Iterator[str]:
    wanted = (read_yaml(root / "book" / "profiles.yml").get(paper.slug) or {}).get("cpu") or {}
    if {**RUN_PARAMETERS, **declared(notebook)} != {**RUN_PARAMETERS, **wanted}:
        yield "the parameters cell differs from the cpu profile of book/profiles.yml"
    if len(json.dumps(notebook)) > 1_000_000:
        yield "larger than 1 MB"


def _code_gaps(source: str) -> Iterator[str]:
    if len(source.splitlines()) > 25:
        yield "is longer than 25 lines"
    if re.search(r"\b(pip|conda|mamba|apt|apt-get) install\b", source):
        yield "installs something"
    try:
        functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    except SyntaxError:
        functions = []
        yield "is not plain Python"
    yield from (f"has {f.name}, longer than 10 lines" for f in functions if f.end_lineno - f.lineno >= 10)


def _output_gaps(root: Path, cell: NotebookNode) -> Iterator[str]:
    meta = cell.metadata.get("mystnb", {})
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if output.output_type == "error" or output.get("name") == "stderr":
            yield "has an error or stderr output"
        if any(mime.startswith("image/") for mime in data):
            for part, key in (("image", "alt"), ("figure", "caption")):
                if not meta.get(part, {}).get(key):
                    yield f"has a figure without {key} (metadata mystnb.{part}.{key})"
        yield from (f"has too large a {mime}" for mime, limit in _LIMITS.items() if len(data.get(mime, "")) > limit)
        text = output.get("text", "") + "".join(str(value) for mime, value in data.items() if mime.startswith("text/"))
        if str(root) in text or _ABSOLUTE.search(text):
            yield "shows an absolute path"
