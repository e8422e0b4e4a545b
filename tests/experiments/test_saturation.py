import pytest
import torch

from p2k.core.seeding import generator
from p2k.experiments.saturation import band, gradient_drop, inflection_layers, local_maxima, saturation_index


def curves():
    rng = generator(0)
    return 1 + torch.rand(8, generator=rng, dtype=torch.float64), torch.rand(
        8, generator=rng, dtype=torch.float64
    ) + 0.01


def test_index_range_and_invariances():
    entropy, gradient = curves()
    index = saturation_index(entropy, gradient)
    assert (index >= 0).all()
    assert (index <= 1).all()
    for other in (saturation_index(3 * entropy + 2, gradient), saturation_index(entropy, 1e-6 * gradient)):
        assert (other - index).abs().max() < 1e-12
    alone = saturation_index(entropy, gradient, weight=1.0)
    assert torch.equal(alone.argsort(), entropy.argsort(descending=True))
    assert alone[entropy.argmin()] == 1
    flat = torch.ones(4)
    assert (saturation_index(flat, flat) == 0).all()


def test_the_published_band():
    assert band([0, 5], 12) == [0, 1, 4, 5, 6]
    index = torch.tensor([0.9, 0.2, 0.1, 0.3, 0.5, 0.8, 0.4, 0.3, 0.2, 0.2, 0.1, 0.0])
    assert inflection_layers(index) == [0, 1, 4, 5, 6]
    assert inflection_layers(index, dilation=0) == [0, 5]
    assert inflection_layers(index, threshold=0.85) == [0, 1]
    assert inflection_layers(index.flip(0), skip_top=0.25) == [5, 6, 7]
    assert inflection_layers(torch.zeros(5)) == []


def test_maxima_at_ends_and_plateaus():
    assert local_maxima([3, 1, 2]) == [0, 2]
    assert local_maxima([1, 2, 2, 1]) == [1]
    assert local_maxima([1, 2, 2, 3]) == [3]
    assert local_maxima([2, 2]) == [0]
    assert local_maxima([1]) == [0]
    assert local_maxima([-1, -2]) == []


def test_drop():
    drop = gradient_drop(torch.tensor([1.0, 10.0, 100.0]))
    assert (drop - torch.tensor([1.0, 1.0, 0.0]).double() * torch.tensor(10.0).double().log()).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: saturation_index(torch.ones(3), torch.ones(4)), "must be"),
        (lambda: saturation_index(torch.ones(3), torch.zeros(3)), "positive"),
        (lambda: saturation_index(torch.ones(3), torch.ones(3), weight=2), "weight"),
        (lambda: inflection_layers(torch.ones(3), dilation=-1), "dilation"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
