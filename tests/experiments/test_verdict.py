"""The verdict of a results table follows from its numbers."""

from types import SimpleNamespace

import pytest

from p2k.experiments.verdict import ResultRow, results_table


def interval(low, high, n=5):
    return SimpleNamespace(mean=(low + high) / 2, low=low, high=high, n=n)


@pytest.mark.parametrize(
    ("paper", "here", "options", "verdict"),
    [
        (1.4, interval(1.0, 2.0), {"same_protocol": True}, "reproduced"),
        (1.4, interval(1.0, 2.0), {}, "same direction"),
        (1.4, interval(2.0, 3.0), {"same_protocol": True}, "same direction"),
        (1.4, interval(-0.5, 2.0), {"same_protocol": True}, "not reproduced"),
        (1.4, interval(-0.5, 2.0), {}, "not reproduced"),
        (1.4, interval(-2.0, -1.0), {}, "not reproduced"),
        (-1.4, interval(-2.0, -1.0), {}, "same direction"),
        (None, interval(1.0, 2.0), {}, "not comparable"),
        (1.4, interval(1.0, 2.0, n=1), {}, "not comparable"),
        (80.0, interval(79.0, 81.0), {"null": None}, "not comparable"),
        (80.0, interval(79.0, 81.0), {"null": None, "same_protocol": True}, "reproduced"),
        (80.0, interval(70.0, 71.0), {"null": None, "same_protocol": True}, "not reproduced"),
        (0.0, interval(-1.0, 1.0), {"same_protocol": True}, "reproduced"),
        (0.0, interval(1.0, 2.0), {"same_protocol": True}, "not reproduced"),
        (1.4, interval(float("nan"), float("nan")), {"same_protocol": True}, "not reproduced"),
    ],
)
def test_verdict(paper, here, options, verdict):
    assert ResultRow("gain", paper, here, **options).verdict == verdict


def test_table_has_gap_interval_and_verdict():
    table = results_table(
        [ResultRow("gain, points", 1.4, interval(1.0, 2.0)), ResultRow("new", None, interval(0.0, 1.0))]
    )
    rows = table.replace("\N{NO-BREAK SPACE}", " ").splitlines()
    assert "[1.00,\N{NO-BREAK SPACE}2.00], n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}5" in table
    assert rows[2] == "| gain, points | 1.40 | 1.50 [1.00, 2.00], n = 5 | +0.10 | same direction |"
    assert rows[3].endswith("| – | 0.50 [0.00, 1.00], n = 5 | – | not comparable |")
    assert table._repr_markdown_() == table
