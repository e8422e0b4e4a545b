"""Batched augmentations against loops over single images."""

import pytest
import torch

from p2k.core.seeding import generator
from p2k.data.augment import normalise, random_crop, random_horizontal_flip


def images(count: int = 7) -> torch.Tensor:
    return torch.randn(count, 3, 5, 6, generator=generator(0))


def test_crop_equals_a_loop_over_images() -> None:
    padding, batch = 2, images()
    shifts = torch.randint(0, 2 * padding + 1, (2, len(batch), 1), generator=generator(1))
    expected = []
    for image, top, left in zip(batch, shifts[0, :, 0], shifts[1, :, 0], strict=True):
        canvas = torch.zeros(3, 5 + 2 * padding, 6 + 2 * padding)
        canvas[:, padding : padding + 5, padding : padding + 6] = image
        expected.append(canvas[:, top : top + 5, left : left + 6])
    assert torch.equal(random_crop(batch, padding, generator(1)), torch.stack(expected))


def test_every_shift_occurs_and_zero_padding_is_the_identity() -> None:
    marker = torch.zeros(2000, 1, 9, 9)
    marker[:, :, 4, 4] = 1
    places = random_crop(marker, 2, generator(0)).flatten(1).argmax(1).unique()
    assert len(places) == 25
    assert torch.equal(random_crop(images(), 0, generator(0)), images())
    with pytest.raises(ValueError, match="padding"):
        random_crop(images(), -1, generator(0))


def test_flip_equals_a_loop_over_images() -> None:
    batch = images(200)
    mirrored = torch.rand((200, 1, 1, 1), generator=generator(3)).flatten() < 0.5
    expected = torch.stack([torch.fliplr(x[0]) if m else x[0] for x, m in zip(batch, mirrored, strict=True)])
    assert torch.equal(random_horizontal_flip(batch, generator(3))[:, 0], expected)
    assert 60 < mirrored.sum() < 140


def test_normalise_gives_each_channel_mean_zero_and_deviation_one() -> None:
    batch = images(50) * 3 + 2
    mean, std = batch.mean((0, 2, 3)), batch.std((0, 2, 3), unbiased=False)
    out = normalise(batch, mean, std)
    # A mean of zero has no relative error; the images have values of about one.
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3), unbiased=False), torch.ones(3))


def test_augmentation_keeps_bytes() -> None:
    batch = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
    assert random_crop(batch, 1, generator(0)).dtype == torch.uint8
    assert random_horizontal_flip(batch, generator(0)).dtype == torch.uint8
