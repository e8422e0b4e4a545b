"""What only a GPU can show of linear_logp. Collected only where torch sees CUDA."""

import pytest
import torch
from linear_logp_cases import BACKENDS, assert_as_good_as_full, head, run, upstream

from p2k.ops.linear_logp import linear_logp

pytestmark = pytest.mark.gpu
both = pytest.mark.parametrize("backend", BACKENDS)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vocab", [1, 32, 1000, 50257])
def test_compiled_kernels_and_widening_products(dtype, vocab, backend):
    inputs, target = head(1500, vocab=vocab, dim=64, dtype=dtype)
    assert_as_good_as_full(inputs, target, backend=backend)


@both
def test_two_runs_agree_also_across_streams(backend):
    inputs, target = head(3000, vocab=5003, dim=128, dtype=torch.bfloat16)
    grads = upstream(target)
    first = run(linear_logp, inputs, target, grads, backend=backend)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        second = run(linear_logp, inputs, target, grads, backend=backend)
    torch.cuda.synchronize()
    assert all(map(torch.equal, first, second))


@both
def test_no_host_synchronisation(backend):
    inputs, target = head(64, vocab=100)
    grads = upstream(target)
    run(linear_logp, inputs, target, grads, backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run(linear_logp, inputs, target, grads, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(found) == 6


@both
def test_a_target_out_of_range_is_nan(backend):
    inputs, target = head(8, vocab=100)
    target[3] = 100
    found = linear_logp(inputs[0], inputs[1], target, backend=backend)
    assert found.logp.isnan().tolist() == [index == 3 for index in range(8)]
