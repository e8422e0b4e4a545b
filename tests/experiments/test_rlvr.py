from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from p2k.core.errors import P2KError
from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors, tolerance
from p2k.data.arithmetic import make_arithmetic
from p2k.experiments import rlvr
from p2k.experiments.records import read_records, write_record
from p2k.experiments.rlvr import RLVRConfig, guard, train_policy, warm_start
from p2k.experiments.rlvr_arms import ARMS, MAP_ARMS, guarded, guarded_by_group
from p2k.experiments.rlvr_sweep import compare_arms, to_records, tune, warm_starts
from p2k.experiments.rollout import accuracy, sample_rollout
from p2k.losses.registry import POLICY_LOSSES
from p2k.models.generation import completion_logps

TIGHT = tolerance(torch.float64)
CONFIG = RLVRConfig(warm_steps=60, rollouts=4, prompts=8, num_generations=4)


@pytest.fixture(scope="module")
def data():
    return make_arithmetic("sum-1")


@pytest.fixture(scope="module")
def start(data):
    return warm_start(data, CONFIG)


def same(first, second) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def gradients(data):
    """Gradient of each method's loss on one on-policy batch, all parameters in one vector, in float64."""
    model = warm_start(data, replace(CONFIG, warm_steps=120)).double()
    rollout = sample_rollout(model, data, generator(0), prompts=32, num_generations=4)
    # Methods differ in how they weigh prompts by success rate, so every rate must occur.
    assert set(rollout.rewards.view(32, 4).sum(1).tolist()) == {0, 1, 2, 3, 4}
    arms = {**ARMS, "apo-0": ARMS["apo"].but("apo-0", alpha=0.0, tau=0.5, beta_reward=0.3)}
    found = {}
    for name, arm in arms.items():
        logps, _ = completion_logps(model, rollout.prompts, rollout.tokens, rollout.mask)
        loss, _ = arm.loss(logps, rollout, arm.advantages(rollout, 4).double(), 4)
        grads = torch.autograd.grad(loss, list(model.parameters()))
        found[name] = torch.cat([grad.flatten() for grad in grads])
    return found


@pytest.mark.parametrize(
    ("first", "second", "factor"),
    [
        ("reinforce", "rloo", 1.0),
        ("gspo", "grpo", 1.0),
        ("gopo-2", "rloo", 3 / 4),
        ("gopo-1", "gopo-2", 1.0),
        ("dr_grpo", "gopo-2", 1 / 3),
        ("apo-0", "gopo-2", 1 / (0.5 * 0.3)),
    ],
)
def test_first_on_policy_step_of_relatives_coincides(gradients, first, second, factor):
    # Rewards, and with them advantages, are float32 numbers; means of four binary rewards are exact in it.
    assert relative_errors(gradients[first], factor * gradients[second])[0] <= 10 * tolerance(torch.float32)


def test_first_steps_that_must_differ_do(gradients):
    for first, second in (("grpo", "rloo"), ("dapo", "grpo"), ("adpo", "grpo"), ("dpo", "grpo"), ("gopo", "gopo-2")):
        a, b = gradients[first], gradients[second]
        assert torch.cosine_similarity(a, b, dim=0) < 0.9999
        assert torch.cosine_similarity(a, b, dim=0) > 0.5


def test_methods_weigh_a_prompt_by_its_success_rate_only(data, start):
    """On-policy and with binary rewards every gradient is (R - p) times a weight of p: derived in the chapter."""
    weights = {
        "rloo": lambda p: 4 / 3,
        "grpo": lambda p: (4 / 3 * p * (1 - p)) ** -0.5,
        "dpo": lambda p: 1 / (2 * p * (1 - p)),
        "adpo": lambda p: _softmax_weight(p, 0.8, 0.5, (4 / 3 * p * (1 - p)) ** -0.5),
        "gopo": lambda p: 1.0 if p <= 0.5 else 0.5 / p,
    }
    rollout = sample_rollout(start, data, generator(0), prompts=1, num_generations=4)
    rollout = replace(rollout, mask=torch.ones_like(rollout.mask))
    for wins in (1, 2, 3):
        one = replace(rollout, rewards=(torch.arange(4) < wins).float())
        for name, weight in weights.items():
            logps = one.old_logps.double().requires_grad_()
            arm = ARMS[name]
            loss, _ = arm.loss(logps, replace(one, old_logps=logps.detach()), arm.advantages(one, 4).double(), 4)
            (grad,) = torch.autograd.grad(loss, logps)
            tokens = {"grpo": 3.0}.get(name, 1.0)  # a mean over three tokens, not a sum
            expected = -(one.rewards - wins / 4).double() * weight(wins / 4) / 4
            # GRPO adds 1e-6 to a deviation near one half, and advantages are float32 numbers.
            assert torch.allclose(tokens * grad[:, 0], expected, rtol=1e-5)


def _softmax_weight(p, tau, beta, scale):
    """(q+ - 1/G) / (tau (1 - p)) times G: ADPO's weight for standardised advantages."""
    up, down = torch.tensor([(1 - p) * scale / beta, -p * scale / beta], dtype=torch.float64).exp()
    chosen = up / (4 * (p * up + (1 - p) * down))
    return 4 * (chosen - 1 / 4) / (tau * (1 - p))


@pytest.mark.parametrize("name", sorted(ARMS))
def test_every_arm_runs_and_moves_the_policy(name, data, start):
    model = deepcopy(start)
    result = train_policy(model, data, ARMS[name], replace(CONFIG, rollouts=1))
    assert result.stopped == ""
    assert not same(result.state, start.state_dict())
    for metric in ("reward", "entropy", "kl", "grad_norm", "length", "sampled", "log_ratio/low", "log_ratio/high"):
        assert len(result.history[metric]) == 1
    assert result.history["kl"][0] > 0
    assert result.train_accuracy == accuracy(model, data, data.train)


def test_the_map_has_nine_arms_with_registered_losses():
    assert len(MAP_ARMS) == 9
    assert all(ARMS[name].recipe.loss in POLICY_LOSSES for name in MAP_ARMS)


def test_training_raises_the_reward(data):
    config = RLVRConfig(rollouts=30, prompts=32, minibatches=1, learning_rate=2e-3)
    result = train_policy(warm_start(data, config), data, ARMS["apo"], config)
    rewards = result.history["reward"]
    # 1,280 samples on either side: five standard errors of a difference of shares are below 0.1.
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1


def test_equal_runs_are_equal_and_seeds_matter(data, start):
    runs = [
        train_policy(deepcopy(start), data, ARMS["grpo"], replace(CONFIG, seed=seed, rollouts=2)) for seed in (0, 0, 1)
    ]
    assert runs[0].history == runs[1].history
    assert same(runs[0].state, runs[1].state)
    assert runs[0].history != runs[2].history


def test_a_guard_per_group_is_the_guard_of_each_group_alone():
    counts = torch.tensor([1, 4, 6, 7, 8])
    rewards = (torch.arange(8) < counts[:, None]).double()
    advantages = rewards - rewards.mean(-1, keepdim=True)
    logps = -torch.rand(5, 8, generator=generator(3), dtype=torch.float64)
    alone = [guarded(logps[row], advantages[row])["alpha"] for row in range(5)]
    together = guarded_by_group(logps, advantages)["alpha"]
    torch.testing.assert_close(together, torch.stack(alone)[:, None], rtol=TIGHT, atol=TIGHT)
    assert (together.flatten() < 0.9).tolist() == [False, False, True, True, False]
    # The hardest prompt of a batch holds the common guard at its start.
    assert guarded(logps, advantages)["alpha"].item() == pytest.approx(0.9, abs=TIGHT)


@pytest.mark.parametrize("name", ["apo-guarded", "apo-guarded-group", "dapo"])
def test_a_resumed_run_ends_in_the_same_bits(name, data, start, tmp_path, monkeypatch):
    whole = train_policy(deepcopy(start), data, ARMS[name], CONFIG)
    path, improve, calls = tmp_path / "run.pt", rlvr._improve, []

    def interrupted(*args):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(None)
        return improve(*args)

    monkeypatch.setattr(rlvr, "_improve", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_policy(deepcopy(start), data, ARMS[name], CONFIG, checkpoint=path, checkpoint_every=2)
    monkeypatch.setattr(rlvr, "_improve", improve)
    # A resumed run starts from another model: everything must come from the file.
    other = warm_start(data, replace(CONFIG, seed=5))
    resumed = train_policy(other, data, ARMS[name], CONFIG, checkpoint=path, checkpoint_every=2)
    assert resumed.history == whole.history
    assert same(resumed.state, whole.state)
    with pytest.raises(P2KError, match="other settings"):
        train_policy(deepcopy(start), data, ARMS["grpo"], CONFIG, checkpoint=path)


def test_nan_stops_the_run_and_keeps_the_last_good_policy(data, start):
    class Broken:
        name, resample = "broken", 0

        def advantages(self, rollout, num_generations):
            return torch.zeros_like(rollout.old_logps)

        def loss(self, logps, part, advantages, num_generations):
            return logps.sum() * torch.nan, {}

    result = train_policy(deepcopy(start), data, Broken(), CONFIG)
    assert result.stopped == "nan"
    assert len(result.history["reward"]) == 1
    assert same(result.state, start.state_dict())


def test_guards_by_hand():
    config = replace(CONFIG, patience=2, collapse_share=0.5, max_kl=1.0)
    good = {"grad_norm": [1.0], "kl": [0.1], "reward": [0.2]}
    assert guard(good, config) == ""
    assert guard({**good, "grad_norm": [float("inf")]}, config) == "nan"
    assert guard({**good, "kl": [float("nan")]}, config) == "nan"
    assert guard({**good, "kl": [1.5]}, config) == "kl"
    assert guard({**good, "reward": [0.8, 0.8, 0.5, 0.4]}, config) == ""
    assert guard({**good, "reward": [0.8, 0.8, 0.5, 0.2]}, config) == "collapse"
    assert guard({**good, "reward": [0.0, 0.0, 0.0]}, config) == ""


def test_a_guard_ends_a_run(data, start):
    result = train_policy(deepcopy(start), data, ARMS["grpo"], replace(CONFIG, learning_rate=1.0, max_kl=0.01))
    assert result.stopped == "kl"
    assert len(result.history["reward"]) == 1


def test_comparison_is_fair_and_recorded(data, tmp_path):
    arms = [ARMS["grpo"], ARMS["gopo"]]
    config = replace(CONFIG, rollouts=2, warm_steps=30)
    tuning = tune(arms, data, config, learning_rates=(1e-4, 1e-2), seeds=(7,))
    comparison = compare_arms(arms, data, config, seeds=(0, 1), tuning=tuning, tuning_seeds=(7,))
    for name, results in comparison.results.items():
        rate = comparison.learning_rates[name]
        assert tuning[name][rate] == max(tuning[name].values())
        assert [result.config.seed for result in results] == [0, 1]
        assert {result.config.learning_rate for result in results} == {rate}
    # The first rollout comes before any update, so arms of a seed that share a start see the same rewards.
    first = [[result.history["reward"][0] for result in results] for results in comparison.results.values()]
    assert first[0] == first[1]
    alone = train_policy(
        warm_start(data, replace(config, seed=1)),
        data,
        ARMS["gopo"],
        replace(config, seed=1, learning_rate=comparison.learning_rates["gopo"]),
    )
    assert same(alone.state, comparison.results["gopo"][1].state)
    options = {"slug": "policy-map", "experiment": "sums", "profile": "cpu", "metrics": ("train_accuracy", "pass@1")}
    for record in to_records(comparison, **options):
        write_record(tmp_path, record)
    records = {(record.arm, record.metric): record for record in read_records(tmp_path)}
    assert len(records) == 4
    assert list(records["gopo", "pass@1"].values) == comparison.values("pass@1")["gopo"]
    with pytest.raises(ValueError, match="not be reported"):
        compare_arms(arms, data, config, seeds=(7,), tuning=tuning, tuning_seeds=(7,))
    with pytest.raises(ValueError, match="same grid"):
        compare_arms([*arms, ARMS["rloo"]], data, config, seeds=(0,), tuning=tuning, tuning_seeds=(7,))


def test_shared_starts_change_nothing_and_stay_as_they_are(data):
    arms, config = [ARMS["grpo"]], replace(CONFIG, rollouts=1, warm_steps=30)
    starts = warm_starts(data, config, (0, 1, 7))
    before = {seed: deepcopy(start.state_dict()) for seed, start in starts.items()}
    options = {"seeds": (0, 1), "tuning_seeds": (7,)}
    tuning = [
        tune(arms, data, config, learning_rates=(1e-3, 1e-2), seeds=(7,), starts=given) for given in (None, starts)
    ]
    assert tuning[0] == tuning[1]
    alone, shared = (
        compare_arms(arms, data, config, tuning=tuning[0], starts=given, **options) for given in (None, starts)
    )
    for one, other in zip(alone.results["grpo"], shared.results["grpo"], strict=True):
        assert same(one.state, other.state)
    assert all(same(before[seed], start.state_dict()) for seed, start in starts.items())
    with pytest.raises(ValueError, match=r"none for \[2\]"):
        compare_arms(arms, data, config, tuning=tuning[0], starts=starts, seeds=(0, 2), tuning_seeds=(7,))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_generations": 1}, "at least 2"), ({"minibatches": 3}, "divide"), ({"learning_rate": -1.0}, "> 0")],
)
def test_bad_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)
