"""What holds for every loss: gradients, half precision, masks, infinities, lone candidates, no wait for the device."""

import functools

import pytest
import torch

from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors
from p2k.losses import (
    adpo_loss,
    all_pairs_loss,
    apo_loss,
    decoupled_adpo_loss,
    dpo_loss,
    gopo_loss,
    linear_gopo_loss,
    plackett_luce_loss,
)
from p2k.losses.dpo import PAIR_LOSSES, SMOOTHED
from p2k.losses.group_policy import gopo_policy_loss
from p2k.losses.lists import anchored_logits
from p2k.losses.registry import POLICY_LOSSES, get_policy_loss
from p2k.losses.targets import softmax_target


def on_targets(loss, **options):
    """A list loss that takes a target, as a function of rewards instead."""

    def run(logps, ref, rewards, mask=None, reduction="mean"):
        # The target belongs to the problem, not to the precision under test.
        target = softmax_target(rewards.double(), mask=mask).to(torch.promote_types(rewards.dtype, torch.float32))
        return loss(logps, ref, target, mask=mask, reduction=reduction, **options)

    return run


LIST_LOSSES = {
    "adpo": on_targets(adpo_loss, tau=0.7),
    "adpo-decoupled": on_targets(decoupled_adpo_loss, tau=2.0),
    "apo-0": on_targets(apo_loss, alpha=0.0),
    "apo-0.35": on_targets(apo_loss, alpha=0.35, tau=0.7),
    "apo-0.9": on_targets(apo_loss, alpha=0.9),
    "apo-1": on_targets(apo_loss, alpha=1.0),
    "gopo": functools.partial(gopo_loss, mu=0.5),
    "gopo-linear": functools.partial(linear_gopo_loss, mu=0.5),
    "plackett-luce": functools.partial(plackett_luce_loss, beta=0.5),
    "all-pairs": functools.partial(all_pairs_loss, beta=0.5),
}
EVERY_LIST_LOSS = pytest.mark.parametrize("loss", LIST_LOSSES.values(), ids=LIST_LOSSES)
SHIFT_INVARIANT = [name for name in LIST_LOSSES if not name.startswith(("gopo", "adpo-dec"))]


def batch(count=3, length=4, seed=0, dtype=torch.float64):
    rng = generator(seed)
    logps, ref, rewards = (torch.randn(count, length, generator=rng, dtype=torch.float64) for _ in range(3))
    return logps.to(dtype).requires_grad_(), ref.to(dtype), rewards.to(dtype)


def gradient(loss, x):
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


@EVERY_LIST_LOSS
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_gradcheck(loss, reduction):
    logps, ref, rewards = batch()
    mask = torch.tensor([[True] * 4, [True, True, False, True], [True] * 4])
    # gradcheck compares with finite differences for a random upstream gradient of every output.
    assert torch.autograd.gradcheck(lambda x: loss(x, ref, rewards, mask=mask, reduction=reduction)[0], (logps,))


@pytest.mark.parametrize("name", ["adpo", "apo-0.35", "apo-1", "gopo", "gopo-linear"])
def test_second_derivatives(name):
    logps, ref, rewards = batch()
    assert torch.autograd.gradgradcheck(lambda x: LIST_LOSSES[name](x, ref, rewards, reduction="none")[0], (logps,))


@EVERY_LIST_LOSS
def test_reductions_agree(loss):
    logps, ref, rewards = batch()
    each, total, mean = (loss(logps, ref, rewards, reduction=mode)[0] for mode in ("none", "sum", "mean"))
    assert each.shape == (3,)
    torch.testing.assert_close(each.sum(), total)
    torch.testing.assert_close(total / 3, mean)


@EVERY_LIST_LOSS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_computed_in_float32(loss, dtype):
    logps, ref, rewards = batch(count=8, dtype=dtype)
    value, metrics = loss(logps, ref, rewards)
    wide = logps.detach().double().requires_grad_()
    truth, _ = loss(wide, ref.double(), rewards.double())
    # The same numbers in float64: only the inputs' rounding separates a half-precision loss from float32's error.
    assert value.dtype == torch.float32
    assert abs(value.item() - truth.item()) <= 1e-5 * max(1.0, abs(truth.item()))
    grad = gradient(value, logps)
    assert grad.dtype == dtype
    # One rounding of the gradient to the input's dtype, and float32 arithmetic before it.
    bound = max(1e-5, torch.finfo(dtype).eps)
    assert relative_errors(grad, gradient(truth, wide))[0] <= bound
    assert not any(tensor.requires_grad for tensor in metrics.values())


@EVERY_LIST_LOSS
def test_empty_masks_give_zero_with_a_zero_gradient(loss):
    logps, ref, rewards = batch()
    logps = torch.where(torch.ones(3, 4, dtype=torch.bool), torch.nan, logps.detach()).requires_grad_()
    mask = torch.zeros(3, 4, dtype=torch.bool)
    for reduction in ("mean", "sum", "none"):
        value, metrics = loss(logps, ref, rewards, mask=mask, reduction=reduction)
        assert (value == 0).all()
        assert (gradient(value.sum(), logps) == 0).all()
    assert all(tensor.isfinite().all() for tensor in metrics.values())


@EVERY_LIST_LOSS
def test_an_empty_list_does_not_dilute_the_mean(loss):
    logps, ref, rewards = batch()
    mask = torch.tensor([[True] * 4, [False] * 4, [True] * 4])
    kept = [0, 2]
    value, _ = loss(logps, ref, rewards, mask=mask)
    expected, _ = loss(logps[kept], ref[kept], rewards[kept])
    torch.testing.assert_close(value, expected)
    assert (gradient(value, logps)[1] == 0).all()


@EVERY_LIST_LOSS
def test_masked_candidates_may_hold_anything(loss):
    logps, ref, rewards = batch()
    value, _ = loss(logps, ref, rewards, reduction="none")
    for junk in (torch.nan, torch.inf, -torch.inf, 1e30):
        pad = torch.full((3, 2), junk, dtype=torch.float64)
        wide = torch.cat([pad[:, :1], logps.detach(), pad[:, 1:]], -1).requires_grad_()
        mask = torch.tensor([False, True, True, True, True, False]).expand(3, 6)
        padded = [torch.cat([pad[:, :1], tensor, pad[:, 1:]], -1) for tensor in (ref, rewards)]
        again, _ = loss(wide, *padded, mask=mask, reduction="none")
        torch.testing.assert_close(again, value)
        grad = gradient(again.sum(), wide)
        torch.testing.assert_close(grad[:, 1:5], gradient(value.sum(), logps))
        assert (grad[:, [0, 5]] == 0).all()


@EVERY_LIST_LOSS
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_infinities_and_nan_stay_in_their_list(loss, poison):
    logps, ref, rewards = batch()
    poisoned = logps.detach().clone()
    poisoned[1, 2] = poison
    poisoned.requires_grad_()
    clean, dirty = (loss(x, ref, rewards, reduction="none")[0] for x in (logps, poisoned))
    assert torch.equal(dirty[[0, 2]], clean[[0, 2]])
    assert torch.equal(gradient(dirty.sum(), poisoned)[[0, 2]], gradient(clean.sum(), logps)[[0, 2]])


@EVERY_LIST_LOSS
def test_a_lone_candidate(loss):
    logps, ref, rewards = batch(length=1)
    value, metrics = loss(logps, ref, rewards)
    assert value.isfinite()
    assert all(tensor.isfinite().all() for tensor in metrics.values())
    at = ref.clone().requires_grad_()
    assert (gradient(loss(at, ref, rewards)[0], at) == 0).all()


@pytest.mark.parametrize("name", SHIFT_INVARIANT)
def test_a_lone_candidate_has_no_say_in_a_list_loss(name):
    logps, ref, rewards = batch(length=1)
    value, _ = LIST_LOSSES[name](logps, ref, rewards, reduction="none")
    assert (value == 0).all()
    assert (gradient(value.sum(), logps) == 0).all()


@EVERY_LIST_LOSS
@pytest.mark.parametrize("size", [50.0, 1e4])
def test_huge_log_ratios_in_float32_stay_finite(loss, size):
    if loss is LIST_LOSSES["adpo-decoupled"]:
        size = min(size, 50.0)  # an exponential without a normaliser overflows at 88: that is the variant's own limit
    rewards = torch.tensor([[1.0, 0.5, 0.0, -1.0]])
    logps = torch.tensor([[size, -size, 0.0, size / 2]], requires_grad=True)
    value, _ = loss(logps, torch.zeros_like(rewards), rewards)
    assert value.isfinite()
    assert gradient(value, logps).isfinite().all()


@EVERY_LIST_LOSS
def test_same_input_gives_the_same_bits(loss):
    logps, ref, rewards = batch(dtype=torch.float32)
    first, second = (loss(logps, ref, rewards)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(gradient(first, logps), gradient(second, logps))


@EVERY_LIST_LOSS
def test_nothing_is_read_on_the_host(loss):
    # Tensors on the meta device have no values, so a loss that read one would raise.
    logps, ref, rewards = (torch.empty(3, 4, device="meta") for _ in range(3))
    logps.requires_grad_()
    value, metrics = loss(logps, ref, rewards, mask=torch.empty(3, 4, dtype=torch.bool, device="meta"))
    value.backward()
    assert logps.grad.shape == logps.shape
    assert all(tensor.device.type == "meta" for tensor in metrics.values())


PAIRS = [(name, 0.1 if name in SMOOTHED else 0.0) for name in PAIR_LOSSES]


@pytest.mark.parametrize(("loss_type", "smoothing"), PAIRS)
def test_pair_losses(loss_type, smoothing):
    rng = generator(3)
    chosen, rejected, ref_chosen, ref_rejected = (torch.randn(5, generator=rng, dtype=torch.float64) for _ in range(4))
    chosen.requires_grad_()
    rejected.requires_grad_()
    options = {"beta": 0.8, "loss_type": loss_type, "label_smoothing": smoothing}

    def each(x, y):
        return dpo_loss(x, y, ref_chosen, ref_rejected, reduction="none", **options)[0]

    assert torch.autograd.gradcheck(each, (chosen, rejected))
    for dtype in (torch.float16, torch.bfloat16):
        halves = [tensor.detach().to(dtype) for tensor in (chosen, rejected, ref_chosen, ref_rejected)]
        value, metrics = dpo_loss(*halves, **options)
        truth, _ = dpo_loss(*[tensor.double() for tensor in halves], **options)
        assert value.dtype == torch.float32
        assert abs(value.item() - truth.item()) < 1e-5  # float32 arithmetic on numbers of order 1
        assert not any(tensor.requires_grad for tensor in metrics.values())
    # A pair that the policy cannot produce stays alone with its loss.
    broken = chosen.detach().clone()
    broken[2] = -torch.inf
    rest = [0, 1, 3, 4]
    assert torch.equal(each(broken, rejected)[rest], each(chosen, rejected)[rest])
    empty = torch.empty(0, dtype=torch.float64, requires_grad=True)
    value, _ = dpo_loss(empty, empty, empty, empty, **options)
    value.backward()
    assert value == 0


def policy_batch(rows=8, tokens=3, dtype=torch.float64, seed=4):
    rng = generator(seed)
    old = -torch.rand(rows, tokens, generator=rng, dtype=torch.float64)
    new = old + 0.05 * torch.randn(rows, tokens, generator=rng, dtype=torch.float64)
    advantages = torch.randn(rows, 1, generator=rng, dtype=torch.float64).expand(rows, tokens)
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (rows, 1), generator=rng)
    return old.to(dtype), new.to(dtype).requires_grad_(), advantages.to(dtype), mask


def config(name, **options):
    group = {"num_generations": 4} if name in ("adpo", "apo", "gopo", "online_dpo") else {}
    wide = {"clip_ratio": 0.2} if name == "gspo" else {}
    return {**group, **wide, **options}


EVERY_POLICY_LOSS = pytest.mark.parametrize("name", sorted(POLICY_LOSSES))


@EVERY_POLICY_LOSS
def test_policy_gradcheck(name):
    old, new, advantages, mask = policy_batch()
    loss = get_policy_loss(name)
    assert torch.autograd.gradcheck(lambda x: loss(old, x, advantages, mask, config=config(name))[0], (new,))


@EVERY_POLICY_LOSS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_policy_losses_in_half_precision(name, dtype):
    old, new, advantages, mask = policy_batch(dtype=dtype)
    value, _ = get_policy_loss(name)(old, new, advantages, mask, config=config(name))
    wide = [tensor.detach().double() for tensor in (old, new, advantages)]
    truth, _ = get_policy_loss(name)(*wide, mask, config=config(name))
    assert value.dtype == torch.float32
    assert abs(value.item() - truth.item()) < 1e-5  # float32 arithmetic on numbers of order 1
    assert gradient(value, new).dtype == dtype


@EVERY_POLICY_LOSS
def test_policy_losses_with_nothing_to_count(name):
    old, new, advantages, mask = policy_batch()
    value, metrics = get_policy_loss(name)(old * torch.nan, new, advantages, mask & False, config=config(name))
    assert value == 0
    assert (gradient(value, new) == 0).all()
    assert all(tensor.isfinite().all() for tensor in metrics.values())


@EVERY_POLICY_LOSS
def test_policy_losses_survive_impossible_tokens(name):
    old, new, advantages, mask = policy_batch()
    far = new.detach().clone()
    far[0, 0] += 500.0
    far[1, 0] -= 500.0
    far.requires_grad_()
    options = config(name, log_ratio_clip=5.0) if name in ("adpo", "apo") else config(name)
    value, _ = get_policy_loss(name)(old.float(), far.float(), advantages.float(), mask, config=options)
    assert value.isfinite()
    assert gradient(value, far).isfinite().all()


@EVERY_POLICY_LOSS
def test_policy_losses_read_nothing_on_the_host(name):
    old, new, advantages = (torch.empty(8, 3, device="meta") for _ in range(3))
    mask = torch.empty(8, 3, device="meta", dtype=torch.bool)
    value, metrics = get_policy_loss(name)(old, new.requires_grad_(), advantages, mask, config=config(name))
    value.backward()
    assert all(tensor.device.type == "meta" for tensor in metrics.values())


@pytest.mark.parametrize("name", ["adpo", "apo", "gopo"])
class TestGroups:
    def test_rows_that_are_not_whole_groups_raise(self, name):
        old, new, advantages, mask = policy_batch(rows=6)
        with pytest.raises(ValueError, match="not whole groups of num_generations=4"):
            get_policy_loss(name)(old, new, advantages, mask, config=config(name))

    def test_split_and_shuffled_groups_raise_when_the_prompts_are_known(self, name):
        old, new, advantages, mask = policy_batch()
        loss = get_policy_loss(name)
        whole = config(name, index=["a"] * 4 + ["b"] * 4)
        assert loss(old, new, advantages, mask, config=whole)[0].isfinite()
        for index in ("aaabbbbb", "abababab", "aaaaaaaa", "aaab"):
            with pytest.raises(ValueError, match="must stand together"):
                loss(old, new, advantages, mask, config=config(name, index=list(index)))

    def test_parts_of_a_group_would_give_another_gradient(self, name):
        old, new, advantages, mask = policy_batch()
        loss = get_policy_loss(name)
        whole = gradient(loss(old, new, advantages, mask, config=config(name))[0], new)
        halves = loss(old, new, advantages, mask, config={"num_generations": 2})[0]
        assert (gradient(halves, new) - whole).abs().max() > 1e-3

    def test_group_of_one(self, name):
        old, new, advantages, mask = policy_batch()
        value, _ = get_policy_loss(name)(old, new, advantages, mask, config={"num_generations": 1})
        assert value.isfinite()
        _, grad = value, gradient(value, new)
        # A list of one says nothing; a ratio of one sample is still held to 1.
        assert (grad == 0).all() if name != "gopo" else (grad != 0).any()

    @pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "nope"])
    def test_other_means_are_refused(self, name, mode):
        old, new, advantages, mask = policy_batch()
        with pytest.raises(ValueError, match="use seq-mean-token-mean"):
            get_policy_loss(name)(old, new, advantages, mask, mode, config(name))

    def test_options_it_cannot_honour_are_refused(self, name):
        old, new, advantages, mask = policy_batch()
        loss = get_policy_loss(name)
        with pytest.raises(ValueError, match="rollout_is_weights"):
            loss(old, new, advantages, mask, config=config(name), rollout_is_weights=torch.ones(8, 3))
        with pytest.raises(ValueError, match="unknown options clip_ratio"):
            loss(old, new, advantages, mask, config=config(name, clip_ratio=0.2))
        with pytest.raises(ValueError, match="must give num_generations"):
            loss(old, new, advantages, mask)
        with pytest.raises(ValueError, match="ratio_level must be one of"):
            loss(old, new, advantages, mask, config=config(name, ratio_level="word"))


def test_token_level_gopo_takes_every_mean():
    old, new, advantages, mask = policy_batch()
    options = config("gopo", ratio_level="token")
    for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum"):
        value, _ = gopo_policy_loss(old, new, advantages, mask, mode, options)
        assert value > 0
    scaled = gopo_policy_loss(
        old, new, advantages, mask, "seq-mean-token-sum-norm", {**options, "loss_scale_factor": 8}
    )
    torch.testing.assert_close(scaled[0], value)


class TrainerConfig:
    """A trainer's own configuration: many attributes, the loss's options in `policy_loss`."""

    clip_ratio = 0.1
    clip_ratio_low = None
    learning_rate = 1.0
    policy_loss = {"tau": 0.3, "num_generations": 4}


def test_a_trainers_configuration_is_read_by_attribute():
    old, new, advantages, mask = policy_batch()
    from_object = get_policy_loss("adpo")(old, new, advantages, mask, config=TrainerConfig())[0]
    from_dict = get_policy_loss("adpo")(old, new, advantages, mask, config={"tau": 0.3, "num_generations": 4})[0]
    assert from_object == from_dict
    drift = new + 0.15
    clipped = get_policy_loss("vanilla")(old, drift, advantages, mask, config=TrainerConfig())[0]
    assert clipped == get_policy_loss("vanilla")(old, drift, advantages, mask, config={"clip_ratio": 0.1})[0]
    assert clipped != get_policy_loss("vanilla")(old, drift, advantages, mask)[0]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vanilla", {"clip_ratio_low": 1.0}, "clip_ratio_low must lie"),
        ("vanilla", {"clip_ratio_c": 0.5}, "clip_ratio_c must be > 1"),
        ("vanilla", {"loss_scale_factor": 3.0}, "belongs to seq-mean-token-sum-norm"),
        ("gspo", {"tau": 1.0}, "unknown options tau"),
        ("apo", {"num_generations": 4, "alpha": 2.0}, "alpha must lie"),
    ],
)
def test_policy_options_out_of_range_raise(name, options, message):
    old, new, advantages, mask = policy_batch()
    with pytest.raises(ValueError, match=message):
        get_policy_loss(name)(old, new, advantages, mask, config=options)


def test_policy_tensors_of_wrong_shape_raise():
    old, new, advantages, mask = policy_batch()
    loss = get_policy_loss("vanilla")
    with pytest.raises(ValueError, match="advantages must have shape"):
        loss(old, new, advantages[:, :1], mask)
    with pytest.raises(ValueError, match="response_mask must have shape"):
        loss(old, new, advantages, mask[:, :1])
    with pytest.raises(ValueError, match=r"log_prob must be \[rows, tokens\]"):
        loss(old[0], new[0], advantages[0], mask[0])
    with pytest.raises(ValueError, match="needs loss_scale_factor"):
        loss(old, new, advantages, mask, "seq-mean-token-sum-norm")
    with pytest.raises(ValueError, match="use seq-mean-token-mean"):
        get_policy_loss("gspo")(old, new, advantages, mask, "token-mean")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "sigmoid_norm"}, "loss_type must be one of sigmoid, robust, ipo"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "hinge takes no label_smoothing"),
        ({"label_smoothing": 0.5}, r"must lie in \[0, 0.5\)"),
        ({"loss_type": "exo_pair"}, "infinite for hard labels"),
        ({"beta": 0.0}, "beta must be"),
        ({"reduction": "batch"}, "reduction must be one of"),
        ({"reference_free": True}, "pass both reference"),
    ],
)
def test_pair_options_out_of_range_raise(options, message):
    x = torch.zeros(2)
    with pytest.raises(ValueError, match=message):
        dpo_loss(x, x, x, x, **options)


def test_pair_metrics_and_reference_free():
    chosen, rejected = torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -1.0])
    loss, metrics = dpo_loss(chosen, rejected, None, None, beta=0.5, reference_free=True)
    zero = torch.zeros(2)
    assert loss == dpo_loss(chosen, rejected, zero, zero, beta=0.5)[0]
    expected = {
        "rewards/chosen": -1.0,
        "rewards/rejected": -0.75,
        "rewards/accuracies": 0.5,
        "rewards/margins": -0.25,
        "logps/chosen": -2.0,
        "logps/rejected": -1.5,
    }
    assert {name: tensor.item() for name, tensor in metrics.items()} == expected
    with pytest.raises(ValueError, match="pass both reference"):
        dpo_loss(chosen, rejected, zero, None)


def test_a_pair_with_an_impossible_loser_has_no_loss():
    chosen, zero = torch.zeros(1, requires_grad=True), torch.zeros(1)
    loss, _ = dpo_loss(chosen, torch.full((1,), -torch.inf), zero, zero)
    assert loss == 0
    assert gradient(loss, chosen) == 0


def test_the_default_dtype_does_not_leak_into_float32():
    logps, scores = torch.randn(3, 4, dtype=torch.float32), torch.rand(3, 4, dtype=torch.float32)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert anchored_logits(logps, 0 * logps).dtype == torch.float32
        assert softmax_target(scores).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
