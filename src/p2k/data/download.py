"""Checksummed downloads that resume, and the sentence that tells what to fetch where there is no network."""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from p2k.core.errors import DatasetMissing

CHUNK = 1 << 20
ATTEMPTS = 3


@dataclass(frozen=True)
class Archive:
    """One file to fetch.

    Args:
        url: where it is published.
        filename: its name under the data folder.
        algorithm: a name that `hashlib.new` knows, such as ``md5`` or ``sha256``.
        digest: lower-case hexadecimal digest of the whole file.
    """

    url: str
    filename: str
    algorithm: str
    digest: str


class _Interrupted(Exception):
    """The connection failed or the file came out wrong; what arrived may be resumed."""


def fetch(archive: Archive, root: Path | str, *, progress: bool = True, timeout: float = 30.0) -> Path:
    """Return the verified file under `root`, downloading what is missing of it.

    Bytes stream into ``<filename>.part``, which a later call resumes; only a file with the right digest is renamed
    to its final name, so a file under that name is whole.

    Args:
        archive: what to fetch.
        root: data folder; created when missing.
        progress: show a bar on standard error.
        timeout: seconds without an answer after which an attempt counts as failed, ``> 0``.

    Raises:
        DatasetMissing: no network, or the server's file has another digest; says what to fetch and where to put it.
    """
    path = Path(root).expanduser().absolute() / archive.filename
    if path.exists() and _digest(path, archive.algorithm) == archive.digest:
        return path
    part = path.with_name(path.name + ".part")
    reason = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for _ in range(ATTEMPTS):
            try:
                _stream(archive, part, progress=progress, timeout=timeout)
                _verify(archive, part)
            except _Interrupted as error:
                reason = str(error)
            else:
                os.replace(part, path)
                return path
    except OSError as error:
        reason = str(error)
    raise DatasetMissing(
        f"{archive.filename} is not in place and could not be downloaded: {reason}\n"
        f"Fetch   {archive.url}\ncheck   {archive.algorithm} {archive.digest}\nput it  {path}"
    )


def _stream(archive: Archive, part: Path, *, progress: bool, timeout: float) -> None:
    """Append to `part` what is missing of the file, or start over where the server cannot resume."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(archive.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            if answer.status != 206:
                have = 0
            length = answer.headers.get("Content-Length")
            total = have + int(length) if length else None
            bar = tqdm(
                desc=archive.filename,
                initial=have,
                total=total,
                unit="B",
                unit_scale=True,
                leave=False,
                disable=not progress,
            )
            with bar, open(part, "r+b" if have else "wb") as file:
                file.seek(have)
                while chunk := answer.read(CHUNK):
                    file.write(chunk)
                    bar.update(len(chunk))
                file.flush()
                os.fsync(file.fileno())
    except urllib.error.HTTPError as error:
        # 416: nothing is left to send. The digest decides whether `part` is whole.
        if error.code != 416:
            raise _Interrupted(f"HTTP {error.code} {error.reason}") from error
        return
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise _Interrupted(str(getattr(error, "reason", "") or error)) from error
    if total is not None and part.stat().st_size < total:
        raise _Interrupted(f"the connection closed after {part.stat().st_size} of {total} bytes")


def _verify(archive: Archive, part: Path) -> None:
    """Raise unless `part` is the archive. A wrong file is removed, so that the next attempt starts over."""
    found = _digest(part, archive.algorithm)
    if found != archive.digest:
        part.unlink()
        raise _Interrupted(f"the server's file has {archive.algorithm} {found}, expected {archive.digest}")


def _digest(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()
