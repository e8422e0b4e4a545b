"""Downloads: resumed, verified, atomic, and clear where they cannot succeed."""

import hashlib
from pathlib import Path

import pytest

from p2k.core.errors import DatasetMissing
from p2k.data.download import Archive, fetch

CONTENT = bytes(range(256)) * 400


def archive_of(server, name: str = "set.bin", content: bytes = CONTENT) -> Archive:
    server.files[name] = content
    return Archive(server.url(name), name, "sha256", hashlib.sha256(CONTENT).hexdigest())


def test_a_whole_download_is_verified_and_renamed(server, tmp_path: Path) -> None:
    path = fetch(archive_of(server), tmp_path / "new" / "folder", progress=False)
    assert path.read_bytes() == CONTENT
    assert [p.name for p in path.parent.iterdir()] == ["set.bin"]


def test_a_file_in_place_asks_no_server(server, tmp_path: Path) -> None:
    (tmp_path / "set.bin").write_bytes(CONTENT)
    fetch(archive_of(server), tmp_path, progress=False)
    assert server.requests == []


def test_a_dropped_connection_is_resumed_in_the_same_call(server, tmp_path: Path) -> None:
    archive = archive_of(server)
    server.drops, server.drop_after = 2, 30_000
    assert fetch(archive, tmp_path, progress=False).read_bytes() == CONTENT
    assert server.requests == [None, "bytes=30000-", "bytes=60000-"]


def test_a_part_left_by_an_earlier_run_is_resumed(server, tmp_path: Path) -> None:
    archive = archive_of(server)
    server.drops, server.drop_after = 3, 10_000
    with pytest.raises(DatasetMissing, match="closed after 30000 of 102400 bytes"):
        fetch(archive, tmp_path, progress=False)
    assert (tmp_path / "set.bin.part").stat().st_size == 30_000
    assert fetch(archive, tmp_path, progress=False).read_bytes() == CONTENT
    assert server.requests[-1] == "bytes=30000-"


def test_a_whole_part_needs_only_its_name(server, tmp_path: Path) -> None:
    (tmp_path / "set.bin.part").write_bytes(CONTENT)
    assert fetch(archive_of(server), tmp_path, progress=False).read_bytes() == CONTENT


def test_a_stale_part_is_thrown_away(server, tmp_path: Path) -> None:
    (tmp_path / "set.bin.part").write_bytes(b"x" * 500)
    assert fetch(archive_of(server), tmp_path, progress=False).read_bytes() == CONTENT
    assert server.requests == ["bytes=500-", None]


def test_a_server_without_ranges_starts_over(server, tmp_path: Path) -> None:
    archive = archive_of(server)
    server.ranges = False
    (tmp_path / "set.bin.part").write_bytes(CONTENT[:777])
    assert fetch(archive, tmp_path, progress=False).read_bytes() == CONTENT
    assert server.requests == ["bytes=777-"]


def test_a_wrong_checksum_leaves_nothing_behind(server, tmp_path: Path) -> None:
    archive = archive_of(server, content=b"something else")
    with pytest.raises(DatasetMissing, match="has sha256"):
        fetch(archive, tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_corrupt_file_in_place_is_replaced(server, tmp_path: Path) -> None:
    (tmp_path / "set.bin").write_bytes(b"torn")
    assert fetch(archive_of(server), tmp_path, progress=False).read_bytes() == CONTENT


@pytest.mark.parametrize("path", ["missing.bin", ""])
def test_without_the_file_the_error_says_what_to_put_where(server, tmp_path: Path, path: str) -> None:
    url = server.url("missing.bin") if path else "http://127.0.0.1:1/set.bin"
    archive = Archive(url, "set.bin", "md5", "0" * 32)
    with pytest.raises(DatasetMissing) as caught:
        fetch(archive, tmp_path, progress=False)
    message = str(caught.value)
    assert all(part in message for part in (url, "md5 " + "0" * 32, str(tmp_path / "set.bin")))
    assert ("HTTP 404" in message) == bool(path)
    assert not (tmp_path / "set.bin").exists()


def test_an_unwritable_folder_says_so(server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DatasetMissing, match="put it"):
        fetch(archive_of(server), tmp_path / "file" / "data", progress=False)
