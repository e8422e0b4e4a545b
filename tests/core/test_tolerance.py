import pytest
import torch

from p2k.core.tolerance import FLOOR, assert_as_good_as, relative_errors, tolerance

TRUTH = torch.linspace(1, 2, 50, dtype=torch.float64)


def test_tolerance_grows_with_the_square_root_of_long_sums():
    assert tolerance(torch.float32, 1024) == tolerance(torch.float32)
    assert tolerance(torch.float32, 4096) == pytest.approx(2 * tolerance(torch.float32))
    assert tolerance(torch.float32, dot=True) > tolerance(torch.float32)


@pytest.mark.parametrize("dtype", FLOOR)
def test_the_table_is_a_few_unit_roundoffs(dtype):
    unit = torch.finfo(dtype).eps / 2
    assert 2 * unit <= FLOOR[dtype] <= 1000 * unit


def test_relative_errors():
    frobenius, largest = relative_errors(TRUTH + 0.02, TRUTH)
    assert largest == pytest.approx(0.01)
    assert frobenius == pytest.approx(0.02 * 50**0.5 / TRUTH.norm().item())
    assert relative_errors(TRUTH + 0.02, TRUTH, scale=10 * TRUTH)[1] == pytest.approx(0.001)
    assert relative_errors(TRUTH[:0], TRUTH[:0]) == (0.0, 0.0)
    with pytest.raises(TypeError, match="truth must be float64"):
        relative_errors(TRUTH, TRUTH.float())
    with pytest.raises(ValueError, match="actual must have shape"):
        relative_errors(TRUTH[:1], TRUTH)


def test_as_good_as_eager():
    eager = TRUTH.float() * (1 + 1e-5)
    assert_as_good_as(TRUTH.float() * (1 + 1.9e-5), TRUTH, eager, factor=2)
    with pytest.raises(AssertionError, match="weights: frobenius error"):
        assert_as_good_as(TRUTH.float() * (1 + 2.5e-5), TRUTH, eager, factor=2, name="weights")


def test_one_wrong_element_is_not_averaged_away():
    truth = torch.ones(10_000, dtype=torch.float64)
    actual = truth.float()
    actual[7] += 2e-6
    with pytest.raises(AssertionError, match="max error"):
        assert_as_good_as(actual, truth, truth.float(), factor=2)


def test_a_lucky_eager_result_is_forgiven_by_rounding_only():
    exact = TRUTH.float()
    assert_as_good_as(exact * (1 + 2 * torch.finfo(torch.float32).eps), exact.double(), exact, factor=2)
    with pytest.raises(AssertionError):
        assert_as_good_as(exact * (1 + 1e-6), exact.double(), exact, factor=2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_numbers_never_pass(value):
    actual = TRUTH.float()
    actual[3] = value
    with pytest.raises(AssertionError):
        assert_as_good_as(actual, TRUTH, TRUTH.float(), factor=2)
    with pytest.raises(AssertionError):
        assert_as_good_as(actual, TRUTH, actual, factor=2)


def test_dtypes_must_agree():
    with pytest.raises(TypeError, match="actual must have dtype torch.float32 like eager"):
        assert_as_good_as(TRUTH.half(), TRUTH, TRUTH.float(), factor=2)
