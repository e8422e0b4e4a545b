"""The factored output layer: the dense step to rounding, at a cost without D, its repairs and its edges."""

import copy
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from p2k.core.errors import P2KError
from p2k.core.seeding import generator
from p2k.core.tolerance import assert_as_good_as, tolerance
from p2k.linalg.spherical import spherical_statistics
from p2k.nn.z_loss import FactoredOutput

# The layer is tested with losses of its own floor's neighbours written out here: floors do not import sideways.
D, WIDTH = 23, 6
EXACT = 10 * tolerance(torch.float64)


def softplus_of_score(s):
    z = s.deviation / (torch.where(s.counted, s.scatter, 1.0) / s.classes).sqrt()
    return torch.where(s.counted, torch.nn.functional.softplus(1.5 - z), 0.0).sum()


def taylor(s):
    o_c = s.mean + s.deviation
    total = s.classes * (1 + s.mean) + s.sum_of_squares / 2
    return torch.where(s.counted, total.log() - (1 + o_c + o_c**2 / 2).log(), 0.0).sum()


def squared(s):
    o_c = s.mean + s.deviation
    return torch.where(s.counted, 0.5 * (s.sum_of_squares - 2 * o_c + 1), 0.0).sum()


LOSSES = {"z": (softplus_of_score, 0.3), "taylor": (taylor, 0.3), "squared": (squared, 0.02)}
EVERY_LOSS = pytest.mark.parametrize(("loss", "rate"), LOSSES.values(), ids=LOSSES)


def batches(count, items, classes=D, width=WIDTH, seed=0):
    rng = generator(seed)
    for _ in range(count):
        h = torch.randn(items, width, generator=rng, dtype=torch.float64)
        yield h, torch.randint(classes, (items,), generator=rng)


def make(classes=D, width=WIDTH, seed=0, **options):
    layer = FactoredOutput(width, classes, **{"dtype": torch.float64, **options})
    layer.reset_parameters(generator(seed))
    return layer


def dense_step(W, h, c, loss, rate):
    """The loss, the gradient in the hidden vectors and the weight after one dense SGD step."""
    W, h = W.clone().requires_grad_(), h.clone().requires_grad_()
    value = loss(spherical_statistics(h @ W.mT, c))
    slope, back = torch.autograd.grad(value, (W, h))
    return value.detach(), back, (W - rate * slope).detach()


def factored_step(layer, h, c, loss, rate):
    h = h.clone().requires_grad_()
    value = loss(layer(h, c))
    value.backward()
    layer.step(rate)
    return value.detach(), h.grad


def relative(got, want):
    return ((got - want).norm() / want.norm()).item()


@EVERY_LOSS
@pytest.mark.parametrize("items", [1, 4, 9])
def test_every_step_equals_the_dense_one(loss, rate, items):
    layer = make()
    for h, c in batches(30, items):
        W = layer.weight
        value, back, after = dense_step(W, h, c, loss, rate / items)
        got, got_back = factored_step(layer, h, c, loss, rate / items)
        torch.testing.assert_close(got, value, rtol=EXACT, atol=EXACT)
        assert relative(got_back, back) < EXACT
        assert relative(layer.weight, after) < EXACT


@pytest.mark.parametrize("items", [1, 8])
def test_hundreds_of_steps_end_at_the_dense_weight(items):
    layer = make(refactor_every=None)
    W = layer.weight
    for h, c in batches(400, items):
        _, _, W = dense_step(W, h, c, softplus_of_score, 0.3 / items)
        factored_step(layer, h, c, softplus_of_score, 0.3 / items)
    assert relative(layer.weight, W) < EXACT
    assert max(layer.drift()[:3]) < EXACT


@pytest.mark.parametrize(("classes", "width"), [(1, 3), (2, 3), (3, 1), (5, 8)])
def test_small_sizes(classes, width):
    layer = make(classes, width)
    W = layer.weight
    for h, c in batches(10, 3, classes, width):
        if classes > 2:
            _, _, W = dense_step(W, h, c, softplus_of_score, 0.1)
            factored_step(layer, h, c, softplus_of_score, 0.1)
        else:  # One or two classes have no slope in the z-score; Taylor's loss has one.
            _, _, W = dense_step(W, h, c, taylor, 0.1)
            factored_step(layer, h, c, taylor, 0.1)
    assert relative(layer.weight, W) < EXACT


@settings(max_examples=30, deadline=None)
@given(classes=st.integers(1, 12), width=st.integers(1, 7), items=st.integers(0, 9), seed=st.integers(0, 999))
def test_any_size_of_layer_and_batch(classes, width, items, seed):
    layer = make(classes, width, seed)
    h, c = next(batches(1, items, classes, width, seed + 1))
    value, back, after = dense_step(layer.weight, h, c, taylor, 0.05)
    got, got_back = factored_step(layer, h, c, taylor, 0.05)
    torch.testing.assert_close(got, value, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(got_back, back, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(layer.weight, after, rtol=EXACT, atol=EXACT)


def test_repeated_targets_in_one_batch():
    h, _ = next(batches(1, 7))
    c = torch.tensor([3, 3, 3, 0, 0, 3, 22])
    layer = make()
    _, _, W = dense_step(layer.weight, h, c, taylor, 0.1)
    factored_step(layer, h, c, taylor, 0.1)
    assert relative(layer.weight, W) < EXACT
    assert max(layer.drift()[:3]) < EXACT


@pytest.mark.parametrize("rate", [1.0, 1.0 + 1e-9])
def test_a_step_that_makes_the_factor_singular_is_still_exact(rate):
    """Squared error with rate * |h|^2 = 1 wipes the direction of h out of every row."""
    layer, h, c = make(), torch.zeros(1, WIDTH, dtype=torch.float64), torch.tensor([4])
    h[0, 2] = 1.0
    for _ in range(3):
        _, _, W = dense_step(layer.weight, h, c, squared, rate)
        factored_step(layer, h, c, squared, rate)
        assert relative(layer.weight, W) < EXACT
        assert layer.drift().condition < 1e4
        h = h.roll(1, 1)


def test_float32_rows_are_as_good_as_a_dense_float32_weight():
    layer = make(dtype=torch.float32)
    truth, eager = layer.weight.double(), layer.weight
    for h, c in batches(200, 4):
        _, _, truth = dense_step(truth, h, c, softplus_of_score, 0.1)
        _, _, eager = dense_step(eager, h.float(), c, softplus_of_score, 0.1)
        factored_step(layer, h.float(), c, softplus_of_score, 0.1)
    assert layer.weight.dtype == torch.float32
    assert_as_good_as(layer.weight, truth, eager, factor=2)


def test_drift_grows_in_single_precision_and_refactoring_repairs_it():
    layer = make(dtype=torch.float32, factor_dtype=torch.float32, refactor_every=None)
    for h, c in batches(600, 4):
        factored_step(layer, h.float(), c, taylor, 0.1)
    before, W = layer.drift(), layer.weight
    layer.refactor()
    after = layer.drift()
    assert before.gram > 5 * after.gram
    assert max(after[:3]) < tolerance(torch.float32)
    assert after.condition == pytest.approx(1.0)
    assert relative(layer.weight, W) < tolerance(torch.float32)


def test_repairs_follow_their_schedule_and_their_limit():
    layer = make(refactor_every=5)
    eye = torch.eye(WIDTH, dtype=torch.float64)
    for number, (h, c) in enumerate(batches(10, 2), start=1):
        factored_step(layer, h, c, taylor, 0.1)
        assert torch.equal(layer.factor, eye) == (number % 5 == 0)
    strict = make(refactor_every=None, condition_limit=1.0 + 1e-12)
    for h, c in batches(2, 2):
        factored_step(strict, h, c, taylor, 0.1)
        assert torch.equal(strict.factor, eye)


def test_a_common_offset_of_any_size_changes_no_statistic_and_no_update():
    far, near = make(), make()
    far.mean_row += 1e12
    for h, c in batches(20, 3):
        s, t = far(h, c), near(h, c)
        assert torch.equal(s.scatter, t.scatter)
        assert torch.equal(s.deviation, t.deviation)
        for layer, statistics in ((far, s), (near, t)):
            softplus_of_score(statistics).backward()
            layer.step(0.1)
    assert torch.equal(far.rows, near.rows)


def test_a_weight_with_a_large_offset_is_centred_when_it_is_set():
    layer, W = make(), make().weight
    layer.set_weight(W + 2.0**30)
    # Storing W + 2^30 rounds it at 2^30 units of rounding; nothing more is lost.
    assert (layer.weight - 2.0**30 - W).abs().max() < 2**30 * EXACT
    assert layer.rows.abs().max() < 2
    h, c = next(batches(1, 3))
    torch.testing.assert_close(layer(h, c).scatter, make()(h, c).scatter, rtol=2**30 * EXACT, atol=0)


def test_rows_of_other_classes_are_not_written():
    layer = make()
    h, c = torch.ones(3, WIDTH, dtype=torch.float64), torch.tensor([1, 7, 7])
    before = layer.rows.clone()
    factored_step(layer, h, c, softplus_of_score, 0.5)
    written = (layer.rows != before).any(1).nonzero()[:, 0]
    assert written.tolist() == [1, 7]


def flops(classes, width, items):
    layer = FactoredOutput(width, classes)
    h, c = torch.randn(items, width, generator=generator(0)).requires_grad_(), torch.zeros(items, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        softplus_of_score(layer(h, c)).backward()
        layer.step(0.1)
    return counter.get_total_flops()


def test_operations_do_not_depend_on_the_classes_and_grow_with_the_square_of_the_width():
    assert flops(100, 32, 1) == flops(20_000, 32, 1)
    assert flops(100, 64, 1) / flops(100, 32, 1) == pytest.approx(4, rel=0.1)  # O(d) terms are within a tenth


def test_ignored_labels_and_what_stands_beside_them():
    layer, other = make(), make()
    h, c = next(batches(1, 5))
    keep = torch.tensor([True, False, True, True, False])
    poisoned = torch.where(keep[:, None], h, torch.nan)
    _, back = factored_step(layer, poisoned, torch.where(keep, c, -100), softplus_of_score, 0.2)
    _, clean = factored_step(other, h[keep], c[keep], softplus_of_score, 0.2)
    assert relative(layer.weight, other.weight) < EXACT
    assert relative(back[keep], clean) < EXACT
    assert torch.equal(back[~keep], torch.zeros(2, WIDTH, dtype=torch.float64))
    W = layer.weight
    factored_step(layer, h, torch.full((5,), -100), taylor, 0.2)
    assert torch.equal(layer.weight, W)


def test_two_passes_before_a_step_are_one_batch_and_factors_on_the_loss_count():
    layer, other = make(), make()
    (h, c), (g, e) = batches(2, 3)
    (3 * taylor(layer(h, c))).backward()
    (3 * taylor(layer(g, e))).backward()
    layer.step(0.05)
    factored_step(other, torch.cat([h, g]), torch.cat([c, e]), taylor, 0.15)
    assert relative(layer.weight, other.weight) < EXACT


def test_leading_dimensions_and_an_empty_batch():
    layer, other = make(), make()
    h, c = next(batches(1, 6))
    factored_step(layer, h.view(2, 3, WIDTH), c.view(2, 3), taylor, 0.1)
    factored_step(other, h, c, taylor, 0.1)
    assert torch.equal(layer.weight, other.weight)
    factored_step(layer, h[:0], c[:0], taylor, 0.1)
    assert torch.equal(layer.weight, other.weight)


def test_scores_equal_those_of_the_dense_weight():
    layer = make()
    for h, c in batches(5, 4):
        factored_step(layer, h, c, taylor, 0.1)
    torch.testing.assert_close(layer.logits(h), h @ layer.weight.mT, rtol=EXACT, atol=EXACT)
    assert layer.logits(h.half()).dtype == torch.float32


def test_the_weight_of_a_scale_invariant_loss_only_grows():
    layer, sizes = make(), []
    for h, c in batches(40, 3):
        sizes.append(layer.weight.norm().item())
        factored_step(layer, h, c, softplus_of_score, 1.0)
    assert all(b >= a * (1 - EXACT) for a, b in zip(sizes, sizes[1:], strict=False))
    assert sizes[-1] > sizes[0]


@pytest.mark.parametrize("scale", [0.1, 50.0])
def test_scaling_the_weight_and_the_rate_by_its_square_scales_the_whole_run(scale):
    layer, other = make(), make()
    other.set_weight(scale * layer.weight)
    for h, c in batches(30, 3):
        factored_step(layer, h, c, softplus_of_score, 0.2)
        factored_step(other, h, c, softplus_of_score, 0.2 * scale**2)
    assert relative(other.weight, scale * layer.weight) < EXACT


def test_saving_and_resuming_changes_no_bit():
    layer, resumed = make(refactor_every=7), make(refactor_every=7, seed=5)
    data = list(batches(20, 3))
    for h, c in data[:10]:
        factored_step(layer, h, c, taylor, 0.1)
    taylor(resumed(*data[0]))
    resumed.load_state_dict(copy.deepcopy(layer.state_dict()))
    for h, c in data[10:]:
        factored_step(layer, h, c, taylor, 0.1)
        factored_step(resumed, h, c, taylor, 0.1)
    assert all(
        torch.equal(a, b) for a, b in zip(layer.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)


def test_it_has_no_parameters_that_another_optimizer_could_move():
    layer = make()
    assert list(layer.parameters()) == []
    assert "classes=23" in repr(layer)


def test_nothing_is_remembered_outside_training():
    layer = make()
    h, c = next(batches(1, 2))
    W = layer.weight
    with torch.no_grad():
        layer(h, c)
    layer.eval()(h.clone().requires_grad_(), c).scatter.sum().backward()
    layer.step(0.1)
    assert torch.equal(layer.weight, W)


def test_a_step_needs_a_finite_gradient_and_leaves_the_layer_alone_without():
    layer = make()
    h, c = next(batches(1, 2))
    W = layer.weight
    loss = taylor(layer(h, c))
    with pytest.raises(P2KError, match="call backward"):
        layer.step(0.1)
    (math.inf * loss).backward()
    with pytest.raises(P2KError, match="not finite"):
        layer.step(0.1)
    assert torch.equal(layer.weight, W)
    layer.discard()
    layer.step(0.1)
    assert torch.equal(layer.weight, W)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"in_features": 0}, ValueError, "in_features must be > 0"),
        ({"classes": 0}, ValueError, "classes must be > 0"),
        ({"refactor_every": 0}, ValueError, "refactor_every must be > 0"),
        ({"condition_limit": 1.0}, ValueError, "condition_limit must be > 1"),
        ({"dtype": torch.bfloat16}, TypeError, "dtype must be float32 or float64"),
        ({"factor_dtype": torch.float16}, TypeError, "factor_dtype must be float32 or float64"),
    ],
)
def test_bad_options_are_refused(options, error, words):
    with pytest.raises(error, match=words):
        FactoredOutput(**{"in_features": 3, "classes": 4, **options})


def test_bad_tensors_are_refused():
    layer, c = make(), torch.tensor([0, 1])
    h = torch.zeros(2, WIDTH, dtype=torch.float64)
    for run, error, words in [
        (functools.partial(layer, h.long(), c), TypeError, "hidden must be floating point"),
        (functools.partial(layer, h[:, 1:], c), ValueError, r"hidden must be \[\*items, 6\]"),
        (functools.partial(layer, h, c[:1]), ValueError, "target must have shape"),
        (functools.partial(layer, h, c.float()), TypeError, "target must hold integers"),
        (functools.partial(layer.set_weight, h), ValueError, "weight must have shape"),
        (functools.partial(layer.step, -1.0), ValueError, "learning_rate must be >= 0"),
        (functools.partial(make().half(), h, c), TypeError, "must stay float32 or float64"),
    ]:
        with pytest.raises(error, match=words):
            run()
