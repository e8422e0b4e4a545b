"""The spike comparison: arms differ in nothing but what they limit, tuning never sees reported seeds."""

import copy
import math

import pytest
import torch
from torch import nn

from p2k.experiments import ghosts_of_softmax as study


@pytest.fixture(scope="module")
def data():
    return study.load()


@pytest.fixture(scope="module")
def start(data):
    return study.checkpoint(data, 7)


def run(arm, bound, start, data, *, spike=(1.0, 4), steps=4):
    return study.run_arm(arm, bound, *start, data, spike=spike, seed=7, steps=steps)


def test_a_checkpoint_is_reproducible_and_left_alone(data, start):
    again = study.checkpoint(data, 7)
    before = copy.deepcopy(start[0].state_dict())
    first = run(study.PLAIN, math.inf, start, data, spike=(100.0, 4))
    assert first == run(study.PLAIN, math.inf, again, data, spike=(100.0, 4))
    assert all(torch.equal(value, before[name]) for name, value in start[0].state_dict().items())
    assert start[1].param_groups[0]["lr"] == study.RATE


@pytest.mark.parametrize("arm", study.GRIDS)
def test_a_bound_that_never_binds_is_plain_adam(arm, data, start):
    free = run(study.PLAIN, math.inf, start, data)
    held = run(arm, 1e9, start, data)
    # Gradient clipping multiplies by one and update clipping adds what it subtracted: rounding of float32.
    assert held.losses == pytest.approx(free.losses, rel=1e-5)


def test_arms_limit_what_they_say(data, start):
    lengths = {}
    for arm, bound in ((study.PLAIN, math.inf), (study.UPDATE, 0.05), (study.GRADIENT, 1e-4), (study.CONTROLLER, 0.5)):
        model, optimizer = copy.deepcopy(start)
        optimizer.param_groups[0]["lr"] *= 1000
        take = {
            study.PLAIN: study._plain,
            study.UPDATE: study._clip_update,
            study.GRADIENT: study._clip_gradient,
            study.CONTROLLER: study._controlled,
        }[arm]
        step = take(model, optimizer, bound)
        images, labels = (part[: study.BATCH] for part in data.train)
        nn.functional.cross_entropy(model(images), labels).backward()
        old = torch.cat([p.detach().flatten() for p in model.parameters()])
        step(images)
        lengths[arm] = (torch.cat([p.detach().flatten() for p in model.parameters()]) - old).norm().item()
    assert lengths[study.UPDATE] == pytest.approx(0.05, rel=1e-4)  # float32 norm of ten thousand entries
    assert lengths[study.CONTROLLER] < lengths[study.PLAIN]
    # Adam divides by the gradient's size: a gradient clipped to a thousandth leaves a step that is still enormous.
    assert lengths[study.GRADIENT] > 0.2 * lengths[study.PLAIN] > 10 * lengths[study.UPDATE]


def test_a_spike_ends_after_its_steps(data, start):
    calm = run(study.PLAIN, math.inf, start, data, spike=(1.0, 4))
    short = run(study.PLAIN, math.inf, start, data, spike=(1.0, 0))
    assert short == calm
    jolt = run(study.CONTROLLER, 1e9, start, data, spike=(1e4, 1))
    assert jolt.ratios[0] > 10 * max(jolt.ratios[1:])


def test_ratios_are_recorded_for_the_controller_only(data, start):
    assert run(study.PLAIN, math.inf, start, data).ratios == []
    traced = run(study.CONTROLLER, 1.0, start, data, spike=(1e4, 4))
    assert len(traced.ratios) == 4
    assert traced.ratios[0] > 100


def test_the_study_pairs_seeds_and_keeps_tuning_apart(data):
    calm, long = (1.0, 2), (1e4, 2)
    sizes = {"seeds": (0, 1), "spikes": (calm, long), "steps": 2, "tuning_spikes": (calm,)}
    found = study.spike_study(data, tuning_seeds=(100,), **sizes)
    assert set(found.chosen) == set(study.GRIDS)
    assert all(found.chosen[arm] in grid for arm, grid in study.GRIDS.items())
    arms = {arm for arm, _ in found.runs}
    assert arms == {"plain Adam", "controller, r = 1", *(f"{arm}, tuned" for arm in study.GRIDS)}
    assert all(len(found.accuracy(arm, m)) == 2 for arm in arms for m in (calm, long))
    assert found.runs["plain Adam", calm][0].losses[0] == found.runs["controller, r = 1", long][0].losses[0]
    assert found.difference("plain Adam", "plain Adam", calm).mean == 0
    with pytest.raises(ValueError, match="must not be reported"):
        study.spike_study(data, tuning_seeds=(1,), **sizes)


def test_batches_cover_the_images_once_per_epoch():
    order = study.batches(150, 3, "cpu")
    epoch = torch.cat([next(order), next(order)])
    assert len(epoch.unique()) == 128
    with pytest.raises(KeyError):
        study.run_arm("no arm", 1.0, nn.Linear(1, 1), None, None, spike=(1.0, 1), seed=0, steps=1)
