"""What to repeat of long checks whose stored results are up to date: a slice that moves with the commit.

`P2K_ALL=1`, which `make test-all` sets, repeats all of them.
"""

import hashlib
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
EVERY = os.environ.get("P2K_ALL") == "1"


def git(*words: str) -> str:
    """Output of a git command, empty where there is no repository."""
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def number(commit: str, name: str) -> int:
    """A number that a commit draws for a name."""
    return int(hashlib.sha256((commit + name).encode()).hexdigest(), 16)


def lowest(names: Iterable[str], commit: str) -> str:
    """The one name that a commit picks."""
    return min(names, key=lambda name: number(commit, name))
