"""Benchmark one workload: times by pass and implementation, against the device's own measured ceilings."""

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors

PASSES = ("forward", "backward", "both")
# Enough for inputs of one MiB against three times the largest cache of today's GPUs; smaller ones are launch-bound.
MOST_SETS = 400
# Parameters of mallopt, from malloc.h of glibc.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


@dataclass(frozen=True)
class Cost:
    """What the mathematics has to move and compute in one pass: bytes through memory, floating-point operations."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Workload:
    """One op at one size, with everything it is compared with.

    Args:
        op: name of the op, as in ``p2k.ops``.
        shape: sizes by axis name, for the record.
        dtype: of the inputs.
        make_inputs: ``(generator, device, dtype) -> tensors``, random, none of them requiring gradients.
        kernel: the op with its own fused or native code, called on the inputs; None where that cannot run.
        reference: the op's torch reference; its float64 result is the truth.
        forward: cost of the forward pass, as the fused form moves it.
        backward: cost of the backward pass.
        peers: further implementations by name.
        strangers: names among `peers` of what computes another function of the same inputs: timed, not checked.
        passes: which of `PASSES` are measured.
        summed: terms behind the longest sum in a value or gradient; 0 means the longest axis.
        dot: the op multiplies matrices, on a GPU in split TF32 where they are float32.
        cached: the inputs are to be found in the cache: one input set is used again and again. Otherwise sets are
            rotated, so that every call reads its inputs from memory.
    """

    op: str
    shape: Mapping[str, int]
    dtype: torch.dtype
    make_inputs: Callable[[torch.Generator, torch.device, torch.dtype], tuple[Tensor, ...]]
    kernel: Callable[..., Tensor] | None
    reference: Callable[..., Tensor]
    forward: Cost
    backward: Cost
    peers: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)
    strangers: tuple[str, ...] = ()
    passes: tuple[str, ...] = PASSES
    summed: int = 0
    dot: bool = False
    cached: bool = False

    def cost(self, pass_name: str) -> Cost:
        """Cost of `forward`, `backward` or `both`."""
        if pass_name == "both":
            return Cost(self.forward.bytes + self.backward.bytes, self.forward.flops + self.backward.flops)
        return {"forward": self.forward, "backward": self.backward}[pass_name]


@dataclass(frozen=True)
class Ceilings:
    """What the device does at best, measured: bytes per second of a large copy, operations per second of a product."""

    bytes_per_second: float
    flops_per_second: float

    def bound_seconds(self, cost: Cost) -> float:
        """Least time for `cost` at these ceilings."""
        return max(cost.bytes / self.bytes_per_second, cost.flops / self.flops_per_second)


class Clock:
    """Seconds of one call sequence on a device; CUDA events on a GPU, the process clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, calls: Sequence[Callable[[], object]]) -> float:
        """Mean seconds per call of running `calls` back to back."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - start) / len(calls)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        begin.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / len(calls)


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache that rotation has to defeat; 64 MiB where torch cannot tell."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return 64 * 2**20


def keep_freed_memory() -> None:
    """Let the C library reuse what torch frees on a CPU, as torch's own allocator does on a GPU.

    Otherwise every large result comes in fresh pages, which cost the system about as much as a pass over them. It
    settles after some calls, which the warm-up makes.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(library, "mallopt"):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def measure_ceilings(device: torch.device) -> Ceilings:
    """Time a copy that exceeds every cache and a large matrix product, the best of several runs each."""
    clock, cuda = Clock(device), device.type == "cuda"
    source = torch.randn((2**30 if cuda else 2**27) // 4, device=device)
    target = torch.empty_like(source)
    dtype, size = (torch.bfloat16, 8192) if cuda else (torch.float32, 1024)
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    copy = min(clock.seconds([lambda: target.copy_(source)] * 3) for _ in range(5))
    product = min(clock.seconds([lambda: left @ right] * 3) for _ in range(5))
    return Ceilings(2 * source.numel() * 4 / copy, 2 * size**3 / product)


def interleaved_seconds(
    calls: Mapping[str, Sequence[Callable[[], object]]],
    clock: Clock,
    *,
    budget: float,
    warm_up: float = 0.2,
    rounds: int = 100,
    parts: int = 1,
) -> dict[str, list[float]]:
    """Time several implementations in turn, so that drift of the machine hits all of them alike.

    Each entry of `calls` holds one call per rotated input set. A round makes all of them, or with `parts` one part of
    them, the next round the next part. For `warm_up` seconds nothing is recorded. Stops after `rounds`, or when
    `budget` seconds per implementation are spent (at least five rounds), or when the medians are known to one per cent.
    """
    start, turn = time.perf_counter(), 0
    while True:
        for place, implementation in enumerate(calls.values()):
            clock.seconds(_part(implementation, turn, place / len(calls), parts))
        turn += 1
        if time.perf_counter() - start >= warm_up:
            break
    samples: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    for done in range(1, rounds + 1):
        for place, (name, implementation) in enumerate(calls.items()):
            samples[name].append(clock.seconds(_part(implementation, turn + done - 1, place / len(calls), parts)))
        settled = done >= 20 and all(_relative_error_of_median(values) < 0.01 for values in samples.values())
        if settled or (done >= 5 and time.perf_counter() - start > budget * len(calls)):
            break
    return samples


def _part(calls: Sequence[Callable], turn: int, place: float, parts: int) -> Sequence[Callable]:
    """The calls of one turn. `place` in [0, 1) keeps implementations apart: none finds what another has just read."""
    size = -(-len(calls) // parts)
    parts = -(-len(calls) // size)
    start = (turn + int(place * parts)) % parts * size
    return calls[start : start + size]


def _relative_error_of_median(values: list[float]) -> float:
    """Half the width of the middle 60 per cent, shrunk as a mean would be, over the median."""
    low, middle, high = quantiles(values)
    return (high - low) / 2 / middle / len(values) ** 0.5


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile."""
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return cuts[0], statistics.median(values), cuts[3]


def closures(
    workload: Workload, function: Callable[..., Tensor], inputs: tuple[Tensor, ...], upstream: Tensor
) -> dict[str, Callable[[], object]]:
    """By pass, a call that runs that pass of `function` once."""

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    found: dict[str, Callable[[], object]] = {"forward": forward}
    if workload.passes == ("forward",):
        return found
    leaves = tuple(tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in inputs)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    output = function(*leaves)
    found["backward"] = lambda: torch.autograd.grad(output, wanted, upstream, retain_graph=True)
    found["both"] = lambda: torch.autograd.grad(function(*leaves), wanted, upstream)
    return found


def rotated_inputs(
    workload: Workload, device: torch.device, *, seed: int
) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Input sets and upstream gradients; one set for a cached workload.

    Between two uses of a set the others move more than three times the cache, with what the reference computes and
    keeps for its backward pass: an op with large results needs few sets.
    """
    source = generator(seed, device)
    moved = 0
    for _ in range(1 if workload.cached else MOST_SETS):
        inputs = workload.make_inputs(source, device, workload.dtype)
        output, kept = kept_bytes(workload.reference, inputs)
        yield inputs, torch.randn(output.shape, generator=source, device=device, dtype=output.dtype)
        moved += max(workload.forward.bytes, kept)
        if moved > 3 * cache_bytes(device):
            return


def kept_bytes(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, int]:
    """Output of one call, without its graph, and the bytes that the graph would keep for the backward pass."""
    leaves = tuple(tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in inputs)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = function(*leaves)
    return output.detach(), sum(kept.values())


def memory_above_inputs(call: Callable[[], object], device: torch.device) -> int | None:
    """Peak bytes a call allocates beyond what is already there; None where torch does not count (CPU)."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def errors_against_float64(
    workload: Workload, function: Callable[..., Tensor], device: torch.device, *, seed: int
) -> dict[str, float]:
    """Relative Frobenius error of the value, and of the worst gradient where one is measured, on fresh inputs."""
    source = generator(seed, device)
    inputs = workload.make_inputs(source, device, workload.dtype)
    wide = tuple(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs)
    upstream = torch.randn(workload.reference(*inputs).shape, generator=source, device=device, dtype=torch.float64)
    truth = closures(workload, workload.reference, wide, upstream)
    actual = closures(workload, function, inputs, upstream.to(workload.dtype))
    errors = {"forward": relative_errors(actual["forward"](), truth["forward"]())[0]}
    if "both" in truth:
        pairs = zip(actual["both"](), truth["both"](), strict=True)
        errors["backward"] = max(relative_errors(got, expected)[0] for got, expected in pairs)
    return errors
