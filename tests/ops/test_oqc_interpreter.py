"""What only the interpreter can show of the OQC kernels: float64, and memory that is not there."""

import subprocess
import sys

import pytest
import torch
from oqc_cases import STAGES, leaves

from p2k.ops.oqc import kernel

both = pytest.mark.parametrize("name", STAGES)


@both
def test_gradcheck_through_the_interpreter(name, monkeypatch):
    monkeypatch.setattr(kernel, "LAUNCH", {4: (2, 4)})
    stage, inputs = STAGES[name]
    for width, gate in ((3, "scalar"), (6, "token")):
        # A power of two, because the interpreter hands scalars over in float32.
        assert torch.autograd.gradcheck(
            lambda *x: stage(*x, eps=2**-10, **({} if name == "inject" else {"norm_eps": 2**-10})),
            leaves(inputs(3, width, gate=gate, dtype=torch.float64)),
            fast_mode=width > 4,
        )


@both
def test_bfloat16_loads(name):
    """The interpreter truncates bfloat16 stores, so what is read is compared where it is kept in float32."""
    _, inputs = STAGES[name]
    half = inputs(5, 33, dtype=torch.bfloat16)
    epsilons = [1e-3] * (1 if name == "inject" else 2)
    launch = getattr(kernel, f"{name}_forward")
    same = launch(*[x.float() for x in half], *epsilons)
    assert all(map(torch.equal, launch(*half, *epsilons)[1:], same[1:]))


FAR = """
import sys, torch
from p2k.ops.oqc import kernel
from p2k.core.mutation import Mutant, mutated
stride = 2**30 + 8
storage = torch.from_file(sys.argv[1], shared=True, size=2 * stride + 8, dtype=torch.float16)
main = torch.as_strided(storage, (3, 8), (stride, 1))
main.copy_(torch.arange(24).reshape(3, 8))
aux = torch.ones(3, 8, dtype=torch.float16)
narrow = Mutant(".to(tl.int64) * ROWS", " * ROWS", "row offsets in 32 bits", 2)
def same(module):
    near, far = (module.inject_forward(x, aux, None, None, 1e-3)[0] for x in (main.clone(), main))
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
