import pytest
import torch

from p2k.core.errors import P2KError
from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors, tolerance
from p2k.data.arithmetic import decode, make_arithmetic, reward
from p2k.experiments.rlvr import RLVRConfig, build_policy, warm_start
from p2k.experiments.rollout import accuracy, diversity, sample_completions, sample_rollout
from p2k.models.generation import completion_logps

SIZE = {"prompts": 12, "num_generations": 4}


@pytest.fixture(scope="module")
def data():
    return make_arithmetic("sum-1")


@pytest.fixture(scope="module")
def model(data):
    return warm_start(data, RLVRConfig(warm_steps=60)).double()


def test_rows_of_a_group_share_a_training_problem(model, data):
    rollout = sample_rollout(model, data, generator(0), **SIZE)
    groups = rollout.problems.view(12, 4)
    assert bool((groups == groups[:, :1]).all())
    assert len(set(groups[:, 0].tolist())) == 12
    assert set(groups[:, 0].tolist()) <= set(data.train.tolist())
    assert torch.equal(rollout.prompts, data.prompts[rollout.problems])
    assert rollout.sampled == 48


def test_rewards_and_logps_are_those_of_verifier_and_full_pass(model, data):
    rollout = sample_rollout(model, data, generator(1), **SIZE)
    texts = [decode(row) for row in rollout.tokens]
    expected = [reward(data.text(p), text) for p, text in zip(rollout.problems.tolist(), texts, strict=True)]
    assert rollout.rewards.tolist() == expected
    assert 0 < sum(expected) < len(expected)
    logps, _ = completion_logps(model, rollout.prompts, rollout.tokens, rollout.mask)
    assert relative_errors(rollout.old_logps, logps.detach())[1] <= tolerance(torch.float64)


def test_minibatches_hold_whole_groups_and_cover_everything(model, data):
    rollout = sample_rollout(model, data, generator(2), **SIZE)
    parts = rollout.minibatches(3, 4, generator(0))
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(48))
    for part in parts:
        groups = part.view(-1, 4)
        assert torch.equal(groups % 4, torch.arange(4).expand(4, 4))
        assert bool((groups // 4 == groups[:, :1] // 4).all())
        assert torch.equal(rollout.rows(part).problems, rollout.problems[part])
    assert not torch.equal(torch.cat(parts), torch.cat(rollout.minibatches(3, 4, generator(1))))
    with pytest.raises(ValueError, match="evenly"):
        rollout.minibatches(5, 4, generator(0))


def test_resampling_keeps_informative_groups_first(model, data):
    plain = sample_rollout(model, data, generator(3), **SIZE)
    kept = sample_rollout(model, data, generator(3), resample=3, **SIZE)

    def informative(rollout):
        groups = rollout.rewards.view(-1, 4)
        return int((groups != groups[:, :1]).any(1).sum())

    assert informative(plain) < informative(kept) == 12
    assert len(kept.rewards) == len(plain.rewards)
    assert kept.sampled in (96, 144, 192)
    assert bool((kept.problems.view(12, 4) == kept.problems.view(12, 4)[:, :1]).all())


def test_resampling_gives_up_where_nothing_can_be_learnt(data):
    rollout = sample_rollout(build_policy(data, "cpu-tiny", 0), data, generator(0), resample=2, **SIZE)
    assert len(rollout.rewards) == 48
    assert rollout.sampled == 144


def test_too_many_prompts_are_refused(model, data):
    with pytest.raises(P2KError, match="training problems"):
        sample_rollout(model, data, generator(0), prompts=1000, num_generations=2)


def test_accuracy_is_that_of_greedy_decoding(model, data):
    tokens = sample_completions(model, data, data.train, None, 0.0).tokens
    texts = [decode(row) for row in tokens]
    right = [reward(data.text(p), text) for p, text in zip(data.train.tolist(), texts, strict=True)]
    assert accuracy(model, data, data.train, batch=7) == pytest.approx(sum(right) / len(right))


def test_diversity_counts_what_python_counts():
    data = make_arithmetic("split-1", held_out=0.3)
    model = warm_start(data, RLVRConfig(warm_steps=80, prompts=2, minibatches=1))
    found = diversity(model, data, data.train, generator(5), samples=8)
    rows = data.train.repeat_interleave(8)
    tokens = sample_completions(model, data, rows, generator(5), 1.0).tokens
    distinct, solved, right = 0, 0, 0
    for place, problem in enumerate(data.train.tolist()):
        texts = [decode(row) for row in tokens[8 * place : 8 * place + 8]]
        good = [text for text in texts if reward(data.text(problem), text)]
        distinct, solved, right = distinct + len(set(good)), solved + bool(good), right + len(good)
    count = len(data.train)
    assert 0 < right < 8 * count
    assert distinct < right
    assert found["pass@1"] == pytest.approx(right / (8 * count))
    assert found["pass@8"] == pytest.approx(solved / count)
    assert found["distinct_correct"] == pytest.approx(distinct / count)
