"""Pages whose content stands outside them: the package, the catalogue, provenance and records.

Such a page is read again when an input changes, and only then.
"""

import hashlib
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

# What these pages are written from.
INPUTS = ("book/catalogue.yml", "book/profiles.yml", "book/results", "book/_ext", "notebooks", "src/p2k")


def mark_live(env: BuildEnvironment, docname: str) -> None:
    """Note that a page shows something of `INPUTS`."""
    env.p2k_live = getattr(env, "p2k_live", set()) | {docname}


def inputs_digest(root: Path) -> str:
    """Hash names and contents of `INPUTS`; compiled Python does not count."""
    found = [file for name in INPUTS for file in (root / name, *(root / name).rglob("*")) if file.is_file()]
    digest = hashlib.sha256()
    for file in sorted(file for file in found if file.suffix != ".pyc"):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def live_pages(app: Sphinx, env: BuildEnvironment, added: set, changed: set, removed: set) -> list[str]:
    """Name the pages to read again: all that are marked where an input has changed since the last build."""
    before, env.p2k_inputs = getattr(env, "p2k_inputs", None), inputs_digest(Path(app.srcdir))
    return [] if env.p2k_inputs == before else sorted(getattr(env, "p2k_live", set()) & env.found_docs)


def setup(app: Sphinx) -> dict:
    """Register the hook."""
    app.connect("env-get-outdated", live_pages)
    return {"version": "1", "parallel_read_safe": False}
