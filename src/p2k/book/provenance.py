"""What a stored chapter was made from: a digest over everything that can change its outputs, and who ran it when."""

import ast
import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from nbformat import NotebookNode

from p2k.book.notebook import code_cells, notebook_path, read_notebook


@dataclass(frozen=True)
class Provenance:
    """The record that the runner stamps into `metadata["p2k"]` of a notebook.

    `claims` holds one `{"label", "verdict", "tolerance", "note"}` per claim, verdict `holds` or `no claim`;
    `parts` maps each input of the digest to its own short hash, so that a stale chapter can say what changed.
    """

    profile: str
    device: str
    device_name: str
    versions: dict[str, str | None]
    date: str
    seconds: float
    digest: str
    claims: tuple[dict[str, Any], ...] = ()
    parts: dict[str, str] = field(default_factory=dict)

    def write(self, notebook: NotebookNode) -> None:
        """Stamp the record into a notebook."""
        notebook.metadata["p2k"] = {**asdict(self), "claims": list(self.claims)}


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
    return combine(chapter_parts(root, slug, profile))


def combine(parts: dict[str, str]) -> str:
    """One digest of all parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def chapter_parts(root: Path, slug: str, profile: str, notebook: NotebookNode | None = None) -> dict[str, str]:
    """Hash each input: code cells, outputs, imported p2k modules, profile parameters and recorded results.

    A data set counts through the module that loads it, because its checksum is a constant there.
    """
    notebook = read_notebook(root, slug) if notebook is None else notebook
    cells, name = code_cells(notebook), f"notebooks/{slug}.ipynb"
    profiles = yaml.safe_load((root / "book" / "profiles.yml").read_text(encoding="utf-8")) or {}
    parts = {
        f"{name} code": _hash([canonical(cell.source) for cell in cells]),
        f"{name} outputs": _hash([cell.get("outputs", []) for cell in cells]),
        f"book/profiles.yml {profile}": _hash((profiles.get(slug) or {}).get(profile)),
    }
    for path in sorted(module_closure(root, [cell.source for cell in cells])):
        parts[path.relative_to(root).as_posix()] = _hash(canonical(path.read_text(encoding="utf-8")))
    for path in sorted((root / "book" / "results" / slug).glob("*.json")):
        parts[path.relative_to(root).as_posix()] = _hash(path.read_text(encoding="utf-8"))
    return parts


def changed_parts(root: Path, slug: str) -> list[str] | None:
    """Names of the inputs that differ from the stored record; None where there is no record."""
    stored = read_provenance(root, slug)
    if stored is None:
        return None
    now = chapter_parts(root, slug, stored.profile)
    changed = sorted(name for name in now.keys() | stored.parts.keys() if now.get(name) != stored.parts.get(name))
    return changed or ([] if combine(now) == stored.digest else ["the digest itself"])


def module_closure(root: Path, sources: list[str]) -> set[Path]:
    """Files of all p2k modules that the sources import, directly or not, anywhere in their text."""
    found: set[Path] = set()
    queue = [(source, "__main__") for source in sources]
    while queue:
        source, package = queue.pop()
        for name in _imports(source, package):
            path = _module_file(root, name)
            if path is not None and path not in found:
                found.add(path)
                inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
                queue.append((path.read_text(encoding="utf-8"), inside))
    return found


def canonical(source: str) -> str:
    """Python source as text that ignores layout, comments and docstrings and is equal on all Python versions.

    Text that is no Python (a cell with a magic) stands for itself.
    """
    try:
        return json.dumps(_dump(ast.parse(source)), separators=(",", ":"))
    except SyntaxError:
        return source


def _dump(node: Any) -> Any:
    """Nested lists of a syntax tree; empty fields are left out because new Python versions add such fields."""
    if isinstance(node, list):
        return [_dump(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    values = dict(ast.iter_fields(node))
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
            values["body"] = node.body[1:]
    kept = {name: value for name, value in values.items() if name not in ("ctx", "kind", "type_comment")}
    if not isinstance(node, ast.Constant):
        kept = {name: value for name, value in kept.items() if value is not None and value != []}
    return [type(node).__name__, {name: _dump(value) for name, value in sorted(kept.items())}]


def _imports(source: str, package: str) -> set[str]:
    """Dotted names of the p2k modules that a source may import, with the packages above them."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return set()
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    names = {name for name in names if name.partition(".")[0] == "p2k"}
    return {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 2)}


def _module_file(root: Path, name: str) -> Path | None:
    """The file of a module below `src`, or None where the name is an attribute."""
    path = root / "src" / Path(*name.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
