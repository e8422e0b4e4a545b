"""A file is written whole or not at all."""

import os

import pytest

from p2k.core.files import write_atomic


def test_write_creates_the_folder_and_leaves_no_temporary_file(tmp_path):
    write_atomic(tmp_path / "new" / "file.txt", "text")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file.txt"]


def test_a_failing_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    write_atomic(path, "old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1
