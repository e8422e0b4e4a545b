"""What only the interpreter can show of the attention kernels: bfloat16 loads, and memory that is not there."""

import subprocess
import sys

import pytest
import torch

from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors, tolerance
from p2k.ops.attention_entropy import kernel, reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("width", [16, 40])
def test_bfloat16_loads(width):
    """The interpreter truncates bfloat16 stores: what is kept in float32 is compared exactly, the rest more loosely."""
    source = generator(0)
    q, k, v, grad = (torch.randn(1, 2, 20, width, generator=source).bfloat16() for _ in range(4))
    grad_entropy = torch.randn(1, 2, 20, generator=source)
    narrow, wide = (kernel.forward(*(x.to(dtype) for x in (q, k, v)), None, True, 0.3) for dtype in DTYPES)
    assert all(map(torch.equal, narrow[1:], wide[1:]))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    exact = reference.attention_entropy(*leaves, None, True, 0.3)
    assert max(relative_errors(narrow[1], exact[1].detach())) <= tolerance(torch.float32, dot=True)
    gradients = torch.autograd.grad(exact, leaves, (grad.double(), grad_entropy.double()))
    found = kernel.backward(grad, grad_entropy, (q, k, v), None, narrow, True, 0.3, [True] * 3)
    for actual, truth in zip((narrow[0], *found), (exact[0].detach(), *gradients), strict=True):
        # A truncation is worth two roundings.
        assert relative_errors(actual, truth)[0] <= 2 * tolerance(torch.bfloat16, dot=True)


DTYPES = (torch.bfloat16, torch.float32)
FAR = """
import sys, torch
from p2k.ops.attention_entropy import kernel
from p2k.core.mutation import Mutant, mutated
stride = 2**30 + 8
storage = torch.from_file(sys.argv[1], shared=True, size=2 * stride + 32, dtype=torch.float16)
x = torch.as_strided(storage, (3, 1, 4, 8), (stride, 8, 8, 1))
x.copy_(torch.linspace(-1, 1, 96).reshape(3, 1, 4, 8))
narrow = Mutant("(tl.program_id(0) // tiles).to(tl.int64)", "(tl.program_id(0) // tiles)", "32 bits", 4)
def results(module, x):
    out, entropy, *rest = module.forward(x, x, x, None, False, 1.0)
    rows = (out, entropy, *rest)
    return out, entropy, *module.backward(x, entropy, (x, x, x), None, rows, False, 1.0, [True] * 3)
def same(module):
    return all(map(torch.equal, results(module, x.clone()), results(module, x)))
assert same(kernel)
print("sound", flush=True)
with mutated(kernel, narrow) as broken:
    sys.exit(0 if same(broken) else 1)
"""


def test_offsets_beyond_32_bits(tmp_path):
    """A sparse file stands for 4 GiB of memory; the mutant reads a wild address, so it runs on its own."""
    result = subprocess.run([sys.executable, "-c", FAR, tmp_path / "far"], capture_output=True, text=True)
    assert result.stdout == "sound\n", result.stderr
    assert result.returncode != 0
