"""Digits, the second-order tasks, the container and its stratified split."""

import math

import pytest
import torch

from p2k.core.seeding import generator
from p2k.data import ImageData
from p2k.data.digits import load_digits
from p2k.data.image_data import stratified_split
from p2k.data.quad import make_quad, make_textures


def test_digits_are_split_without_overlap_and_by_class() -> None:
    data = load_digits()
    assert [len(data.split(name)[1]) for name in ("train", "val", "test")] == [896, 301, 600]
    assert data.image_shape == (1, 8, 8)
    assert data.train_images.max() == 1
    shares = torch.stack([data.split(n)[1].bincount() / len(data.split(n)[1]) for n in ("train", "val", "test")])
    # A stratified share is off by at most one item per end of its stretch, and 2 of 301 is 0.0067.
    assert (shares - shares[0]).abs().max() < 0.0067
    rows = torch.cat([data.split(n)[0] for n in ("train", "val", "test")]).flatten(1)
    assert rows.unique(dim=0).shape[0] == 1797


def test_digits_depend_on_the_seed_alone() -> None:
    assert load_digits().checksum == load_digits().checksum
    assert load_digits(1).checksum != load_digits().checksum


def test_stratified_split_is_disjoint_and_balanced() -> None:
    labels = torch.arange(90) % 3
    parts = stratified_split(labels, (30, 15, 45), generator(0))
    assert torch.cat(parts).unique().numel() == 90
    for part in parts:
        assert (labels[part].bincount() - len(part) / 3).abs().max() <= 1
    with pytest.raises(ValueError, match="sum to <= 90"):
        stratified_split(labels, (90, 1), generator(0))


def test_quad_labels_follow_the_quadratic_forms_and_not_the_mean() -> None:
    data = make_quad(train=4000)
    assert data.image_shape == (6, 3, 3)
    shares = data.train_labels.bincount(minlength=6) / 4000
    assert shares.min() > 0.08
    # First-order statistics carry nothing: class means of 9 x 4000/6 standard normals scatter by 1/sqrt(6000).
    means = torch.stack([data.train_images[data.train_labels == k].mean((0, 2, 3)) for k in range(6)])
    assert means.abs().max() < 5 / math.sqrt(6000)
    # The 21 second-order statistics carry the label: a linear least-squares classifier on them is far above 1/6.
    tokens = data.train_images.flatten(2).mT.double()
    pairs = torch.triu_indices(6, 6)
    second = torch.einsum("ntf,ntg->nfg", tokens, tokens)[:, *pairs]
    second = second - second.mean(0)
    target = torch.nn.functional.one_hot(data.train_labels).double()
    weight = torch.linalg.lstsq(second, target - target.mean(0)).solution
    accuracy = ((second @ weight).argmax(1) == data.train_labels).double().mean()
    assert accuracy > 0.8


def test_textures_differ_in_correlations_only() -> None:
    data = make_textures(train=2000, val=10, test=10, image_size=8, patch_size=4, num_classes=2, correlation=0.5)
    patches = data.train_images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(2000, 4, 48).double()
    covariance = [
        torch.einsum("npi,npj->ij", p, p) / (p.shape[0] * 4)
        for p in (patches[data.train_labels == k] for k in range(2))
    ]
    # Each entry averages about 4000 products of unit variance: 6 standard errors are 0.1.
    for matrix in covariance:
        assert (matrix.diagonal() - 1).abs().max() < 0.14
        strong = matrix.fill_diagonal_(0).abs() > 0.25
        assert strong.sum(1).eq(1).all()
    differing = (covariance[0] - covariance[1]).abs() > 0.5
    assert 0 < differing.sum() < 48


@pytest.mark.parametrize("arguments", [{"patch_size": 5}, {"patch_size": 6}, {"correlation": 1.0}])
def test_impossible_textures_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="must"):
        make_textures(train=1, val=1, test=1, **arguments)


def split(count: int = 4, *, classes: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(count, 1, 2, 2), torch.arange(count) % classes


def test_image_data_moves_normalises_and_names_its_splits() -> None:
    images = torch.arange(32, dtype=torch.uint8).view(4, 2, 2, 2)
    labels = torch.tensor([0, 1, 0, 1])
    data = ImageData("toy", images, labels, images, labels, images, labels, num_classes=2)
    mean, std = data.channel_statistics()
    expected = images.double().transpose(0, 1).flatten(1) / 255
    torch.testing.assert_close(mean, expected.mean(1).float())
    torch.testing.assert_close(std, expected.std(1, unbiased=False).float())
    assert data.to("cpu").checksum == data.checksum
    with pytest.raises(ValueError, match="'train', 'val', 'test'"):
        data.split("dev")


def test_a_constant_channel_can_be_normalised() -> None:
    data = ImageData("flat", *split(), *split(), *split(), num_classes=2)
    assert data.channel_statistics()[1].tolist() == [1.0]


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"train_images": torch.zeros(4, 1, 2, 2).double()}, TypeError, "uint8 or float32"),
        ({"val_labels": torch.zeros(4)}, TypeError, "int64"),
        ({"test_images": torch.zeros(4, 3, 2, 2)}, ValueError, "like train"),
        ({"test_labels": torch.zeros(3, dtype=torch.int64)}, ValueError, "one label per image"),
        ({"val_labels": torch.full((4,), 2)}, ValueError, "must lie in 0..1"),
        ({"val_images": torch.zeros(0, 1, 2, 2), "val_labels": torch.zeros(0).long()}, ValueError, "at least one"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict, error: type, reason: str) -> None:
    parts = dict(
        zip(
            ("train_images", "train_labels", "val_images", "val_labels", "test_images", "test_labels"),
            (*split(), *split(), *split()),
            strict=True,
        )
    )
    with pytest.raises(error, match=reason):
        ImageData("bad", **{**parts, **change}, num_classes=2)
