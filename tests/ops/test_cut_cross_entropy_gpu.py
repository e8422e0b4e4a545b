"""What only a GPU can show of cut_cross_entropy. Collected only where torch sees CUDA."""

import pytest
import torch
from cut_cross_entropy_cases import BACKENDS, as_good_as_full, head, peaky, random, run

from p2k.ops.cut_cross_entropy import cut_cross_entropy, filtered_gradients

pytestmark = pytest.mark.gpu
OPTIONS = {"filter_eps": 2.0**-12, "sort_vocab": True, "backend": "triton"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocab", [1, 32, 1000, 50257])
def test_compiled_kernels(dtype, vocab):
    inputs, target = head(1500, vocab=vocab, dim=72, dtype=dtype)
    as_good_as_full(inputs, target, backend="triton")


def test_both_backends_filter_alike():
    inputs, target = peaky(1000, 5003, 64)
    maps = [filtered_gradients(*inputs[:2], target, filter_eps=1e-4, sort_vocab=True, backend=b) for b in BACKENDS]
    # An entry within rounding of the threshold may fall on either side.
    assert (maps[0].kept != maps[1].kept).double().mean() < 1e-3
    assert maps[0].kept.double().mean() < 1


def test_two_runs_agree_also_across_streams():
    inputs, target = peaky(3000, 5003, 128, dtype=torch.bfloat16)
    grads = [random(3000), random(3000, seed=1)]
    first = run(cut_cross_entropy, inputs, target, grads, **OPTIONS)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        second = run(cut_cross_entropy, inputs, target, grads, **OPTIONS)
    torch.cuda.synchronize()
    assert all(map(torch.equal, first, second))


def test_no_host_synchronisation():
    inputs, target = head(64, vocab=100)
    grads = [random(64), random(64, seed=1)]
    run(cut_cross_entropy, inputs, target, grads, **OPTIONS)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run(cut_cross_entropy, inputs, target, grads, **OPTIONS)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(found) == 5
