"""Parameter counts against the closed formulas, the width search, and which parameters decay."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from p2k.core.errors import BudgetUnreachable
from p2k.nn.afbo import AFBOFeedForward
from p2k.nn.ffn import GELUFeedForward, GLUFeedForward
from p2k.nn.matching import Match, count_parameters, decay_groups, decayed_names, match_hidden
from p2k.nn.oqc import FEED_FORWARDS, build_feed_forward, width_step

EXTRAS = {
    "aux": lambda d, m, r: 2 * d * r + m * r + r,
    "fixed": lambda d, m, r: 2 * d * r + m * r + r,
    "oqc": lambda d, m, r: 2 * d * r + m * r + r,
    "oqc-wide": lambda d, m, r: 2 * d * m,
    "oqc-output": lambda d, m, r: 2 * d * r + d * r + r,
    "oqc-lr": lambda d, m, r: 2 * d * r + 2 * m * r + r,
    "oqc-lr-tied": lambda d, m, r: 2 * d * r + m * r + r,
    "oqc-static": lambda d, m, r: 2 * d * r + m * r + r + 1,
    "oqc-dynamic": lambda d, m, r: 2 * d * r + m * r + r + d + 1,
    "squares": lambda d, m, r: 1,
    "squares-oqc": lambda d, m, r: 1,
    "squares-fixed": lambda d, m, r: 1,
}


@settings(max_examples=10, deadline=None)
@given(dim=st.integers(1, 8).map(lambda n: 4 * n), hidden=st.integers(1, 8).map(lambda n: 4 * n))
def test_hosts_hold_their_formulas(dim, hidden):
    grid = {"grid": (2, 2)}
    weights = {
        GELUFeedForward: (2 * dim * hidden, hidden + dim, {}),
        GLUFeedForward: (3 * dim * hidden, 2 * hidden + dim, {}),
        AFBOFeedForward: (
            2 * dim * hidden // 4 + dim * hidden // 4 + 18 * hidden + dim * hidden,
            2 * hidden + dim,
            grid,
        ),
    }
    for host, (weight, bias, options) in weights.items():
        assert count_parameters(host(dim, hidden, bias=False, **options)) == weight
        assert count_parameters(host(dim, hidden, **options)) == weight + bias


@settings(max_examples=5, deadline=None)
@given(
    dim=st.integers(1, 6).map(lambda n: 4 * n), hidden=st.integers(1, 6).map(lambda n: 4 * n), rank=st.integers(1, 9)
)
def test_variants_hold_their_formulas(dim, hidden, rank):
    def count(name):
        return count_parameters(build_feed_forward(name, dim, hidden, rank=rank, grid=(2, 2), device="meta"))

    variants = [name for name in FEED_FORWARDS if "+" in name]
    assert {name.partition("+")[2] for name in variants} == set(EXTRAS)
    for name in variants:
        host, _, variant = name.partition("+")
        assert count(name) - count(host) == EXTRAS[variant](dim, hidden, rank)


def test_shared_parameters_count_once():
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    assert count_parameters(nn.Sequential(first, second, nn.BatchNorm1d(3))) == 9 + 3 + 3 + 6


@settings(max_examples=40, deadline=None)
@given(slope=st.integers(1, 50), offset=st.integers(0, 500), budget=st.integers(1, 20000), step=st.integers(1, 9))
@example(slope=2, offset=0, budget=11, step=1)  # a tie, which rounded gaps would break towards the larger width
def test_search_finds_what_trying_all_widths_finds(slope, offset, budget, step):
    def build(hidden):
        return nn.ParameterList([torch.empty(slope * hidden), torch.empty(offset)])

    counts = {width: slope * width + offset for width in range(step, budget + 2 * step + 2, step)}
    best = min(counts, key=lambda width: (abs(counts[width] - budget), width))
    match = match_hidden(build, budget, multiple_of=step, tolerance=1e9)
    assert match == Match(best, counts[best], counts[best] / budget - 1)


def test_search_of_a_count_that_bends():
    def build(hidden):
        return nn.Linear(hidden, hidden, bias=False)

    assert match_hidden(build, 10000).hidden == 100
    assert match_hidden(build, 10099, tolerance=0.02) == Match(100, 10000, 10000 / 10099 - 1)


def test_search_takes_no_memory():
    seen = []

    def build(hidden):
        module = build_feed_forward("glu+fixed", 64, hidden, rank=4)
        seen.extend(parameter.device.type for parameter in module.parameters())
        return module

    match = match_hidden(build, 10**9)
    assert abs(match.gap) < 1e-6
    assert set(seen) == {"meta"}


def test_unreachable_budget_names_both_neighbours():
    def build(hidden):
        return build_feed_forward("gelu", 16, hidden, rank=4)

    with pytest.raises(
        BudgetUnreachable, match=r"of 1,000 parameters; nearest are 808 at width 24 and 1,072 at width 32"
    ):
        match_hidden(build, 1000, multiple_of=8)
    with pytest.raises(BudgetUnreachable, match="49 at width 1 and 82 at width 2"):
        match_hidden(build, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget"),
        ({"budget": 10, "multiple_of": 0}, "multiple_of"),
        ({"budget": 10, "tolerance": -0.1}, "tolerance"),
        ({"budget": 100}, "more parameters at a larger width"),
    ],
)
def test_bad_searches(options, message):
    with pytest.raises(ValueError, match=message):
        match_hidden(lambda hidden: nn.Linear(3, 3), **options)


def test_widths_that_cannot_be_built_say_so():
    with pytest.raises(ValueError, match="multiple of 4"):
        match_hidden(lambda hidden: build_feed_forward("afbo", 8, hidden, grid=(2, 2)), 1000)
    assert [width_step(name) for name in ("afbo+oqc", "glu+oqc", "gelu")] == [4, 1, 1]
    with pytest.raises(ValueError, match="must be one of"):
        width_step("mlp")


def test_norms_gates_and_biases_do_not_decay():
    model = nn.Sequential(nn.LayerNorm(8), build_feed_forward("glu+oqc-dynamic", 8, 8, rank=2))
    assert decayed_names(model) == {
        "1.host.up.weight",
        "1.host.down.weight",
        "1.auxiliary.features.maps.weight",
        "1.auxiliary.lift.weight",
    }
    decayed, exempt = decay_groups(model, 0.05)
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.05, 0.0)
    assert len(decayed["params"]) + len(exempt["params"]) == len(list(model.parameters()))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([decayed, exempt], lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == decayed_names(model)
    with pytest.raises(ValueError, match="weight_decay"):
        decay_groups(model, -1.0)
