"""The map of relatives: what the policy losses share exactly and where they differ."""

import math

import pytest
import torch

from p2k.core.seeding import generator
from p2k.core.tolerance import tolerance
from p2k.losses.advantages import group_advantages, rloo_advantages
from p2k.losses.apo import apo_loss
from p2k.losses.dpo import dpo_loss
from p2k.losses.listwise import plackett_luce_loss
from p2k.losses.recipes import RECIPES
from p2k.losses.reduction import AGGREGATIONS, aggregate, kl_estimate
from p2k.losses.registry import POLICY_LOSSES, get_policy_loss
from p2k.losses.targets import pair_target, softmax_target

TIGHT = tolerance(torch.float64)
SIZE, TOKENS = 6, 4
GROUPED = {"adpo", "apo", "gopo", "online_dpo"}


def close(actual, expected, factor=1.0):
    """Equality up to the table's float64 entry, relative to the larger of 1 and the expected value."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected.expand(actual.shape), rtol=factor * TIGHT, atol=factor * TIGHT)


def batch(rewards, seed=0, drift=0.0):
    """Old and current log-probabilities, mask of mixed lengths and group numbers for ``[prompts, SIZE]`` rewards."""
    rng, rows = generator(seed), rewards.numel()
    old = -torch.rand(rows, TOKENS, generator=rng, dtype=torch.float64)
    new = old + drift * torch.randn(rows, TOKENS, generator=rng, dtype=torch.float64)
    lengths = torch.randint(1, TOKENS + 1, (rows, 1), generator=rng)
    groups = torch.arange(rewards.shape[0]).repeat_interleave(SIZE)
    return old, new.requires_grad_(), (torch.arange(TOKENS) < lengths).double(), groups


def run(name, old, new, advantages, mask, mode=None, **options):
    """Loss and gradient of a registered policy loss for one advantage per row."""
    if name in GROUPED:
        options = {"num_generations": SIZE, **options}
    extra = {} if mode is None else {"loss_agg_mode": mode}
    loss, metrics = get_policy_loss(name)(old, new, advantages.unsqueeze(-1) * mask, mask, config=options, **extra)
    assert not any(tensor.requires_grad for tensor in metrics.values())
    return loss.detach(), torch.autograd.grad(loss, new, retain_graph=True)[0]


REWARDS = torch.randn(3, SIZE, generator=generator(1), dtype=torch.float64)


def test_1_rloo_and_grpo_rescale_the_centred_reward():
    groups = torch.arange(3).repeat_interleave(SIZE)
    flat = REWARDS.flatten()
    centred = group_advantages(flat, groups, scale_rewards="none")
    close(centred, (REWARDS - REWARDS.mean(-1, keepdim=True)).flatten())
    close(rloo_advantages(flat, groups), SIZE / (SIZE - 1) * centred)
    others = (REWARDS.sum(-1, keepdim=True) - REWARDS) / (SIZE - 1)
    close(rloo_advantages(flat, groups), (REWARDS - others).flatten())
    deviation = REWARDS.std(-1, keepdim=True).expand_as(REWARDS).flatten()
    close(group_advantages(flat, groups, eps=1e-300), centred / deviation)


def test_2_the_first_on_policy_step_is_the_same_for_all_ratio_methods():
    old, new, mask, _ = batch(REWARDS)
    advantages = (REWARDS - REWARDS.mean(-1, keepdim=True)).flatten()
    _, reinforce = run("gpg", old, new, advantages, mask, "seq-mean-token-mean")
    close(run("vanilla", old, new, advantages, mask, "seq-mean-token-mean")[1], reinforce)
    close(run("gspo", old, new, advantages, mask)[1], reinforce)
    close(run("gopo", old, new, advantages, mask, ratio_level="sequence_mean", mu=100.0)[1], reinforce)
    tau, beta_reward = 0.5, 0.3
    options = {"ratio_level": "sequence_mean", "alpha": 0.0, "tau": tau, "beta_reward": beta_reward}
    close(run("apo", old, new, advantages, mask, **options)[1], reinforce / (tau * beta_reward))


@pytest.mark.parametrize("correct", range(1, SIZE))
def test_3_binary_rewards_share_a_direction_and_differ_in_the_prompts_weight(correct):
    rewards = (torch.arange(SIZE) < correct).double().unsqueeze(0)
    rate = correct / SIZE
    old, new, mask, groups = batch(rewards)
    centred = (rewards - rate).flatten()
    q_up = softmax_target(rewards, beta_reward=0.5)[0, 0].item()
    weights = {
        ("gpg", "none"): 1.0,
        ("vanilla", "group"): math.sqrt((SIZE - 1) / SIZE) / math.sqrt(rate * (1 - rate)),
        ("adpo", "none"): SIZE * (q_up - 1 / SIZE) / (0.8 * (1 - rate)),
    }
    for (name, scale), weight in weights.items():
        advantages = group_advantages(rewards.flatten(), groups, scale_rewards=scale, eps=1e-300)
        mode = None if name in GROUPED else "seq-mean-token-sum"
        _, grad = run(name, old, new, advantages, mask, mode)
        close(-SIZE * grad, weight * centred.unsqueeze(-1) * mask, factor=10)
    rloo = rloo_advantages(rewards.flatten(), groups)
    close(rloo, SIZE / (SIZE - 1) * centred)
    for name, options in (("apo", {"alpha": 0.0}), ("apo", {"alpha": 0.35}), ("apo", {"alpha": 1.0}), ("gopo", {})):
        _, grad = run(name, old, new, centred, mask, **options)
        coefficients = -grad[:, 0]
        close(torch.nn.functional.cosine_similarity(coefficients, centred, dim=0), 1.0)


def test_4_robust_dpo_is_unbiased_under_symmetric_flips():
    rng = generator(2)
    chosen, rejected = (torch.randn(20, generator=rng, dtype=torch.float64) for _ in range(2))
    zero, eps = torch.zeros_like(chosen), 0.3
    options = {"beta": 0.7, "loss_type": "robust", "label_smoothing": eps, "reduction": "none"}
    right = dpo_loss(chosen, rejected, zero, zero, **options)[0]
    flipped = dpo_loss(rejected, chosen, zero, zero, **options)[0]
    clean = dpo_loss(chosen, rejected, zero, zero, beta=0.7, reduction="none")[0]
    close((1 - eps) * right + eps * flipped, clean, factor=10)
    # Unbounded below, unlike the clean loss.
    far = dpo_loss(chosen + 1000, rejected, zero, zero, **options)[0]
    assert far.max() < -100


def test_4_exo_pair_is_the_reverse_kl_list_loss_of_two():
    rng = generator(3)
    logps, ref = (torch.randn(5, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    exo, _ = dpo_loss(*logps.unbind(-1), *ref.unbind(-1), beta=0.4, loss_type="exo_pair", label_smoothing=0.1)
    close(apo_loss(logps, ref, pair_target(logps, label_smoothing=0.1), alpha=0.0, tau=1 / 0.4)[0], exo)


def test_4_plackett_luce_is_the_product_of_softmaxes():
    rng = generator(4)
    logps, ref, rewards = (torch.randn(3, 5, generator=rng, dtype=torch.float64) for _ in range(3))
    expected = []
    for row in range(3):
        u = (0.3 * (logps - ref))[row, rewards[row].argsort(descending=True)]
        expected.append(sum(u[k:].logsumexp(0) - u[k] for k in range(5)))
    loss, _ = plackett_luce_loss(logps, ref, rewards, beta=0.3, reduction="none")
    close(loss, torch.stack(expected), factor=10)


def test_5_dapo_with_equal_ends_is_ppo_and_gspo_of_one_token_is_sequence_ppo():
    advantages = REWARDS.flatten()
    old, new, mask, _ = batch(REWARDS, drift=0.4)
    ppo = run("vanilla", old, new, advantages, mask, clip_ratio=0.2)
    equal = run("vanilla", old, new, advantages, mask, clip_ratio_low=0.2, clip_ratio_high=0.2)
    higher = run("vanilla", old, new, advantages, mask, clip_ratio_low=0.2, clip_ratio_high=0.28)
    for one, other in zip(ppo, equal, strict=True):
        close(one, other)
    assert (ppo[1] != higher[1]).any()
    single = torch.zeros_like(mask)
    single[:, 0] = 1
    options = {"clip_ratio": 0.2}
    token = run("vanilla", old, new, advantages, single, "seq-mean-token-mean", clip_ratio_c=None, **options)
    for one, other in zip(run("gspo", old, new, advantages, single, **options), token, strict=True):
        close(one, other)


@pytest.mark.parametrize("name", sorted(POLICY_LOSSES))
def test_6_equal_rewards_teach_nothing_but_pull_the_list_losses_home(name):
    rewards = torch.full((3, SIZE), 0.7, dtype=torch.float64)
    old, new, mask, groups = batch(rewards, drift=0.3)
    advantages = group_advantages(rewards.flatten(), groups)
    close(advantages, 0.0)
    _, grad = run(name, old, new, advantages, mask)
    # Equals make no pair, so DPO has nothing to pull on.
    if name in GROUPED - {"online_dpo"}:
        assert grad.abs().max() > 1e-3
        _, home = run(name, old, old.clone().requires_grad_(), advantages, mask)
        close(home, 0.0)
    else:
        close(grad, 0.0)


@pytest.mark.parametrize("mode", AGGREGATIONS)
@pytest.mark.parametrize("name", ["vanilla", "gpg"])
def test_7_padding_changes_nothing_under_any_aggregation(name, mode):
    check_padding(name, mode, {"loss_scale_factor": 9.0} if mode.endswith("norm") else {})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gspo", {}),
        ("adpo", {}),
        ("apo", {}),
        ("gopo", {}),
        ("gopo", {"ratio_level": "token"}),
        ("online_dpo", {}),
    ],
)
def test_7_padding_changes_nothing_for_sequence_and_group_losses(name, options):
    check_padding(name, None, options)


def check_padding(name, mode, options):
    old, new, mask, _ = batch(REWARDS, drift=0.3)
    advantages = REWARDS.flatten()
    loss, grad = run(name, old, new, advantages, mask, mode, **options)
    rows, junk = old.shape[0], torch.nan
    # More tokens for everyone, and one more group that has none at all.
    pad = torch.nn.functional.pad
    wide_old = pad(old, (0, 2, 0, SIZE), value=junk)
    wide_new = pad(new.detach(), (0, 2, 0, SIZE), value=junk).requires_grad_()
    wide_mask = pad(mask, (0, 2, 0, SIZE))
    # Masked tokens inside the sequences hold anything as well.
    wide_old = torch.where(wide_mask == 1, wide_old, junk)
    padded, padded_grad = run(name, wide_old, wide_new, pad(advantages, (0, SIZE)), wide_mask, mode, **options)
    close(padded, loss)
    close(padded_grad[:rows, :TOKENS] * mask, grad * mask)
    assert (padded_grad[wide_mask == 0] == 0).all()


def test_aggregation_modes_by_hand():
    losses = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    expected = {"token-mean": 7 / 3, "seq-mean-token-mean": (1.5 + 4) / 2, "seq-mean-token-sum": (3 + 4) / 2}
    for mode, value in expected.items():
        close(aggregate(losses, mask, mode), value)
    close(aggregate(losses, mask, "seq-mean-token-sum-norm", loss_scale_factor=10.0), 0.7)
    close(aggregate(losses, mask, "token-mean", num_items_in_batch=6), 7 / 6)


@pytest.mark.parametrize("name", ["vanilla", "gpg"])
def test_micro_batches_add_up_with_the_global_token_count(name):
    old, new, mask, _ = batch(REWARDS, drift=0.3)
    advantages, total = REWARDS.flatten(), mask.sum()
    whole, _ = run(name, old, new, advantages, mask)
    parts = 0.0
    for rows in (slice(0, 5), slice(5, 18)):
        part = [tensor[rows] for tensor in (old, new, advantages, mask)]
        parts += run(name, *part, num_items_in_batch=total)[0]
    close(parts, whole)


def test_ppo_gradient_stops_exactly_where_the_clip_says():
    ratio = torch.tensor([[0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 2.0, 3.5]], dtype=torch.float64)
    old, mask = torch.zeros_like(ratio), torch.ones_like(ratio)
    for sign in (1.0, -1.0):
        new = ratio.log().requires_grad_()
        _, grad = run("vanilla", old, new, torch.tensor([sign]).double(), mask)
        silent = ratio > 1.2 if sign > 0 else (ratio < 0.8) | (ratio > 3.0)
        assert torch.equal(grad == 0, silent)


def test_dual_clip_caps_the_loss_of_a_bad_answer():
    old = torch.zeros(1, 1, dtype=torch.float64)
    new = torch.full((1, 1), math.log(10.0), dtype=torch.float64, requires_grad=True)
    bad, mask = torch.tensor([-2.0], dtype=torch.float64), torch.ones(1, 1)
    close(run("vanilla", old, new, bad, mask)[0], 6.0)
    close(run("vanilla", old, new, bad, mask, clip_ratio_c=None)[0], 20.0)


def test_a_clip_without_a_lower_end_is_not_dapo():
    # One published comparison ran DAPO with a lower width of 0: a bad answer whose ratio fell is never pushed further.
    old = torch.zeros(1, 1, dtype=torch.float64)
    new = torch.full((1, 1), -0.05, dtype=torch.float64, requires_grad=True)
    bad, mask = torch.tensor([-1.0], dtype=torch.float64), torch.ones(1, 1)
    assert run("vanilla", old, new, bad, mask, clip_ratio_low=0.0, clip_ratio_high=0.28)[1] == 0
    assert run("vanilla", old, new, bad, mask, clip_ratio_low=0.2, clip_ratio_high=0.28)[1] > 0


def test_importance_weights_of_the_sampler_scale_each_token():
    old, new, mask, _ = batch(REWARDS, drift=0.3)
    advantages = REWARDS.flatten().unsqueeze(-1) * mask
    weights = torch.rand(mask.shape, generator=generator(5), dtype=torch.float64)
    weighted, _ = get_policy_loss("vanilla")(old, new, advantages, mask, rollout_is_weights=weights)
    per_token = torch.stack(
        [get_policy_loss("vanilla")(old, new, advantages, mask * (torch.arange(TOKENS) == t))[0] for t in range(TOKENS)]
    )
    assert weighted.isfinite()
    double, _ = get_policy_loss("vanilla")(old, new, advantages, mask, rollout_is_weights=2 * torch.ones_like(mask))
    counts = mask.sum(0)
    close(double.detach(), 2 * (per_token * counts).sum().detach() / counts.sum())


def test_kl_estimators():
    logps, ref = torch.tensor([-1.0, -2.0]).double(), torch.tensor([-1.5, -2.0]).double()
    close(kl_estimate(logps, ref, estimator="k1"), torch.tensor([0.5, 0.0]))
    close(kl_estimate(logps, ref, estimator="k2"), torch.tensor([0.125, 0.0]))
    close(kl_estimate(logps, ref), torch.tensor([math.exp(-0.5) + 0.5 - 1, 0.0], dtype=torch.float64))


def test_every_recipe_runs_and_separates_advantage_from_loss():
    old, new, mask, groups = batch(REWARDS, drift=0.2)
    rewards = torch.zeros_like(mask)
    rewards[:, 0] = REWARDS.flatten()
    for name, recipe in RECIPES.items():
        advantages, returns = recipe.estimator(
            rewards, mask, index=[f"prompt-{number}" for number in groups.tolist()], config=recipe.advantage_options
        )
        assert torch.equal(advantages, returns)
        options = dict(recipe.loss_options)
        if recipe.loss in GROUPED:
            options["num_generations"] = SIZE
        if recipe.loss_agg_mode.endswith("norm"):
            options["loss_scale_factor"] = float(TOKENS)
        loss, _ = recipe.policy_loss(old, new, advantages, mask, recipe.loss_agg_mode, options)
        assert loss.isfinite(), name
        assert torch.autograd.grad(loss, new, retain_graph=True)[0].abs().sum() > 0, name
