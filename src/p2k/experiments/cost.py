"""What each chapter costs: seconds of its stored notebook and of its test files."""

import json
from pathlib import Path

from p2k.core.errors import P2KError
from p2k.experiments.benchmark_records import SCHEMA


def chapter_costs(root: Path, environment: dict) -> dict:
    """Join what the notebooks and the last whole test run recorded, by the stem that a chapter has on every floor.

    Args:
        root: the checkout. Seconds of the tests come from `_build/test-seconds.json`, which the suite writes.
        environment: of this run; each notebook's own device stands in its provenance.

    Returns:
        One row per notebook, with None for what was not run, and the seconds of the tests that belong to no chapter.
    """
    seconds = seconds_by_test_file(root)
    chapters = [_chapter(path, seconds) for path in sorted((root / "notebooks").glob("*.ipynb"))]
    own = {name for chapter in chapters for name in chapter["test_files"]}
    shared = sum(value for name, value in seconds.items() if name not in own) if seconds else None
    return {"schema": SCHEMA, "environment": environment, "chapters": chapters, "shared_test_seconds": shared}


def seconds_by_test_file(root: Path) -> dict[str, float]:
    """Seconds by test file of the last whole run of the suite; empty where there was none.

    Raises:
        P2KError: the file is not what the suite writes.
    """
    path = root / "_build" / "test-seconds.json"
    if not path.is_file():
        return {}
    try:
        return {str(name): float(value) for name, value in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise P2KError(f"{path} is not a map from test files to seconds ({error}): run `make test` again") from error


def _chapter(path: Path, seconds: dict[str, float]) -> dict:
    """Cost of one notebook; a test file is its own where the stem stands as words in the file's name."""
    record = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("p2k", {})
    words = f"_{path.stem.replace('-', '_')}_"
    own = sorted(name for name in seconds if words in f"_{Path(name).stem}_")
    return {
        "slug": path.stem,
        "profile": record.get("profile"),
        "notebook_seconds": record.get("seconds"),
        "test_seconds": sum(seconds[name] for name in own) if own else None,
        "test_files": own,
    }
