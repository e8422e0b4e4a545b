"""What only a GPU can show of the OQC kernels. Collected only where torch sees CUDA."""

import pytest
import torch
from oqc_cases import STAGES, assert_kernel_as_good_as_eager, inject, leaves, run

pytestmark = pytest.mark.gpu
both = pytest.mark.parametrize("name", STAGES)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [1, 56, 57, 512, 3072, 4096, 8200])
def test_compiled_kernels(name, dtype, width):
    stage, inputs = STAGES[name]
    assert_kernel_as_good_as_eager(stage, inputs(300, width, dtype=dtype))


@both
def test_two_runs_agree_also_across_streams(name):
    stage, inputs = STAGES[name]
    dense = inputs(5000, 512, gate="scalar", dtype=torch.bfloat16)
    first = run(stage, leaves(dense), dense[0])
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        second = run(stage, leaves(dense), dense[0])
    torch.cuda.synchronize()
    assert all(map(torch.equal, first, second))


@both
def test_fresh_memory_does_not_shine_through(name):
    stage, inputs = STAGES[name]
    dense = inputs(1000, 57)
    poison = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(8)]
    del poison
    assert all(x.isfinite().all() for x in run(stage, leaves(dense), dense[0]))


def test_offsets_beyond_32_bits():
    width = 4096
    tokens = 2**31 // width + 3
    main = torch.zeros(tokens, width, dtype=torch.float16, device="cuda")
    aux = torch.zeros_like(main)
    main[-1], aux[-1] = torch.randn(2, width, device="cuda").half()
    out = inject(main, aux, None, None)
    assert torch.equal(out[-1], inject(main[-1:].clone(), aux[-1:].clone(), None, None)[0])
    assert not out[:-1].any()


def test_no_host_synchronisation():
    dense = STAGES["inject"][1](64, 512, gate="scalar")
    run(inject, leaves(dense), dense[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = run(inject, leaves(dense), dense[0])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(results) == 5
