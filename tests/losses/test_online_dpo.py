import pytest
import torch
import torch.nn.functional as F

from p2k.core.seeding import generator
from p2k.losses.online_dpo import online_dpo_policy_loss
from p2k.losses.registry import get_policy_loss

OPTIONS = {"num_generations": 4, "beta": 0.7}


def batch():
    random = generator(0)
    old, new = (-torch.rand(8, 3, dtype=torch.float64, generator=random) for _ in range(2))
    mask = torch.tensor([[True, True, True], [True, True, False]]).repeat(4, 1)
    rewards = torch.tensor([1.0, 0, 0, 1, 1, 1, 1, 1], dtype=torch.float64)
    return old, new.requires_grad_(), rewards[:, None].expand(-1, 3), mask


def test_it_is_the_mean_over_groups_of_the_mean_over_pairs():
    old, new, advantages, mask = batch()
    loss, _ = online_dpo_policy_loss(old, new, advantages, mask, config=OPTIONS)
    ratio = ((new - old) * mask).sum(1)
    pairs = [-F.logsigmoid(0.7 * (ratio[win] - ratio[lose])) for win in (0, 3) for lose in (1, 2)]
    assert torch.allclose(loss, torch.stack(pairs).mean() / 2)
    (grad,) = torch.autograd.grad(loss, new)
    assert not grad[~mask].any()
    assert not grad[4:].any()
    assert bool((grad[:4][mask[:4]] != 0).all())


def test_equal_rewards_make_no_pair_whatever_the_lengths():
    # In float32 a plain mean over 7 tokens differs from one over 2 in the last bit for half of these advantages.
    lengths = torch.tensor([7, 2, 3, 5])
    mask = torch.arange(7) < lengths[:, None]
    for advantage in torch.rand(50, generator=generator(1)):
        advantages = torch.stack([advantage, advantage, -advantage, -advantage])[:, None].expand(4, 7)
        new = torch.zeros(4, 7, requires_grad=True)
        loss, _ = online_dpo_policy_loss(new.detach(), new, advantages, mask, config={"num_generations": 4})
        (grad,) = torch.autograd.grad(loss, new)
        # Four pairs of a winner and a loser, one half each: a winner gets -1/4, and a fifth pair would show.
        assert torch.equal(grad[:, 0], torch.tensor([-0.25, -0.25, 0.25, 0.25]))


def test_an_empty_group_does_not_dilute_and_split_groups_raise():
    old, new, advantages, mask = batch()
    loss, _ = online_dpo_policy_loss(old[:4], new[:4], advantages[:4], mask[:4], config=OPTIONS)
    gone = mask & (torch.arange(8) < 4)[:, None]
    padded, _ = online_dpo_policy_loss(old, new, advantages, gone, config=OPTIONS)
    assert torch.equal(padded, loss)
    whole = {**OPTIONS, "index": list("aaaabbbb")}
    assert online_dpo_policy_loss(old, new, advantages, mask, config=whole)[0].isfinite()
    with pytest.raises(ValueError, match="must stand together"):
        online_dpo_policy_loss(old, new, advantages, mask, config={**OPTIONS, "index": list("abababab")})


def test_it_is_registered_and_refuses_what_it_cannot_honour():
    old, new, advantages, mask = batch()
    loss = get_policy_loss("online_dpo")
    cases = [({}, "num_generations"), ({"num_generations": 3}, "whole groups"), ({**OPTIONS, "mu": 1.0}, "unknown")]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            loss(old, new, advantages, mask, config=options)
    with pytest.raises(ValueError, match="seq-mean-token-mean"):
        loss(old, new, advantages, mask, "token-mean", config=OPTIONS)
    with pytest.raises(ValueError, match="weights"):
        loss(old, new, advantages, mask, config=OPTIONS, rollout_is_weights=torch.ones_like(old))
