"""TinyImageNet from its published archive: decoded once, then read from one cached array file."""

import io
import os
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from p2k.core.checks import require
from p2k.core.errors import P2KError
from p2k.core.seeding import generator
from p2k.data.download import Archive, fetch
from p2k.data.image_data import ImageData, stratified_split

TINY_IMAGENET = Archive(
    "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
    "tiny-imagenet-200.zip",
    "md5",
    "90528d7ca1a48142e341f4ef8d21d0de",
)
SIZE = 64
# A 64x64 JPEG takes a few kilobytes; more than this is not one.
LARGEST_MEMBER = 1 << 20


def load_tiny_imagenet(
    root: Path | str, *, val: int = 5_000, seed: int = 0, archive: Archive = TINY_IMAGENET, progress: bool = True
) -> ImageData:
    """TinyImageNet, uint8 ``[N, 3, 64, 64]``, grey images repeated over the channels.

    The archive's test labels were never published: its validation images serve as `test` here, and `val` images are
    split off its training images.

    Args:
        root: data folder; the archive is looked for there and downloaded when missing, and the cache lies beside it.
        val: size of the stratified validation part, ``>= 1``.
        seed: of that split.
        archive: where the archive comes from.
        progress: show bars while downloading and decoding.

    Raises:
        DatasetMissing: the archive is neither there nor downloadable.
        MissingDependency: Pillow is not installed and nothing is cached yet.
        P2KError: the archive does not hold what it should.
    """
    cache = Path(root).expanduser().absolute() / f"{Path(archive.filename).stem}-{archive.digest[:12]}.npz"
    if not cache.exists():
        path = fetch(archive, root, progress=progress)
        try:
            arrays = _decode(path, progress)
        except (zipfile.BadZipFile, KeyError, ValueError, OSError) as error:
            raise P2KError(
                f"{path} is not the TinyImageNet archive ({error}): remove it and fetch {archive.url}"
            ) from error
        _save(cache, arrays)
    with np.load(cache, allow_pickle=False) as stored:
        images, labels, *test, classes = (torch.from_numpy(stored[name]) for name in _ARRAYS)
    chosen_val, chosen_train = stratified_split(labels, (val, len(labels) - val), generator(seed))
    train = images[chosen_train], labels[chosen_train]
    held_out = images[chosen_val], labels[chosen_val]
    return ImageData("tinyimagenet", *train, *held_out, *test, num_classes=int(classes))


_ARRAYS = ("train_images", "train_labels", "test_images", "test_labels", "num_classes")


def _decode(path: Path, progress: bool) -> dict[str, np.ndarray]:
    """Decode all labelled images straight from the archive; nothing is unpacked to disk."""
    base = "tiny-imagenet-200"
    with zipfile.ZipFile(path) as archive:
        label_of = {word: i for i, word in enumerate(archive.read(f"{base}/wnids.txt").decode().split())}
        train = []
        for name in sorted(archive.namelist()):
            folders = name.split("/")
            if len(folders) == 5 and folders[1] == "train" and name.endswith(".JPEG"):
                train.append((name, label_of[folders[2]]))
        lines = archive.read(f"{base}/val/val_annotations.txt").decode().splitlines()
        test = [(f"{base}/val/images/{name}", label_of[word]) for name, word, *_ in map(str.split, lines)]
        if not train or not test:
            raise ValueError("no images inside")
        arrays = {"num_classes": np.int64(len(label_of))}
        for part, items in (("train", train), ("test", test)):
            bar = tqdm(items, desc=f"decode {part}", leave=False, disable=not progress)
            arrays[f"{part}_images"] = np.stack([_image(archive, name) for name, _ in bar])
            arrays[f"{part}_labels"] = np.array([label for _, label in items], dtype=np.int64)
    return arrays


def _image(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One image as uint8 ``[3, 64, 64]``."""
    pillow = require("PIL.Image", extra="book", purpose="decoding TinyImageNet")
    if archive.getinfo(name).file_size > LARGEST_MEMBER:
        raise ValueError(f"{name} is larger than {LARGEST_MEMBER} bytes")
    with pillow.open(io.BytesIO(archive.read(name)), formats=("JPEG",)) as image:
        if image.size != (SIZE, SIZE):
            raise ValueError(f"{name} must have {SIZE}x{SIZE} pixels, got {image.size}")
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def _save(cache: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the cache under a temporary name first, so that a file under its own name is whole."""
    with tempfile.NamedTemporaryFile(dir=cache.parent, suffix=".npz.part", delete=False) as file:
        try:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            os.unlink(file.name)
            raise
    os.replace(file.name, cache)
