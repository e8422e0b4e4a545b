"""Result records: round trip, stable bytes, and refusal of anything that is not one."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from p2k.core import files
from p2k.core.errors import P2KError
from p2k.experiments.records import ResultRecord, read_record, read_records, write_record

RECORD = ResultRecord(
    slug="oqc",
    experiment="digits",
    arm="glu+oqc",
    profile="cpu",
    metric="test_accuracy",
    values=[0.9, 0.925],
    seeds=[0, 1],
    parameters=15_250,
    config={"epochs": 3, "widths": (8, 16)},
    device="some CPU @ 2/3 GHz",
    versions={"torch": "2.13.0", "triton": None},
    date="2026-11-22T00:00:00+00:00",
    seconds=1.5,
)


def test_a_record_survives_the_round_trip(tmp_path: Path) -> None:
    path = write_record(tmp_path, RECORD)
    assert path.name == "digits-glu+oqc-cpu-test_accuracy.json"
    assert read_record(path) == RECORD
    other = replace(RECORD, arm="glu")
    write_record(tmp_path / "deeper" / "x.json", other)
    write_record(tmp_path, other)
    assert read_records(tmp_path) == [RECORD, other]
    assert read_records(tmp_path / "nowhere") == []


def test_equal_records_are_equal_bytes(tmp_path: Path) -> None:
    reordered = replace(RECORD, config={"widths": [8, 16], "epochs": 3})
    first, second = (write_record(tmp_path / n, r) for n, r in (("a.json", RECORD), ("b.json", reordered)))
    assert first.read_bytes() == second.read_bytes()
    keys = list(json.loads(first.read_text()))
    assert keys == sorted(keys)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch) -> None:
    path = write_record(tmp_path / "r.json", RECORD)
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_record(path, replace(RECORD, values=(0.0, 0.0)))
    assert read_record(path) == RECORD
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "change",
    [
        {"profile": "huge"},
        {"values": (0.5, float("nan"))},
        {"values": (0.5,)},
        {"values": 0.5},
        {"values": (), "seeds": ()},
        {"seeds": (0, 0)},
        {"seeds": (0, 1.5)},
        {"parameters": -1},
        {"parameters": True},
        {"arm": "a/b"},
        {"slug": ""},
        {"date": "yesterday"},
        {"date": "2026-11-22T00:00:00"},
        {"seconds": -1.0},
        {"config": {"x": object()}},
        {"config": {"x": float("inf")}},
        {"config": [1]},
        {"versions": {"torch": 2}},
        {"schema": 2},
    ],
)
def test_wrong_fields_are_refused_by_name(change: dict) -> None:
    with pytest.raises(ValueError, match="|".join(change)):
        replace(RECORD, **change)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda text: text[:50], "not a result record"),
        (lambda text: "[]", "expected an object"),
        (lambda text: text.replace('"schema": 1', '"schema": 7'), "schema 7"),
        (lambda text: text.replace('"slug"', '"slag"'), r"missing keys \['slug'\], unknown keys \['slag'\]"),
        (lambda text: text.replace("15250", '"many"'), "parameters"),
    ],
)
def test_a_file_that_is_no_record_says_why(tmp_path: Path, edit, reason: str) -> None:
    path = write_record(tmp_path / "r.json", RECORD)
    path.write_text(edit(path.read_text()))
    with pytest.raises(P2KError, match=reason) as caught:
        read_record(path)
    assert str(path) in str(caught.value)
