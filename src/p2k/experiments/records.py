"""Frozen results of experiments as JSON: what ran, on what, and every seed's number."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from p2k.core.errors import P2KError
from p2k.core.files import write_atomically

SCHEMA = 1


@dataclass(frozen=True)
class ResultRecord:
    """One arm of one experiment.

    Args:
        slug: chapter, such as ``oqc``.
        experiment: name of the comparison, such as ``digits``.
        arm: name of the variant.
        profile: ``smoke``, ``cpu`` or ``gpu``.
        metric: what the values are, such as ``test_accuracy``.
        values: one finite number per seed.
        seeds: in the order of `values`.
        parameters: number of trained parameters, ``>= 0``.
        config: settings of the run, JSON values only.
        device: name of the processor or GPU.
        versions: package versions.
        date: ISO 8601 with a time zone.
        seconds: wall-clock duration, ``>= 0``.
        schema: version of this layout.

    Raises:
        ValueError: a field has the wrong type or range; the message names it.
    """

    slug: str
    experiment: str
    arm: str
    profile: str
    metric: str
    values: tuple[float, ...]
    seeds: tuple[int, ...]
    parameters: int
    config: dict[str, Any]
    device: str
    versions: dict[str, str | None]
    date: str
    seconds: float
    schema: int = field(default=SCHEMA)

    def __post_init__(self) -> None:
        """Normalise sequences to tuples and check every field."""
        for name in ("values", "seeds"):
            if not isinstance(getattr(self, name), (list, tuple)):
                raise ValueError(f"ResultRecord: {name} must be a list, got {getattr(self, name)!r}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name, accept in _CHECKS.items():
            if not accept(getattr(self, name)):
                raise ValueError(f"ResultRecord: {name} has a wrong type or value: {getattr(self, name)!r}")
        if not self.values or len(self.values) != len(self.seeds):
            raise ValueError(f"ResultRecord: {len(self.values)} values do not fit {len(self.seeds)} seeds")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"ResultRecord: seeds must differ, got {self.seeds}")
        try:
            encoded = json.loads(json.dumps(self.config, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"ResultRecord: config must hold finite JSON values only: {error}") from error
        # What a reader will see, so that a record equals itself after a round trip.
        object.__setattr__(self, "config", encoded)

    @property
    def filename(self) -> str:
        """Name that differs between records of one folder."""
        return f"{self.experiment}-{self.arm}-{self.profile}-{self.metric}.json"


def write_record(path: Path | str, record: ResultRecord) -> Path:
    """Write a record atomically and return its path.

    Args:
        path: the file, or an existing folder in which `record.filename` is used.
        record: what to write; keys are sorted, so equal records give equal files.
    """
    target = Path(path)
    if target.is_dir():
        target = target / record.filename
    text = json.dumps(asdict(record), indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_atomically(target, lambda file: file.write(text.encode()))
    return target


def read_record(path: Path | str) -> ResultRecord:
    """Read and check one record.

    Raises:
        P2KError: the file is not JSON, has missing or unknown keys, another schema, or a wrong value.
    """
    try:
        content = json.loads(Path(path).read_text())
    except ValueError as error:
        raise P2KError(f"{path} is not a result record: {error}; run its experiment again") from error
    if not isinstance(content, dict):
        raise P2KError(f"{path} is not a result record: expected an object, got {type(content).__name__}")
    if content.get("schema") != SCHEMA:
        raise P2KError(f"{path} has schema {content.get('schema')!r}, this version reads {SCHEMA}: run it again")
    known = {f.name for f in fields(ResultRecord)}
    if content.keys() != known:
        missing, unknown = sorted(known - content.keys()), sorted(content.keys() - known)
        raise P2KError(f"{path} is not a result record: missing keys {missing}, unknown keys {unknown}")
    try:
        return ResultRecord(**content)
    except ValueError as error:
        raise P2KError(f"{path}: {error}") from error


def read_records(folder: Path | str) -> list[ResultRecord]:
    """All records of a folder in the order of their file names; a missing folder has none."""
    return [read_record(path) for path in sorted(Path(folder).glob("*.json"))]


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _name(value: object) -> bool:
    return isinstance(value, str) and value != "" and "/" not in value


def _dated(value: object) -> bool:
    try:
        return datetime.fromisoformat(value).tzinfo is not None
    except (TypeError, ValueError):
        return False


_CHECKS = {
    **dict.fromkeys(("slug", "experiment", "arm", "metric"), _name),
    "profile": lambda value: value in ("smoke", "cpu", "gpu"),
    "values": lambda value: all(map(_number, value)),
    "seeds": lambda value: all(map(_whole, value)),
    "parameters": lambda value: _whole(value) and value >= 0,
    "config": lambda value: isinstance(value, dict) and all(isinstance(key, str) for key in value),
    "device": lambda value: isinstance(value, str) and value != "",
    "versions": lambda value: isinstance(value, dict) and all(isinstance(v, str | None) for v in value.values()),
    "date": _dated,
    "seconds": lambda value: _number(value) and value >= 0,
    "schema": lambda value: value == SCHEMA,
}
