import json
import time

import pytest
import torch

from p2k.core.benchmark import Ceilings, Cost, Workload
from p2k.core.errors import P2KError
from p2k.experiments import benchmark

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
    ((path, records),) = benchmark.run([workload], CPU, folder, quick=True, **options)
    return path, records


def test_every_op_declares_workloads_with_sensible_costs():
    for op in benchmark.op_names():
        for quick in (True, False):
            declared = benchmark.declared_workloads([op], CPU, quick=quick)
            assert declared, f"ops/{op}/bench.py declares nothing"
            for workload in declared:
                assert workload.op.startswith(op)
                inputs = workload.make_inputs(torch.Generator().manual_seed(0), CPU, workload.dtype)
                smallest = sum(tensor.numel() * tensor.element_size() for tensor in inputs)
                assert workload.forward.bytes >= smallest
                assert workload.backward.bytes >= workload.forward.bytes


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
    assert benchmark.read_file(path)["environment"]["device_type"] == "cpu"
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ('{"schema": 99, "records": []}', "schema 1 expected, got 99"),
        ('{"schema": 1, "records": [{"op": "x"}]}', "record keys differ"),
    ],
)
def test_a_broken_file_is_refused(tmp_path, content, message):
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(P2KError, match=message):
        benchmark.read_file(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "record.json"
    benchmark.write_json(path, {"schema": 1})
    with pytest.raises(TypeError):
        benchmark.write_json(path, {"schema": object()})
    assert json.loads(path.read_text()) == {"schema": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["record.json"]


def test_a_planted_slowdown_is_reported(workload, tmp_path, monkeypatch):
    _, before = measured(workload, tmp_path / "before")
    use(monkeypatch, eager=workload.reference, kernel=slow_square)
    _, after = measured(workload, tmp_path / "after")
    assert any("square float32 forward kernel" in line for line in benchmark.regressions(before, after))
    assert not benchmark.regressions(before, before)


def test_a_wrong_implementation_is_reported_after_timing(workload, tmp_path, monkeypatch):
    use(monkeypatch, eager=workload.reference, kernel=lambda x: x * x * 1.01)
    _, records = measured(workload, tmp_path)
    problems = {record["implementation"]: record["problem"] for record in records}
    assert problems["eager"] is None
    assert "on a new seed exceeds" in problems["kernel"]


def test_faster_than_the_roofline_is_an_error(workload):
    impossible = Ceilings(bytes_per_second=1.0, flops_per_second=1.0)
    records = benchmark.measure(workload, CPU, impossible, quick=True)
    assert all("of the roofline" in record["problem"] for record in records)


def test_a_suspicious_speedup_is_flagged(workload, monkeypatch):
    use(monkeypatch, eager=workload.reference, compile=slow_square, kernel=workload.kernel)
    records = benchmark.measure(workload, CPU, None, quick=True)
    forward = [record for record in records if record["implementation"] == "kernel" and record["pass"] == "forward"]
    assert "times torch.compile" in forward[0]["problem"]
