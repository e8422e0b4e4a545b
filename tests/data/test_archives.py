"""CIFAR-100 and TinyImageNet end to end on tiny archives of the published format."""

import hashlib
import io
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from p2k.core.errors import DatasetMissing, P2KError
from p2k.data.cifar import CIFAR100, load_cifar100
from p2k.data.download import Archive
from p2k.data.tinyimagenet import TINY_IMAGENET, load_tiny_imagenet


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 strings, which is how the published files were made."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_string(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)
        self.memoize(value)

    dispatch[bytes] = save_string


def python2_pickle(value: object) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def cifar_file(count: int, seed: int) -> dict[bytes, object]:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)
    return {b"data": pixels, b"fine_labels": [i % 100 for i in range(count)], b"coarse_labels": [0] * count}


def cifar_tar(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def serve(server, published: Archive, content: bytes) -> Archive:
    server.files[published.filename] = content
    return Archive(server.url(published.filename), published.filename, "md5", hashlib.md5(content).hexdigest())


def test_cifar_arrays_come_out_as_they_went_in(server, tmp_path: Path) -> None:
    train, test = cifar_file(300, 0), cifar_file(40, 1)
    archive = serve(server, CIFAR100, cifar_tar({"train": python2_pickle(train), "test": python2_pickle(test)}))
    data = load_cifar100(tmp_path, val=100, archive=archive, progress=False)
    assert data.train_images.shape == (200, 3, 32, 32)
    assert data.val_images.dtype == torch.uint8
    np.testing.assert_array_equal(data.test_images.flatten(1).numpy(), test[b"data"])
    assert data.test_labels.tolist() == test[b"fine_labels"]
    # Three images of each class, one of which goes to validation.
    assert data.val_labels.bincount(minlength=100).tolist() == [1] * 100
    together = torch.cat([data.train_images, data.val_images]).flatten(1).double().sum(0)
    np.testing.assert_array_equal(together.numpy(), train[b"data"].sum(0))
    again = load_cifar100(tmp_path, val=100, archive=archive, progress=False)
    assert again.checksum == data.checksum
    assert load_cifar100(tmp_path, val=100, seed=1, archive=archive, progress=False).checksum != data.checksum


class Evil:
    def __reduce__(self) -> tuple:
        return (print, ("executed",))


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({"train": pickle.dumps(Evil(), protocol=2)}, "names __builtin__.print"),
        ({"train": b"\x80\x02garbage"}, "is not the CIFAR-100 archive"),
        ({"train": python2_pickle({b"data": np.zeros((2, 7), np.uint8), b"fine_labels": [0, 1]})}, r"\[N, 3072\]"),
        ({"test": b""}, "train"),
    ],
)
def test_a_wrong_cifar_archive_is_refused(server, tmp_path: Path, members, reason: str, capsys) -> None:
    archive = serve(server, CIFAR100, cifar_tar(members))
    with pytest.raises(P2KError, match=reason):
        load_cifar100(tmp_path, val=1, archive=archive, progress=False)
    assert "executed" not in capsys.readouterr().out


def test_a_link_in_place_of_a_cifar_file_is_refused(server, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        info = tarfile.TarInfo("cifar-100-python/train")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(P2KError, match="not a regular file"):
        load_cifar100(tmp_path, archive=serve(server, CIFAR100, buffer.getvalue()), progress=False)


def jpeg(grey: int, mode: str = "RGB", size: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (size, size), (grey,) * 3 if mode == "RGB" else grey).save(buffer, "JPEG")
    return buffer.getvalue()


def tiny_zip(size: int = 64) -> bytes:
    words = ["n01", "n02", "n03"]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as out:
        base = "tiny-imagenet-200"
        out.writestr(f"{base}/wnids.txt", "\n".join(words))
        for label, word in enumerate(words):
            for i in range(4):
                mode = "L" if i == 0 else "RGB"
                out.writestr(f"{base}/train/{word}/images/{word}_{i}.JPEG", jpeg(40 * label, mode, size))
        lines = [f"val_{i}.JPEG\t{words[2 - i]}\t0\t0\t9\t9" for i in range(3)]
        out.writestr(f"{base}/val/val_annotations.txt", "\n".join(lines))
        for i in range(3):
            out.writestr(f"{base}/val/images/val_{i}.JPEG", jpeg(40 * (2 - i)))
    return buffer.getvalue()


def test_tiny_imagenet_is_decoded_once_and_cached(server, tmp_path: Path) -> None:
    archive = serve(server, TINY_IMAGENET, tiny_zip())
    data = load_tiny_imagenet(tmp_path, val=3, archive=archive, progress=False)
    assert (data.num_classes, len(data.train_labels), data.image_shape) == (3, 9, (3, 64, 64))
    for images, labels in (data.split("train"), data.split("val"), data.split("test")):
        # A uniform JPEG keeps its grey level to within one step of its quantisation.
        error = images.double().mean((1, 2, 3)) - 40.0 * labels
        assert error.abs().max() <= 1
    assert data.test_labels.tolist() == [2, 1, 0]
    (tmp_path / archive.filename).unlink()
    server.files.clear()
    assert load_tiny_imagenet(tmp_path, val=3, archive=archive, progress=False).checksum == data.checksum
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [b"no zip", tiny_zip(size=32)])
def test_a_wrong_tiny_imagenet_archive_is_refused_and_not_cached(server, tmp_path: Path, content: bytes) -> None:
    archive = serve(server, TINY_IMAGENET, content)
    with pytest.raises(P2KError, match="remove it and fetch"):
        load_tiny_imagenet(tmp_path, val=1, archive=archive, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == [archive.filename]


@pytest.mark.parametrize(("load", "archive"), [(load_cifar100, CIFAR100), (load_tiny_imagenet, TINY_IMAGENET)])
def test_without_a_network_the_loader_says_what_to_fetch(tmp_path: Path, load, archive: Archive, monkeypatch) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no route")))
    with pytest.raises(DatasetMissing, match="no route") as caught:
        load(tmp_path, progress=False)
    assert archive.url in str(caught.value)
    assert archive.digest in str(caught.value)
    assert str(tmp_path / archive.filename) in str(caught.value)
