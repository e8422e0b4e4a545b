"""Running a chapter: papermill, a fresh kernel, an empty folder, no network, and a record of what was run."""

import datetime
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from unittest import mock

from nbformat import NotebookNode, read, reads, writes

from p2k.book.catalogue import load_catalogue, read_yaml
from p2k.book.claims import CLAIM_MIME
from p2k.book.notebook import code_cells, declared, notebook_path, read_notebook, tagged
from p2k.book.provenance import Provenance, changed_parts, chapter_parts, digest_of
from p2k.core.checks import require
from p2k.core.device import choose_device, device_name, versions
from p2k.core.errors import P2KError
from p2k.core.files import write_atomic

# Seconds that one cell may take. A paper's full protocol may take hours; it works in a folder that stays and resumes.
PROFILES = {"smoke": 120, "cpu": 300, "gpu": None}
# The runner sets these where a notebook's `parameters` cell declares them; their stored values are these.
RUN_PARAMETERS = {"profile": "cpu", "device": "cpu", "output_dir": "."}


class ChapterFailed(P2KError):
    """A cell of a chapter raised; the message names chapter, cell and error. The stored notebook is as it was."""


def run_chapter(root: Path, slug: str, profile: str = "cpu", *, device: str = "auto", out: Path | None = None) -> Path:
    """Execute a chapter, write the result whole or not at all, and return its path.

    The cpu profile is stored in `notebooks/`; the others (and cpu with `out`) go to `out`, by default
    `runs/<slug>/<profile>/`. JSON files that a gpu run leaves in its output folder also go to `book/results/<slug>/`.

    Raises:
        ChapterFailed: a cell raised, timed out or lost its kernel.
        P2KError: unknown slug, profile or device, a parameter that the notebook does not declare, no GPU for gpu.
    """
    parameters, chosen = _parameters(root, slug, profile, device)
    out = out or (root / "runs" / slug / profile if profile != "cpu" else None)
    with tempfile.TemporaryDirectory(prefix="p2k-") as folder:
        work = out.resolve() if out and profile == "gpu" else Path(folder, "work")
        work.mkdir(parents=True, exist_ok=True)
        given = {"profile": profile, "device": chosen, "output_dir": str(work)}
        names = declared(read_notebook(root, slug))
        if unknown := parameters.keys() - names.keys():
            raise P2KError(f"notebooks/{slug}.ipynb: the parameters cell does not declare {', '.join(sorted(unknown))}")
        parameters |= {name: given[name] for name in given.keys() & names.keys()}
        started = time.perf_counter()
        environment = kernel_environment(root, Path(folder), device=chosen, network=profile == "gpu")
        with mock.patch.dict(os.environ, environment):
            result = _execute(root, slug, parameters, work, Path(folder, "out.ipynb"), limit=PROFILES[profile])
        seconds = round(time.perf_counter() - started, 1)
        _record(result := clean(result), root, slug, profile=profile, device=chosen, seconds=seconds)
        if out and profile != "gpu":
            shutil.copytree(work, out, dirs_exist_ok=True)
        target = out / f"{slug}.ipynb" if out else notebook_path(root, slug)
        for path in sorted(work.glob("*.json")) if profile == "gpu" else []:
            write_atomic(root / "book" / "results" / slug / path.name, path.read_text(encoding="utf-8"))
        write_atomic(target, writes(result).rstrip("\n") + "\n")
    return target


def stale_chapters(root: Path) -> list[str]:
    """Slugs of the chapters whose stored outputs are missing, edited or older than what made them."""
    chapters = [paper.slug for paper in load_catalogue(root).chapters]
    return [slug for slug in chapters if notebook_path(root, slug).is_file() and changed_parts(root, slug) != []]


def clean(notebook: NotebookNode) -> NotebookNode:
    """Strip what differs from run to run: injected cells, timings, stderr and papermill's own metadata."""
    notebook.cells = [cell for cell in notebook.cells if not tagged(cell, "injected-parameters")]
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {key: cell.metadata[key] for key in cell.metadata if key not in ("papermill", "execution")}
    # Counts start at 1 whatever was injected; nbval takes a cell without a count for one that never ran.
    for number, cell in enumerate(code_cells(notebook), start=1):
        cell.execution_count = number
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in (output for output in cell.outputs if output.output_type == "execute_result"):
            output.execution_count = number
    return reads(writes(notebook), as_version=4)


def _parameters(root: Path, slug: str, profile: str, device: str) -> tuple[dict, str]:
    load_catalogue(root)[slug]
    if profile not in PROFILES:
        raise P2KError(f"profile must be {', '.join(PROFILES)}, got {profile!r}")
    parameters = (read_yaml(root / "book" / "profiles.yml").get(slug) or {}).get(profile)
    if parameters is None:
        raise P2KError(f"book/profiles.yml has no profile {profile!r} for {slug!r}: add its parameters")
    chosen = choose_device("cpu" if device == "auto" and profile != "gpu" else device)
    if profile == "gpu" and chosen.type != "cuda":
        raise P2KError(f"the gpu profile of {slug!r} needs a CUDA GPU, got device {chosen}: see `p2k doctor`")
    return dict(parameters), str(chosen)


def kernel_environment(root: Path, folder: Path, *, device: str = "cpu", network: bool = False) -> dict[str, str]:
    """What a kernel inherits: one thread, this checkout's package, interpreted kernels on a CPU, and no network."""
    startup = folder / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    if not network:
        shutil.copy(files("p2k.book") / "templates" / "no_network.py.txt", startup / "00-no-network.py")
    # Looking through all of torch's objects after every few hundred new ones takes a tenth of a run.
    (startup / "01-garbage.py").write_text("import gc\ngc.set_threshold(100_000, 20, 100)\ndel gc\n")
    path = os.pathsep.join(filter(None, [str(root / "src"), os.environ.get("PYTHONPATH")]))
    fixed = {"OMP_NUM_THREADS": "1", "SOURCE_DATE_EPOCH": "0", "MPLBACKEND": "inline", "P2K_ROOT": str(root)}
    interpret = {"TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    return {**fixed, **interpret, "PYTHONPATH": path, "IPYTHONDIR": str(folder / "ipython")}


def _execute(root: Path, slug: str, parameters: dict, work: Path, target: Path, *, limit: int | None) -> NotebookNode:
    """The executed notebook, through the scratch file `target`; ChapterFailed where a cell did not succeed."""
    papermill = require("papermill", extra="book", purpose="running a chapter")
    from nbclient.exceptions import DeadKernelError

    source = str(notebook_path(root, slug))
    options = {"kernel_name": "python3", "cwd": str(work), "execution_timeout": limit}
    # Written once at the end: papermill's copy after every cell costs seconds, and nobody reads it.
    options |= {"request_save_on_cell_execute": False, "autosave_cell_every": 0}
    try:
        papermill.execute_notebook(source, str(target), parameters, progress_bar=sys.stderr.isatty(), **options)
    except papermill.PapermillExecutionError as error:
        first = next((line for line in error.source.splitlines() if line.strip()), "")
        raise ChapterFailed(f"{slug}: cell {error.cell_index} ({first!r}): {error.ename}: {error.evalue}") from error
    except (TimeoutError, DeadKernelError) as error:
        raise ChapterFailed(f"{slug}: {str(error).strip().splitlines()[0]} (a cell may take {limit} s)") from error
    return read(target, as_version=4)


def _record(notebook: NotebookNode, root: Path, slug: str, *, profile: str, device: str, seconds: float) -> None:
    """Stamp provenance and the claims found in the outputs; mark claims and results tables for nbval."""
    claims = []
    for cell in code_cells(notebook):
        data = [output.get("data", {}) for output in cell.outputs]
        claims += [bundle[CLAIM_MIME] for bundle in data if CLAIM_MIME in bundle]
        marked = any(CLAIM_MIME in bundle or "| verdict |" in bundle.get("text/markdown", "") for bundle in data)
        if marked and not tagged(cell, "nbval-check-output"):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "nbval-check-output"]
    parts, today = chapter_parts(root, slug, profile, notebook), datetime.datetime.now(datetime.UTC).date().isoformat()
    made = Provenance(profile, device, device_name(device), versions(), today, seconds, digest_of(parts), (), parts)
    notebook.metadata["p2k"] = asdict(made) | {"claims": claims}
