"""The Z-loss and its relatives: invariances, closed forms, limits, edges."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from p2k.core.seeding import generator
from p2k.core.tolerance import assert_as_good_as, tolerance
from p2k.linalg.spherical import SphericalStatistics, spherical_statistics
from p2k.losses.z_loss import (
    ZLoss,
    quadratic_bound_of,
    spherical_softmax_of,
    squared_error_of,
    target_z_score,
    taylor_softmax_loss,
    taylor_softmax_of,
    z_loss,
    z_loss_of,
)

EXACT = 10 * tolerance(torch.float64)
SETTINGS = [(1.0, 0.0), (0.1, 28.0), (7.0, 2.0)]
FAMILY = {
    "z": functools.partial(z_loss_of, sharpness=1.3, location=0.7),
    "taylor": taylor_softmax_of,
    "spherical": spherical_softmax_of,
    "squared": squared_error_of,
    "bound": quadratic_bound_of,
}


def outputs(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def labels(items, classes, seed=1):
    return torch.randint(classes, (items,), generator=generator(seed))


def by_formula(o, c, a, b):
    """The definition, in the papers' order of steps."""
    mean = o.mean(-1, keepdim=True)
    z = (o - mean) / (o - mean).square().mean(-1, keepdim=True).sqrt()
    return F.softplus(a * (b - z.gather(-1, c[:, None])[:, 0]), threshold=1e9) / a


def gradient(loss, o):
    return torch.autograd.grad(loss, o)[0]


@pytest.mark.parametrize(("a", "b"), SETTINGS)
def test_value_and_gradient_equal_the_closed_form(a, b):
    o, c = outputs(6, 9).requires_grad_(), labels(6, 9)
    loss = z_loss(o, c, sharpness=a, location=b, reduction="none")
    torch.testing.assert_close(loss, by_formula(o, c, a, b), rtol=EXACT, atol=0)
    mean, sigma = o.mean(-1, keepdim=True), o.std(-1, correction=0, keepdim=True)
    z = ((o - mean) / sigma).gather(-1, c[:, None])
    pull = torch.sigmoid(a * (b - z))
    closed = -pull * ((F.one_hot(c, 9).double() - 1 / 9) / sigma - z * (o - mean) / (9 * sigma**2))
    torch.testing.assert_close(gradient(loss.sum(), o), closed, rtol=EXACT, atol=EXACT)
    size = (pull / sigma)[:, 0] * (1 - 1 / 9 - z[:, 0] ** 2 / 9).sqrt()
    torch.testing.assert_close(closed.norm(dim=1), size, rtol=EXACT, atol=0)


@pytest.mark.parametrize("loss", FAMILY.values(), ids=FAMILY)
def test_gradcheck_of_the_family(loss):
    o, c = outputs(3, 5).requires_grad_(), torch.tensor([4, -100, 0])
    assert torch.autograd.gradcheck(lambda x: loss(spherical_statistics(x, c), reduction="none"), (o,))
    assert torch.autograd.gradgradcheck(lambda x: loss(spherical_statistics(x, c)), (o,))


def test_the_family_equals_its_definitions():
    o, c = outputs(5, 7), labels(5, 7)
    s, pick = spherical_statistics(o, c), c[:, None]
    taylor = 1 + o + o**2 / 2
    want = {
        "taylor": -(taylor / taylor.sum(1, keepdim=True)).log().gather(1, pick)[:, 0],
        "spherical": -((o**2 + 1e-3) / (o**2 + 1e-3).sum(1, keepdim=True)).log().gather(1, pick)[:, 0],
        "squared": 0.5 * (o - F.one_hot(c, 7)).square().sum(1),
    }
    for name, value in want.items():
        torch.testing.assert_close(FAMILY[name](s, reduction="none"), value, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(taylor_softmax_loss(o, c), want["taylor"].mean(), rtol=EXACT, atol=0)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 30.0])
def test_the_quadratic_bound_is_never_below_log_softmax(scale):
    o, c = scale * outputs(200, 6), labels(200, 6)
    bound = quadratic_bound_of(spherical_statistics(o, c), reduction="none")
    assert (bound >= F.cross_entropy(o, c, reduction="none") - EXACT).all()
    flat = torch.full((1, 6), 3.0, dtype=torch.float64)
    touch = quadratic_bound_of(spherical_statistics(flat, c[:1]))
    torch.testing.assert_close(touch, F.cross_entropy(flat, c[:1]), rtol=EXACT, atol=0)


@pytest.mark.parametrize(("a", "b"), SETTINGS)
@pytest.mark.parametrize(("scale", "shift"), [(3.0, 0.0), (1.0, -7.0), (1e-6, 2.0), (1e5, 1e4)])
def test_neither_scale_nor_shift_matters(a, b, scale, shift):
    o, c = outputs(4, 10), labels(4, 10)
    base = z_loss(o, c, sharpness=a, location=b, reduction="none")
    moved = z_loss(scale * o + shift, c, sharpness=a, location=b, reduction="none")
    # Storing o + shift rounds o at the size of the shift.
    lost = EXACT * (1 + abs(shift) / scale)
    torch.testing.assert_close(moved, base, rtol=lost, atol=lost)


@settings(max_examples=40, deadline=None)
@given(
    classes=st.integers(1, 40),
    items=st.integers(0, 5),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-10, 10),
    seed=st.integers(0, 999),
)
def test_any_shape_scale_and_shift(classes, items, scale, shift, seed):
    o, c = outputs(items, classes, seed=seed).requires_grad_(), labels(items, classes, seed=seed + 1)
    options = {"sharpness": 1.0, "location": 1.0, "reduction": "none"}
    loss = z_loss(o, c, **options)
    lost = EXACT * (1 + abs(shift) / scale)  # storing o + shift rounds o at the size of the shift
    torch.testing.assert_close(z_loss(scale * o + shift, c, **options), loss, rtol=lost, atol=lost)
    slope = gradient(loss.sum(), o)
    small = 10 * EXACT * (1 + slope.abs().sum().item())
    assert slope.sum(-1).abs().sum() <= small
    assert (slope * o).sum(-1).abs().sum() <= small * (1 + o.abs().sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [-100, -60, 60, 100])
def test_powers_of_two_change_no_bit_even_where_squares_leave_the_range(dtype, power):
    o, c = outputs(4, 10).to(dtype), labels(4, 10)
    o[:, 0] = 0.0  # The first output is subtracted; 0 keeps that exact at every scale.
    options = {"sharpness": 1.0, "location": 1.0, "reduction": "none"}
    scaled = z_loss(o * 2.0**power, c, **options)
    assert torch.equal(scaled, z_loss(o, c, **options))


def test_a_negative_factor_turns_the_score_around():
    o, c = outputs(4, 10), labels(4, 10)
    z, turned = (target_z_score(spherical_statistics(x, c)) for x in (o, -2 * o))
    torch.testing.assert_close(turned, -z, rtol=EXACT, atol=EXACT)


def test_gradients_are_orthogonal_to_the_ones_and_to_the_outputs():
    o, c = outputs(5, 12).requires_grad_(), labels(5, 12)
    slope = gradient(z_loss(o, c, sharpness=1.0, location=3.0), o)
    assert slope.sum(1).abs().max() < EXACT
    assert (slope * o).sum(1).abs().max() < EXACT


@pytest.mark.parametrize("classes", [2, 3, 100])
def test_the_score_is_largest_for_one_hot_outputs(classes):
    o = F.one_hot(torch.tensor([1]), classes).double().requires_grad_()
    z = target_z_score(spherical_statistics(o, torch.tensor([1])))
    torch.testing.assert_close(z.item(), math.sqrt(classes - 1), rtol=EXACT, atol=0)
    assert gradient(z.sum(), o).abs().max() < EXACT
    many = target_z_score(spherical_statistics(outputs(500, classes), labels(500, classes)))
    assert many.abs().max() <= math.sqrt(classes - 1) + EXACT


def test_two_classes_leave_nothing_to_learn():
    o, c = outputs(6, 2).requires_grad_(), labels(6, 2)
    loss = z_loss(o, c, sharpness=1.0, location=0.5, reduction="none")
    sign = torch.where(o.argmax(1) == c, 1.0, -1.0).double()
    torch.testing.assert_close(loss, F.softplus(0.5 - sign), rtol=EXACT, atol=0)
    assert gradient(loss.sum(), o).abs().max() < EXACT


@pytest.mark.parametrize("o", [torch.tensor([[4.0]]), torch.full((1, 5), 0.1), torch.full((1, 5), -1e30)])
def test_outputs_without_spread_get_score_zero_and_no_gradient(o):
    o = o.requires_grad_()
    loss = z_loss(o, torch.tensor([0]), sharpness=2.0, location=1.0)
    torch.testing.assert_close(loss.item(), math.log1p(math.exp(2.0)) / 2, rtol=tolerance(torch.float32), atol=0)
    assert torch.equal(gradient(loss, o), torch.zeros_like(o))


def test_a_large_sharpness_is_a_hinge_and_a_small_one_a_line():
    o, c = outputs(50, 8), labels(50, 8)
    z = target_z_score(spherical_statistics(o, c))
    hinge = z_loss(o, c, sharpness=1e9, location=1.0, reduction="none")
    # softplus(a x) / a exceeds the hinge by at most log(2) / a.
    torch.testing.assert_close(hinge, (1 - z).clamp(min=0), rtol=0, atol=math.log(2) / 1e9 + EXACT)
    line = z_loss(o, c, sharpness=1e-6, location=1.0, reduction="none") - math.log(2) / 1e-6
    # The next term of the series is a x^2 / 8; the subtraction loses log(2) / a in units of rounding.
    torch.testing.assert_close(line, (1 - z) / 2, rtol=0, atol=1e-5)


def test_the_best_scores_are_ordered_like_the_probabilities():
    p = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
    for a, b in [(0.1, 0.0), (1.0, 1.0), (5.0, 3.0)]:
        o = outputs(5, seed=3).requires_grad_()
        solver = torch.optim.LBFGS([o], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

        def close(o=o, solver=solver, a=a, b=b):
            solver.zero_grad()
            loss = p @ z_loss(o.expand(5, 5), torch.arange(5), sharpness=a, location=b, reduction="none")
            loss.backward()
            return loss

        solver.step(close)
        assert o.detach().argsort(descending=True).tolist() == [0, 1, 2, 3, 4], (a, b)


def test_extremes_stay_finite():
    huge = torch.tensor([[3e38, -3e38, 0.0]]).requires_grad_()
    loss = z_loss(huge, torch.tensor([0]), sharpness=1e4, location=1e4)
    assert loss.isfinite()
    assert gradient(loss, huge).isfinite().all()
    tiny = torch.tensor([[1e-30, 2e-30, 4e-30]])
    torch.testing.assert_close(
        z_loss(tiny, torch.tensor([2]), sharpness=1.0, location=0.0),
        z_loss(tiny * 1e30, torch.tensor([2]), sharpness=1.0, location=0.0),
        rtol=tolerance(torch.float32), atol=0,
    )  # fmt: skip


def test_float32_is_as_good_as_the_formula_in_float32():
    o, c = 100 + outputs(64, 33), labels(64, 33)
    exact, plain, ours = o.clone().requires_grad_(), o.float().requires_grad_(), o.float().requires_grad_()
    exact.data.copy_(plain.data)
    truth = by_formula(exact, c, 1.0, 2.0)
    eager = by_formula(plain, c, 1.0, 2.0)
    loss = z_loss(ours, c, sharpness=1.0, location=2.0, reduction="none")
    assert loss.dtype == torch.float32
    assert_as_good_as(loss, truth, eager, factor=2, length=33)
    up = outputs(64, seed=5)
    slopes = [torch.autograd.grad(x, y, up.to(x.dtype))[0] for x, y in ((loss, ours), (truth, exact), (eager, plain))]
    assert_as_good_as(*slopes, factor=3, length=33)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    o, c = outputs(5, 20).to(dtype).requires_grad_(), labels(5, 20)
    loss = z_loss(o, c, sharpness=1.0, location=2.0)
    assert loss.dtype == torch.float32
    assert gradient(loss, o).dtype == dtype
    exact = by_formula(o.double(), c, 1.0, 2.0).mean()
    torch.testing.assert_close(loss.double(), exact, rtol=tolerance(torch.float32), atol=0)


def test_ignored_labels_count_nowhere():
    o, c = outputs(4, 6), labels(4, 6)
    keep = torch.tensor([True, False, True, False])
    marked, poisoned = torch.where(keep, c, -100), torch.where(keep[:, None], o, torch.nan).requires_grad_()
    options = {"sharpness": 1.0, "location": 2.0}
    loss = z_loss(poisoned, marked, **options)
    torch.testing.assert_close(loss, z_loss(o[keep], c[keep], **options), rtol=EXACT, atol=0)
    slope = gradient(loss, poisoned)
    assert slope.isfinite().all()
    assert torch.equal(slope[~keep], torch.zeros(2, 6, dtype=torch.float64))
    each = z_loss(poisoned, marked, reduction="none", **options)
    assert torch.equal(each[~keep], torch.zeros(2, dtype=torch.float64))
    assert z_loss(o, torch.full((4,), -100), **options).item() == 0


def test_reductions_module_and_leading_dimensions():
    o, c = outputs(2, 3, 6), labels(6, 6).view(2, 3)
    each = ZLoss(1.0, 2.0, reduction="none")(o, c)
    assert each.shape == (2, 3)
    torch.testing.assert_close(ZLoss(1.0, 2.0)(o, c), each.mean(), rtol=EXACT, atol=0)
    torch.testing.assert_close(ZLoss(1.0, 2.0, reduction="sum")(o, c), each.sum(), rtol=EXACT, atol=0)
    assert "sharpness=1.0" in repr(ZLoss(1.0, 2.0))
    assert z_loss(torch.zeros(0, 3), torch.zeros(0).long(), sharpness=1.0, location=0.0).item() == 0


@pytest.mark.parametrize("loss", FAMILY.values(), ids=FAMILY)
def test_the_family_sees_the_statistics_only(loss):
    numbers = outputs(3, 4)
    s = SphericalStatistics(7, numbers[0], numbers[1].abs(), numbers[2], torch.tensor([True, True, False, True]))
    assert loss(s, reduction="none")[2] == 0
    torch.testing.assert_close(loss(s), loss(s, reduction="sum") / 3, rtol=EXACT, atol=0)


def test_it_compiles_whole():
    o, c = outputs(4, 9).requires_grad_(), labels(4, 9)
    step = functools.partial(z_loss, sharpness=1.0, location=2.0)
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(gradient(compiled(o, c), o), gradient(step(o, c), o), rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sharpness": 0.0, "location": 1.0}, "sharpness must be > 0"),
        ({"sharpness": 1.0, "location": math.nan}, "location must be finite"),
        ({"sharpness": 1.0, "location": 1.0, "reduction": "max"}, "reduction must be one of"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        z_loss(torch.zeros(2, 3), torch.zeros(2).long(), **options)


def test_bad_tensors_are_refused():
    with pytest.raises(TypeError, match="floating point"):
        z_loss(torch.zeros(2, 3).long(), torch.zeros(2).long(), sharpness=1.0, location=0.0)
    with pytest.raises(ValueError, match="a class or more"):
        z_loss(torch.zeros(2, 0), torch.zeros(2).long(), sharpness=1.0, location=0.0)
    with pytest.raises(ValueError, match="eps"):
        spherical_softmax_of(spherical_statistics(torch.zeros(1, 3), torch.tensor([0])), eps=0.0)
    with pytest.raises(ValueError, match="sharpness"):
        ZLoss(-1.0, 0.0)
