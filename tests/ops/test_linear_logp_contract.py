"""What linear_logp promises around the numbers: errors, backends, autocast, compilation, transforms, derivatives."""

import os
import subprocess
import sys

import pytest
import torch
from linear_logp_cases import ABSENT, BACKENDS, DEVICE, full, head, random, run, upstream
from torch._dynamo.testing import CompileCounterWithBackend

from p2k.core.errors import BackendUnavailable, P2KError
from p2k.core.tolerance import relative_errors, tolerance
from p2k.ops.linear_logp import LinearLogp, linear_logp, reference, registration

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
both = pytest.mark.parametrize("backend", BACKENDS)
HIDDEN, WEIGHT, BIAS, TARGET = (
    torch.ones(2, 3, 4),
    torch.ones(5, 4),
    torch.ones(5),
    torch.zeros(2, 3, dtype=torch.int64),
)

BAD = [
    ({"target": TARGET[:1]}, ValueError, r"target must have shape \(2, 3\), got \(1, 3\)"),
    ({"target": TARGET.int()}, TypeError, "target must be torch.int64, got torch.int32"),
    ({"target": TARGET + 5}, ValueError, r"target must be in \[0, 5\) or ignore_index -100, got 5"),
    ({"target": TARGET - 1}, ValueError, r"target must be in \[0, 5\) or ignore_index -100, got -1"),
    ({"target": TARGET - 100, "ignore_index": -1}, ValueError, r"ignore_index -1, got -100"),
    ({"target": TARGET.to("meta")}, ValueError, "target must be on cpu like hidden, got meta"),
    ({"hidden": torch.ones(())}, ValueError, r"hidden must have a last dimension, got shape \(\)"),
    ({"hidden": HIDDEN[..., :3]}, ValueError, r"weight must have shape \(vocab, 3\) with no size 0, got \(5, 4\)"),
    ({"hidden": HIDDEN[..., :0], "weight": WEIGHT[:, :0]}, ValueError, "weight must have shape"),
    ({"hidden": HIDDEN.long()}, TypeError, "hidden must be floating point, got torch.int64"),
    ({"weight": WEIGHT.T}, ValueError, r"weight must have shape \(vocab, 4\) with no size 0, got \(4, 5\)"),
    ({"weight": WEIGHT[0]}, ValueError, "weight must have shape"),
    ({"weight": WEIGHT[:0]}, ValueError, "weight must have shape"),
    ({"weight": WEIGHT.half()}, TypeError, "weight must have dtype torch.float32 like hidden, got torch.float16"),
    ({"weight": WEIGHT.to("meta")}, ValueError, "weight must be on cpu like hidden, got meta"),
    ({"bias": WEIGHT}, ValueError, r"bias must have shape \(5,\), got \(5, 4\)"),
    ({"bias": BIAS.double()}, TypeError, "bias must have dtype"),
    ({"temperature": 0.0}, ValueError, "temperature must be > 0 and finite, got 0.0"),
    ({"temperature": float("nan")}, ValueError, "temperature must be > 0"),
    ({"temperature": float("inf")}, ValueError, "temperature must be > 0"),
    ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
    ({"backend": "cuda"}, ValueError, "backend must be 'auto', 'torch' or 'triton', got 'cuda'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    given = {"hidden": HIDDEN, "weight": WEIGHT, "target": TARGET} | change
    # Devices are named as the messages do, also where the suite runs on a GPU.
    given = {name: x.cpu() if isinstance(x, torch.Tensor) and not x.is_meta else x for name, x in given.items()}
    with pytest.raises(error, match=f"linear_logp: .*{message}"):
        linear_logp(**given)


def test_it_is_a_named_tuple_in_float32():
    inputs, target = head(2, 3, vocab=5, dtype=torch.bfloat16)
    found = linear_logp(inputs[0], inputs[1], target)
    assert isinstance(found, LinearLogp)
    assert found._fields == ("logp", "logsumexp", "entropy")
    assert {x.dtype for x in found} == {torch.float32}
    assert {x.shape for x in found} == {(2, 3)}


def test_auto_is_torch_on_a_cpu():
    inputs, target = head(5, vocab=20)
    inputs, target = [x.cpu() for x in inputs], target.cpu()
    for x, y in zip(linear_logp(*inputs[:2], target), linear_logp(*inputs[:2], target, backend="torch"), strict=True):
        assert torch.equal(x, y)


CALL = """
import sys
{first}
import torch
from p2k.ops.linear_logp import linear_logp
x, y = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
print(linear_logp(x, x, y).logp.shape)
try:
    linear_logp(x, x, y, backend="triton")
except Exception as error:
    print(type(error).__name__, error)
assert not sys.modules.get("triton")
"""


@pytest.mark.parametrize(
    ("first", "message"),
    [("", "set TRITON_INTERPRET=1 before"), ("sys.modules['triton'] = None", "triton is not installed")],
)
def test_without_triton(first, message):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", CALL.format(first=first)], env=environment, capture_output=True, text=True
    )
    assert result.stdout.startswith("torch.Size([2])\nBackendUnavailable linear_logp: backend='triton' cannot run")
    assert message in result.stdout


def op_arguments(backend, strided):
    """Arguments of the forward op and of the backward op."""
    inputs, target = head(3, 4, vocab=6)
    if strided:
        inputs = [x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim > 1 else x for x in inputs]
        target = target.repeat_interleave(2, 0)[::2]
    hidden, weight, bias = (x.requires_grad_() for x in inputs)
    options = (0.5, ABSENT, 5, backend)
    plain = [x.detach() for x in (hidden, weight)]
    *_, numbers = registration.forward(*plain, target, bias.detach(), *options)
    grads = torch.stack(upstream(target))
    yield registration.forward, (hidden, weight, target, bias, *options)
    yield registration.backward, (grads, *plain, target, bias.detach(), numbers, *options, [True, True, False])


@both
@pytest.mark.parametrize("strided", [False, True])
def test_opcheck(backend, strided):
    for op, arguments in op_arguments(backend, strided):
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@both
def test_compiled_whole_and_not_again_for_another_size(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_logp, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for tokens, vocab in ((6, 20), (7, 33), (9, 18)):
        inputs, target = head(tokens, vocab=vocab)
        grads = upstream(target)
        eager = run(linear_logp, inputs, target, grads, backend=backend, temperature=0.5)
        found = run(compiled, inputs, target, grads, backend=backend, temperature=0.5)
        assert all(map(torch.equal, found, eager))
        frames.append(counter.frame_count)
    assert frames[1] == frames[2]
    names = {str(node.target) for graph in counter.graphs for node in graph.graph.nodes}
    assert any("p2k.linear_logp_forward" in name for name in names)


@both
def test_compiled_code_answers_a_wrong_target_with_nan(backend):
    torch._dynamo.reset()
    compiled = torch.compile(linear_logp, fullgraph=True, backend="aot_eager")
    inputs, target = head(4, vocab=5)
    grads = upstream(target)
    target[1], target[2] = 5, -3
    logp, logsumexp, _, dhidden, *_ = run(compiled, inputs, target, grads, backend=backend)
    wrong = torch.tensor([False, True, True, False], device=DEVICE)
    assert torch.equal(logp.isnan(), wrong)
    assert torch.equal(dhidden.isnan(), wrong[:, None].expand_as(dhidden))
    assert logsumexp.isfinite().all()


@both
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_casts_as_a_linear_layer_does(backend, compiled):
    inputs, target = head(6, vocab=20)
    grads = upstream(target)
    function = linear_logp
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(linear_logp, fullgraph=True, backend="aot_eager")
    with torch.autocast(DEVICE, torch.bfloat16):
        found = run(function, inputs, target, grads, backend=backend)
    expected = run(linear_logp, [x.bfloat16() for x in inputs], target, grads, backend=backend)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y.float())


def test_function_transforms_use_the_reference_and_refuse_the_kernel():
    (hidden, weight, bias), target = head(2, 5, vocab=7)
    looped = [linear_logp(x, weight, y, bias=bias) for x, y in zip(hidden, target, strict=True)]
    found = torch.vmap(lambda x, y: linear_logp(x, weight, y, bias=bias))(hidden, target)
    for x, y in zip(found, zip(*looped, strict=True), strict=True):
        assert max(relative_errors(x, torch.stack(y).double())) <= tolerance(torch.float32, dot=True)
    with pytest.raises(BackendUnavailable, match="a torch.func transform is active"):
        torch.vmap(lambda x, y: linear_logp(x, weight, y, backend="triton"))(hidden, target)


@both
def test_no_second_derivative(backend):
    inputs, target = head(3, vocab=5)
    x = inputs[0].requires_grad_()
    result = linear_logp(x, inputs[1], target, backend=backend).logp
    (gradient,) = torch.autograd.grad(result.square().sum(), x, create_graph=True)
    with pytest.raises(P2KError, match="no second derivative; p2k.ops.linear_logp.reference.linear_logp has one"):
        gradient.sum().backward()


def test_the_reference_has_both_derivatives():
    inputs, target = head(3, vocab=5, dim=2, dtype=torch.float64)
    target[1] = ABSENT
    leaves = [x.requires_grad_() for x in inputs]

    def function(hidden, weight, bias):
        return full(hidden, weight, target, bias=bias, temperature=0.7)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_gradcheck_of_the_chunked_form():
    inputs, target = head(5, vocab=6, dim=3, dtype=torch.float64)
    target[1] = ABSENT
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logp(h, w, target, bias=b, temperature=0.7, chunk_size=2, backend="torch"),
        [x.requires_grad_() for x in inputs],
    )


def test_closed_form_backward():
    """The gradient of the logits, in the letters of rows.py, against autograd through the reference."""
    z, target = random(4, 6, dtype=torch.float64).requires_grad_(), torch.tensor([0, 5, 2, 2], device=DEVICE)
    g, l, e = (x[:, None] for x in upstream(target, dtype=torch.float64))  # noqa: E741
    results = reference.linear_logp(z, torch.eye(6).to(z), target, None, 1.0, ABSENT)
    (expected,) = torch.autograd.grad(results, z, [g[:, 0], l[:, 0], e[:, 0]])
    s = z.log_softmax(-1)
    p, hot = s.exp(), torch.nn.functional.one_hot(target, 6)
    found = g * (hot - p) + l * p - e * p * (s + results[2][:, None])
    assert max(relative_errors(found.detach(), expected)) <= tolerance(torch.float64)
