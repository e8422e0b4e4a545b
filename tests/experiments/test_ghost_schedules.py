"""Rates from the radius: every step has the length that was asked for, and tuning never sees reported seeds."""

import pytest

from p2k.experiments import ghost_schedules as schedules
from p2k.experiments.ghosts_of_softmax import load


@pytest.fixture(scope="module")
def data():
    return load()


def test_every_step_has_the_ratio_that_was_asked_for(data):
    run = schedules.run_schedule(schedules.RADIUS, 0.25, data, seed=0, steps=4)
    assert run.ratios == pytest.approx([0.25] * 4)
    assert run == schedules.run_schedule(schedules.RADIUS, 0.25, data, seed=0, steps=4)


def test_a_fixed_rate_is_never_cut(data):
    run = schedules.run_schedule(schedules.FIXED, 5.0, data, seed=0, steps=6)
    assert max(run.ratios) > 1
    assert len({round(ratio, 6) for ratio in run.ratios}) == 6
    with pytest.raises(KeyError):
        schedules.run_schedule("no rule", 0.5, data, seed=0, steps=1)


def test_both_rules_learn_and_tuning_stays_apart(data, monkeypatch):
    monkeypatch.setattr(schedules, "GRIDS", {schedules.FIXED: (1e-9, 0.1), schedules.RADIUS: (1e-9, 0.25)})
    found = schedules.schedule_study(data, seeds=(0, 1), tuning_seeds=(100,), steps=12)
    assert found.chosen == {schedules.FIXED: 0.1, schedules.RADIUS: 0.25}
    for rule in found.chosen:
        assert len(found.accuracy(rule)) == 2
        assert min(found.accuracy(rule)) > max(found.accuracy(rule, 1e-9))
    assert found.runs[schedules.FIXED, 0.1][0].losses[0] == found.runs[schedules.RADIUS, 0.25][0].losses[0]
    with pytest.raises(ValueError, match="must not be reported"):
        schedules.schedule_study(data, seeds=(1, 2), tuning_seeds=(2,), steps=1)
