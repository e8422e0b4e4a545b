"""The comparison on noisy digits, small, and the rules its arms obey."""

import pytest
import torch

from p2k.experiments import inflection as study
from p2k.experiments import inflection_arms as arms
from p2k.experiments.loop import TrainConfig
from p2k.experiments.stacked import train_stacked


@pytest.fixture(scope="module")
def regimes():
    shift = study.make_shift(source=96, target=64)
    return study.compare_regimes(under=2, over=4, adapt=1, seeds=range(2), shift=shift, progress=False)


def test_every_arm_and_seed_has_its_number(regimes):
    for regime, epochs in zip(regimes, (2, 4), strict=True):
        assert regime.epochs == epochs
        assert set(regime.accuracy) == set(regime.rates) == set(regime.parameters) == set(arms.ARMS)
        assert all(len(values) == 2 and all(0 <= v <= 100 for v in values) for values in regime.accuracy.values())
        assert set(regime.rates.values()) <= set(study.RATES)
        assert regime.movement.shape == (2, arms.MODEL.depth)
        assert regime.gradient("on_target", "median_gradient").shape == (2, arms.MODEL.depth)
        assert regime.difference(arms.FULL, arms.HEAD).n == 2
    assert regimes[0].single is None
    assert regimes[1].single.shape == (2, arms.MODEL.depth)
    assert ((regimes[1].single >= 0) & (regimes[1].single <= 100)).all()


def test_parameters_of_each_arm(regimes):
    head, layer = 16 * 10 + 10, 4 * (16 + 3 * 16)
    block = sum(p.numel() for p in arms.make_source(0).blocks[0].parameters())
    for regime in regimes:
        chosen = sum(map(len, regime.layers)) / len(regime.layers)
        assert regime.parameters[arms.HEAD] == head
        assert regime.parameters[arms.ALL] == head + 6 * layer
        assert regime.parameters[arms.INFLECTION] == regime.parameters[arms.RANDOM] == head + chosen * layer
        assert regime.parameters[arms.TOP] == head + 2 * block + 2 * 16
        assert regime.parameters[arms.FULL] == sum(p.numel() for p in arms.make_source(0).parameters())


def test_the_control_has_as_many_other_layers(regimes):
    for regime in regimes:
        for chosen, drawn in zip(regime.layers, regime.random, strict=True):
            assert len(chosen) == len(drawn) >= 1
            if 2 * len(chosen) <= arms.MODEL.depth:
                assert not set(chosen) & set(drawn)


def test_source_and_target_are_disjoint_and_the_shift_is_noise():
    shift, plain = study.make_shift(), study.make_shift(0.0)
    rows = [tuple(image.flatten().tolist()) for data in (plain.source, plain.target) for image in data.train_images]
    tests = {tuple(image.flatten().tolist()) for image in plain.target.test_images}
    # A few digits occur twice in the data set itself.
    assert len(set(rows)) > 0.99 * len(rows)
    assert len(tests & set(rows)) <= 3
    noise = shift.target.test_images - plain.target.test_images
    assert abs(noise.std() - 0.12) < 0.003
    assert torch.equal(shift.source.train_images, plain.source.train_images)


def test_adapters_that_are_switched_off_never_move():
    source = arms.make_source(0)
    model = arms.make_adaptable(source, arms.Job(arms.INFLECTION, 0, (1, 4), 1e-2))
    data = study.make_shift(target=40).target
    config = TrainConfig(epochs=1, batch_size=20, learning_rate=1e-2, weight_decay=0.0, warmup_epochs=0.5)
    train_stacked([model], data, config, seeds=[0], progress=False)
    for number, block in enumerate(model.blocks):
        moved = (block.attention.query_key_value.lora_B["default"].weight != 0).any()
        assert moved == (number in (1, 4))
    frozen = dict(source.named_parameters())
    for name, parameter in model.named_parameters():
        original = name.replace("base_layer.", "").replace("original_module.", "")
        if not parameter.requires_grad:
            assert torch.equal(parameter, frozen[original])


def test_arms_of_one_seed_start_from_one_function():
    source, images = arms.make_source(3), torch.rand(4, 1, 8, 8)
    for arm in arms.ARMS:
        for layers in ((), (0, 2), (4, 5), tuple(range(6))):
            assert torch.equal(arms.make_adaptable(source, arms.Job(arm, 3, layers, 1e-2))(images), source(images))


def test_only_the_top_trains_in_its_arm():
    source, data = arms.make_source(0), study.make_shift(target=40).target
    model = arms.make_adaptable(source, arms.Job(arms.TOP, 0, (4, 5), 1e-2))
    config = TrainConfig(epochs=1, batch_size=20, learning_rate=1e-2, weight_decay=0.0, warmup_epochs=0.5)
    train_stacked([model], data, config, seeds=[0], progress=False)
    before = dict(source.named_parameters())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    top = ("blocks.4.", "blocks.5.", "readout.", "head.")
    assert moved == {name for name in before if name.startswith(top)}


@pytest.mark.parametrize("seeds", [[0], [0, study.SWEEP_SEED]])
def test_seeds_of_the_sweep_are_not_reported(seeds):
    with pytest.raises(ValueError, match="at least two seeds"):
        study.compare_regimes(seeds=seeds)
