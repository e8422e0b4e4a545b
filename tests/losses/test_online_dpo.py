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
