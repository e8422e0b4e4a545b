"""Seeds trained as one batch against the same seeds trained one by one."""

import warnings
from dataclasses import replace

import pytest
import torch
from toy import ToyNet, toy_data

from p2k.core.errors import P2KError
from p2k.experiments.loop import TrainConfig, train
from p2k.experiments.stacked import train_stacked

CONFIG = TrainConfig(epochs=2, batch_size=16, learning_rate=1e-2, label_smoothing=0.1, crop_padding=1)


def double_nets(seeds: range) -> list[ToyNet]:
    return [ToyNet(seed).double() for seed in seeds]


def test_stacked_training_equals_training_one_by_one() -> None:
    models, data = double_nets(range(4)), toy_data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stacked = train_stacked(models, data, CONFIG, seeds=range(4), progress=False)
    for seed, (model, result) in enumerate(zip(models, stacked, strict=True)):
        alone_model = ToyNet(seed).double()
        alone = train(alone_model, data, CONFIG, seed=seed, progress=False)
        # Twelve float64 steps; Adam divides small gradients by their own size, which amplifies rounding.
        torch.testing.assert_close(result.losses, alone.losses, rtol=1e-10, atol=0)
        for p, q in zip(model.parameters(), alone_model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-9)
        assert torch.equal(result.test_correct, alone.test_correct)
        assert result.val_accuracy == alone.val_accuracy


def test_every_replica_has_its_own_learning_rate() -> None:
    models, data, rates = double_nets(range(3)), toy_data(), [1e-2, 3e-3, 1e-3]
    train_stacked(models, data, CONFIG, seeds=[7, 7, 7], rates=rates, progress=False)
    for seed, (model, rate) in enumerate(zip(models, rates, strict=True)):
        alone = ToyNet(seed).double()
        train(alone, data, replace(CONFIG, learning_rate=rate), seed=7, progress=False)
        # Rounding of float64, amplified as above.
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-9)


def test_replicas_do_not_touch_each_other() -> None:
    data = toy_data()
    pair, single = double_nets(range(2)), double_nets(range(1))
    both = train_stacked(pair, data, CONFIG, seeds=[0, 1], progress=False)
    alone = train_stacked(single, data, CONFIG, seeds=[0], progress=False)
    # The batch of nets changes the order of float64 sums, nothing else.
    torch.testing.assert_close(both[0].losses, alone[0].losses, rtol=1e-12, atol=0)


def test_a_seed_that_diverges_is_named() -> None:
    models = double_nets(range(3))
    with torch.no_grad():
        models[1].gain.fill_(float("inf"))
    with pytest.raises(P2KError, match=r"seeds \[11\]"):
        train_stacked(models, toy_data(), CONFIG, seeds=[10, 11, 12], progress=False)


@pytest.mark.parametrize(("count", "seeds", "rates"), [(0, [], None), (2, [0], None), (2, [0, 1], [1e-3])])
def test_seeds_and_rates_must_fit_the_models(count: int, seeds: list, rates: list | None) -> None:
    with pytest.raises(ValueError, match="one seed and one rate per model"):
        train_stacked(double_nets(range(count)), toy_data(), CONFIG, seeds=seeds, rates=rates, progress=False)
