"""What only a GPU can show of the polycom kernels. Collected only where torch sees CUDA."""

import pytest
import torch
from polycom_cases import NAMES, assert_kernel_as_good_as_eager, inputs, leaves, random, run

pytestmark = pytest.mark.gpu
both = pytest.mark.parametrize("name", NAMES)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [1, 57, 512, 3072, 4096, 8200])
def test_compiled_kernels(name, dtype, width):
    assert_kernel_as_good_as_eager(name, inputs(300, width, dtype=dtype))


@both
def test_two_runs_agree_also_across_streams(name):
    dense = inputs(5000, 512, dtype=torch.bfloat16)
    first = run(name, leaves(dense), dense[0])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        second = run(name, leaves(dense), dense[0])
    torch.cuda.synchronize()
    assert all(map(torch.equal, first, second))


@both
def test_no_host_synchronisation(name):
    dense, grad = inputs(64, 512), random(64, 512)
    run(name, leaves(dense), grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = run(name, leaves(dense), grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(results) == 4
