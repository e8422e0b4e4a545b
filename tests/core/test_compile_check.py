from pathlib import Path

import pytest

from p2k.core import compile_check
from p2k.core.errors import P2KError
from p2k.ops.oqc import budget


@pytest.fixture
def on_path(monkeypatch):
    """The subprocess finds this folder's modules of cases."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")


def test_oqc_kernels_keep_their_budget():
    recorded, measured = budget.load(), compile_check.measure("p2k.ops.oqc.budget")
    print(f"budget measured with {recorded['versions']}, now {measured['versions']}")
    for key, found in measured["kernels"].items():
        print(f"{key:60} now {list(found.values())} budget {list(recorded['kernels'].get(key, {}).values())}")
    assert compile_check.over_budget(measured["kernels"], recorded["kernels"]) == []


def test_no_oqc_budget_allows_a_spill():
    kernels = budget.load()["kernels"]
    assert {entry["spilled_bytes"] for entry in kernels.values()} == {0}
    for arch in ("sm_80", "sm_90"):
        assert any(key.endswith(arch) for key in kernels)
    # Rows that a wide load divides are read by wide loads.
    assert all(entry["wide_loads"] > 0 for key, entry in kernels.items() if " 57 " not in key)


@pytest.mark.usefixtures("on_path")
def test_it_sees_spills_and_narrow_loads():
    kernels = compile_check.measure("compile_cases")["kernels"]
    assert kernels["contiguous copy sm_90"]["wide_loads"] > 0
    assert kernels["contiguous copy sm_90"]["spilled_bytes"] == 0
    assert kernels["strided copy sm_90"]["wide_loads"] == 0
    assert kernels["hoard hoard sm_90"]["spilled_bytes"] > 0
    allowed = {key: entry | {"spilled_bytes": 0} for key, entry in kernels.items()}
    (problem,) = compile_check.over_budget(kernels, allowed)
    assert problem.startswith("hoard hoard sm_90: spilled_bytes")


@pytest.mark.usefixtures("on_path")
def test_it_rejects_what_the_interpreter_accepts():
    with pytest.raises(P2KError, match="thin_dot does not compile for sm_90"):
        compile_check.measure("compile_cases_rejected")


def test_over_budget():
    entry = {"registers": 33, "spilled_bytes": 0, "shared_bytes": 64, "wide_loads": 2}
    assert compile_check.over_budget({"a": entry}, {"a": entry}) == []
    assert compile_check.over_budget({"a": entry | {"registers": 40}}, {"a": entry}) == []
    assert compile_check.over_budget({"a": entry | {"registers": 41}}, {"a": entry}) == ["a: registers 41, budget 40"]
    assert compile_check.over_budget({"a": entry | {"wide_loads": 1}}, {"a": entry}) == ["a: wide_loads 1, budget 2"]
    assert compile_check.over_budget({"a": entry | {"wide_loads": 3}}, {"a": entry}) == []
    assert compile_check.over_budget({"a": entry}, {}) == ["a: measured but not budgeted"]
    assert compile_check.over_budget({}, {"a": entry}) == ["a: budgeted but not measured"]
