"""What only the interpreter can show of the StableMax kernel: float64, and memory that is not there."""

import subprocess
import sys

import pytest
import torch
from stablemax_cases import inputs

from p2k.ops.stablemax import kernel, stablemax_loss

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")


@pytest.mark.parametrize("classes", [3, 6])
def test_gradcheck_through_the_interpreter(classes, monkeypatch):
    monkeypatch.setattr(kernel, "LAUNCH", {4: (2, 4)})
    logits, target, _ = inputs(3, classes, dtype=torch.float64)
    function = lambda z: stablemax_loss(z, target, backend="triton")  # noqa: E731
    assert torch.autograd.gradcheck(function, logits.requires_grad_(), fast_mode=classes > 3)


def test_bfloat16_loads():
    """The interpreter truncates bfloat16 stores, so what is read is compared where it is kept in float32."""
    logits, target, _ = inputs(5, 33, dtype=torch.bfloat16)
    narrow, wide = (kernel.forward(x, target, -100) for x in (logits, logits.float()))
    assert all(map(torch.equal, narrow, wide))


FAR = """
import sys, torch
from p2k.ops.stablemax import kernel
from p2k.core.mutation import Mutant, mutated
stride = 2**30 + 8
storage = torch.from_file(sys.argv[1], shared=True, size=2 * stride + 8, dtype=torch.float16)
logits = torch.as_strided(storage, (3, 8), (stride, 1))
logits.copy_(torch.arange(24).reshape(3, 8))
target = torch.tensor([0, 1, 2])
narrow = Mutant(".to(tl.int64) * ROWS", " * ROWS", "row offsets in 32 bits", 2)
def same(module):
    near, far = (module.forward(x, target, -100)[0] for x in (logits.clone(), logits))
    return torch.equal(near, far)
assert same(kernel)
print("sound", flush=True)
with mutated(kernel, narrow) as broken:
    sys.exit(0 if same(broken) else 1)
"""


def test_row_offsets_beyond_32_bits(tmp_path):
    """A sparse file stands for 4 GiB of memory; the mutant reads a wild address, so it runs on its own."""
    result = subprocess.run([sys.executable, "-c", FAR, tmp_path / "far"], capture_output=True, text=True)
    assert result.stdout == "sound\n", result.stderr
    assert result.returncode != 0
