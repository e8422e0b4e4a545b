"""Temperature and alpha schedules: ranges, directions, and state."""

import math

import pytest
import torch

from p2k.core.seeding import generator
from p2k.core.tolerance import tolerance
from p2k.losses.schedules import ESSAlpha, adaptive_temperature, confidence, guarded_alpha, improvement
from p2k.losses.targets import softmax_target

TIGHT = tolerance(torch.float64)


def test_temperature_by_hand():
    entropy = torch.tensor([[0.2, 0.4], [0.9, 0.9], [2.0, 2.0]], dtype=torch.float64)
    rewards = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    tau = adaptive_temperature(entropy, rewards, tau=0.8, entropy_weight=0.5, failure_weight=2.0)
    factors = [1 + 0.5 * 0.3 + 2 * 0.7 * 1.0, 1 + 0.5 * 0.9 + 2 * 0.1 * 0.5, 1 + 0.5]
    expected = 0.8 * torch.tensor(factors, dtype=torch.float64).unsqueeze(-1)
    torch.testing.assert_close(tau, expected, rtol=TIGHT, atol=TIGHT)


def test_temperature_is_clipped_and_equal_rewards_count_one_half():
    entropy, rewards = torch.zeros(2, 3), torch.ones(2, 3)
    assert torch.equal(adaptive_temperature(entropy, rewards), torch.full((2, 1), 1.5))
    assert torch.equal(adaptive_temperature(entropy, rewards, tau_range=(0.1, 1.2)), torch.full((2, 1), 1.2))
    assert torch.equal(adaptive_temperature(entropy, rewards, tau_range=(2.0, 5.0)), torch.full((2, 1), 2.0))


def test_temperature_rises_with_failure_where_the_policy_is_sure():
    rewards = torch.tensor([[1.0], [0.0]])
    sure = adaptive_temperature(torch.zeros(2, 1), rewards)
    unsure = adaptive_temperature(torch.ones(2, 1), rewards)
    assert sure[1] > sure[0]
    assert unsure[1] == unsure[0]


def test_improvement_of_one_binary_group_reads_its_success_rate():
    for correct in range(1, 8):
        rewards = (torch.arange(8) < correct).double()
        rate = correct / 8
        assert improvement(rewards - rate).item() == pytest.approx(max(0.0, 2 * rate - 1), abs=TIGHT)
    assert improvement(torch.ones(4)).item() == 0.0


def test_confidence_is_nearly_inert_at_usual_likelihoods():
    log_vocab = math.log(151_936)
    assert confidence(torch.tensor([-0.1, -0.3]), log_vocab).item() == pytest.approx(1 - 0.2 / log_vocab, rel=1e-6)
    assert confidence(torch.tensor([-1e9]), log_vocab).item() == 0.0
    assert confidence(torch.tensor([0.0]), log_vocab).item() == 1.0


def batch(seed=0):
    rng = generator(seed)
    logits = torch.randn(4, 8, generator=rng, dtype=torch.float64)
    return logits, softmax_target(torch.randn(4, 8, generator=rng, dtype=torch.float64), beta_reward=0.3)


def test_ess_alpha_waits_then_moves_toward_the_wanted_size():
    logits, targets = batch()
    schedule = ESSAlpha(warmup=2, max_step=0.03)
    seen = [schedule.step(logits, targets).item() for _ in range(60)]
    assert seen[:2] == [pytest.approx(0.9)] * 2
    assert max(abs(b - a) for a, b in zip(seen, seen[1:], strict=False)) <= 0.03 + 1e-12
    # A fixed batch has a fixed wanted value on the grid, which the average reaches.
    wanted = min(schedule.grid.tolist(), key=lambda alpha: abs(seen[-1] - alpha))
    assert seen[-1] == pytest.approx(wanted, abs=2e-3)
    assert 0.35 <= seen[-1] < 0.9


def test_ess_alpha_holds_on_policy():
    _, targets = batch()
    schedule = ESSAlpha(warmup=0)
    for _ in range(5):
        assert schedule.step(torch.zeros(4, 8, dtype=torch.float64), targets).item() == pytest.approx(0.9)


def test_ess_alpha_state_survives_a_restart():
    logits, targets = batch(1)
    through, first = ESSAlpha(warmup=1), ESSAlpha(warmup=1)
    expected = [through.step(logits, targets).item() for _ in range(6)]
    for _ in range(3):
        first.step(logits, targets)
    second = ESSAlpha(warmup=1)
    second.load_state_dict(first.state_dict())
    assert [second.step(logits, targets).item() for _ in range(3)] == expected[3:]


def test_bad_input_raises():
    with pytest.raises(ValueError, match="alpha_min <= alpha_max"):
        guarded_alpha(torch.ones(()), torch.ones(()), alpha_min=0.9, alpha_max=0.5)
    with pytest.raises(ValueError, match="alpha_min <= alpha_max"):
        ESSAlpha(alpha_max=1.0)
    with pytest.raises(ValueError, match="target in"):
        ESSAlpha(target=0.0)
    with pytest.raises(ValueError, match="tau must be"):
        adaptive_temperature(torch.ones(1, 1), torch.ones(1, 1), tau=0.0)
    with pytest.raises(ValueError, match=r"\[prompts, samples\]"):
        adaptive_temperature(torch.ones(1, 2), torch.ones(1, 1))
