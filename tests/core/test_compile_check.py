import json
from pathlib import Path

import pytest

import p2k.ops
from p2k.core import compile_check
from p2k.core.errors import P2KError

OPS = Path(p2k.ops.__path__[0])
WITH_KERNEL = sorted(path.parent.name for path in OPS.glob("*/kernel.py"))


def budget_of(op):
    return json.loads((OPS / op / "budget.json").read_text())


@pytest.fixture
def on_path(monkeypatch):
    """The subprocess finds this folder's modules of cases."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")


@pytest.mark.parametrize("op", WITH_KERNEL)
def test_kernels_keep_their_budget(op):
    assert (OPS / op / "budget.py").is_file(), f"ops/{op} has a kernel and no budget: see book/contributing.md"
    recorded, measured = budget_of(op), compile_check.measure(f"p2k.ops.{op}.budget")
    problems = compile_check.over_budget(measured["kernels"], recorded["kernels"])
    versions = f"budget measured with {recorded['versions']}, now {measured['versions']}"
    assert not problems, "\n".join([versions, *problems])


@pytest.mark.parametrize("op", WITH_KERNEL)
def test_budgets_cover_three_generations_in_both_directions(op):
    kernels = budget_of(op)["kernels"]
    programs = {
        arch: {key.split()[-2] for key in kernels if key.endswith(f" {arch}")} for arch in ("sm_80", "sm_90", "sm_100")
    }
    assert all(programs.values())
    assert len(programs["sm_100"]) > 1
    assert programs["sm_100"] <= programs["sm_90"]


def test_no_oqc_budget_allows_a_spill():
    kernels = budget_of("oqc")["kernels"]
    assert {entry["spilled_bytes"] for entry in kernels.values()} == {0}
    # Rows that a wide load divides are read by wide loads.
    assert all(entry["wide_loads"] > 0 for key, entry in kernels.items() if " 57 " not in key)


@pytest.mark.usefixtures("on_path")
def test_it_sees_spills_and_narrow_loads():
    kernels = compile_check.measure("compile_cases")["kernels"]
    assert kernels["contiguous copy sm_90"]["wide_loads"] > 0
    assert kernels["contiguous copy sm_90"]["spilled_bytes"] == 0
    assert kernels["strided copy sm_90"]["wide_loads"] == 0
    spilled = kernels["hoard hoard sm_90"]["spilled_bytes"]
    assert spilled > 0
    allowed = {key: entry | {"spilled_bytes": 0} for key, entry in kernels.items()}
    (problem,) = compile_check.over_budget(kernels, allowed)
    assert problem.startswith("hoard hoard sm_90: spilled_bytes beyond the budget: registers ")
    assert f"spilled_bytes {spilled} (budget 0)" in problem
    assert kernels["product fat_dot sm_80"]["tensor_core"] > 0
    assert kernels["product fat_dot sm_90"]["tensor_core"] > 0
    assert kernels["product fat_dot sm_100"]["tensor_core"] > 0
    assert kernels["contiguous copy sm_90"]["tensor_core"] == 0


@pytest.mark.usefixtures("on_path")
def test_it_rejects_what_the_interpreter_accepts():
    with pytest.raises(P2KError, match="thin_dot does not compile for sm_90"):
        compile_check.measure("compile_cases_rejected")


ENTRY = {"registers": 33, "spilled_bytes": 0, "shared_bytes": 64, "wide_loads": 2, "tensor_core": 4}


@pytest.mark.parametrize("change", [{}, {"registers": 40}, {"wide_loads": 3}, {"shared_bytes": 0}, {"tensor_core": 5}])
def test_within_budget(change):
    assert compile_check.over_budget({"a": ENTRY | change}, {"a": ENTRY}) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"registers": 41}, "registers 41 (budget 40)"),
        ({"spilled_bytes": 8}, "spilled_bytes 8 (budget 0)"),
        ({"shared_bytes": 65}, "shared_bytes 65 (budget 64)"),
        ({"wide_loads": 1}, "wide_loads 1 (budget 2)"),
        ({"tensor_core": 0}, "tensor_core 0 (budget 4)"),
        ({"new_figure": 1}, "new_figure 1 (budget None)"),
    ],
)
def test_over_budget_puts_the_numbers_side_by_side(change, said):
    (problem,) = compile_check.over_budget({"a": ENTRY | change}, {"a": ENTRY})
    assert problem.startswith(f"a: {next(iter(change))} beyond the budget: registers ")
    assert said in problem


def test_kernels_and_budgets_must_match():
    assert compile_check.over_budget({"a": ENTRY}, {}) == ["a: measured but not budgeted"]
    assert compile_check.over_budget({}, {"a": ENTRY}) == ["a: budgeted but not measured"]
