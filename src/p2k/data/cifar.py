"""CIFAR-100 from its published archive, read without executing what its pickles could name."""

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from p2k.core.errors import P2KError
from p2k.core.seeding import generator
from p2k.data.download import Archive, fetch
from p2k.data.image_data import ImageData, stratified_split

CIFAR100 = Archive(
    "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
    "cifar-100-python.tar.gz",
    "md5",
    "eb9058c3a382ffc7106e4002c42a8d85",
)
# The training file holds 154 MB; more than this is not the data set.
LARGEST_MEMBER = 1 << 28


def load_cifar100(
    root: Path | str, *, val: int = 5_000, seed: int = 0, archive: Archive = CIFAR100, progress: bool = True
) -> ImageData:
    """CIFAR-100 with fine labels, uint8 ``[N, 3, 32, 32]``; `val` images are split off the training file.

    Args:
        root: data folder; the archive is looked for there and downloaded when missing.
        val: size of the stratified validation part, ``>= 1``.
        seed: of that split.
        archive: where the archive comes from.
        progress: show a bar while downloading.

    Raises:
        DatasetMissing: the archive is neither there nor downloadable.
        P2KError: the archive does not hold what it should.
    """
    path = fetch(archive, root, progress=progress)
    try:
        with tarfile.open(path) as tar:
            (images, labels), test = (_read(tar, f"cifar-100-python/{name}") for name in ("train", "test"))
    except (tarfile.TarError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise P2KError(f"{path} is not the CIFAR-100 archive ({error}): remove it and fetch {archive.url}") from error
    chosen_val, chosen_train = stratified_split(labels, (val, len(labels) - val), generator(seed))
    train = images[chosen_train], labels[chosen_train]
    return ImageData("cifar100", *train, images[chosen_val], labels[chosen_val], *test, num_classes=100)


class _ArrayUnpickler(pickle.Unpickler):
    """Admits the three globals of a pickled NumPy array, and nothing that could run code."""

    admitted = {
        (module, name)
        for module, name in (
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
        )
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.admitted:
            raise pickle.UnpicklingError(f"the pickle names {module}.{name}, which no array needs")
        # NumPy 2 moved the module and warns about its old name.
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read(tar: tarfile.TarFile, name: str) -> tuple[Tensor, Tensor]:
    """Images and labels of one member. Nothing is unpacked to disk, so member names cannot lead anywhere."""
    member = tar.getmember(name)
    if not member.isfile() or member.size > LARGEST_MEMBER:
        raise tarfile.TarError(f"{name} is not a regular file of at most {LARGEST_MEMBER} bytes")
    # The pickles come from Python 2: its strings are bytes.
    content = _ArrayUnpickler(io.BytesIO(tar.extractfile(member).read()), encoding="bytes").load()
    images = np.asarray(content[b"data"])
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3 * 32 * 32:
        raise ValueError(f"{name}: data must be uint8 [N, 3072], got {images.dtype} {images.shape}")
    labels = torch.tensor(content[b"fine_labels"], dtype=torch.int64)
    return torch.from_numpy(images.copy()).view(-1, 3, 32, 32), labels
