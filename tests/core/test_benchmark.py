import dataclasses
import subprocess
import sys
import time

import pytest
import torch

from p2k.core import benchmark
from p2k.core.benchmark import Ceilings, Clock, Cost, Workload

CPU = torch.device("cpu")


def square(x):
    return x * x


def make_workload(kernel=square, reference=square):
    return Workload(
        op="square",
        shape={"n": 64},
        dtype=torch.float32,
        make_inputs=lambda source, device, dtype: (torch.randn(64, generator=source, device=device, dtype=dtype),),
        kernel=kernel,
        reference=reference,
        forward=Cost(bytes=512, flops=64),
        backward=Cost(bytes=768, flops=128),
    )


def test_cost_of_both_passes_is_the_sum():
    assert make_workload().cost("both") == Cost(1280, 192)
    assert make_workload().cost("forward") == Cost(512, 64)


@pytest.mark.parametrize(("cost", "seconds"), [(Cost(100, 1), 10.0), (Cost(1, 100), 5.0)])
def test_bound_is_the_slower_of_memory_and_arithmetic(cost, seconds):
    assert Ceilings(bytes_per_second=10, flops_per_second=20).bound_seconds(cost) == seconds


def test_passes_compute_what_they_say():
    x, upstream = torch.randn(5), torch.randn(5)
    closures = benchmark.closures(make_workload(), square, (x,), upstream)
    assert torch.equal(closures["forward"](), x * x)
    assert torch.equal(closures["backward"]()[0], 2 * x * upstream)
    assert torch.equal(closures["both"]()[0], 2 * x * upstream)
    assert not x.requires_grad


def test_interleaving_sees_a_slow_implementation():
    calls = {"fast": [lambda: None], "slow": [lambda: time.sleep(0.002)]}
    samples = benchmark.interleaved_seconds(calls, Clock(CPU), budget=0.05)
    assert len(samples["fast"]) == len(samples["slow"]) >= 5
    assert min(samples["slow"]) > 0.002 > max(samples["fast"])


def test_interleaving_respects_its_round_limit():
    samples = benchmark.interleaved_seconds({"only": [lambda: None]}, Clock(CPU), budget=60, rounds=7)
    assert len(samples["only"]) == 7


def test_parts_take_turns_and_implementations_keep_apart():
    made = []
    calls = {name: [lambda n=name, i=i: made.append((n, i)) for i in range(8)] for name in ("a", "b")}
    benchmark.interleaved_seconds(calls, Clock(CPU), budget=60, warm_up=0, rounds=7, parts=4)
    turns = [made[i : i + 4] for i in range(0, len(made), 4)]
    assert [turn[0] for turn in turns[:5]] == [("a", 0), ("a", 2), ("a", 4), ("a", 6), ("a", 0)]
    # The other one is half a rotation behind, and all sets are used equally often.
    assert [turn[2] for turn in turns[:3]] == [("b", 4), ("b", 6), ("b", 0)]
    assert {made.count((name, i)) for name in "ab" for i in range(8)} == {2}


def test_rotation_exceeds_the_cache(monkeypatch):
    monkeypatch.setattr(benchmark, "cache_bytes", lambda device: 600)
    sets = list(benchmark.rotated_inputs(make_workload(), CPU, seed=0))
    assert 512 * len(sets) > 1800
    assert not torch.equal(sets[0][0][0], sets[1][0][0])


def test_what_the_reference_keeps_counts_as_moved(monkeypatch):
    def outer(x):
        return (x[:, None] * x[None, :]).exp().sum()

    x = torch.arange(1.0, 17.0)
    value, kept = benchmark.kept_bytes(outer, (x,))
    assert torch.equal(value, outer(x))
    assert not value.requires_grad
    # The inputs once, and the table of 16 by 16 that exp keeps.
    assert kept == 4 * (16 + 16 * 16)
    workload = make_workload()
    monkeypatch.setattr(benchmark, "cache_bytes", lambda device: 10 * workload.forward.bytes)
    monkeypatch.setattr(benchmark, "kept_bytes", lambda function, inputs: (function(*inputs), 10**9))
    assert len(list(benchmark.rotated_inputs(workload, CPU, seed=0))) == 1


def test_a_cached_workload_is_not_rotated():
    cached = dataclasses.replace(make_workload(), cached=True)
    assert len(list(benchmark.rotated_inputs(cached, CPU, seed=0))) == 1


def test_warm_up_is_not_recorded():
    calls = []
    samples = benchmark.interleaved_seconds(
        {"only": [lambda: calls.append(time.sleep(0.001))]}, Clock(CPU), budget=60, warm_up=0.02, rounds=5
    )
    assert len(samples["only"]) == 5
    assert len(calls) > 10


def test_freed_memory_is_reused_without_fresh_pages():
    # In a process of its own, because the setting stays.
    code = """
import resource, torch
from p2k.core.benchmark import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**23)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

fresh = min(faults() for _ in range(20))
keep_freed_memory()
print(fresh, [faults() for _ in range(40)][-1])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    fresh, kept = map(int, run.stdout.split())
    # 32 MiB are 8,192 pages, or 16 huge ones.
    assert fresh >= 16
    assert kept == 0


def test_errors_are_taken_against_float64_in_value_and_gradient():
    right = benchmark.errors_against_float64(make_workload(), square, CPU, seed=0)
    assert max(right.values()) < 1e-6
    wrong = benchmark.errors_against_float64(make_workload(), lambda x: x * x + 0.01 * x.detach() * x, CPU, seed=0)
    assert wrong["forward"] > 1e-3
    assert wrong["backward"] > 1e-3


def test_ceilings_are_positive_and_ordered_like_a_machine():
    ceilings = benchmark.measure_ceilings(CPU)
    assert 1e8 < ceilings.bytes_per_second < 1e13
    assert 1e8 < ceilings.flops_per_second < 1e14
