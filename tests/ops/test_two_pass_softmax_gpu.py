"""What only a GPU can show of the row programs. Collected only where torch sees CUDA."""

import pytest
import torch
from test_two_pass_softmax_kernel import assert_as_good_as_eager, random, run

from p2k.ops.two_pass_softmax import kernel, registration

pytestmark = pytest.mark.gpu
each = pytest.mark.parametrize("program", kernel.PROGRAMS)


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("columns", [1, 57, 4096, 16385, 32768, 32769, 128256])
def test_compiled_programs(program, dtype, columns):
    assert_as_good_as_eager(program, random(300, columns, dtype=dtype))


@each
def test_two_runs_agree_also_across_streams(program):
    x = random(1000, 5000, dtype=torch.bfloat16)
    first = run(lambda x: registration.softmax(x, program), x, x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        second = run(lambda x: registration.softmax(x, program), x, x)
    torch.cuda.synchronize()
    assert all(map(torch.equal, first, second))


def test_offsets_beyond_32_bits():
    columns = 4096
    x = torch.zeros(2**31 // columns + 3, columns, dtype=torch.float16, device="cuda")
    x[-1] = random(columns, dtype=torch.float16)
    assert torch.equal(registration.softmax(x)[-1], registration.softmax(x[-1:].clone())[0])


def test_no_host_synchronisation():
    x = random(64, 512)
    run(registration.softmax, x, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = run(registration.softmax, x, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(results) == 2
