"""The one container every image classification set arrives in, and the seeded split that fills it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images and labels in three disjoint parts; choices are made on `val`, numbers are reported on `test`.

    Args:
        name: short name of the set.
        train_images: ``[N, C, H, W]``, uint8 in 0..255 or float32; `val_images` and `test_images` alike.
        train_labels: ``[N]`` int64 in ``0 <= label < num_classes``; `val_labels` and `test_labels` alike.
        num_classes: number of classes, ``>= 2``.
        checksum: sha256 over all six arrays; computed when left empty.

    Raises:
        ValueError: shapes disagree, a split is empty, or a label is out of range.
        TypeError: images are neither uint8 nor float32, or labels are not int64.
    """

    name: str
    train_images: Shaped[Tensor, "train channels height width"]
    train_labels: Int64[Tensor, " train"]
    val_images: Shaped[Tensor, "val channels height width"]
    val_labels: Int64[Tensor, " val"]
    test_images: Shaped[Tensor, "test channels height width"]
    test_labels: Int64[Tensor, " test"]
    num_classes: int
    checksum: str = ""

    def __post_init__(self) -> None:
        """Check the arrays and fill in the checksum."""
        for name in SPLITS:
            self._check_split(name)
        if not self.checksum:
            object.__setattr__(self, "checksum", array_checksum(self._arrays()))

    def split(self, name: Literal["train", "val", "test"]) -> tuple[Tensor, Tensor]:
        """Images and labels of one part."""
        if name not in SPLITS:
            raise ValueError(f"ImageData.split: name must be one of {SPLITS}, got {name!r}")
        return getattr(self, f"{name}_images"), getattr(self, f"{name}_labels")

    def to(self, device: torch.device | str) -> "ImageData":
        """A copy whose tensors live on `device`."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) if isinstance(v, Tensor) else v for k, v in moved.items()})

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        return tuple(self.train_images.shape[1:])

    def channel_statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over the training images, float32 ``[C]``.

        In the units of `as_float`: uint8 images count as 0..1. A constant channel gets deviation 1.
        """
        total = torch.zeros(self.image_shape[0], dtype=torch.float64, device=self.train_images.device)
        square = torch.zeros_like(total)
        # In chunks, because a float64 copy of a large set does not fit beside it.
        for chunk in self.train_images.split(4096):
            values = as_float(chunk).double()
            total += values.sum((0, 2, 3))
            square += values.square().sum((0, 2, 3))
        count = self.train_images.numel() // self.image_shape[0]
        mean = total / count
        deviation = (square / count - mean.square()).clamp_min(0).sqrt()
        return mean.float(), torch.where(deviation > 1e-6, deviation, 1.0).float()

    def _arrays(self) -> list[Tensor]:
        return [tensor for name in SPLITS for tensor in self.split(name)]

    def _check_split(self, name: str) -> None:
        images, labels = self.split(name)
        if images.dtype not in (torch.uint8, torch.float32):
            raise TypeError(f"ImageData: {name}_images must be uint8 or float32, got {images.dtype}")
        if labels.dtype != torch.int64:
            raise TypeError(f"ImageData: {name}_labels must be int64, got {labels.dtype}")
        if images.ndim != 4 or images.shape[1:] != self.train_images.shape[1:]:
            raise ValueError(f"ImageData: {name}_images must be [N, C, H, W] like train, got {tuple(images.shape)}")
        if labels.shape != images.shape[:1] or len(labels) == 0:
            raise ValueError(f"ImageData: {name} needs one label per image and at least one, got {tuple(labels.shape)}")
        if labels.min() < 0 or labels.max() >= self.num_classes:
            raise ValueError(
                f"ImageData: {name}_labels must lie in 0..{self.num_classes - 1}, "
                f"got {labels.min().item()}..{labels.max().item()}"
            )


def as_float(images: Shaped[Tensor, "*shape"]) -> Tensor:
    """Images as floating point: uint8 divided by 255, float unchanged."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def array_checksum(arrays: Sequence[Tensor]) -> str:
    """Sha256 over dtype, shape and bytes of the arrays in order."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype}{tuple(array.shape)}".encode())
        digest.update(memoryview(array.detach().cpu().contiguous().numpy()).cast("B"))
    return digest.hexdigest()


def stratified_split(
    labels: Int64[Tensor, " items"], counts: Sequence[int], generator: torch.Generator
) -> list[Tensor]:
    """Disjoint random index sets of the given sizes whose class shares follow those of `labels`.

    Items of each class are shuffled and spread evenly over a line; consecutive stretches of that line are the
    sets, so each holds its share of every class up to one item per end.

    Raises:
        ValueError: the sizes are not positive or exceed the number of items.
    """
    if min(counts) < 1 or sum(counts) > len(labels):
        raise ValueError(f"stratified_split: counts must be >= 1 and sum to <= {len(labels)}, got {tuple(counts)}")
    shuffled = torch.randperm(len(labels), generator=generator)
    position = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = shuffled[labels[shuffled] == label]
        offset = torch.rand((), generator=generator, dtype=torch.float64)
        position[members] = (torch.arange(len(members), dtype=torch.float64) + offset) / len(members)
    order = position.argsort(stable=True)
    return list(order[: sum(counts)].split(list(counts)))
