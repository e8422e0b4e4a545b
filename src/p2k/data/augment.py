"""Augmentations of image batches in plain torch: vectorised, on any device, driven by an explicit generator."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor


def random_crop(
    images: Shaped[Tensor, "batch channels height width"], padding: int, generator: torch.Generator
) -> Shaped[Tensor, "batch channels height width"]:
    """Pad every image with zeros and cut a window of the old size at its own random place.

    Args:
        images: any dtype, ``[N, C, H, W]``.
        padding: pixels added on each side, ``>= 0``; shifts are uniform in ``-padding .. padding``.
        generator: on the device of `images`.

    Raises:
        ValueError: a negative padding.
    """
    if padding < 0:
        raise ValueError(f"random_crop: padding must be >= 0, got {padding}")
    count, channels, height, width = images.shape
    shifts = torch.randint(0, 2 * padding + 1, (2, count, 1), generator=generator, device=images.device)
    rows = (shifts[0] + torch.arange(height, device=images.device))[:, None, :, None]
    columns = (shifts[1] + torch.arange(width, device=images.device))[:, None, None, :]
    item = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return F.pad(images, (padding,) * 4)[item, channel, rows, columns]


def random_horizontal_flip(
    images: Shaped[Tensor, "batch channels height width"], generator: torch.Generator
) -> Shaped[Tensor, "batch channels height width"]:
    """Mirror each image left to right with probability one half; `generator` lives on the images' device."""
    mirrored = torch.rand((len(images), 1, 1, 1), generator=generator, device=images.device) < 0.5
    return torch.where(mirrored, images.flip(-1), images)


def normalise(
    images: Float[Tensor, "batch channels height width"],
    mean: Float[Tensor, " channels"],
    std: Float[Tensor, " channels"],
) -> Float[Tensor, "batch channels height width"]:
    """Subtract each channel's mean and divide by its standard deviation, both ``[C]``."""
    return (images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
