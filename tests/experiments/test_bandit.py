from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors, tolerance
from p2k.data.preferences import SCENARIOS, make_preferences
from p2k.experiments import bandit_training as training
from p2k.experiments.bandit import run_bandits
from p2k.experiments.bandit_training import METHODS, evaluate, train, train_reference

BY_NAME = {method.name: method for method in METHODS}


def double(data):
    return replace(
        data, **{k: v.double() for k, v in vars(data).items() if torch.is_tensor(v) and v.is_floating_point()}
    )


@pytest.fixture(scope="module")
def data():
    return double(make_preferences(SCENARIOS[4:8:3], (0, 1), steps=25, test=64))


@pytest.fixture(scope="module")
def start(data):
    return train_reference(data, width=16)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_stack_equals_one_environment_at_a_time(method, data, start):
    setting = method.settings[0]
    together = train(data, start, method, setting)
    place = 2
    alone = make_preferences((data.scenarios[place],), (data.seeds[place],), steps=25, test=64)
    alone = double(alone)
    single = train(alone, train_reference(alone, width=16), method, setting)
    for name, tensor in single.items():
        # Twenty-five Adam steps amplify the order of summation a little beyond one reduction's rounding.
        assert relative_errors(together[name][place], tensor[0])[0] <= 1e3 * tolerance(torch.float64)
        assert not torch.allclose(together[name][place], start[name][place])


def test_losses_by_hand():
    random = generator(0)
    logps, anchor, rewards = (torch.randn(2, 3, 4, dtype=torch.float64, generator=random) for _ in range(3))
    pairs = [(i, j) for i in range(4) for j in range(4)]
    u = (logps - anchor) / 2.0
    every = torch.stack([-F.logsigmoid(u[..., i] - u[..., j]) * (rewards[..., i] > rewards[..., j]) for i, j in pairs])
    assert torch.allclose(training.all_pairs(logps, anchor, rewards, tau=2.0), every.sum(0) / 6)
    first = torch.where(rewards[..., 0] > rewards[..., 1], u[..., 0] - u[..., 1], u[..., 1] - u[..., 0])
    assert torch.allclose(training.one_pair(logps, anchor, rewards, tau=2.0), -F.logsigmoid(first))
    flipped = training.all_pairs(logps, anchor, -rewards, tau=2.0)
    robust = (0.8 * every.sum(0) / 6 - 0.2 * flipped) / 0.6
    assert torch.allclose(training.robust_pairs(logps, anchor, rewards, tau=2.0, flip=0.2), robust)
    cross = -((rewards / 0.3).softmax(-1) * u.log_softmax(-1)).sum(-1)
    assert torch.allclose(training.list_raw(logps, anchor, rewards, tau=2.0, beta_reward=0.3), cross)
    hard = training.soft_pairs(logps, anchor, rewards, tau=2.0, beta_reward=1e-4)
    assert torch.allclose(hard, training.all_pairs(logps, anchor, rewards, tau=2.0))


def test_metrics_by_hand(data, start):
    zero = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    found = evaluate(data, zero)
    assert torch.allclose(found["win_mass"], torch.full_like(found["win_mass"], 1 / 8))
    expected = (data.test_rewards.amax(-1) - data.test_rewards.mean(-1)).mean(1)
    assert torch.allclose(found["regret"], expected)


def test_reference_learns_and_methods_improve_on_it(data, start):
    reference = evaluate(data, start)
    assert reference["top1"].mean() > 1.5 / 8
    trained = evaluate(data, train(data, start, BY_NAME["list-raw"], {"tau": 2.0, "beta_reward": 0.3}))
    assert trained["regret"].mean() < reference["regret"].mean()


def test_the_sweep_chooses_on_tuning_seeds_and_reports_on_others():
    methods = [replace(BY_NAME[name], settings=BY_NAME[name].settings[:2]) for name in ("dpo-all-pairs", "list-raw")]
    options = {"seeds": (0, 1), "tuning_seeds": (9,), "scenarios": SCENARIOS[:2], "steps": 20, "width": 16}
    result = run_bandits(methods, metric="regret", **options)
    for method in methods:
        rows = result.tuning[method.name]
        best = min(range(2), key=lambda place: rows[place]["regret"])
        assert result.chosen[method.name] == method.settings[best]
        assert result.scores[method.name]["top1"].shape == (2, 2)
    comparison = result.compare("list-raw", "dpo-all-pairs")
    difference = result.scores["list-raw"]["regret"] - result.scores["dpo-all-pairs"]["regret"]
    assert [row.condition for row in comparison] == list(result.scenarios)
    assert [row.difference.mean for row in comparison] == pytest.approx(difference.mean(0).tolist(), abs=1e-6)
    assert set(result.means()) == {"reference", "dpo-all-pairs", "list-raw"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": (1, 2), "tuning_seeds": (2,)}, "tuning seeds"),
        ({"metric": "loss"}, "metric"),
        ({"methods": (METHODS[0], replace(METHODS[1], settings=METHODS[1].settings[:2]))}, "same number"),
    ],
)
def test_unfair_sweeps_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run_bandits(**options)
