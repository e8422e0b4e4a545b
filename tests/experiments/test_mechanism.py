"""Overlap, rank and separation of models built to have known values."""

import math

import pytest
import torch
from torch import nn

from p2k.core.seeding import generator
from p2k.data import ImageData
from p2k.experiments.mechanism import measure
from p2k.models.vit import ViTConfig, build_vit

CONFIG = ViTConfig(4, 2, 1, 3, dim=16, depth=2, heads=2, hidden=64, rank=8)


def data(count: int = 60) -> ImageData:
    rng = generator(0)
    labels = torch.arange(count) % 3
    images = torch.randn(count, 1, 4, 4, generator=rng) + labels.view(-1, 1, 1, 1)
    return ImageData("toy", images, labels, images, labels, images, labels, num_classes=3)


def model(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_vit(CONFIG, name)


@pytest.mark.parametrize("name", ["gelu+squares-oqc", "glu+oqc", "glu+oqc-dynamic", "glu+oqc-lr-tied"])
def test_projection_removes_the_overlap(name: str) -> None:
    found = measure(model(name), data())
    assert len(found.layers) == 2
    for layer in found.layers:
        for overlap in layer.overlaps:
            # The stabiliser 1e-6 leaves a share eps / |main|^2 of the overlap, and |main|^2 is above 0.01 here.
            assert overlap.after < 1e-4
            assert overlap.before > 10 * overlap.after
            assert overlap.pythagoras < 1e-4
            assert overlap.parallel_energy >= overlap.before**2


def test_squares_overlap_far_above_chance_and_untied_lift_keeps_its_overlap() -> None:
    squares = measure(model("gelu+squares"), data()).layers[0].overlaps[0]
    assert squares.before > 4 * squares.chance
    assert squares.after == pytest.approx(squares.before)
    assert squares.pythagoras > 0.01
    hidden, rank = measure(model("glu+oqc-lr"), data()).layers[0].overlaps
    assert (hidden.space, rank.space) == ("hidden", "rank")
    assert rank.after < 1e-4 < hidden.after
    assert rank.chance == pytest.approx(math.sqrt(2 / (math.pi * 8)))


def test_a_plain_host_has_ranks_and_no_overlap() -> None:
    found = measure(model("glu"), data())
    assert [layer.overlaps for layer in found.layers] == [(), ()]
    assert all(1 < layer.participation_ratio <= layer.effective_rank <= 64 for layer in found.layers)


class Collapsed(nn.Module):
    """Pooled features that are the class alone, around one linear feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Doubling()

    def features(self, images: torch.Tensor) -> torch.Tensor:
        self.block(images.flatten(2).mT)
        mean = images.mean((1, 2, 3))
        return torch.stack([(mean > cut).float() for cut in (-0.6, 0.6)], dim=1) + 1e-3 * images[:, 0, 0, :2]


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * x.expand(*x.shape[:-1], 3)

    forward = hidden


def test_collapsed_classes_are_separated_and_one_direction_has_rank_one() -> None:
    found = measure(Collapsed(), data())
    assert found.class_separation > 3
    assert found.silhouette > 0.7
    assert found.layers[0].effective_rank == pytest.approx(1, abs=1e-3)
    assert found.layers[0].participation_ratio == pytest.approx(1, abs=1e-3)


def test_measuring_leaves_no_trace() -> None:
    net = model("glu+oqc").train()
    measure(net, data())
    assert net.training
    assert all(not module._forward_pre_hooks for module in net.modules())
    assert all(p.grad is None for p in net.parameters())


def test_a_model_without_feed_forward_blocks_is_refused() -> None:
    class Flat(nn.Linear):
        def features(self, images: torch.Tensor) -> torch.Tensor:
            return self(images.flatten(1))

    with pytest.raises(ValueError, match="Flat has no feed-forward block"):
        measure(Flat(16, 2), data())
