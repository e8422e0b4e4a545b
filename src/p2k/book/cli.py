"""The `p2k` command. Exit codes: 0 done, 1 something failed or is missing, 2 wrong usage."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer
import typer.core
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from p2k.book import runner
from p2k.book.catalogue import chapter_status, find_root, load_catalogue
from p2k.book.check import check_book, check_chapter
from p2k.book.scaffold import new_chapter
from p2k.core.device import choose_device
from p2k.core.doctor import examine
from p2k.core.errors import P2KError
from p2k.core.files import write_atomic
from p2k.experiments import benchmark, benchmark_records
from p2k.experiments.cost import chapter_costs


class Group(typer.core.TyperGroup):
    """Prints what a user can mend as one red line, without a traceback."""

    def invoke(self, ctx: typer.Context) -> object:
        try:
            return super().invoke(ctx)
        except (P2KError, ValueError) as error:
            errors.print(f"[red]error: {escape(str(error))}[/red]")
            raise typer.Exit(1) from error


app = typer.Typer(cls=Group, help="From Paper to Kernel: run, check and build the book.", no_args_is_help=True)
console, errors = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)


@app.command("list")
def list_(every: Annotated[bool, typer.Option("--all", help="also papers and maps without a chapter")] = False) -> None:
    """List the chapters with their status."""
    catalogue, table = load_catalogue(root := find_root()), Table("slug", "part", "status", "title")
    for paper in catalogue.entries if every else catalogue.chapters:
        status = chapter_status(root, paper.slug) if paper.floors else "planned"
        table.add_row(paper.slug, catalogue.parts[paper.part], status, escape(paper.title))
    console.print(table)


@app.command()
def run(slug: str, profile: str = "cpu", device: str = "auto", out: Path | None = None) -> None:
    """Execute a chapter in a fresh kernel; the cpu profile is stored, the others go to runs/ or --out."""
    target = runner.run_chapter(find_root(), slug, profile, device=device, out=out)
    console.print(f"{slug}: ran the {profile} profile, written to {target}")


@app.command()
def new(slug: str, floors: str = "ops,nn,experiments", part: str = "A") -> None:
    """Write the skeleton of a chapter on the given floors, with tests that fail until they are filled."""
    for path in new_chapter(root := find_root(), slug, floors=tuple(floors.split(",")), part=part):
        console.print(path.relative_to(root).as_posix())
    console.print(f"next: p2k check {slug}")


@app.command()
def check(slug: Annotated[str | None, typer.Argument()] = None) -> None:
    """List what a chapter (or every chapter and the book) still lacks."""
    root = find_root()
    slugs = [slug] if slug else [paper.slug for paper in load_catalogue(root).chapters]
    gaps = {name: check_chapter(root, name) for name in slugs} | ({} if slug else {"book": check_book(root)})
    for name, found in gaps.items():
        console.print("\n  ".join([f"{name}: {len(found) or 'nothing'} missing", *map(escape, found)]))
    raise typer.Exit(1 if any(gaps.values()) else 0)


@app.command()
def build(strict: bool = True, execute: bool = True) -> None:
    """Execute the stale chapters, refresh the README's table and render the site."""
    root = find_root()
    for slug in runner.stale_chapters(root) if execute else []:
        console.print(f"{slug}: stale, running its cpu profile")
        runner.run_chapter(root, slug)
    renew_readme(root)
    options = ["-W", "--keep-going"] if strict else []
    if subprocess.run([Path(sys.executable).with_name("jupyter-book"), "build", ".", *options], cwd=root).returncode:
        raise P2KError("the site was not built: jupyter-book's messages are above")
    console.print(f"open {root / '_build' / 'html' / 'index.html'}\nor serve it: p2k serve")


@app.command()
def serve(port: int = 8000) -> None:
    """Serve the built site on 127.0.0.1."""
    if not (folder := find_root() / "_build" / "html").is_dir():
        raise P2KError("the site is not built: p2k build")
    options = ["--bind", "127.0.0.1", "--directory", str(folder)]
    if subprocess.run([sys.executable, "-m", "http.server", str(port), *options], stderr=subprocess.DEVNULL).returncode:
        raise P2KError(f"port {port} cannot be used: p2k serve --port N")


@app.command()
def bench(
    ops: Annotated[list[str] | None, typer.Argument(help="folders of p2k.ops; all when none is named")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    out: Annotated[Path | None, typer.Option(help="folder of the records; default runs/bench/<device>")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="one size per op, rough medians")] = False,
    compare: Annotated[Path | None, typer.Option(help="earlier records: a slower point is an error")] = None,
    resume: Annotated[bool, typer.Option(help="keep what this code measured on this machine")] = True,
) -> None:
    """Measure the ops against eager torch, torch.compile and installed peers; 1 on an unbelievable or slower point."""
    root, place = find_root(), choose_device(device)
    folder = out or root / "runs" / "bench" / (f"{place.type}-quick" if quick else place.type)
    here = benchmark.environment(place)
    before = benchmark_records.read_baseline(compare, here) if compare else []
    workloads = benchmark.declared_workloads(ops or [], place, quick=quick)
    table, files = Table("op", "size", "pass", "implementation", "ms", "x eager", "roofline"), []
    measured = benchmark.run(workloads, place, folder, quick=quick, resume=resume)
    for _, content in tqdm(measured, total=len(workloads), unit="workload", disable=None):
        files.append(content)
        for row in benchmark.summary(content):
            table.add_row(*map(escape, row))
    if place.type == "cpu" and not ops:
        benchmark_records.write_json(folder / benchmark_records.COST_FILE, chapter_costs(root, here))
    console.print(table, f"{len(files)} files in {folder}")
    for note in sorted({f"{name} is missing: {why}" for file in files for name, why in file["absent"].items()}):
        console.print(escape(note))
    found = [line for file in files for line in benchmark.problems(file)]
    found += benchmark_records.regressions(before, [record for file in files for record in file["records"]])
    for line in found:
        errors.print(f"[red]{escape(line)}[/red]")
    raise typer.Exit(1 if found else 0)


@app.command()
def doctor() -> None:
    """Say what this machine can do and what is missing for the rest."""
    table = Table("what", "found", "what to do")
    for finding in examine():
        table.add_row(finding.name, escape(finding.found), escape(finding.advice))
    console.print(table, f"checkout: {find_root()}")


def renew_readme(root: Path) -> None:
    """Make the table between `<!-- chapters -->` and `<!-- /chapters -->` of the README anew."""
    rows = ["<!-- chapters -->", "| chapter | paper | status |", "|---|---|---|"]
    for paper in load_catalogue(root).chapters:
        status = chapter_status(root, paper.slug)
        rows.append(f"| [{paper.slug}](notebooks/{paper.slug}.ipynb) | {paper.title} | {status} |")
    table = "\n".join([*rows, "<!-- /chapters -->"])
    old = readme.read_text(encoding="utf-8") if (readme := root / "README.md").is_file() else ""
    if (new := re.sub(r"<!-- chapters -->.*?<!-- /chapters -->", lambda _: table, old, flags=re.S)) != old:
        write_atomic(readme, new)
