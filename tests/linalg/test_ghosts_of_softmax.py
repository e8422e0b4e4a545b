"""Radius, bounds and series of the log-partition along a line, against closed forms, zeros and planted bugs."""

import math

import pytest
import torch

from p2k.core.mutation import Mutant, survivors
from p2k.core.seeding import generator
from p2k.core.tolerance import tolerance
from p2k.linalg import ghosts_of_softmax as ghosts
from p2k.linalg.partition_zeros import nearest_zeros

SMALL = tolerance(torch.float64)


def lines(count, classes, seed=0, scale=3.0):
    rng = generator(seed)
    draw = torch.randn(2, count, classes, generator=rng, dtype=torch.float64)
    return scale * draw[0], draw[1]


def test_spread_bound_and_ratio_by_hand():
    slopes = torch.tensor([[1.0, -2.0, 0.5], [4.0, 4.0, 4.0]], dtype=torch.float64)
    assert ghosts.logit_spread(slopes).tolist() == [3.0, 0.0]
    assert ghosts.radius_bound(slopes).tolist() == [math.pi / 3, math.inf]
    assert ghosts.step_ratio(slopes).item() == 3 / math.pi


@pytest.mark.parametrize("classes", [2, 3, 5, 20])
def test_no_zero_is_nearer_than_the_bound(classes):
    z, a = lines(60, classes)
    zeros = nearest_zeros(z, a)
    assert (zeros.abs() >= ghosts.radius_bound(a)).all()
    assert (zeros.imag.abs() >= ghosts.radius_bound(a)).all()
    # Zeros are found to rounding of the step, which a slope of a few units carries into the value.
    assert ghosts.relative_partition(z, a, zeros[:, None]).abs().max() < 1e-13


def test_two_classes_have_the_closed_radius():
    z, a = lines(100, 2)
    zeros, exact = nearest_zeros(z, a), ghosts.binary_radius(z, a)
    assert ((zeros.abs() - exact) / exact).abs().max() < SMALL
    gap, slope = z[:, 0] - z[:, 1], a[:, 1] - a[:, 0]
    by_hand = torch.complex(gap / slope, math.pi / slope.abs())
    assert ((zeros - by_hand).abs() / exact).max() < SMALL
    balanced = torch.zeros_like(z)
    torch.testing.assert_close(ghosts.binary_radius(balanced, a), ghosts.radius_bound(a), rtol=SMALL, atol=0)


def test_invariances():
    z, a = lines(40, 6)
    zeros = nearest_zeros(z, a)
    for moved, slopes, factor in ((z + 7, a, 1), (z, a + 3, 1), (z, 4 * a, 4), (z, -a, 1)):
        other = nearest_zeros(moved, slopes)
        assert ((other.abs() * factor - zeros.abs()) / zeros.abs()).abs().max() < SMALL
        torch.testing.assert_close(ghosts.radius_bound(slopes) * factor, ghosts.radius_bound(a), rtol=SMALL, atol=0)
    cold = nearest_zeros(z / 5, a / 5)
    assert (cold.abs() >= 5 * ghosts.radius_bound(a) * (1 - SMALL)).all()  # temperature 5 stretches the bound by 5


def test_relative_partition_is_a_characteristic_function():
    z, a = lines(30, 7)
    t = torch.complex(*torch.randn(2, 30, 11, generator=generator(3), dtype=torch.float64))
    direct = torch.exp(z[:, None] + a[:, None] * t[..., None]).sum(-1)
    real = torch.exp(z[:, None] + a[:, None] * t.real[..., None]).sum(-1)
    found = ghosts.relative_partition(z, a, t)
    assert (found - direct / real).abs().max() < SMALL
    floor = ghosts.zero_free_bound(ghosts.logit_spread(a)[:, None], t.imag.abs())
    assert (found.abs() >= floor - SMALL).all()
    assert ghosts.relative_partition(z, a, t * 1000).isfinite().all()


def test_the_strip_bound_is_attained_and_ends_at_the_bound():
    z, a = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[0.0, 1.3]], dtype=torch.float64)
    y = torch.linspace(0, math.pi / 1.3, 50, dtype=torch.float64)[None]
    found = ghosts.relative_partition(z, a, 1j * y).abs()
    assert (found - ghosts.zero_free_bound(torch.tensor([1.3], dtype=torch.float64), y)).abs().max() < SMALL
    assert ghosts.zero_free_bound(torch.tensor(1.0), torch.tensor(100.0)).abs() < 1e-7  # cos(pi / 2) in float32


def test_series_has_cumulants_and_the_radius_of_the_nearest_zero():
    z, a = lines(40, 5)
    series = ghosts.log_partition_series(z, a, 160)
    p = z.softmax(-1)
    mean = (p * a).sum(-1)
    centred = a - mean[:, None]
    for order, cumulant in ((1, mean), (2, (p * centred**2).sum(-1)), (3, (p * centred**3).sum(-1))):
        assert (series[:, order] * math.factorial(order) - cumulant).abs().max() < 1e2 * SMALL
    found, zeros = ghosts.series_radius(series), nearest_zeros(z, a)
    # The largest of twenty cosines is near 1, and its 150th root nearer.
    assert (found / zeros.abs() - 1).abs().max() < 0.01
    assert (found >= ghosts.radius_bound(a) * 0.99).all()
    step = 0.3 * zeros.abs()
    powers = step[:, None] ** torch.arange(161, dtype=torch.float64)
    exact = (z + a * step[:, None]).logsumexp(-1) - z.logsumexp(-1)
    assert ((series * powers).sum(-1) - exact).abs().max() < 1e2 * SMALL


def test_truncated_log_cosh_converges_inside_and_explodes_outside():
    z, a = torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
    series = ghosts.log_partition_series(z, a, 40)

    def error(r, order):
        t = r * math.pi / 2
        return abs(sum(series[n].item() * t**n for n in range(order + 1)) - math.log(math.cosh(t)))

    assert error(0.5, 4) > 1e-3
    assert error(0.5, 40) < 1e-13
    assert error(1.1, 40) > error(1.1, 20) > error(1.1, 10)
    assert error(1.5, 40) > 1e5


def test_third_moment_and_kl_bounds_hold_and_are_tight():
    rng = generator(1)
    z = 4 * torch.randn(20_000, 2, generator=rng, dtype=torch.float64)
    z = torch.cat([z, 3 * torch.randn(20_000, 3, generator=rng, dtype=torch.float64) - 4], 1)
    a = torch.randn(20_000, 5, generator=rng, dtype=torch.float64)
    spread, p = ghosts.logit_spread(a), z.softmax(-1)
    centred = a - (p * a).sum(-1, keepdim=True)
    third = (p * centred**3).sum(-1).abs()
    ceiling = spread**3 / (6 * math.sqrt(3))
    assert (third <= ceiling).all()
    assert (third / ceiling).max() > 0.9
    t = 3 * torch.randn(20_000, generator=rng, dtype=torch.float64)
    q = z + a * t[:, None]
    divergence = (p * (z.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    half = t**2 / 2 * (p * centred**2).sum(-1)
    bound = ghosts.kl_remainder_bound(spread, t)
    assert ((divergence - half).abs() <= bound + SMALL).all()
    backward = (q.softmax(-1) * (q.log_softmax(-1) - z.log_softmax(-1))).sum(-1)
    assert ((backward - half).abs() <= 2 * bound + SMALL).all()
    assert ((backward - half).abs() > bound).any()  # The two directions do not share a constant.
    sharp = (3 - math.sqrt(3)) / 6
    share = torch.tensor([sharp, 1 - sharp], dtype=torch.float64)
    unit = torch.tensor([1.0, 0.0], dtype=torch.float64)
    moment = (share * (unit - sharp) ** 3).sum().abs()
    assert abs(moment * 6 * math.sqrt(3) - 1) < SMALL


def test_curvature_is_self_concordant_along_the_line():
    z, a = lines(500, 6)
    spread = ghosts.logit_spread(a)

    def variance(t):
        p = (z + t * a).softmax(-1)
        return (p * (a - (p * a).sum(-1, keepdim=True)) ** 2).sum(-1)

    for t in (0.1, 0.7, 2.0):
        assert (variance(t) <= variance(0) * (t * spread).exp() * (1 + 1e3 * SMALL)).all()
    assert (variance(1.0) <= spread**2 / 4).all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z, a: ghosts.logit_spread(a.long()), TypeError, "slopes must be floating point"),
        (lambda z, a: ghosts.logit_spread(a[:, :0]), ValueError, "with a class"),
        (lambda z, a: ghosts.step_ratio(a[:0]), ValueError, "at least one example"),
        (lambda z, a: ghosts.binary_radius(z, a), ValueError, "two classes, got 3"),
        (lambda z, a: ghosts.binary_radius(z[:, :2], a), ValueError, "one shape"),
        (lambda z, a: ghosts.relative_partition(z, a, a), TypeError, "steps must be complex"),
        (lambda z, a: ghosts.relative_partition(z.float(), a, a), TypeError, "must have dtype"),
        (lambda z, a: ghosts.log_partition_series(z, a, 0), ValueError, "order must be at least 1"),
        (lambda z, a: ghosts.series_radius(z, tail=3), ValueError, r"tail must lie in \[1, 3\)"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(*lines(4, 3))


MUTANTS = [
    Mutant("slopes.amax(-1) - slopes.amin(-1)", "slopes.abs().amax(-1)", "largest slope for the spread"),
    Mutant("slopes.amax(-1) - slopes.amin(-1)", "slopes.amax(-1) + slopes.amin(-1)", "sign of the smallest slope"),
    Mutant("return math.pi / logit_spread(slopes)", "return 2 * math.pi / logit_spread(slopes)", "a full turn"),
    Mutant("return spread.amax() / math.pi", "return spread.amin() / math.pi", "the safest example decides"),
    Mutant("return spread.amax() / math.pi", "return spread.mean() / math.pi", "mean over the batch"),
    Mutant("torch.hypot(gap, torch.full_like(gap, math.pi))", "gap.abs() + math.pi", "sum for the hypotenuse"),
    Mutant("logits[..., 0] - logits[..., 1]", "logits[..., 0] + logits[..., 1]", "not invariant to a shift"),
    Mutant("slopes[..., None, :] * steps.real[..., None]", "slopes[..., None, :]", "tilt without the step"),
    Mutant("torch.cos((spread * height / 2)", "torch.cos((spread * height)", "whole angle"),
    Mutant("power = power * centred / n", "power = power * centred", "moments without factorials"),
    Mutant("power = power * centred / n", "power = power * slopes / n", "raw moments with a central mean"),
    Mutant("(k * series[k] * moments[n - k]", "(series[k] * moments[n - k]", "recursion without its weight"),
    Mutant("moments[n] - known / n", "moments[n] - known", "recursion without its divisor"),
    Mutant("series[1] = series[1] + mean", "series[1] = series[1]", "mean slope lost"),
    Mutant("* n / 2).log()", ").log()", "logarithm's own 1/n left in"),
    Mutant("(36 * math.sqrt(3))", "(72 * math.sqrt(3))", "half the remainder"),
]


def wrong(module) -> bool:
    """True when a radius, bound or series disagrees with zeros found elsewhere or with its defining inequality."""
    z, a = lines(25, 4)
    zeros = nearest_zeros(z, a).abs()
    bound = module.radius_bound(a)
    balanced, pair = torch.zeros(25, 2, dtype=torch.float64), a[:, :2]
    tight = nearest_zeros(balanced, pair).abs()
    if (bound > zeros).any() or (module.radius_bound(pair) / tight - 1).abs().max() > 1e-9:
        return True
    if (module.binary_radius(z[:, :2], pair) / nearest_zeros(z[:, :2], pair).abs() - 1).abs().max() > 1e-9:
        return True
    if abs(module.step_ratio(a).item() * bound.min().item() - 1) > 1e-9:
        return True
    t = torch.complex(torch.full((25, 1), 0.7, dtype=torch.float64), bound[:, None] / 2)
    direct = torch.exp(z[:, None] + a[:, None] * t[..., None]).sum(-1)
    real = torch.exp(z[:, None] + a[:, None] * t.real[..., None]).sum(-1)
    if (module.relative_partition(z, a, t) - direct / real).abs().max() > 1e-9:
        return True
    if abs(module.zero_free_bound(torch.tensor(1.0), torch.tensor(math.pi / 2)).item() - math.sqrt(0.5)) > 1e-6:
        return True
    series = module.log_partition_series(z, a, 80)
    step = 0.3 * zeros
    exact = (z + a * step[:, None]).logsumexp(-1) - z.logsumexp(-1)
    if ((series * step[:, None] ** torch.arange(81)).sum(-1) - exact).abs().max() > 1e-9:
        return True
    if (module.series_radius(series) / zeros - 1).abs().max() > 0.015:
        return True
    sharp = (3 - math.sqrt(3)) / 6
    near = 1e-3
    z2 = torch.tensor([math.log(sharp), math.log(1 - sharp)], dtype=torch.float64)
    q = z2 + torch.tensor([near, 0.0], dtype=torch.float64)
    gap = (z2.exp() * (z2 - q.log_softmax(-1))).sum() - near**2 / 2 * sharp * (1 - sharp)
    tight = module.kl_remainder_bound(torch.tensor(1.0, dtype=torch.float64), torch.tensor(near, dtype=torch.float64))
    return not 0.99 < (gap.abs() / tight).item() < 1.001


def test_every_planted_bug_is_caught():
    alive = survivors(ghosts, MUTANTS, wrong)
    assert not alive, [mutant.why for mutant in alive]
