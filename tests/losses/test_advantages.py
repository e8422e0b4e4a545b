"""Advantage estimators against formulas written out by hand."""

import numpy as np
import pytest
import torch

from p2k.core.seeding import generator
from p2k.core.tolerance import tolerance
from p2k.losses.advantages import (
    generalised_advantages,
    group_advantages,
    group_ids,
    informative_rows,
    overlong_penalty,
    rloo_advantages,
    whiten,
)
from p2k.losses.registry import ADVANTAGE_ESTIMATORS, get_adv_estimator, get_policy_loss, register_adv_est
from p2k.losses.targets import standardised_target

TIGHT = tolerance(torch.float64)


def test_groups_may_be_ragged_and_shuffled():
    names = np.array(["b", "a", "b", "c", "a", "b"])
    rewards = torch.tensor([1.0, 2.0, 3.0, 9.0, 4.0, 8.0], dtype=torch.float64)
    groups = group_ids(names)
    centred = group_advantages(rewards, groups, scale_rewards="none")
    expected = torch.tensor([-3.0, -1.0, -1.0, 9.0, 1.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(centred, expected, rtol=TIGHT, atol=TIGHT)
    leave_one_out = torch.tensor([-4.5, -2.0, -1.5, 9.0, 2.0, 6.0], dtype=torch.float64)
    torch.testing.assert_close(rloo_advantages(rewards, groups), leave_one_out, rtol=TIGHT, atol=TIGHT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_give_exactly_nothing(dtype, scale):
    # A plain mean leaves one unit round-off, which the tiny deviation turns into an advantage of 0.06 in float32.
    rewards = torch.full((14,), 0.7, dtype=dtype)
    groups = torch.arange(2).repeat_interleave(7)
    assert (group_advantages(rewards, groups, scale_rewards=scale) == 0).all()
    assert (rloo_advantages(rewards, groups) == 0).all()
    target = standardised_target(rewards.view(2, 7))
    assert (target == target[0, 0]).all()
    assert not informative_rows(rewards, groups).any()


def test_the_plain_mean_fails_at_equal_rewards():
    rewards = torch.full((7,), 0.7)
    naive = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    assert naive.abs().max() > 0.01


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo"])
def test_a_lone_sample_keeps_its_reward(estimator):
    rewards, mask = torch.tensor([[0.0, 2.0], [1.0, 0.0]]), torch.tensor([[1, 1], [1, 0]])
    advantages, _ = get_adv_estimator(estimator)(rewards, mask, index=["a", "b"])
    assert torch.equal(advantages, torch.tensor([[2.0, 2.0], [1.0, 0.0]]))


def test_batch_scaling_divides_all_groups_alike():
    rewards = torch.randn(12, generator=generator(0), dtype=torch.float64)
    groups = torch.arange(3).repeat_interleave(4)
    scaled = group_advantages(rewards, groups, scale_rewards="batch", eps=1e-300)
    centred = group_advantages(rewards, groups, scale_rewards="none")
    torch.testing.assert_close(scaled, centred / rewards.std(), rtol=TIGHT, atol=TIGHT)


@pytest.mark.parametrize("scale", [True, False, "None", "std", None])
def test_scales_that_do_not_say_which_are_refused(scale):
    with pytest.raises(ValueError, match="group, batch, none"):
        group_advantages(torch.ones(2), torch.zeros(2, dtype=torch.long), scale_rewards=scale)


def test_informative_rows_are_those_of_groups_that_differ():
    rewards = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.3])
    assert informative_rows(rewards, torch.tensor([0, 0, 1, 1, 2])).tolist() == [False, False, True, True, False]


def test_overlong_penalty_is_dapos_ramp():
    lengths = torch.tensor([0, 16384, 18432, 20480, 30000])
    penalty = overlong_penalty(lengths, max_length=20480, cache=4096)
    assert penalty.tolist() == [0.0, 0.0, -0.5, -1.0, -1.0]
    with pytest.raises(ValueError, match="cache must lie"):
        overlong_penalty(lengths, max_length=10, cache=11)


def test_generalised_advantages_are_the_discounted_sum():
    rng = generator(1)
    reward, value = (torch.randn(2, 5, generator=rng, dtype=torch.float64) for _ in range(2))
    mask = torch.ones(2, 5)
    mask[1, 3:] = 0
    gamma, lam = 0.9, 0.8
    advantages, returns = generalised_advantages(reward, value, mask, gamma=gamma, lam=lam)
    for row, length in ((0, 5), (1, 3)):
        following = torch.cat([value[row, 1:length], value.new_zeros(1)])
        errors = reward[row, :length] + gamma * following - value[row, :length]
        for start in range(length):
            expected = sum((gamma * lam) ** k * errors[start + k] for k in range(length - start))
            torch.testing.assert_close(advantages[row, start], expected, rtol=TIGHT, atol=TIGHT)
    assert (advantages[1, 3:] == 0).all()
    torch.testing.assert_close(returns[0], advantages[0] + value[0], rtol=TIGHT, atol=TIGHT)
    whitened = whiten(advantages, mask == 1)[mask == 1]
    assert abs(whitened.mean().item()) < 1e-12  # rounding of a centred sum
    assert whitened.std().item() == pytest.approx(1.0, abs=1e-7)  # the variance is floored by 1e-8


def test_gae_estimator_is_whitened():
    rng = generator(2)
    reward, value = (torch.randn(3, 4, generator=rng, dtype=torch.float64) for _ in range(2))
    mask = torch.ones(3, 4)
    advantages, returns = get_adv_estimator("gae")(reward, mask, values=value, config={"lam": 0.95})
    raw, expected = generalised_advantages(reward, value, mask, lam=0.95)
    assert torch.equal(advantages, whiten(raw, mask == 1))
    assert torch.equal(returns, expected)


def test_unknown_names_and_options_raise_and_name_what_there_is():
    with pytest.raises(ValueError, match="dr_grpo, gae, grpo, rloo"):
        get_adv_estimator("nope")
    with pytest.raises(ValueError, match="adpo, apo, gopo, gpg, gspo, online_dpo, vanilla"):
        get_policy_loss("nope")
    with pytest.raises(ValueError, match="unknown options lamb: supported are gamma, lam"):
        get_adv_estimator("gae")(torch.ones(1, 1), torch.ones(1, 1), values=torch.ones(1, 1), config={"lamb": 1})
    with pytest.raises(ValueError, match="is taken"):
        register_adv_est("grpo")(lambda: None)
    assert ADVANTAGE_ESTIMATORS["grpo"] is get_adv_estimator("grpo")
    with pytest.raises(TypeError, match="floating point"):
        group_advantages(torch.ones(2, dtype=torch.long), torch.zeros(2, dtype=torch.long))
