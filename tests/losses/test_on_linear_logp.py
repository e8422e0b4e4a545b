"""The losses driven from hidden states: the same value and gradients as through all logits in float64."""

import pytest
import torch

from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors, tolerance
from p2k.losses import adpo_loss, apo_loss, dpo_loss, get_policy_loss, gopo_loss
from p2k.ops.linear_logp import linear_logp

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, TOKENS, DIM, VOCAB, ABSENT = 6, 9, 8, 40, -100


def lists(loss, weights):
    """A loss on two lists of three candidates, each a sum over its tokens."""

    def call(logps, entropy, ref, mask, advantages):
        per_row, ref_row = (x.sum(-1).view(2, 3) for x in (logps, ref))
        return loss(per_row, ref_row, weights(advantages.view(2, 3)))[0]

    return call


def pairs(logps, entropy, ref, mask, advantages):
    chosen, rejected = logps.sum(-1).view(2, 3).unbind()
    ref_chosen, ref_rejected = ref.sum(-1).view(2, 3).unbind()
    return dpo_loss(chosen, rejected, ref_chosen, ref_rejected)[0]


def policy(name):
    def call(logps, entropy, ref, mask, advantages):
        loss, _ = get_policy_loss(name)(ref, logps, advantages[:, None].expand_as(logps), mask)
        return loss - 0.01 * (entropy * mask).sum() / mask.sum()

    return call


LOSSES = {
    "dpo": pairs,
    "adpo": lists(adpo_loss, lambda advantages: advantages.softmax(-1)),
    "apo": lists(apo_loss, lambda advantages: advantages.softmax(-1)),
    "gopo": lists(gopo_loss, lambda advantages: advantages - advantages.mean(-1, keepdim=True)),
    "vanilla": policy("vanilla"),
    "gspo": policy("gspo"),
}


def full_logits(hidden, weight, target):
    logps = torch.log_softmax(hidden @ weight.T, -1)
    mask = target != ABSENT
    chosen = logps.gather(-1, target.clamp_min(0)[..., None])[..., 0]
    return chosen * mask, -(logps.exp() * logps).sum(-1) * mask


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_same_loss_and_gradients_as_through_all_logits(loss, backend):
    source = generator(0, DEVICE)
    hidden, weight = (
        torch.randn(*shape, generator=source, device=DEVICE) / 2 for shape in ((ROWS, TOKENS, DIM), (VOCAB, DIM))
    )
    target = torch.randint(0, VOCAB, (ROWS, TOKENS), generator=source, device=DEVICE)
    target[1, 4:] = target[4, 7:] = ABSENT
    advantages = torch.randn(ROWS, generator=source, device=DEVICE, dtype=torch.float64)
    old, _ = full_logits(
        hidden.double() + 0.01 * torch.randn(hidden.shape, generator=source, device=DEVICE), weight.double(), target
    )

    def through(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
        logps, entropy = function(*leaves, target)
        value = loss(logps, entropy, old.to(dtype), target != ABSENT, advantages.to(dtype))
        return value.detach(), *torch.autograd.grad(value, leaves)

    def chunked(*inputs):
        found = linear_logp(*inputs, chunk_size=16, backend=backend)
        return found.logp, found.entropy

    truth = through(full_logits, torch.float64)
    for found, exact in zip(through(chunked, torch.float32), truth, strict=True):
        assert exact.any()
        assert relative_errors(found, exact)[0] <= tolerance(torch.float32, dot=True)
