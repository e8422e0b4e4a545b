"""Inputs and comparisons that the StableMax tests share."""

import torch
import torch.nn.functional as F

from p2k.core.seeding import generator
from p2k.core.tolerance import assert_as_good_as
from p2k.ops.stablemax import reference, stablemax_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORWARD, BACKWARD = 2, 3


def inputs(*shape, offset=0.0, scale=3.0, seed=0, dtype=torch.float32):
    """Logits ``[*tokens, classes]``, targets and an upstream gradient."""
    source = generator(seed, DEVICE)
    logits = torch.randn(shape, generator=source, dtype=torch.float64, device=DEVICE) * scale + offset
    target = torch.randint(0, shape[-1], shape[:-1], generator=source, device=DEVICE)
    grad = torch.randn(shape[:-1], generator=source, dtype=torch.float64, device=DEVICE)
    return logits.to(dtype), target, grad


def run(function, logits, target, grad, **options):
    """Losses and gradient of the logits."""
    leaf = logits.detach().requires_grad_()
    losses = function(leaf, target, **options)
    return losses.detach(), torch.autograd.grad(losses, leaf, grad.to(losses.dtype))[0]


def eager(logits, target, ignore_index=-100):
    """What torch does without a float64: softmax of the symmetric logarithm in float32."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    rows = reference.symlog(logits.to(wide)).reshape(-1, logits.shape[-1])
    return F.cross_entropy(rows, target.reshape(-1), ignore_index=ignore_index, reduction="none").view(target.shape)


def assert_kernel_as_good_as_eager(logits, target, grad, *, ignore_index=-100):
    """Losses within twice, gradients within three times the error of torch in the same dtype."""
    options = {"ignore_index": ignore_index}
    truth = run(stablemax_loss, logits.double(), target, grad, backend="torch", **options)
    base = run(eager, logits, target, grad, **options)
    actual = run(stablemax_loss, logits, target, grad, backend="triton", **options)
    assert (actual[0].dtype, actual[1].dtype) == (torch.promote_types(logits.dtype, torch.float32), logits.dtype)
    for name, factor, *three in zip(("loss", "gradient"), (FORWARD, BACKWARD), actual, truth, base, strict=True):
        assert_as_good_as(*three, factor=factor, length=logits.shape[-1], name=name)
