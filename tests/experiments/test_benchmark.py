import dataclasses
import json
import math
import time
from pathlib import Path

import pytest
import torch

from p2k.core.benchmark import Ceilings, Cost, Workload
from p2k.core.errors import P2KError
from p2k.experiments import benchmark, benchmark_records

CPU = torch.device("cpu")


def slow_square(x):
    time.sleep(0.001)
    return x * x


@pytest.fixture
def workload(monkeypatch):
    found = Workload(
        op="square",
        shape={"n": 64},
        dtype=torch.float32,
        make_inputs=lambda source, device, dtype: (torch.randn(64, generator=source, device=device, dtype=dtype),),
        kernel=lambda x: x * x,
        reference=lambda x: x * x,
        forward=Cost(bytes=512, flops=64),
        backward=Cost(bytes=768, flops=128),
    )
    use(monkeypatch, eager=found.reference, kernel=found.kernel)
    return found


def use(monkeypatch, **candidates):
    monkeypatch.setattr(benchmark, "implementations", lambda workload: candidates)


def measured(workload, folder, **options):
    ((path, content),) = benchmark.run([workload], CPU, folder, quick=True, **options)
    return path, content["records"]


def test_every_op_has_benchmarks():
    folders = {path.parent.name for path in Path(benchmark.p2k.ops.__path__[0]).glob("*/__init__.py")}
    assert set(benchmark.op_names()) == folders, "add bench.py, see book/contributing.md"


def test_every_op_declares_workloads_with_sensible_costs():
    for op in benchmark.op_names():
        for quick in (True, False):
            declared = benchmark.declared_workloads([op], CPU, quick=quick)
            assert declared, f"ops/{op}/bench.py declares nothing"
            assert len({(w.op, *w.shape.items(), w.dtype) for w in declared}) == len(declared)
            for workload in declared:
                assert workload.op.startswith(op)
                inputs = workload.make_inputs(torch.Generator().manual_seed(0), CPU, workload.dtype)
                smallest = sum(tensor.numel() * tensor.element_size() for tensor in inputs)
                assert workload.forward.bytes >= smallest
                assert workload.backward.bytes >= workload.forward.bytes


def test_a_gpu_run_is_small_enough_for_ten_minutes_and_for_the_references_memory():
    """About ten seconds a workload, most of them compilation; five matrices per head in float64 beside the truth."""
    declared = benchmark.declared_workloads([], torch.device("cuda"), quick=False)
    assert len(declared) <= 60
    for workload in declared:
        shape = workload.shape
        if "width" in shape and "heads" in shape:
            pairs = shape["batch"] * shape["heads"] * shape.get("tokens", shape.get("keys")) ** 2
            assert 10 * 8 * pairs < 100e9, f"{workload.op} {shape}: the reference would not fit 141 GB"


def test_what_a_gpu_has_to_beat_is_declared():
    declared = benchmark.declared_workloads([], torch.device("cuda"), quick=False)
    named = {workload.op.partition(".")[0]: set() for workload in declared}
    for workload in declared:
        named[workload.op.partition(".")[0]] |= set(workload.peers)
        assert set(workload.strangers) <= set(workload.peers)
    assert "cut-cross-entropy" in named["linear_logp"] & named["cut_cross_entropy"]
    assert "liger-kernel" in named["polycom"] & named["two_pass_softmax"]
    assert "flash-linear-attention" in named["lucid"]


def test_an_unknown_op_is_named():
    with pytest.raises(P2KError, match=r"no such op: nonsense; there are .*oqc"):
        benchmark.declared_workloads(["nonsense"], CPU, quick=True)


def test_run_writes_valid_records_and_resumes(workload, tmp_path):
    path, records = measured(workload, tmp_path)
    assert {(record["pass"], record["implementation"]) for record in records} == {
        (pass_name, name) for pass_name in ("forward", "backward", "both") for name in ("eager", "kernel")
    }
    assert all(record["problem"] is None for record in records)
    stamp = path.stat().st_mtime_ns
    measured(workload, tmp_path)
    assert path.stat().st_mtime_ns == stamp
    measured(workload, tmp_path, resume=False)
    assert path.stat().st_mtime_ns > stamp
    assert benchmark_records.read_file(path)["environment"]["device_type"] == "cpu"
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "is not of type 'object'"),
        ('{"schema": 1}', "'environment' is a required property"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, content, message):
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(P2KError, match=message):
        benchmark_records.read_file(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("dtype", "float7", "records.0.dtype: 'float7' is not one of"),
        ("milliseconds", {"p20": 1, "p50": 0, "p80": 2}, "milliseconds.p50: 0 is less than or equal to"),
        ("bytes", 1.5, "records.0.bytes: 1.5 is not of type 'integer'"),
        ("colour", "red", r"Additional properties are not allowed \('colour'"),
    ],
)
def test_a_record_is_checked_field_by_field(workload, tmp_path, field, value, message):
    path, records = measured(workload, tmp_path)
    content = benchmark_records.read_file(path)
    content["schema"] = 99
    benchmark_records.write_json(path, content)
    with pytest.raises(P2KError, match="schema: 1 was expected"):
        benchmark_records.read_file(path)
    content["schema"], content["records"][0][field] = 1, value
    benchmark_records.write_json(path, content)
    with pytest.raises(P2KError, match=message):
        benchmark_records.read_file(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "record.json"
    benchmark_records.write_json(path, {"schema": 1})
    for unwritable, error in ((object(), TypeError), (math.nan, ValueError)):
        with pytest.raises(error):
            benchmark_records.write_json(path, {"schema": unwritable})
    assert json.loads(path.read_text()) == {"schema": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["record.json"]


def test_a_planted_slowdown_is_reported(workload, tmp_path, monkeypatch):
    _, before = measured(workload, tmp_path / "before")
    use(monkeypatch, eager=workload.reference, kernel=slow_square)
    _, after = measured(workload, tmp_path / "after")
    assert any("square float32 forward kernel" in line for line in benchmark_records.regressions(before, after))
    assert not benchmark_records.regressions(before, before)


def test_a_wrong_implementation_is_reported_after_timing(workload, tmp_path, monkeypatch):
    use(monkeypatch, eager=workload.reference, kernel=lambda x: x * x * 1.01)
    _, records = measured(workload, tmp_path)
    problems = {record["implementation"]: record["problem"] for record in records}
    assert problems["eager"] is None
    assert "on a new seed exceeds" in problems["kernel"]


def test_another_function_is_timed_and_not_checked(workload, tmp_path, monkeypatch):
    use(monkeypatch, eager=workload.reference, cube=lambda x: x**3)
    stranger = dataclasses.replace(workload, peers={"cube": None}, strangers=("cube",))
    path, records = measured(stranger, tmp_path)
    assert {record["problem"] for record in records} == {None}
    cubes = [record["error"] for record in records if record["implementation"] == "cube"]
    assert cubes == [{"forward": None, "backward": None}] * 3
    assert measured(dataclasses.replace(stranger, strangers=()), tmp_path, resume=False)[1][-1]["problem"]


def test_bounds_follow_the_longest_sum_and_the_products(workload):
    plain, *others = (
        benchmark.error_bounds(dataclasses.replace(workload, **change), {"forward": 1e-7})["forward"]
        for change in ({}, {"summed": 4096}, {"dot": True})
    )
    assert plain == pytest.approx(3e-7 + 1e-6)
    assert others == pytest.approx([3e-7 + 2e-6, 3e-7 + 1e-5])


def test_faster_than_the_roofline_is_an_error(workload):
    impossible = Ceilings(bytes_per_second=1.0, flops_per_second=1.0)
    records, _ = benchmark.measure(workload, CPU, impossible, effort="quick")
    assert all("of the roofline" in record["problem"] for record in records)


def test_a_suspicious_speedup_is_flagged(workload, monkeypatch):
    use(monkeypatch, eager=workload.reference, compile=slow_square, kernel=workload.kernel)
    records, _ = benchmark.measure(workload, CPU, None, effort="quick")
    forward = [record for record in records if record["implementation"] == "kernel" and record["pass"] == "forward"]
    assert "times torch.compile" in forward[0]["problem"]


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["environment"].update(torch="1.0"),
        lambda content: content["environment"].update(device="another"),
        lambda content: content["environment"].update({"liger-kernel": "0.1"}),
        lambda content: content.update(code="0" * 16),
        lambda content: content.update(effort="full"),
        lambda content: content.pop("absent"),
    ],
    ids=["version", "device", "peer", "code", "effort", "broken"],
)
def test_records_of_another_run_are_not_resumed(workload, tmp_path, change):
    path, _ = measured(workload, tmp_path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    stamp = path.stat().st_mtime_ns
    measured(workload, tmp_path)
    assert path.stat().st_mtime_ns > stamp


def test_code_digest_follows_the_op_and_the_method(tmp_path, monkeypatch):
    (tmp_path / "square").mkdir()
    source = tmp_path / "square" / "kernel.py"
    source.write_text("x = 1")
    monkeypatch.setattr(benchmark.p2k.ops, "__path__", [str(tmp_path)])
    first = benchmark.code_digest("square.forward")
    source.write_text("# why\nx = 1")
    assert benchmark.code_digest("square") == first
    source.write_text("x = 2")
    assert benchmark.code_digest("square") != first


def test_what_cannot_run_is_left_out_with_its_reason(workload, tmp_path, monkeypatch):
    def broken(x):
        raise RuntimeError("no compiler here\nand a long trace")

    use(monkeypatch, eager=workload.reference, compile=broken)
    ((_, content),) = benchmark.run([workload], CPU, tmp_path, quick=True)
    assert content["absent"] == {"compile": "RuntimeError: no compiler here"}
    assert {record["implementation"] for record in content["records"]} == {"eager"}
    use(monkeypatch, eager=workload.reference, kernel=broken)
    with pytest.raises(RuntimeError, match="no compiler"):
        benchmark.measure(workload, CPU, None, effort="quick")


def test_nan_is_reported_and_written_as_null(workload, tmp_path, monkeypatch):
    use(monkeypatch, eager=workload.reference, kernel=lambda x: x * x * float("nan"))
    _, records = measured(workload, tmp_path)
    (forward,) = [r for r in records if r["implementation"] == "kernel" and r["pass"] == "forward"]
    assert forward["error"]["forward"] is None
    assert "forward error nan" in forward["problem"]


def test_a_baseline_comes_from_the_same_machine(workload, tmp_path):
    here = benchmark.environment(CPU)
    with pytest.raises(P2KError, match="nothing to compare with"):
        benchmark_records.read_baseline(tmp_path, here)
    _, records = measured(workload, tmp_path)
    (tmp_path / benchmark_records.COST_FILE).write_text("{}")
    assert benchmark_records.read_baseline(tmp_path, here | {"torch": "9"}) == records
    with pytest.raises(P2KError, match="with threads '1', this run has '64'"):
        benchmark_records.read_baseline(tmp_path, here | {"threads": "64"})


def test_rows_for_the_terminal_name_the_problem(workload, tmp_path, monkeypatch):
    use(monkeypatch, eager=workload.reference, kernel=lambda x: x * x * 1.01)
    ((_, content),) = benchmark.run([workload], CPU, tmp_path, quick=True)
    assert len(benchmark.problems(content)) == 3
    assert benchmark.problems(content)[0].startswith("square n=64 float32 forward kernel: forward error")
    rows = benchmark.summary(content)
    assert rows[0][:4] == ("square", "n=64 float32", "forward", "eager")
    assert float(rows[1][5]) > 0
