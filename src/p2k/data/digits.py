"""The 1,797 handwritten 8x8 digits that ship with scikit-learn: a real data set that needs no network."""

import numpy as np
import torch

from p2k.core.checks import require
from p2k.core.seeding import generator
from p2k.data.image_data import ImageData, stratified_split


def load_digits(seed: int = 0, *, train: int = 896, val: int = 301, test: int = 600) -> ImageData:
    """Digits in three stratified parts, one channel, float32 in 0..1.

    Args:
        seed: of the split; the same seed gives the same split.
        train: number of training images; the three sizes sum to at most 1,797.
        val: number of images on which choices are made.
        test: number of images on which numbers are reported.

    Raises:
        ValueError: the sizes do not fit.
        MissingDependency: scikit-learn is not installed.
    """
    datasets = require("sklearn.datasets", extra="book", purpose="the digits data set")
    bunch = datasets.load_digits()
    images = torch.from_numpy((bunch.images / 16).astype(np.float32)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    parts = stratified_split(labels, (train, val, test), generator(seed))
    arrays = [array[part] for part in parts for array in (images, labels)]
    return ImageData("digits", *arrays, num_classes=10)
