"""Run the benchmarks that the ops declare and write one JSON file per workload, one record per point."""

import datetime
import importlib
import json
import pkgutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import torch._functorch.config
from torch import Tensor

import p2k.ops
from p2k.core import benchmark
from p2k.core.benchmark import Ceilings, Clock, Workload
from p2k.core.device import device_name, version_of, versions
from p2k.core.errors import P2KError
from p2k.core.files import write_atomic

SCHEMA = 1
RECORD_KEYS = {
    "op", "shape", "dtype", "pass", "implementation", "milliseconds", "bytes", "flops", "roofline", "speedup",
    "memory_bytes", "error", "first_call_seconds", "problem",
}  # fmt: skip
# A fused row kernel cannot beat a compiled one by more than the bytes allow; beyond this the measurement is suspect.
SUSPICIOUS_SPEEDUP = 10.0


def op_names() -> list[str]:
    """Every op folder, alphabetically."""
    return sorted(module.name for module in pkgutil.iter_modules(p2k.ops.__path__) if module.ispkg)


def declared_workloads(ops: list[str], device: torch.device, *, quick: bool) -> list[Workload]:
    """The workloads of the named ops (all when empty).

    Raises:
        P2KError: an op that does not exist.
    """
    unknown = sorted(set(ops) - set(op_names()))
    if unknown:
        raise P2KError(f"no such op: {', '.join(unknown)}; there are {', '.join(op_names())}")
    modules = [importlib.import_module(f"p2k.ops.{op}.bench") for op in ops or op_names()]
    return [workload for module in modules for workload in module.workloads(device, quick=quick)]


def implementations(workload: Workload) -> dict[str, Callable[..., Tensor]]:
    """What is timed: our own code, eager torch, `torch.compile` of it, and the peers."""
    torch._dynamo.reset()
    # The backward pass alone is timed by running it again on one graph, which donated buffers forbid.
    torch._functorch.config.donated_buffer = False
    found = {"eager": workload.reference, "compile": torch.compile(workload.reference), **workload.peers}
    return found if workload.kernel is None else {"kernel": workload.kernel, **found}


def measure(workload: Workload, device: torch.device, ceilings: Ceilings | None, *, quick: bool) -> list[dict]:
    """All records of one workload. After timing, every implementation is checked on a new seed."""
    clock, candidates = Clock(device), implementations(workload)
    sets = list(benchmark.rotated_inputs(workload, device, seed=0))
    first_call, closures = {}, {}
    for name, function in candidates.items():
        start = time.perf_counter()
        for call in benchmark.closures(workload, function, *sets[0]).values():
            call()
        first_call[name] = time.perf_counter() - start
        closures[name] = [benchmark.closures(workload, function, *given) for given in sets]
    errors = {
        name: benchmark.errors_against_float64(workload, function, device, seed=1)
        for name, function in candidates.items()
    }
    records = []
    for pass_name in workload.passes:
        calls = {name: [closure[pass_name] for closure in found] for name, found in closures.items()}
        samples = benchmark.interleaved_seconds(calls, clock, budget=0.05 if quick else 0.4)
        for name in candidates:
            memory = benchmark.memory_above_inputs(calls[name][0], device)
            point = _record(workload, pass_name, name, samples, ceilings)
            point |= {"memory_bytes": memory, "error": errors[name], "first_call_seconds": first_call[name]}
            records.append(point | {"problem": find_problem(point, errors["eager"])})
    return records


def _record(
    workload: Workload, pass_name: str, name: str, samples: dict[str, list[float]], ceilings: Ceilings | None
) -> dict:
    cost, own = workload.cost(pass_name), samples[name]
    low, middle, high = (1e3 * value for value in benchmark.quantiles(own))
    ratios = {
        other: benchmark.quantiles([theirs / ours for theirs, ours in zip(samples[other], own, strict=True)])
        for other in samples
        if other != name
    }
    roofline = None
    if ceilings is not None:
        bound = 1e3 * ceilings.bound_seconds(cost)
        roofline = {**asdict(ceilings), "milliseconds": bound, "percent": 100 * bound / middle}
    return {
        "op": workload.op,
        "shape": dict(workload.shape),
        "dtype": str(workload.dtype).removeprefix("torch."),
        "pass": pass_name,
        "implementation": name,
        "milliseconds": {"p20": low, "p50": middle, "p80": high, "n": len(own)},
        "bytes": cost.bytes,
        "flops": cost.flops,
        "roofline": roofline,
        "speedup": {other: dict(zip(("p20", "p50", "p80"), values, strict=True)) for other, values in ratios.items()},
    }


def find_problem(record: dict, eager_error: dict[str, float]) -> str | None:
    """What makes a record unbelievable: faster than the roofline, suspiciously fast, or wrong after timing."""
    roofline = record["roofline"]
    if roofline is not None and roofline["percent"] > 100:
        return f"{roofline['percent']:.0f} % of the roofline: the byte count or the clock is wrong"
    compiled = record["speedup"].get("compile")
    if record["implementation"] == "kernel" and compiled and compiled["p50"] > SUSPICIOUS_SPEEDUP:
        return f"{compiled['p50']:.1f} times torch.compile: check that both do the same work"
    for pass_name, error in record["error"].items():
        bound = 3 * eager_error[pass_name] + 1e-6
        if not error <= bound:
            return f"{pass_name} error {error:.1e} on a new seed exceeds {bound:.1e}"
    return None


def environment(device: torch.device) -> dict[str, str | None]:
    """Device, versions and time of a run."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "threads": str(torch.get_num_threads()),
        "cuda": torch.version.cuda,
        **versions(),
        **{name: version_of(name) for name in ("liger-kernel", "cut-cross-entropy", "flash-linear-attention")},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def run(
    workloads: list[Workload], device: torch.device, folder: Path, *, quick: bool, resume: bool = True
) -> Iterator[tuple[Path, list[dict]]]:
    """Measure the workloads one by one; each file is complete when it appears. Finished ones are read back.

    On a GPU the device's own ceilings are measured first. A CPU gets ratios only: what fits its caches beats any
    copy, so a fraction of the roofline would mean nothing there.
    """
    ceilings = None
    for workload in workloads:
        shape = "-".join(f"{axis}{size}" for axis, size in workload.shape.items())
        path = folder / f"{workload.op}-{shape}-{str(workload.dtype).removeprefix('torch.')}.json"
        if not (resume and path.exists()):
            if device.type == "cuda" and ceilings is None:
                ceilings = benchmark.measure_ceilings(device)
            records = measure(workload, device, ceilings, quick=quick)
            write_json(path, {"schema": SCHEMA, "environment": environment(device), "records": records})
        yield path, read_file(path)["records"]


def write_json(path: Path, content: dict) -> None:
    """Write a benchmark file whole."""
    write_atomic(path, json.dumps(content, indent=1, sort_keys=True) + "\n")


def read_file(path: Path) -> dict:
    """Read one benchmark file and check its schema.

    Raises:
        P2KError: not JSON, another schema version, or a record with missing or unknown keys.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise P2KError(f"{path}: not valid JSON ({error}); delete it and run the benchmark again") from error
    if content.get("schema") != SCHEMA:
        raise P2KError(f"{path}: schema {SCHEMA} expected, got {content.get('schema')}; run the benchmark again")
    for record in content["records"]:
        if set(record) != RECORD_KEYS:
            raise P2KError(f"{path}: record keys differ from the schema: {sorted(set(record) ^ RECORD_KEYS)}")
    return content


def regressions(before: list[dict], after: list[dict], *, tolerance: float = 0.15) -> list[str]:
    """Points whose speed relative to eager torch fell by more than `tolerance`, one line each with both numbers.

    Ratios within one run are compared, not milliseconds: they survive a change of machine load, and a slow-down of
    eager torch itself does not count as ours. Points that only one side has are passed over.
    """

    def key(record: dict) -> tuple:
        names = ("op", "dtype", "pass", "implementation")
        return tuple(record[name] for name in names) + tuple(sorted(record["shape"].items()))

    old = {key(record): record["speedup"] for record in before}
    found = []
    for record in after:
        then, now = old.get(key(record), {}).get("eager"), record["speedup"].get("eager")
        if then and now and now["p80"] < (1 - tolerance) * then["p50"]:
            where = " ".join(str(part) for part in key(record)[:4]) + f" {record['shape']}"
            found.append(f"{where}: {now['p50']:.2f} x eager, was {then['p50']:.2f} x")
    return found
