"""Benchmark files: one per workload, checked against `benchmark.schema.json` when written and when read."""

import functools
import json
from pathlib import Path

import jsonschema

from p2k.core.errors import P2KError
from p2k.core.files import write_atomic

SCHEMA = 1
# Beside the workloads' files; `p2k.experiments.cost` writes it.
COST_FILE = "cost.json"


@functools.cache
def _validator() -> jsonschema.Draft202012Validator:
    schema = Path(__file__).with_name("benchmark.schema.json").read_text(encoding="utf-8")
    return jsonschema.Draft202012Validator(json.loads(schema))


def write_json(path: Path, content: dict) -> None:
    """Write a benchmark file whole; ValueError for NaN or infinity, which JSON has no words for."""
    write_atomic(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_file(path: Path) -> dict:
    """Read one benchmark file and check it against the schema.

    Raises:
        P2KError: not JSON, or not what the schema asks for.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise P2KError(f"{path}: not valid JSON ({error}); delete it and run the benchmark again") from error
    wrong = min(_validator().iter_errors(content), key=lambda error: list(map(str, error.path)), default=None)
    if wrong:
        where = ".".join(map(str, wrong.path)) or "top level"
        raise P2KError(f"{path}: {where}: {wrong.message}; delete it and run the benchmark again")
    return content


def read_folder(folder: Path) -> list[dict]:
    """All benchmark files of a folder, by name.

    Raises:
        P2KError: a file is broken.
    """
    return [read_file(path) for path in sorted(folder.glob("*.json")) if path.name != COST_FILE]


def comparable(environment: dict) -> dict:
    """What must agree between two runs for their numbers to be put side by side: everything but the date."""
    return {name: value for name, value in environment.items() if name != "date"}


def read_baseline(folder: Path, environment: dict) -> list[dict]:
    """Records of an earlier run, to compare a run in `environment` with.

    Raises:
        P2KError: there are none, or they come from another device or number of threads.
    """
    files = read_folder(folder)
    if not files:
        raise P2KError(f"no benchmark files in {folder}: nothing to compare with")
    for file in files:
        for name in ("device", "threads"):
            then, now = file["environment"][name], environment[name]
            if then != now:
                raise P2KError(f"{folder} was measured with {name} {then!r}, this run has {now!r}: measure it here")
    return [record for file in files for record in file["records"]]


def regressions(before: list[dict], after: list[dict], *, tolerance: float = 0.15) -> list[str]:
    """Points whose speed relative to eager torch fell by more than `tolerance`, one line each with both numbers.

    Ratios within one run are compared, not milliseconds: they survive a change of machine load, and a slow-down of
    eager torch itself does not count as ours. Points that only one side has are passed over.
    """

    def key(record: dict) -> tuple:
        names = ("op", "dtype", "pass", "implementation")
        return tuple(record[name] for name in names) + tuple(sorted(record["shape"].items()))

    old = {key(record): record["speedup"] for record in before}
    found = []
    for record in after:
        then, now = old.get(key(record), {}).get("eager"), record["speedup"].get("eager")
        if then and now and now["p80"] < (1 - tolerance) * then["p50"]:
            where = " ".join(str(part) for part in key(record)[:4]) + f" {record['shape']}"
            found.append(f"{where}: {now['p50']:.2f} x eager, was {then['p50']:.2f} x")
    return found
