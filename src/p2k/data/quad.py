"""Procedural tasks whose labels live in second-order statistics, so that no first-order feature solves them."""

import math

import torch
from torch import Tensor

from p2k.core.seeding import generator
from p2k.data.image_data import ImageData


def make_quad(
    seed: int = 0,
    *,
    train: int = 2048,
    val: int = 512,
    test: int = 1024,
    side: int = 3,
    features: int = 6,
    num_classes: int = 6,
) -> ImageData:
    """Gaussian tokens labelled by the largest of several quadratic forms summed over the tokens.

    The label of ``x`` is ``argmax_k sum_t <u_k, x_t> <v_k, x_t>`` minus its expectation ``tokens * <u_k, v_k>``, with
    unit vectors ``u_k, v_k`` that depend on the seed alone. Tokens are pixels: patch size 1 gives one token each.

    Args:
        seed: of the task and of its samples.
        train: number of training images, and `val` and `test` likewise, ``>= 1``.
        side: tokens form a square of ``side ** 2``.
        features: channels of a token.
        num_classes: number of quadratic forms.

    Source: wang2026oqc.
    Chapter: oqc
    """
    rng = generator(seed)
    directions = torch.randn(2, num_classes, features, generator=rng, dtype=torch.float64)
    left, right = directions / directions.norm(dim=-1, keepdim=True)
    expected = side**2 * (left * right).sum(-1)

    def sample(count: int) -> tuple[Tensor, Tensor]:
        images = torch.randn(count, features, side, side, generator=rng)
        tokens = images.double().flatten(2).mT
        scores = ((tokens @ left.T) * (tokens @ right.T)).sum(1) - expected
        return images, scores.argmax(-1)

    return ImageData("quad", *sample(train), *sample(val), *sample(test), num_classes=num_classes)


def make_textures(
    seed: int = 0,
    *,
    train: int = 45_000,
    val: int = 5_000,
    test: int = 10_000,
    image_size: int = 32,
    patch_size: int = 4,
    num_classes: int = 16,
    correlation: float = 0.25,
) -> ImageData:
    """Gaussian textures whose classes differ only in the signs of pairwise correlations inside each patch.

    The ``3 * patch_size ** 2`` values of a patch form disjoint pairs; a class gives each pair a sign, and the two
    values of a pair correlate with ``sign * correlation``. Means and marginal variances are equal for all classes.

    Args:
        seed: of the pairs, the signs and the samples.
        train: number of training images, and `val` and `test` likewise, ``>= 1``.
        image_size: height and width in pixels, a multiple of `patch_size`.
        patch_size: height and width of a patch in pixels, even.
        num_classes: number of sign patterns.
        correlation: magnitude, ``0 < correlation < 1``.

    Raises:
        ValueError: the patch does not tile the image or is odd, or the correlation is out of range.

    Source: wang2026oqc.
    Chapter: oqc
    """
    if image_size % patch_size or patch_size % 2:
        raise ValueError(f"make_textures: patch_size must be even and divide {image_size}, got {patch_size}")
    if not 0 < correlation < 1:
        raise ValueError(f"make_textures: correlation must lie between 0 and 1, got {correlation}")
    rng = generator(seed)
    width, grid = 3 * patch_size**2, image_size // patch_size
    place = torch.randperm(width, generator=rng)
    signs = torch.randint(0, 2, (num_classes, width // 2), generator=rng) * 2.0 - 1

    def sample(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(0, num_classes, (count,), generator=rng)
        values = torch.randn(count, grid**2, width, generator=rng)
        first, second = values[..., : width // 2], values[..., width // 2 :]
        second.mul_(math.sqrt(1 - correlation**2)).add_(correlation * signs[labels].unsqueeze(1) * first)
        patches = values[..., place].view(count, grid, grid, 3, patch_size, patch_size)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(count, 3, image_size, image_size), labels

    return ImageData("textures", *sample(train), *sample(val), *sample(test), num_classes=num_classes)
