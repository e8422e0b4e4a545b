"""Zeros of analytic functions: found where they are known, counted by the argument principle, and refused otherwise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2k.core.errors import P2KError
from p2k.core.mutation import Mutant, survivors
from p2k.core.seeding import generator
from p2k.linalg import partition_zeros as finder
from p2k.linalg.ghosts_of_softmax import radius_bound, relative_partition


def lines(count, classes, seed=0):
    draw = torch.randn(2, count, classes, generator=generator(seed), dtype=torch.float64)
    return 3 * draw[0], draw[1]


def polynomial(points):
    """Zeros at 1 + i, 2i and -1.5 + 0.5i."""
    roots = torch.tensor([1 + 1j, 2j, -1.5 + 0.5j], dtype=torch.complex128)
    parts = points[:, None] - roots
    return parts.prod(1), sum(parts[:, [i for i in range(3) if i != k]].prod(1) for k in range(3))


def square(low, high):
    return torch.tensor([low, complex(high.real, low.imag), high, complex(low.real, high.imag)])


def test_winding_number_counts_what_is_inside():
    assert finder.winding_number(polynomial, square(-3 - 3j, 3 + 3j)) == 3
    assert finder.winding_number(polynomial, square(0.5 + 0.5j, 1.5 + 1.5j)) == 1
    assert finder.winding_number(polynomial, square(2 + 2j, 3 + 3j)) == 0
    assert finder.winding_number(polynomial, square(-3 - 3j, 3 + 3j).flip(0)) == -3


def test_a_zero_on_the_border_is_refused():
    with pytest.raises(P2KError, match="move the border"):
        finder.winding_number(polynomial, square(0j, 1 + 1j))


def test_a_double_zero_is_refused():
    with pytest.raises(P2KError, match="found 1 zeros where the argument principle counts 2"):
        finder.zeros_in_box(lambda t: ((t - 0.5) ** 2, 2 * (t - 0.5)), (-1.1 - 1j, 1 + 1.2j), spacing=0.5)


def test_all_zeros_of_a_box_come_by_modulus():
    found = finder.zeros_in_box(polynomial, (-2 - 1j, 2 + 3j), spacing=0.5)
    expected = torch.tensor([1 + 1j, -1.5 + 0.5j, 2j], dtype=torch.complex128)
    assert (found - expected).abs().max() < 1e-12  # Newton ends at rounding


def test_known_functions():
    z, a = torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
    found = finder.zeros_in_box(finder.partition(z, a), (-1 + 0.1j, 1 + 8j), spacing=0.5)
    ladder = 1j * math.pi * torch.tensor([0.5, 1.5, 2.5], dtype=torch.float64)
    assert (found - ladder).abs().max() < 1e-12  # cosh: the poles of tanh
    z, a = torch.tensor([[0.0, 2.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    assert (finder.nearest_zeros(z, a) - complex(-2, math.pi)).abs().max() < 1e-12  # 1 + e^(x + t): sigmoid, softplus


@pytest.mark.parametrize("classes", [3, 10])
def test_nearest_is_nearest_among_all(classes):
    z, a = lines(12, classes, seed=classes)
    near = finder.nearest_zeros(z, a)
    for row in range(12):
        bound = radius_bound(a[row]).item()
        reach = 1.01 * near[row].abs().item()
        box = complex(-reach, 0.99 * bound), complex(reach, reach)
        found = finder.zeros_in_box(finder.partition(z[row], a[row]), box, spacing=bound / 3)
        assert abs(found[0].abs() - near[row].abs()) < 1e-9 * reach


@settings(max_examples=30, deadline=None)
@given(classes=st.integers(2, 12), scale=st.floats(0.01, 6.0), seed=st.integers(0, 999))
def test_any_line_has_a_zero_and_the_strip_has_none(classes, scale, seed):
    z, a = lines(2, classes, seed=seed)
    near = finder.nearest_zeros(scale * z, a)
    assert relative_partition(scale * z, a, near[:, None]).abs().max() < 1e-11  # Newton ends at rounding of the step
    assert (near.imag >= radius_bound(a) * (1 - 1e-12)).all()


def test_the_slow_search_agrees_with_newton():
    z, a = lines(6, 5, seed=9)
    unit = (a - a.amin(1, keepdim=True)) / (a.amax(1) - a.amin(1))[:, None]
    for row in range(6):
        found = finder._search(z[row], unit[row])
        assert abs(found.abs() - finder._nearest(z, unit)[row].abs()) < 1e-9


def test_a_zero_that_is_not_the_nearest_is_not_certified():
    # 1 + e^(2 + t) has zeros -2 + i pi (2 k + 1).
    z, a = torch.tensor([[0.0, 2.0]], dtype=torch.float64), torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    for turn, certain in ((1, True), (3, False), (5, False)):
        zero = torch.tensor([complex(-2, turn * math.pi)])
        assert finder._certified(z, a, zero).item() is certain


def test_degenerate_lines():
    z, a = lines(4, 5)
    a[1] = 2.0
    a[2, 3] = a[2, 1]
    z[3, 0] = -math.inf
    found = finder.nearest_zeros(z, a)
    assert found[1].abs() == math.inf
    rest = torch.tensor([0, 2, 3])
    assert relative_partition(z[rest], a[rest], found[rest][:, None]).abs().max() < 1e-12
    without = finder.nearest_zeros(z[3:, 1:], a[3:, 1:])
    assert (found[3] - without[0]).abs() < 1e-9
    assert finder.nearest_zeros(z[:0], a[:0]).shape == (0,)
    assert finder.nearest_zeros(z[:2].float(), a[:2].float()).dtype == torch.complex128


def test_large_margins_do_not_overflow():
    z = torch.tensor([[0.0, 60.0, -300.0]], dtype=torch.float64)
    a = torch.tensor([[1.0, 0.0, 0.3]], dtype=torch.float64)
    assert (finder.nearest_zeros(z, a) - complex(60, math.pi)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("z", "a", "error"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 4), ValueError),
        (torch.zeros(3), torch.zeros(3), ValueError),
        (torch.zeros(2, 3).long(), torch.zeros(2, 3).long(), TypeError),
    ],
)
def test_bad_input_is_refused(z, a, error):
    with pytest.raises(error, match="nearest_zeros"):
        finder.nearest_zeros(z, a)


MUTANTS = [
    Mutant("points - step *", "points + step *", "Newton uphill"),
    Mutant("value / torch.where(slope == 0, 1.0, slope)", "value", "Newton without the slope"),
    Mutant("(terms * a[:, None]).sum(-1)", "terms.sum(-1)", "derivative without the slopes"),
    Mutant("a[:, None] * points.imag[..., None])", "a[:, None] * points.real[..., None])", "phase from the real part"),
    Mutant("/ spread[moves]", "* spread[moves]", "unit put back the wrong way"),
    Mutant("(turns.abs() < 0.5)", "(turns.abs() < 99)", "certificate not read"),
    Mutant(
        "radius = torch.where(zeros.abs().isfinite(), zeros.abs(), 1.0)",
        "radius = torch.ones_like(zeros.real)",
        "circle too small",
    ),
    Mutant("(2 * math.pi))\n        # Twice", "math.pi)\n        # Twice", "turns counted by halves"),
    Mutant("if len(found) == expected:", "if len(found) >= 0:", "count not checked"),
    Mutant("(value[1:] * value[:-1].conj()).angle()", "(value[1:] * value[:-1]).angle()", "phases added"),
    Mutant("coarse = turn.abs() > math.pi / 2", "coarse = turn.abs() > 4.0", "border never refined"),
    Mutant("points[points.abs().argsort()]", "points", "zeros in any order"),
]


def wrong(module) -> bool:
    """True when a nearest zero, a count or a list of zeros is not what a polynomial and cosh are known to have."""
    try:
        z, a = lines(8, 4, seed=5)
        near = module.nearest_zeros(z, a)
        if not (near - finder.nearest_zeros(z, a)).abs().max() < 1e-9:
            return True
        far = torch.tensor([complex(-2, 3 * math.pi)])
        if module._certified(torch.tensor([[0.0, 2.0]]).double(), torch.tensor([[0.0, 1.0]]).double(), far):
            return True
        if module.winding_number(polynomial, square(-3 - 3j, 3 + 3j)) != 3:
            return True
        found = module.zeros_in_box(polynomial, (-2 - 1j, 2 + 3j), spacing=1.6)
        expected = torch.tensor([1 + 1j, -1.5 + 0.5j, 2j], dtype=torch.complex128)
        if found.shape != expected.shape or not (found - expected).abs().max() < 1e-9:
            return True
        z, a = torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)
        many = module.zeros_in_box(module.partition(z, a), (-1 + 0.1j, 1 + 30j), spacing=4.0)
        return many.shape != (10,)
    except P2KError:
        return True


def test_every_planted_bug_is_caught():
    alive = survivors(finder, MUTANTS, wrong)
    assert not alive, [mutant.why for mutant in alive]
