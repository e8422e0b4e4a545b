"""A claim passes, fails with its numbers, and prints nothing that depends on the machine."""

import numpy as np
import pytest
import torch

from p2k.book.claims import ClaimFailed, claim, no_claim


def test_a_passing_claim_prints_label_verdict_and_tolerance_only(capsys):
    claim("eq:x-sum", torch.tensor([1.0, 2.0 + 3e-9]), torch.tensor([1.0, 2.0]), 1e-8, note="two terms")
    assert capsys.readouterr().out == "eq:x-sum: holds, absolute error <= 1e-08 (two terms)\n"


@pytest.mark.parametrize(
    ("observed", "expected"),
    [(True, True), (3, 3), (np.arange(3), torch.arange(3)), (torch.zeros(2, 2), 0.0), (1 + 2j, 1 + 2j)],
)
def test_an_exact_claim_takes_every_kind_of_value(observed, expected, capsys):
    claim("eq:x", observed, expected)
    assert capsys.readouterr().out == "eq:x: holds, exactly\n"


@pytest.mark.parametrize(
    ("observed", "expected"),
    [(float("nan"), 0.0), (0.0, float("nan")), (torch.tensor([0.0, float("inf")]), 0.0), (1.0, 1.1), (False, True)],
)
def test_a_wrong_or_undefined_value_fails(observed, expected):
    with pytest.raises(ClaimFailed, match="eq:x: absolute error"):
        claim("eq:x", observed, expected, 1e-3)


def test_a_failure_carries_the_worst_pair():
    with pytest.raises(ClaimFailed, match=r"5\.000e-01 exceeds 1\.000e-01: observed 2\.5, expected 2\.0 at index 1"):
        claim("eq:x", torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]), 0.1)


@pytest.mark.parametrize("observed", [torch.zeros(0), torch.zeros(3), torch.zeros(2, 1)])
def test_shapes_must_agree_and_hold_something(observed):
    with pytest.raises(ClaimFailed, match="shape"):
        claim("eq:x", observed, torch.zeros(2), 1.0)


def test_the_relative_rule_scales_with_the_expected_value():
    claim("eq:x", 1001.0, 1000.0, 2e-3, rule="relative")
    with pytest.raises(ClaimFailed, match="relative error"):
        claim("eq:x", 1001.0, 1000.0, 5e-4, rule="relative")


@pytest.mark.parametrize("options", [{"tol": -1.0}, {"tol": float("inf")}, {"tol": float("nan")}, {"rule": "both"}])
def test_bad_arguments_are_refused(options):
    with pytest.raises(ValueError, match="claim eq:x"):
        claim("eq:x", 1.0, 1.0, **options)


def test_a_reason_is_recorded_and_must_not_be_empty(capsys):
    no_claim("eq:x", "a definition")
    assert capsys.readouterr().out == "eq:x: no claim (a definition)\n"
    with pytest.raises(ValueError, match="reason"):
        no_claim("eq:x", " ")
