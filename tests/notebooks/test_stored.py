"""The stored notebooks run again and their marked outputs come out the same.

All of them while their recorded times add up to at most eight minutes or P2K_ALL=1; beyond that those
changed since main and a tenth of the rest, chosen by the commit's hash.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from moving_slice import EVERY, ROOT, git, number

from p2k.book.catalogue import load_catalogue
from p2k.book.provenance import read_provenance
from p2k.book.runner import kernel_environment

LIMIT_SECONDS = 480


def chosen(runs: dict[str, float], *, changed: set[str], commit: str, every: bool) -> list[str]:
    """The chapters to run again: all that fit, else the changed ones and a slice that moves with the commit."""
    if every or sum(runs.values()) <= LIMIT_SECONDS:
        return sorted(runs)
    return sorted(slug for slug in runs if slug in changed or number(commit, slug) % 10 == 0)


def stored_chapters() -> list[str]:
    """Chosen among the chapters that the runner has stored; test_smoke fails for one that it has not."""
    found = {paper.slug: read_provenance(ROOT, paper.slug) for paper in load_catalogue(ROOT).chapters}
    runs = {slug: run.seconds for slug, run in found.items() if run is not None}
    changed = {Path(name).stem for name in git("diff", "--name-only", "origin/main", "--", "notebooks").splitlines()}
    return chosen(runs, changed=changed, commit=git("rev-parse", "HEAD"), every=EVERY)


def test_all_run_while_they_fit_and_a_moving_slice_beyond():
    few, many = {"a": 100.0, "b": 300.0}, {f"c{number}": 60.0 for number in range(100)}
    assert chosen(few, changed=set(), commit="x", every=False) == ["a", "b"]
    assert len(chosen(many, changed=set(), commit="x", every=True)) == 100
    slices = [chosen(many, changed={"c7"}, commit=commit, every=False) for commit in ("x", "y")]
    assert all("c7" in part and 1 < len(part) < 30 for part in slices)
    assert slices[0] != slices[1]


@pytest.mark.parametrize("slug", stored_chapters())
def test_stored_outputs_come_out_again(slug, tmp_path):
    environment = {**os.environ, **kernel_environment(ROOT, tmp_path)}
    # The runner stores nothing of stderr, and nbval takes a progress bar there for a new output.
    startup = tmp_path / "ipython" / "profile_default" / "startup" / "50-quiet.py"
    startup.write_text("import os, sys\nsys.stderr = open(os.devnull, 'w')\n")
    options = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=280", "-p", "no:cacheprovider", "-q"]
    command = [sys.executable, "-m", "pytest", *options, str(ROOT / "notebooks" / f"{slug}.ipynb")]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:]
