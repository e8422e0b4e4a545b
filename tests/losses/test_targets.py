"""Targets and orderings over lists."""

import math

import pytest
import torch

from p2k.core.seeding import generator
from p2k.core.tolerance import tolerance
from p2k.losses.dpo import dpo_loss
from p2k.losses.listwise import all_pairs_loss, plackett_luce_loss
from p2k.losses.targets import (
    best_target,
    kde_scores,
    kde_target,
    pair_target,
    softmax_target,
    standardised_target,
)

TIGHT = tolerance(torch.float64)
REWARDS = torch.randn(6, 8, generator=generator(0), dtype=torch.float64)


def close(actual, expected, factor=1.0):
    torch.testing.assert_close(actual, expected, rtol=factor * TIGHT, atol=factor * TIGHT)


def test_softmax_of_a_pair_is_bradley_terry():
    pair = REWARDS[:, :2]
    q = softmax_target(pair, beta_reward=0.3)
    close(q[:, 0], ((pair[:, 0] - pair[:, 1]) / 0.3).sigmoid())


@pytest.mark.parametrize("target", [softmax_target, standardised_target, best_target])
def test_masked_candidates_get_nothing_and_change_nothing(target):
    mask = torch.tensor([True] * 5 + [False] * 3).expand(6, 8)
    junk = torch.where(mask, REWARDS, torch.nan)
    q = target(junk, mask=mask)
    close(q[:, :5], target(REWARDS[:, :5]))
    assert (q[:, 5:] == 0).all()
    assert (target(junk, mask=mask & False) == 0).all()


def test_standardised_target_by_hand():
    scores = (REWARDS - REWARDS.mean(-1, keepdim=True)) / (REWARDS.std(-1, keepdim=True) + 1e-4)
    close(standardised_target(REWARDS, beta_reward=0.4, eps=1e-4), (scores / 0.4).softmax(-1))


def test_kde_scores_keep_the_order_and_are_bounded():
    scores = kde_scores(REWARDS)
    assert torch.equal(scores.argsort(-1), REWARDS.argsort(-1))
    wild = REWARDS.clone()
    wild[:, 0] = 1e6
    for length in (2, 4, 8):
        bound = math.log(2 * length - 1)
        assert kde_scores(wild[:, :length]).abs().max() <= bound * (1 + TIGHT)


def test_kde_scores_ignore_shift_and_scale():
    close(kde_scores(3.0 * REWARDS), kde_scores(REWARDS), factor=100)
    close(kde_scores(REWARDS + 10.0), kde_scores(REWARDS), factor=1000)  # a shift of 10 costs a digit or two


def test_an_outlier_moves_the_kde_target_less_than_the_raw_one():
    outlier = REWARDS.clone()
    outlier[:, 3] = 50.0
    assert softmax_target(outlier)[:, 3].min() > 0.999
    assert kde_target(outlier)[:, 3].max() < 0.7
    assert kde_target(outlier).min() > 0


def test_kde_of_equal_rewards_and_of_one_is_uniform():
    close(kde_target(torch.ones(2, 4, dtype=torch.float64)), torch.full((2, 4), 0.25, dtype=torch.float64))
    close(kde_target(torch.ones(2, 1, dtype=torch.float64)), torch.ones(2, 1, dtype=torch.float64))


def test_best_target_takes_the_first_of_equals():
    q = best_target(torch.tensor([[0.0, 1.0, 1.0]]))
    assert q.tolist() == [[0.0, 1.0, 0.0]]


def test_targets_carry_no_gradient():
    rewards = REWARDS.clone().requires_grad_()
    for target in (softmax_target, standardised_target, best_target, kde_target):
        assert not target(rewards).requires_grad


def test_bad_input_raises():
    with pytest.raises(ValueError, match="beta_reward must be"):
        softmax_target(REWARDS, beta_reward=0.0)
    with pytest.raises(ValueError, match="must hold 2"):
        pair_target(REWARDS)
    with pytest.raises(ValueError, match="label_smoothing must lie"):
        pair_target(REWARDS[:, :2], label_smoothing=0.5)


def lists(seed=1):
    rng = generator(seed)
    return [torch.randn(3, 4, generator=rng, dtype=torch.float64) for _ in range(3)]


def test_all_pairs_is_the_mean_of_dpo_over_pairs():
    logps, ref, rewards = lists()
    expected = []
    for row in range(3):
        losses = []
        for winner in range(4):
            for loser in range(4):
                if rewards[row, winner] > rewards[row, loser]:
                    indices = [winner, loser]
                    losses.append(dpo_loss(*logps[row, indices], *ref[row, indices], beta=0.3)[0])
        expected.append(torch.stack(losses).mean())
    loss, metrics = all_pairs_loss(logps, ref, rewards, beta=0.3, reduction="none")
    close(loss, torch.stack(expected))
    assert 0 <= metrics["rewards/accuracies"] <= 1


def test_ties_make_no_pair():
    logps, ref, rewards = lists()
    rewards[1] = 0.5
    loss, _ = all_pairs_loss(logps, ref, rewards)
    kept = [0, 2]
    close(loss, all_pairs_loss(logps[kept], ref[kept], rewards[kept])[0])
    tied = torch.tensor([[1.0, 1.0, 0.0]]).double()
    pair, _ = all_pairs_loss(logps[:1, :3], ref[:1, :3], tied, beta=1.0)
    each = [dpo_loss(*logps[0, [w, 2]], *ref[0, [w, 2]], beta=1.0)[0] for w in (0, 1)]
    close(pair, torch.stack(each).mean())


def test_plackett_luce_is_a_distribution_over_rankings():
    logps, ref, _ = lists()
    total = 0.0
    for order in torch.cartesian_prod(*[torch.arange(4)] * 4):
        if order.unique().numel() == 4:
            ranking = torch.empty(4, dtype=torch.float64)
            ranking[order] = torch.arange(4, 0, -1).double()
            total += (-plackett_luce_loss(logps[0], ref[0], ranking)[0]).exp()
    close(total, torch.ones((), dtype=torch.float64), factor=10)
