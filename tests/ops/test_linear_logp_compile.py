"""What the compile check found of linear_logp's programs, for GPUs that are not there."""

from p2k.ops.linear_logp import budget


def test_no_budget_allows_a_spill_or_narrow_loads():
    kernels = budget.load()["kernels"]
    assert {entry["spilled_bytes"] for entry in kernels.values()} == {0}
    # Rows are padded to a multiple of 16, so no vocabulary narrows the loads.
    assert all(entry["wide_loads"] > 0 for entry in kernels.values())
