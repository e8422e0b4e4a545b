"""StableMax cross-entropy against torch's, option by option, and the softmax loss that does not collapse."""

import pytest
import torch
import torch.nn.functional as F

from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors, tolerance
from p2k.losses.stablemax import StableMaxCrossEntropyLoss, rest_cross_entropy, stablemax_cross_entropy
from p2k.ops.stablemax.reference import symlog

DOUBLE = tolerance(torch.float64)


def batch(*shape, seed=0, dtype=torch.float64, scale=3.0):
    source = generator(seed)
    logits = (torch.randn(shape, generator=source, dtype=torch.float64) * scale).to(dtype)
    return logits, torch.randint(0, shape[-1], shape[:-1], generator=source)


def close(actual, expected):
    return torch.testing.assert_close(actual, expected, rtol=1e2 * DOUBLE, atol=DOUBLE, equal_nan=True)


OPTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.2},
    {"label_smoothing": 1.0, "reduction": "sum"},
    {"weight": torch.linspace(0.5, 2, 6, dtype=torch.float64)},
    {"weight": torch.linspace(0.5, 2, 6, dtype=torch.float64), "reduction": "none", "ignore_index": 3},
    {"weight": torch.linspace(0.5, 2, 6, dtype=torch.float64), "label_smoothing": 0.3, "ignore_index": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "plain")
def test_every_option_is_torchs_on_the_symmetric_logarithm(options):
    logits, target = batch(12, 6)
    target[4] = options.get("ignore_index", -100)
    leaf = logits.requires_grad_()
    losses = stablemax_cross_entropy(leaf, target, **options), F.cross_entropy(symlog(leaf), target, **options)
    close(*losses)
    close(*(torch.autograd.grad(loss.sum(), leaf)[0] for loss in losses))
    module = StableMaxCrossEntropyLoss(**options)
    assert torch.equal(module(leaf, target), losses[0])
    assert set(module.state_dict()) == ({"weight"} if "weight" in options else set())


@pytest.mark.parametrize("loss", [stablemax_cross_entropy, rest_cross_entropy])
def test_classes_come_last_in_any_shape(loss):
    logits, target = batch(2, 3, 4, 5)
    flat = loss(logits.reshape(-1, 5), target.reshape(-1), reduction="none")
    close(loss(logits, target, reduction="none"), flat.view(2, 3, 4))
    close(loss(logits, target), flat.mean())
    with pytest.raises(ValueError, match=r"target must have shape \(2, 3, 5\), got \(2, 3, 4\)"):
        loss(logits.transpose(2, 3), target)


@pytest.mark.parametrize("options", [{}, {"weight": torch.ones(6)}, {"label_smoothing": 0.1}])
def test_nothing_to_learn_from_is_zero_with_a_zero_gradient(options):
    logits, _ = batch(4, 6, dtype=torch.float32)
    leaf, absent = logits.requires_grad_(), torch.full((4,), -100)
    loss = stablemax_cross_entropy(leaf, absent, **options)
    assert loss == 0
    assert not torch.autograd.grad(loss, leaf)[0].any()


def test_half_precision_gives_a_float32_loss():
    for dtype in (torch.float16, torch.bfloat16):
        logits, target = batch(8, 6, dtype=dtype)
        for options in ({}, {"label_smoothing": 0.1}):
            loss = stablemax_cross_entropy(logits, target, **options)
            exact = stablemax_cross_entropy(logits.double(), target, **options)
            assert loss.dtype == torch.float32
            assert relative_errors(loss, exact)[0] <= tolerance(torch.float32)


BAD = [
    (stablemax_cross_entropy, {"reduction": "avg"}, ValueError, "reduction must be one of"),
    (stablemax_cross_entropy, {"label_smoothing": 1.5}, ValueError, r"label_smoothing must lie in \[0, 1\]"),
    (stablemax_cross_entropy, {"weight": torch.ones(5, dtype=torch.float64)}, ValueError, r"weight must have shape"),
    (stablemax_cross_entropy, {"weight": torch.ones(6).long()}, TypeError, "weight must be floating point"),
    (stablemax_cross_entropy, {"label_smoothing": 0.1, "backend": "triton"}, ValueError, "takes neither weight nor"),
    (rest_cross_entropy, {"reduction": None}, ValueError, "reduction must be one of"),
]


@pytest.mark.parametrize(("loss", "options", "error", "message"), BAD)
def test_bad_options(loss, options, error, message):
    with pytest.raises(error, match=message):
        loss(*batch(4, 6), **options)


def test_the_rest_form_is_softmax_cross_entropy():
    logits, target = batch(12, 6)
    logits[0, 1:3], target[5], target[0] = -torch.inf, -100, 0
    leaf = logits.requires_grad_()
    losses = rest_cross_entropy(leaf, target), F.cross_entropy(leaf, target)
    close(*losses)
    close(*(torch.autograd.grad(loss, leaf)[0] for loss in losses))
    assert torch.autograd.gradcheck(lambda z: rest_cross_entropy(z, target[1:]), leaf[1:].detach().requires_grad_())


def test_the_rest_form_of_one_class_is_zero():
    leaf = torch.tensor([[3.0], [-2.0]], requires_grad=True)
    loss = rest_cross_entropy(leaf, torch.zeros(2, dtype=torch.int64))
    assert loss == 0
    assert not torch.autograd.grad(loss, leaf)[0].any()


@pytest.mark.parametrize("gap", [10.0, 20.0, 60.0, 80.0])
def test_the_rest_form_keeps_relative_accuracy_where_log_softmax_rounds_to_zero(gap):
    logits, target = torch.tensor([[gap, 0.3, -0.2]]), torch.tensor([0])
    slopes = []
    for loss, dtype in ((rest_cross_entropy, torch.float32), (rest_cross_entropy, torch.float64)):
        leaf = logits.to(dtype).requires_grad_()
        slopes.append(torch.autograd.grad(loss(leaf, target), leaf)[0][0, 0])
    # One rounding of a logit of this size moves its exponential by as many units.
    assert relative_errors(*slopes)[0] <= tolerance(torch.float32) * gap
    assert (F.cross_entropy(logits, target) == 0) == (gap >= 20)


SMALLEST = {torch.float16: (7.5, 7.8), torch.float32: (16.5, 16.8), torch.float64: (36.6, 36.9)}


@pytest.mark.parametrize("dtype", SMALLEST)
def test_the_gap_at_which_two_classes_collapse(dtype):
    """Between log(2 / eps) minus and plus the rounding of the gap itself."""
    below, above = SMALLEST[dtype]
    eps = torch.finfo(dtype).eps
    assert below < torch.tensor(2 / eps, dtype=torch.float64).log().item() < above
    losses = [F.cross_entropy(torch.tensor([[gap, 0.0]], dtype=dtype), torch.tensor([0])) for gap in (below, above)]
    assert losses[0] > 0 == losses[1]
