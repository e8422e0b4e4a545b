"""The losses, advantages and distances that verl has too, against verl's own; and ours called from its registries."""

import numpy as np
import pytest
import torch
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

from p2k.core.seeding import generator
from p2k.losses.adapters import GROUP_LOSSES, register_with_verl
from p2k.losses.advantages import group_advantages
from p2k.losses.reduction import kl_estimate
from p2k.losses.registry import get_adv_estimator, get_policy_loss

# verl divides by a sequence's length plus 1e-8, which no float64 tolerance allows.
CLOSE = {"rtol": 3e-8, "atol": 3e-8}
# Float32 sums of three or four numbers of order 1, in another order.
SUMS = {"rtol": 2e-6, "atol": 2e-6}
ROWS, TOKENS = 8, 5


def actor(**settings):
    """verl's own configuration of an actor."""
    return ActorConfig(**{"strategy": "fsdp", "rollout_n": 4, "ppo_micro_batch_size_per_gpu": ROWS, **settings})


def batch(seed=0, drift=0.4):
    """Rows of mixed length in float64; the first moved so far that both libraries clamp its ratios."""
    rng = generator(seed)
    old = -torch.rand(ROWS, TOKENS, generator=rng, dtype=torch.float64)
    new = old + drift * torch.randn(ROWS, TOKENS, generator=rng, dtype=torch.float64)
    new[0] += 30.0
    advantages = torch.randn(ROWS, 1, generator=rng, dtype=torch.float64).expand(ROWS, TOKENS)
    mask = (torch.arange(TOKENS) < torch.randint(1, TOKENS + 1, (ROWS, 1), generator=rng)).double()
    return {"old_log_prob": old, "log_prob": new.requires_grad_(), "advantages": advantages, "response_mask": mask}


MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
CASES = [(name, mode, {}) for name in ("vanilla", "gpg") for mode in MODES]
CASES += [("vanilla", "token-mean", {"clip_ratio_high": 0.28}), ("vanilla", "token-mean", {"clip_ratio_c": 1.5})]
CASES += [("gspo", "seq-mean-token-mean", {"clip_ratio_low": low, "clip_ratio_high": 0.28}) for low in (0.05, 0.2)]


@pytest.mark.parametrize(("name", "mode", "options"), CASES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_same_loss_gradient_and_metrics_as_verl(name, mode, options, weighted):
    call = {**batch(), "loss_agg_mode": mode}
    if weighted:
        call["rollout_is_weights"] = 0.5 + torch.rand(ROWS, TOKENS, generator=generator(1), dtype=torch.float64)
    constant = {"loss_scale_factor": 7} if mode.endswith("norm") else {}
    expected, theirs = core_algos.get_policy_loss_fn(name)(**call, config=actor(**options, global_batch_info=constant))
    # verl averages over sequences before it divides by the factor; ours divides the sum.
    ours = {**options, **{key: float(ROWS * value) for key, value in constant.items()}}
    loss, metrics = get_policy_loss(name)(**call, config=ours)
    torch.testing.assert_close(loss, expected, **CLOSE)
    gradient, wanted = (torch.autograd.grad(value, call["log_prob"])[0] for value in (loss, expected))
    assert wanted.abs().max() > 1e-3
    if name == "gspo" and weighted:
        # verl gives each token its own weight in the backward pass, ours gives all tokens of a row their mean.
        assert (gradient - wanted).abs().max() > 1e-3
        gradient, wanted = gradient.sum(1), wanted.sum(1)
    torch.testing.assert_close(gradient, wanted, **CLOSE)
    # The estimate of the distance is clamped by verl and not by us, so the row that ran away is left out of it.
    for key in theirs.keys() & metrics.keys() - {"actor/ppo_kl"}:
        assert metrics[key].item() == pytest.approx(theirs[key], rel=CLOSE["rtol"])
    assert name == "gpg" or len(theirs.keys() & metrics.keys()) >= 2


def rewards_and_names():
    """Groups of four, three and one, shuffled; the reward stands on the last valid token."""
    rng = generator(2)
    lengths = torch.randint(1, TOKENS + 1, (ROWS,), generator=rng)
    rewards = torch.zeros(ROWS, TOKENS)
    rewards[torch.arange(ROWS), lengths - 1] = torch.randn(ROWS, generator=rng)
    mask = (torch.arange(TOKENS) < lengths[:, None]).float()
    return rewards, mask, np.array(["a", "b", "a", "c", "b", "a", "b", "a"], dtype=object)


@pytest.mark.parametrize("name", ["grpo", "rloo"])
def test_same_group_advantages_as_verl(name):
    rewards, mask, names = rewards_and_names()
    expected, _ = core_algos.get_adv_estimator_fn(name)(rewards.clone(), mask, index=names)
    found, _ = get_adv_estimator(name)(rewards, mask, index=names)
    torch.testing.assert_close(found, expected, **SUMS)


def test_dr_grpo_is_verls_grpo_without_the_deviation():
    rewards, mask, names = rewards_and_names()
    estimator = core_algos.get_adv_estimator_fn("grpo")
    expected, _ = estimator(rewards.clone(), mask, index=names, norm_adv_by_std_in_grpo=False)
    found, _ = get_adv_estimator("dr_grpo")(rewards, mask, index=names)
    torch.testing.assert_close(found, expected, **SUMS)


def test_equal_rewards_give_an_advantage_in_verl_and_none_here():
    # The mean of seven times 0.7 is not 0.7 in float32, and the deviation it is divided by is 1e-6.
    rewards, mask = torch.full((7, 1), 0.7), torch.ones(7, 1)
    names = np.array(["a"] * 7, dtype=object)
    theirs, _ = core_algos.get_adv_estimator_fn("grpo")(rewards.clone(), mask, index=names)
    assert theirs.abs().max() > 0.01
    assert (group_advantages(rewards[:, 0], torch.zeros(7, dtype=torch.long)) == 0).all()


def test_same_generalised_advantages_as_verl():
    rng = generator(3)
    rewards, values = (torch.randn(ROWS, TOKENS, generator=rng, dtype=torch.float64) for _ in range(2))
    mask = batch()["response_mask"]
    expected, returns = core_algos.get_adv_estimator_fn("gae")(rewards, values, mask, gamma=0.9, lam=0.8)
    found, ours = get_adv_estimator("gae")(rewards, mask, values=values, config={"gamma": 0.9, "lam": 0.8})
    kept = mask == 1
    torch.testing.assert_close(found[kept], expected[kept], **CLOSE)
    torch.testing.assert_close(ours[kept], returns[kept], **CLOSE)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_same_distances_as_verl(estimator):
    call = batch(4)
    expected = core_algos.kl_penalty_forward(call["log_prob"][1:], call["old_log_prob"][1:], estimator)
    found = kl_estimate(call["log_prob"][1:], call["old_log_prob"][1:], estimator=estimator)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.fixture
def registries(monkeypatch):
    """verl's registries, put back afterwards."""
    for name in ("POLICY_LOSS_REGISTRY", "ADV_ESTIMATOR_REGISTRY"):
        monkeypatch.setattr(core_algos, name, dict(getattr(core_algos, name)))


def test_ours_are_entered_beside_verls_and_found_there(registries):
    theirs = dict(core_algos.POLICY_LOSS_REGISTRY)
    assert sorted(register_with_verl(options={"gopo": {"mu": 0.3}})) == sorted([*GROUP_LOSSES, "dr_grpo"])
    assert theirs.items() <= core_algos.POLICY_LOSS_REGISTRY.items()
    whole = {**batch(), "loss_agg_mode": "seq-mean-token-mean"}
    for name in GROUP_LOSSES:
        options = {"num_generations": 4, **({"mu": 0.3} if name == "gopo" else {})}
        expected, _ = get_policy_loss(name)(**whole, config=options)
        config = actor(global_batch_info={"dp_size": 1, "batch_num_tokens": None, "global_batch_size": ROWS})
        # Two micro-batches, as verl's worker calls them: by keyword, and summed.
        total = 0.0
        for rows in (slice(0, 4), slice(4, ROWS)):
            part = {key: value[rows] if isinstance(value, torch.Tensor) else value for key, value in whole.items()}
            loss, metrics = core_algos.get_policy_loss_fn(name)(**part, config=config, rollout_is_weights=None)
            assert all(isinstance(value, float) for value in metrics.values())
            total = total + loss
        torch.testing.assert_close(total, expected, **CLOSE)


def test_an_entered_estimator_takes_verls_configuration(registries):
    register_with_verl()
    rewards, mask, names = rewards_and_names()
    call = {"token_level_rewards": rewards, "response_mask": mask, "index": names, "config": AlgoConfig()}
    found, returns = core_algos.get_adv_estimator_fn("dr_grpo")(**call)
    assert torch.equal(found, returns)
    assert torch.equal(found, get_adv_estimator("dr_grpo")(rewards, mask, index=names)[0])
