"""Run the benchmarks that the ops declare and write one JSON file per workload, one record per point."""

import datetime
import hashlib
import importlib
import importlib.util
import math
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
from p2k.core.device import device_name, versions
from p2k.core.errors import P2KError
from p2k.core.peers import peer_versions
from p2k.core.syntax import canonical
from p2k.core.tolerance import tolerance
from p2k.experiments.benchmark_records import SCHEMA, comparable, read_file, write_json

# A fused row kernel cannot beat a compiled one by more than the bytes allow; beyond this the measurement is suspect.
SUSPICIOUS_SPEEDUP = 10.0
# Seconds per implementation and pass: of timing, and of running before it.
BUDGET = {"quick": 0.05, "full": 1.0}
WARM_UP = {"quick": 0.02, "full": 0.2}
# A round calls all input sets, in a quick run one part of them.
PARTS = {"quick": 8, "full": 1}
# Measured against each other; anything else may be missing on a machine without spoiling the rest.
ESSENTIAL = ("kernel", "eager")


def op_names() -> list[str]:
    """Every op that declares workloads, alphabetically."""
    names = sorted(module.name for module in pkgutil.iter_modules(p2k.ops.__path__) if module.ispkg)
    return [name for name in names if importlib.util.find_spec(f"p2k.ops.{name}.bench")]


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


def measure(workload: Workload, device: torch.device, ceilings: Ceilings | None, *, effort: str) -> tuple[list, dict]:
    """All records of one workload, and why an implementation is absent. After timing, a new seed checks each again."""
    clock, candidates, absent = Clock(device), implementations(workload), {}
    sets = list(benchmark.rotated_inputs(workload, device, seed=0))
    first_call, closures = {}, {}
    for name, function in list(candidates.items()):
        start = time.perf_counter()
        try:
            for call in benchmark.closures(workload, function, *sets[0]).values():
                call()
        except Exception as error:
            if name in ESSENTIAL:
                raise
            absent[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]
            del candidates[name]
            continue
        first_call[name] = time.perf_counter() - start
        closures[name] = [benchmark.closures(workload, function, *given) for given in sets]
    timed = {pass_name: _time(pass_name, closures, clock, effort) for pass_name in workload.passes}
    memory = {
        (pass_name, name): benchmark.memory_above_inputs(closures[name][0][pass_name], device)
        for pass_name in workload.passes
        for name in candidates
    }
    # What the timing holds goes before float64 comes, which takes as much again.
    closures.clear()
    sets.clear()
    errors = {
        name: benchmark.errors_against_float64(workload, function, device, seed=1)
        for name, function in candidates.items()
        if name not in workload.strangers
    }
    records = []
    for pass_name, samples in timed.items():
        for name in candidates:
            own = errors.get(name, {})
            point = _record(workload, pass_name, name, samples, ceilings) | {"error": own}
            bounds = error_bounds(workload, errors["eager"])
            problem = find_problem(point, bounds)
            point["error"] = {part: own.get(part) if math.isfinite(own.get(part, 0)) else None for part in bounds}
            point |= {"memory_bytes": memory[pass_name, name], "first_call_seconds": first_call[name]}
            records.append(point | {"problem": problem})
    return records, absent


def _time(pass_name: str, closures: dict[str, list[dict]], clock: Clock, effort: str) -> dict[str, list[float]]:
    """Samples of one pass by implementation."""
    calls = {name: [closure[pass_name] for closure in found] for name, found in closures.items()}
    return benchmark.interleaved_seconds(
        calls, clock, budget=BUDGET[effort], warm_up=WARM_UP[effort], parts=PARTS[effort]
    )


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
        "cached": workload.cached,
        "pass": pass_name,
        "implementation": name,
        "milliseconds": {"p20": low, "p50": middle, "p80": high, "n": len(own)},
        "bytes": cost.bytes,
        "flops": cost.flops,
        "roofline": roofline,
        "speedup": {other: dict(zip(("p20", "p50", "p80"), values, strict=True)) for other, values in ratios.items()},
    }


def error_bounds(workload: Workload, eager_error: dict[str, float]) -> dict[str, float]:
    """What an implementation may err by: three times as much as eager torch, and the rounding of another order."""
    length = workload.summed or max(workload.shape.values())
    rounding = tolerance(workload.dtype, length, dot=workload.dot)
    return {part: 3 * error + rounding for part, error in eager_error.items()}


def find_problem(record: dict, bounds: dict[str, float]) -> str | None:
    """What makes a record unbelievable: faster than the roofline, suspiciously fast, or wrong after timing."""
    roofline = record["roofline"]
    if roofline is not None and roofline["percent"] > 100:
        return f"{roofline['percent']:.0f} % of the roofline: the byte count or the clock is wrong"
    compiled = record["speedup"].get("compile")
    if record["implementation"] == "kernel" and compiled and compiled["p50"] > SUSPICIOUS_SPEEDUP:
        return f"{compiled['p50']:.1f} times torch.compile: check that both do the same work"
    for pass_name, error in record["error"].items():
        if not error <= bounds[pass_name]:
            return f"{pass_name} error {error:.1e} on a new seed exceeds {bounds[pass_name]:.1e}"
    return None


def environment(device: torch.device) -> dict[str, str | None]:
    """Device, versions and time of a run."""
    return {
        "device": device_name(device),
        "device_type": device.type,
        "threads": str(torch.get_num_threads()),
        "cuda": torch.version.cuda,
        **versions(),
        **peer_versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def code_digest(op: str) -> str:
    """Hash of the op's own sources and of the method: a record of other code is no record of this one.

    Comments and docstrings of Python do not count.
    """
    folder = Path(p2k.ops.__path__[0]) / op.partition(".")[0]
    sources = [path for path in sorted(folder.glob("*")) if path.suffix in (".py", ".cpp")]
    digest = hashlib.sha256()
    for path in [*sources, Path(benchmark.__file__), Path(__file__)]:
        text = path.read_text(encoding="utf-8")
        digest.update((canonical(text) if path.suffix == ".py" else text).encode())
    return digest.hexdigest()[:16]


def run(
    workloads: list[Workload], device: torch.device, folder: Path, *, quick: bool = False, resume: bool = True
) -> Iterator[tuple[Path, dict]]:
    """Measure the workloads one by one, yielding path and content; each file is complete when it appears.

    A file that the same code wrote with the same effort, versions and device is read back instead. On a GPU the
    device's own ceilings are measured first. A CPU gets ratios only: what fits its caches beats any copy, so a
    fraction of the roofline would mean nothing there.
    """
    if device.type == "cpu":
        benchmark.keep_freed_memory()
    ceilings, effort, here = None, "quick" if quick else "full", environment(device)
    for workload in workloads:
        shape = "-".join(f"{axis}{size}" for axis, size in workload.shape.items())
        path = folder / f"{workload.op}-{shape}-{str(workload.dtype).removeprefix('torch.')}.json"
        same = {"effort": effort, "code": code_digest(workload.op)}
        if not (resume and _is_reusable(path, same, here)):
            if device.type == "cuda" and ceilings is None:
                ceilings = benchmark.measure_ceilings(device)
            records, absent = measure(workload, device, ceilings, effort=effort)
            now = environment(device)
            write_json(path, {"schema": SCHEMA, "environment": now, "absent": absent, "records": records, **same})
        yield path, read_file(path)


def _is_reusable(path: Path, same: dict, here: dict) -> bool:
    """Whether a finished file answers for a run in this environment; one that cannot be read is measured again."""
    try:
        found = read_file(path)
    except P2KError:
        return False
    return comparable(found["environment"]) == comparable(here) and all(found[key] == same[key] for key in same)


def problems(content: dict) -> list[str]:
    """One line per unbelievable record of a benchmark file."""
    return [
        f"{record['op']} {_words(record['shape'])} {record['dtype']} {record['pass']} {record['implementation']}: "
        f"{record['problem']}"
        for record in content["records"]
        if record["problem"]
    ]


def summary(content: dict) -> list[tuple[str, ...]]:
    """Rows for a terminal: op, sizes, pass, implementation, milliseconds, speed-up over eager, roofline."""
    return [
        (
            record["op"],
            f"{_words(record['shape'])} {record['dtype']}",
            record["pass"],
            record["implementation"],
            f"{record['milliseconds']['p50']:.3g}",
            f"{record['speedup']['eager']['p50']:.2f}" if "eager" in record["speedup"] else "",
            f"{record['roofline']['percent']:.0f} %" if record["roofline"] else "",
        )
        for record in content["records"]
    ]


def _words(shape: dict[str, int]) -> str:
    return " ".join(f"{axis}={size}" for axis, size in shape.items())
