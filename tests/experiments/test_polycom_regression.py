"""The regression of the polycom chapter: targets, pairing and the choice of the rate."""

import pytest
import torch

from p2k.core.seeding import generator
from p2k.experiments import polycom_regression as study

SMALL = study.RegressionConfig(hidden=8, batch=16, steps=30, tests=256)


def test_targets_have_the_shapes_they_are_named_for():
    x = torch.randn(50, 4, generator=generator(0))
    line = x + torch.tensor([0.1, 0.0, 0.0, 0.0])
    # A difference of float32 values of size ten: a few units of rounding.
    assert torch.allclose(study.smooth(line) - study.smooth(x), 0.1 * x[:, 1], atol=1e-5)
    same_side = (x[:, 0] - x[:, 1]).sign() == (line[:, 0] - line[:, 1]).sign()
    slope = (study.kinked(line) - study.kinked(x))[same_side] / 0.1
    # Ten times as many after the division by 0.1.
    assert torch.allclose(slope.abs(), torch.ones_like(slope), atol=1e-4)


def test_a_fit_learns_repeats_and_pairs():
    found = study.fit("ReLU", SMALL, seeds=(0, 1), tuning_seed=9)
    again = study.fit("ReLU", SMALL, seeds=(0, 1), tuning_seed=9)
    other = study.fit("PolyReLU", SMALL, seeds=(0, 1), tuning_seed=9)
    for target in study.TARGETS:
        assert found[target].errors == again[target].errors
        assert found[target].rate in SMALL.rates
        assert max(found[target].errors) < 1  # the mean alone has 1
        assert found[target].minus(other[target]).n == 2


def test_activations_of_one_seed_start_from_the_same_maps():
    first, second = (study._network(name, 8, 3).state_dict() for name in ("ReLU", "PolyNorm"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_replica_learns_what_it_learns_alone():
    both = study.fit("GELU", SMALL, seeds=(0, 1), tuning_seed=9)
    alone = study.fit("GELU", SMALL, seeds=(1,), tuning_seed=9)
    for target in study.TARGETS:
        assert both[target].errors[1] == pytest.approx(alone[target].errors[0], rel=1e-2)  # sums in another order


def test_bad_input():
    with pytest.raises(ValueError, match="activation must be one of"):
        study.fit("tanh", SMALL, seeds=(0, 1), tuning_seed=9)
    with pytest.raises(ValueError, match="tuning_seed new"):
        study.fit("ReLU", SMALL, seeds=(0, 1), tuning_seed=1)
    with pytest.raises(ValueError, match="steps must be > 0"):
        study.RegressionConfig(steps=0)
