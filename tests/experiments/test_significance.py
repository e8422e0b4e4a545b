import pytest

from p2k.experiments.significance import compare, holm, signed_rank_p


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    with pytest.raises(ValueError, match="p-values"):
        holm([1.2])


def test_signed_rank_reaches_its_floor_and_no_lower():
    ten = [float(value) for value in range(1, 11)]
    assert signed_rank_p(ten, [0.0] * 10) == pytest.approx(2 / 2**10)
    assert signed_rank_p([1.0, 2, 3, 4, 5], [0.0] * 5) == pytest.approx(2 / 2**5)
    assert signed_rank_p(ten, ten) == 1.0


def test_comparison_keeps_conditions_and_signs():
    first = [[1.0, 2, 3, 4, 5, 6], [1.0, 1, 1, 1, 1, 1]]
    second = [[0.0, 0, 0, 0, 0, 0], [2.0, 2, 2, 2, 2, 2.5]]
    better, worse = compare(["a", "b"], first, second)
    assert (better.condition, worse.condition) == ("a", "b")
    assert better.difference.mean > 0 > worse.difference.high
    assert better.adjusted == pytest.approx(min(1.0, 2 * better.p_value))
    with pytest.raises(ValueError, match="zip"):
        compare(["a"], first, second)
