"""What cut_cross_entropy promises around the numbers: errors, compilation, autocast, derivatives, planted bugs."""

import pytest
import torch
from cut_cross_entropy_cases import ABSENT, BACKENDS, DEVICE, full, head, random, run, small_tiles
from torch._dynamo.testing import CompileCounterWithBackend

from p2k.core.errors import P2KError
from p2k.core.mutation import survivors
from p2k.core.tolerance import relative_errors, tolerance
from p2k.ops.cut_cross_entropy import (
    CutCrossEntropy,
    budget,
    cut_cross_entropy,
    filtered_gradients,
    kernel,
    mutants,
    reference,
    registration,
    tiles,
)

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
    ({"target": TARGET.to("meta")}, ValueError, "target must be on cpu like hidden, got meta"),
    ({"hidden": torch.ones(())}, ValueError, r"hidden must have a last dimension, got shape \(\)"),
    ({"hidden": HIDDEN[..., :3]}, ValueError, r"weight must have shape \(vocab, 3\) with no size 0, got \(5, 4\)"),
    ({"hidden": HIDDEN.long()}, TypeError, "hidden must be floating point, got torch.int64"),
    ({"weight": WEIGHT[:0]}, ValueError, "weight must have shape"),
    ({"weight": WEIGHT.half()}, TypeError, "weight must have dtype torch.float32 like hidden, got torch.float16"),
    ({"bias": WEIGHT}, ValueError, r"bias must have shape \(5,\), got \(5, 4\)"),
    ({"softcap": 0.0}, ValueError, "softcap must be > 0 and finite, got 0.0"),
    ({"filter_eps": 1.0}, ValueError, r"filter_eps must be in \[0, 1\), got 1.0"),
    ({"filter_eps": -0.1}, ValueError, r"filter_eps must be in \[0, 1\), got -0.1"),
    ({"backend": "cuda"}, ValueError, "backend must be 'auto', 'torch' or 'triton', got 'cuda'"),
]


@pytest.fixture(autouse=True)
def _tiles(monkeypatch):
    small_tiles(monkeypatch)


@pytest.mark.parametrize("function", [cut_cross_entropy, filtered_gradients], ids=lambda function: function.__name__)
@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message, function):
    given = {"hidden": HIDDEN, "weight": WEIGHT, "target": TARGET} | change
    given = {name: x.cpu() if isinstance(x, torch.Tensor) and not x.is_meta else x for name, x in given.items()}
    with pytest.raises(error, match=f"{function.__name__}: .*{message}"):
        function(**given)


def test_it_is_a_named_tuple_in_float32():
    inputs, target = head(2, 3, vocab=5, dtype=torch.bfloat16)
    found = cut_cross_entropy(inputs[0], inputs[1], target)
    assert isinstance(found, CutCrossEntropy)
    assert {(x.dtype, tuple(x.shape)) for x in found} == {(torch.float32, (2, 3))}


def op_arguments(backend, strided):
    """Arguments of the forward op and of the backward op."""
    inputs, target = head(5, vocab=10, dim=4)
    if strided:
        inputs = [x.T.contiguous().T if x.ndim > 1 else x.repeat_interleave(2)[::2] for x in inputs]
    hidden, weight, bias = (x.requires_grad_() for x in inputs)
    options, code = (4.0, 0.05, True, True, backend), tiles.codes(target, 10, ABSENT)
    plain = [x.detach() for x in (hidden, weight, bias)]
    numbers = registration.forward_op(*plain[:2], code, plain[2], *options)
    yield registration.forward_op, (hidden, weight, code, bias, *options)
    grads = torch.ones(2, 5)
    yield registration.backward_op, (grads, *plain[:2], code, plain[2], numbers, *options, [True, True, False])


@both
@pytest.mark.parametrize("strided", [False, True])
def test_opcheck(backend, strided):
    for op, arguments in op_arguments(backend, strided):
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@both
def test_compiled_whole_and_not_again_for_another_size(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(cut_cross_entropy, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for tokens, vocab in ((5, 10), (7, 13), (9, 18)):
        inputs, target = head(tokens, vocab=vocab, dim=4)
        grads = [random(tokens), random(tokens, seed=1)]
        options = {"backend": backend, "filter_eps": 0.05, "sort_vocab": True}
        assert all(
            map(
                torch.equal,
                run(compiled, inputs, target, grads, **options),
                run(cut_cross_entropy, inputs, target, grads, **options),
            )
        )
        frames.append(counter.frame_count)
    assert frames[1] == frames[2]
    names = {str(node.target) for graph in counter.graphs for node in graph.graph.nodes}
    assert any("p2k.cut_cross_entropy_forward" in name for name in names)


@both
def test_compiled_code_answers_a_wrong_target_with_nan(backend):
    torch._dynamo.reset()
    compiled = torch.compile(cut_cross_entropy, fullgraph=True, backend="aot_eager")
    inputs, target = head(4, vocab=5, dim=4)
    target[1], target[2] = 5, -3
    loss, logsumexp, dhidden, *_ = run(compiled, inputs, target, [random(4), random(4)], backend=backend)
    wrong = torch.tensor([False, True, True, False], device=DEVICE)
    assert torch.equal(loss.isnan(), wrong)
    assert torch.equal(dhidden.isnan(), wrong[:, None].expand_as(dhidden))
    assert logsumexp.isfinite().all()


def test_autocast_casts_as_a_linear_layer_does():
    inputs, target = head(6, vocab=20)
    grads = [random(6), random(6)]
    with torch.autocast(DEVICE, torch.bfloat16):
        found = run(cut_cross_entropy, inputs, target, grads)
    expected = run(cut_cross_entropy, [x.bfloat16() for x in inputs], target, grads)
    for x, y in zip(found, expected, strict=True):
        assert x.dtype == torch.float32
        assert torch.equal(x, y.float())


def test_function_transforms_use_the_specification_and_refuse_the_filter():
    (hidden, weight, bias), target = head(2, 5, vocab=7)
    found = torch.vmap(lambda x, y: cut_cross_entropy(x, weight, y, bias=bias))(hidden, target)
    looped = [cut_cross_entropy(x, weight, y, bias=bias) for x, y in zip(hidden, target, strict=True)]
    for x, y in zip(found, zip(*looped, strict=True), strict=True):
        assert max(relative_errors(x, torch.stack(y).double())) <= tolerance(torch.float32, dot=True)
    with pytest.raises(P2KError, match="a filtered gradient is no derivative"):
        torch.vmap(lambda x, y: cut_cross_entropy(x, weight, y, filter_eps=0.1))(hidden, target)


def test_no_second_derivative():
    inputs, target = head(3, vocab=5)
    x = inputs[0].requires_grad_()
    result = cut_cross_entropy(x, inputs[1], target).loss
    (gradient,) = torch.autograd.grad(result.square().sum(), x, create_graph=True)
    with pytest.raises(P2KError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_both_derivatives_of_the_specification_and_gradcheck_of_the_tiles(softcap):
    inputs, target = head(5, vocab=9, dim=3, dtype=torch.float64)
    target[1] = ABSENT
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda h, w, b: full(h, w, target, bias=b, softcap=softcap), leaves)
    assert torch.autograd.gradgradcheck(lambda h, w, b: full(h, w, target, bias=b, softcap=softcap), leaves)
    assert torch.autograd.gradcheck(lambda h, w, b: cut_cross_entropy(h, w, target, bias=b, softcap=softcap), leaves)


def test_every_planted_bug_of_the_kernel_is_caught():
    assert survivors(kernel, mutants.MUTANTS, mutants.probe) == []


def test_every_planted_bug_of_the_reference_is_caught():
    assert survivors(reference, mutants.REFERENCE_MUTANTS, mutants.probe) == []


def test_no_budget_allows_a_spill():
    kernels = budget.load()["kernels"]
    assert {entry["spilled_bytes"] for entry in kernels.values()} == {0}
    # Every program multiplies on tensor cores; the gather of a sorted vocabulary keeps its loads wide.
    assert all(entry["tensor_core"] > 0 for entry in kernels.values())
