"""Modular arithmetic: complete, disjoint, right, and the same for the same seed."""

import pytest
import torch

from p2k.data.modular import OPERATIONS, make_modular


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_pair_once_with_its_result(operation):
    data = make_modular(7, operation=operation, train_fraction=0.4, seed=3)
    pairs, labels = torch.cat([data.train_pairs, data.test_pairs]), torch.cat([data.train_labels, data.test_labels])
    assert len(data.train_pairs) == len(data.train_labels) == 19
    assert sorted(pairs.tolist()) == [[x, y] for x in range(7) for y in range(7)]
    symbol = {"add": "+", "subtract": "-", "multiply": "*"}[operation]
    assert labels.tolist() == [eval(f"({x} {symbol} {y}) % 7") for x, y in pairs.tolist()]


def test_the_seed_decides_the_split():
    first, again, other = (make_modular(11, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.train_pairs, again.train_pairs)
    assert not torch.equal(first.train_pairs, other.train_pairs)


def test_one_hot_pairs():
    data = make_modular(5)
    assert data.one_hot(torch.tensor([[1, 4]])).tolist() == [[0.0, 1, 0, 0, 0, 0, 0, 0, 0, 1]]


@pytest.mark.parametrize(
    "bad", [{"operation": "divide"}, {"modulus": 1}, {"train_fraction": 0.0}, {"train_fraction": 1.0}]
)
def test_bad_input(bad):
    with pytest.raises(ValueError, match="make_modular: "):
        make_modular(**({"modulus": 5} | bad))
