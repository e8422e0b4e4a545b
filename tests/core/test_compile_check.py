import json
import shutil
from pathlib import Path

import pytest
from moving_slice import EVERY, git, lowest

import p2k.ops
from p2k.core import compile_check
from p2k.core.backend import TRITON_INSTALLED
from p2k.core.errors import P2KError

OPS = Path(p2k.ops.__path__[0])
WITH_KERNEL = sorted(path.parent.name for path in OPS.glob("*/kernel.py"))
WITH_BUDGET = sorted(path.parent.name for path in OPS.glob("*/budget.json"))


def budget_of(op):
    return json.loads((OPS / op / "budget.json").read_text())


@pytest.fixture
def on_path(monkeypatch):
    """The subprocess finds this folder's modules of cases."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")


def due(ops, *, commit, every):
    """Every op whose budget is not current, and one that the commit draws.

    Without Triton nothing can be compared: all are due, and each says in its own test what is missing.
    """
    if every or not TRITON_INSTALLED:
        return sorted(ops)
    stale = {op for op in ops if not compile_check.is_current(f"p2k.ops.{op}.budget", budget_of(op))}
    return sorted(stale | {lowest(ops, commit)})


@pytest.mark.parametrize("op", WITH_KERNEL)
def test_every_kernel_has_a_budget(op):
    assert (OPS / op / "budget.py").is_file(), f"ops/{op} has a kernel and no budget: see book/contributing.md"
    assert budget_of(op)["kernels"]


@pytest.mark.parametrize("op", due(WITH_BUDGET, commit=git("rev-parse", "HEAD"), every=EVERY))
def test_kernels_keep_their_budget(op):
    recorded, measured = budget_of(op), compile_check.measure(f"p2k.ops.{op}.budget")
    problems = compile_check.over_budget(measured["kernels"], recorded["kernels"])
    versions = f"budget measured with {recorded['versions']}, now {measured['versions']}"
    assert not problems, "\n".join([versions, *problems])


def test_all_budgets_are_due_in_turn_and_stale_ones_always(monkeypatch):
    assert due(WITH_BUDGET, commit="a", every=True) == WITH_BUDGET
    assert {op for commit in map(str, range(100)) for op in due(WITH_BUDGET, commit=commit, every=False)} == {
        *WITH_BUDGET
    }
    monkeypatch.setattr(compile_check, "is_current", lambda module, recorded: ".oqc." not in module)
    assert all("oqc" in due(WITH_BUDGET, commit=commit, every=False) for commit in "abcdef")


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A copy of the package's source that the digest reads."""
    shutil.copytree(OPS.parents[1], tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    monkeypatch.setattr(compile_check, "__file__", str(tmp_path / "src/p2k/core/compile_check.py"))
    return tmp_path / "src/p2k"


@pytest.mark.parametrize(
    ("file", "found", "replacement"),
    [
        ("ops/oqc/kernel.py", "import triton\n", "import triton\n\nSWITCH = 1\n"),
        ("ops/oqc/budget.py", "TOKENS = 4096", "TOKENS = 4095"),
        ("core/machine_code.py", "INSTRUCTION_BYTES = 16", "INSTRUCTION_BYTES = 8"),
    ],
)
def test_a_budget_is_current_until_its_code_changes(checkout, file, found, replacement):
    recorded = budget_of("oqc")
    recorded["digest"] = compile_check.digest("p2k.ops.oqc.budget", recorded["kernels"])
    assert compile_check.is_current("p2k.ops.oqc.budget", recorded)
    source = (checkout / file).read_text()
    (checkout / file).write_text(f"# A comment changes nothing.\n{source}")
    assert compile_check.is_current("p2k.ops.oqc.budget", recorded)
    assert source.count(found) == 1
    (checkout / file).write_text(source.replace(found, replacement))
    assert not compile_check.is_current("p2k.ops.oqc.budget", recorded)


@pytest.mark.parametrize("what", ["kernels", "versions", "digest"])
def test_a_budget_that_was_edited_or_is_of_another_compiler_is_not_current(what):
    recorded = budget_of("oqc")
    recorded["digest"] = compile_check.digest("p2k.ops.oqc.budget", recorded["kernels"])
    if what == "kernels":
        next(iter(recorded["kernels"].values()))["registers"] += 1
    elif what == "versions":
        recorded["versions"]["ptxas"] = "1.0"
    else:
        del recorded["digest"]
    assert not compile_check.is_current("p2k.ops.oqc.budget", recorded)


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
    assert kernels["again copy sm_90"] == kernels["contiguous copy sm_90"]
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
