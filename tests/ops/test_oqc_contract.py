"""What the OQC functions promise around the numbers: errors, backends, compilation, transforms."""

import os
import subprocess
import sys

import pytest
import torch
from oqc_cases import STAGES, inject, inject_inputs, leaves, random, rank_inputs, run
from torch._dynamo.testing import CompileCounterWithBackend

from p2k.core.errors import BackendUnavailable
from p2k.ops import oqc
from p2k.ops.oqc import registration

both = pytest.mark.parametrize("name", STAGES)
X, GATE, CHANNELS = torch.ones(2, 3, 4), torch.ones(2, 3, 1), torch.ones(4)

BAD_INJECT = [
    ({"aux": X[:1]}, ValueError, r"aux must have shape \(2, 3, 4\), got \(1, 3, 4\)"),
    ({"gate": CHANNELS}, ValueError, r"gate must have shape \(\) or \(2, 3, 1\), got \(4,\)"),
    ({"gate": GATE[0]}, ValueError, "gate must have shape"),
    ({"pre_gate": torch.ones(())}, ValueError, r"pre_gate must have shape \(4,\)"),
    ({"main": torch.ones(())}, ValueError, "main must have a last dimension of at least 1"),
    ({"main": X[..., :0], "aux": X[..., :0]}, ValueError, "main must have a last dimension of at least 1"),
    ({"main": X.long()}, TypeError, "main must be floating point, got torch.int64"),
    ({"aux": X.half()}, TypeError, "aux must have dtype torch.float32 like main, got torch.float16"),
    ({"gate": GATE.double()}, TypeError, "gate must have dtype"),
    ({"aux": X.to("meta")}, ValueError, "aux must be on cpu like main, got meta"),
    ({"eps": -1e-6}, ValueError, "eps must be >= 0 and finite"),
    ({"eps": float("nan")}, ValueError, "eps must be >= 0 and finite"),
    ({"eps": float("inf")}, ValueError, "eps must be >= 0 and finite"),
    ({"backend": "cuda"}, ValueError, "backend must be 'auto', 'torch' or 'triton', got 'cuda'"),
]
BAD_RANK = [
    ({"right": X[:1]}, ValueError, "right must have shape"),
    ({"host": X[..., :3]}, ValueError, "host must have shape"),
    ({"weight": X}, ValueError, r"weight must have shape \(4,\)"),
    ({"gate": CHANNELS}, ValueError, "gate must have shape"),
    ({"left": X[..., :0], "right": X[..., :0]}, ValueError, "left must have a last dimension of at least 1"),
    ({"host": X.double()}, TypeError, "host must have dtype"),
    ({"weight": CHANNELS.to("meta")}, ValueError, "weight must be on cpu like left, got meta"),
    ({"eps": -1.0}, ValueError, "eps must be >= 0"),
    ({"norm_eps": 0.0}, ValueError, "norm_eps must be > 0"),
    ({"norm_eps": float("nan")}, ValueError, "norm_eps must be > 0"),
    ({"backend": "Torch"}, ValueError, "backend must be"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_INJECT)
def test_bad_input_of_project_and_inject(change, error, message):
    with pytest.raises(error, match=f"project_and_inject: {message}"):
        oqc.project_and_inject(**({"main": X, "aux": X} | change))


@pytest.mark.parametrize(("change", "error", "message"), BAD_RANK)
def test_bad_input_of_rank_project(change, error, message):
    with pytest.raises(error, match=f"rank_project: {message}"):
        oqc.rank_project(**({"left": X, "right": X, "host": X, "weight": CHANNELS} | change))


def test_auto_is_the_reference_on_a_cpu():
    inputs = [x.cpu() for x in inject_inputs(5, 20)]
    assert torch.equal(inject(*inputs, backend="auto"), inject(*inputs, backend="torch"))


def fresh_process(code, **environment):
    """Run code in a process of its own, without interpreter mode unless `environment` asks for it."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], env=inherited | environment, capture_output=True, text=True)


CALL = """
import torch, {first}
from p2k.ops import oqc
x = torch.ones(2, 3)
assert torch.equal(oqc.project_and_inject(x, x, eps=0.0), x)
try:
    oqc.project_and_inject(x, x, backend="triton")
except Exception as error:
    print(type(error).__name__, error)
assert not sys.modules.get("triton")
compiled = torch.compile(lambda x: oqc.rank_project(x, x, x, x[0]), backend="eager", fullgraph=True)
assert compiled(x).shape == x.shape
"""


def test_a_cpu_without_interpreter_is_told_what_is_missing():
    result = fresh_process(CALL.format(first="sys"))
    assert result.stdout.startswith("BackendUnavailable project_and_inject: backend='triton' cannot run"), result.stderr
    assert "set TRITON_INTERPRET=1 before the first import of triton" in result.stdout
    assert result.returncode == 0, result.stderr


def test_everything_but_the_kernel_works_without_triton():
    result = fresh_process(CALL.format(first="sys; sys.modules['triton'] = None"), TRITON_INTERPRET="1")
    assert "triton is not installed: pip install 'p2k[gpu]'" in result.stdout, result.stderr
    assert result.returncode == 0, result.stderr


def op_arguments(name, strided):
    """Arguments of a forward op and of its backward op."""
    inputs = leaves({"inject": inject_inputs, "rank": rank_inputs}[name](4, 5, 6))
    if strided:
        wide = [x.detach().repeat_interleave(2, 0)[::2] if x.ndim == 3 else x.detach() for x in inputs]
        inputs = [x.transpose(0, 1).requires_grad_() if x.ndim == 3 else x.requires_grad_() for x in wide]
    scalars = (1e-3,) if name == "inject" else (1e-3, 1e-3)
    forward, backward = (getattr(registration, f"{name}_{way}") for way in ("forward", "backward"))
    plain = [x.detach() for x in inputs]
    out, c, inverse = forward(*plain, *scalars)
    needs = [True] * (len(plain) - 1) + [False]
    return (forward, (*inputs, *scalars)), (backward, (out, *plain, c, inverse, *scalars[1:], needs))


@both
@pytest.mark.parametrize("strided", [False, True])
def test_opcheck(name, strided):
    for op, arguments in op_arguments(name, strided):
        result = torch.library.opcheck(op, arguments)
        assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize(("name", "backend"), [("inject", "triton"), ("rank", "triton"), ("inject", "torch")])
def test_compiled_whole_and_not_again_for_another_size(name, backend):
    stage, inputs = STAGES[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(stage, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for tokens, width in ((6, 20), (7, 33), (9, 18)):
        dense, grad = inputs(tokens, width), random(tokens, width, seed=9)
        eager = run(stage, leaves(dense), grad, backend=backend)
        assert all(map(torch.equal, run(compiled, leaves(dense), grad, backend=backend), eager))
        frames.append(counter.frame_count)
    assert frames[1] == frames[2]
    names = {str(node.target) for graph in counter.graphs for node in graph.graph.nodes}
    assert any(f"p2k.{name}_forward" in target for target in names) == (backend == "triton")


def test_the_same_tensor_twice_when_compiled():
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: inject(x, x, None, x[0]), fullgraph=True, backend="aot_eager")
    x = random(5, 20).requires_grad_()
    (eager,) = torch.autograd.grad(inject(x, x, None, x[0]).square().sum(), x)
    assert torch.equal(torch.autograd.grad(compiled(x).square().sum(), x)[0], eager)


@both
def test_function_transforms_use_the_reference_and_refuse_the_kernel(name):
    stage, inputs = STAGES[name]
    batched = [torch.stack([x, 2 * x]) for x in inputs(5, 6)]
    looped = torch.stack([stage(*[x[i] for x in batched], backend="torch") for i in range(2)])
    assert torch.allclose(torch.vmap(lambda *x: stage(*x, backend="auto"))(*batched), looped)
    with pytest.raises(BackendUnavailable, match="a torch.func transform is active"):
        torch.vmap(stage)(*batched)
