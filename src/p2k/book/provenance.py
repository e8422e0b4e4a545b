"""What a stored chapter was made from: a digest over everything that can change its outputs, and who ran it when."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from nbformat import NotebookNode

from p2k.book.notebook import code_cells, notebook_path, read_notebook
from p2k.core.syntax import canonical, import_closure


@dataclass(frozen=True)
class Provenance:
    """The record that the runner stamps into `metadata["p2k"]` of a notebook.

    A claim has a label, a verdict (`holds` or `no claim`), a tolerance and a note; `parts` maps each input of the
    digest to a hash of its own, so that a stale chapter can say what changed.
    """

    profile: str
    device: str
    device_name: str
    versions: dict[str, str | None]
    date: str
    seconds: float
    digest: str
    claims: tuple[dict[str, str], ...] = ()
    parts: dict[str, str] = field(default_factory=dict)


def read_provenance(root: Path, slug: str) -> Provenance | None:
    """The record of a stored notebook; None where there is no notebook or it was never run by the runner."""
    if not notebook_path(root, slug).is_file():
        return None
    record = read_notebook(root, slug).metadata.get("p2k")
    try:
        return Provenance(**{**record, "claims": tuple(record["claims"])})
    except (TypeError, KeyError):
        return None


def chapter_digest(root: Path, slug: str, profile: str) -> str:
    """sha256 over the parts of a stored chapter. Comments and docstrings do not count, outputs do."""
    return digest_of(chapter_parts(root, slug, profile))


def digest_of(value: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def chapter_parts(root: Path, slug: str, profile: str, notebook: NotebookNode | None = None) -> dict[str, str]:
    """Hash each input: code cells, outputs, imported p2k modules, profile parameters and recorded results.

    Benchmarks of the chapter's op count where its code names their folder. A data set counts through the module that
    loads it, because its checksum is a constant there.
    """
    cells = code_cells(notebook or read_notebook(root, slug))
    profiles = yaml.safe_load((root / "book" / "profiles.yml").read_text(encoding="utf-8")) or {}
    parts = {
        f"notebooks/{slug}.ipynb code": [canonical(cell.source) for cell in cells],
        f"notebooks/{slug}.ipynb outputs": [cell.get("outputs", []) for cell in cells],
        f"book/profiles.yml {profile}": (profiles.get(slug) or {}).get(profile),
    }
    modules = import_closure(root / "src", "p2k", [cell.source for cell in cells])
    parts |= {path: canonical(path.read_text(encoding="utf-8")) for path in modules}
    results = root / "book" / "results"
    recorded = [*(results / slug).glob("*.json")]
    if any('"benchmarks"' in cell.source for cell in cells):
        recorded += (results / "benchmarks").glob(f"*/{slug.replace('-', '_')}[-.]*.json")
    parts |= {path: path.read_text(encoding="utf-8") for path in recorded}
    named = {p.relative_to(root).as_posix() if isinstance(p, Path) else p: value for p, value in parts.items()}
    return {name: digest_of(named[name])[:16] for name in sorted(named)}


def changed_parts(root: Path, slug: str) -> list[str] | None:
    """Names of the inputs that differ from the stored record; None where there is no record."""
    stored = read_provenance(root, slug)
    if stored is None:
        return None
    now = chapter_parts(root, slug, stored.profile)
    changed = {name for name in now.keys() | stored.parts.keys() if now.get(name) != stored.parts.get(name)}
    return sorted(changed) or (["the record itself"] if stored.digest != digest_of(now) else [])
