"""What only the interpreter can show of linear_logp's kernel: float64, and memory that is not there."""

import subprocess
import sys

import pytest
import torch
from linear_logp_cases import head

from p2k.ops.linear_logp import kernel, linear_logp


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
def test_gradcheck_through_the_interpreter(monkeypatch):
    monkeypatch.setattr(kernel, "LAUNCH", {4: (2, 4)})
    inputs, target = head(3, vocab=6, dim=2, dtype=torch.float64)
    # A power of two, because the interpreter hands scalars over in float32.
    options = {"temperature": 0.5, "chunk_size": 2, "backend": "triton"}
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logp(h, w, target, bias=b, **options),
        [x.requires_grad_() for x in inputs],
        fast_mode=True,
    )


FAR = """
import sys, torch
from p2k.core.mutation import Mutant, mutated
from p2k.ops.linear_logp import kernel
stride = 2**30 + 16
storage = torch.from_file(sys.argv[1], shared=True, size=2 * stride + 16, dtype=torch.float32)
logits = torch.as_strided(storage, (3, 8), (stride, 1))
logits.copy_(torch.arange(24).reshape(3, 8) % 7)
kernel.LAUNCH = {16: (4, 4)}
near = torch.zeros(3, 16)[:, :8].copy_(logits)
def same(module):
    module.LAUNCH = kernel.LAUNCH
    numbers = torch.empty(2, 4, 3)
    for x, out in zip((near, logits), numbers):
        module.forward(x, None, torch.tensor([0, 3, 7]), 1.0, out)
    return torch.equal(*numbers)
assert same(kernel)
print("sound", flush=True)
narrow = Mutant("tl.program_id(0).to(tl.int64) * ROWS", "tl.program_id(0) * ROWS", "row offsets in 32 bits", 2)
with mutated(kernel, narrow) as broken:
    sys.exit(0 if same(broken) else 1)
"""


def test_row_offsets_beyond_32_bits(tmp_path):
    """A sparse file stands for 8 GiB of memory; the mutant reads a wild address, so it runs on its own."""
    result = subprocess.run([sys.executable, "-c", FAR, tmp_path / "far"], capture_output=True, text=True)
    assert result.stdout == "sound\n", result.stderr
    assert result.returncode != 0
