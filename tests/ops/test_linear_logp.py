"""linear_logp on both backends, the kernel in Triton's interpreter, against all logits in float64."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_logp_cases import (
    ABSENT,
    BACKENDS,
    assert_as_good_as_full,
    full,
    head,
    random,
    run,
    targets,
    upstream,
)

from p2k.core.mutation import survivors
from p2k.core.tolerance import relative_errors, tolerance
from p2k.ops.linear_logp import bench, chunked, kernel, linear_logp, mutants, rows

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
both = pytest.mark.parametrize("backend", BACKENDS)
SIZES = [1, 2, 31, 33, 127, 128, 200, 257]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 columns in groups of 4 rows, and weights widened 5 rows at a time."""
    monkeypatch.setattr(kernel, "LAUNCH", {16: (4, 4)})
    monkeypatch.setattr(chunked, "BLOCK", 5)


@both
@pytest.mark.parametrize("vocab", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_vocabularies_and_dtypes(vocab, dtype, backend):
    inputs, target = head(5, vocab=vocab, dtype=dtype)
    assert_as_good_as_full(inputs, target, backend=backend, chunk_size=3)


@both
@pytest.mark.parametrize("tokens", SIZES)
def test_token_counts(tokens, backend):
    assert_as_good_as_full(*head(tokens, vocab=20), backend=backend, chunk_size=100)


@both
@pytest.mark.parametrize("dim", SIZES)
def test_hidden_widths(dim, backend):
    assert_as_good_as_full(*head(5, vocab=20, dim=dim), backend=backend)


@both
@pytest.mark.parametrize("vocab", [15, 16, 17, 32, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_several_tiles(vocab, dtype, backend, small_tiles):
    assert_as_good_as_full(*head(6, vocab=vocab, dtype=dtype), backend=backend, chunk_size=5)


@both
def test_vocabulary_wider_than_the_largest_tile(backend):
    assert_as_good_as_full(*head(2, vocab=max(kernel.LAUNCH) + 3), backend=backend)


@both
@pytest.mark.parametrize("shape", [(), (7,), (3, 7), (2, 1, 3, 7)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_leading_shapes(shape, bias, backend):
    inputs, target = head(*shape, vocab=11, bias=bias)
    assert_as_good_as_full(inputs, target, backend=backend, chunk_size=4)


@both
@pytest.mark.parametrize("temperature", [0.1, 0.7, 3.0])
def test_temperature(temperature, backend):
    assert_as_good_as_full(*head(6, vocab=20), backend=backend, temperature=temperature)


@both
def test_chunks_do_not_change_the_result(backend):
    """Rows do not see each other, so a chunk's size changes only the order in which the weight's gradient is summed."""
    inputs, target = head(13, vocab=20)
    grads = upstream(target)
    whole = run(linear_logp, inputs, target, grads, backend=backend, chunk_size=10**9)
    for size in (1, 2, 5, 12, 13):
        found = run(linear_logp, inputs, target, grads, backend=backend, chunk_size=size)
        for x, y in zip(found, whole, strict=True):
            assert max(relative_errors(x, y.double())) <= tolerance(torch.float32, dot=True)


LAYOUTS = {
    "columns of a wider tensor": lambda x: torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[:1].expand_as(x),
    "every second column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "dimensions that do not merge": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@both
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout, backend):
    inputs, target = head(3, 4, vocab=20)
    strided = [layout(x) if x.ndim > 1 else x.repeat_interleave(2)[::2] for x in inputs]
    assert_as_good_as_full(strided, layout(target), backend=backend, chunk_size=5)


@both
@pytest.mark.parametrize("shape", [(0,), (2, 0)], ids=str)
def test_no_tokens(shape, backend):
    inputs, target = head(*shape, vocab=5)
    *results, hidden, weight, bias = run(linear_logp, inputs, target, upstream(target), backend=backend)
    assert [x.shape for x in results] == [shape] * 3
    assert hidden.shape == inputs[0].shape
    assert not weight.any()
    assert not bias.any()
    assert weight.shape == (5, 8)


@both
def test_a_vocabulary_of_one_is_certain(backend):
    inputs, target = head(6, vocab=1)
    grads = upstream(target)
    grads[1].zero_()
    logp, _, entropy, *gradients = run(linear_logp, inputs, target, grads, backend=backend)
    assert not any(x.any() for x in (logp, entropy, *gradients))


@both
def test_each_subset_of_gradients(backend):
    inputs, target = head(7, vocab=20)
    grads = upstream(target)
    everything = run(linear_logp, inputs, target, grads, backend=backend, chunk_size=3)
    for needs in itertools.product([False, True], repeat=3):
        hidden, weight, bias = (x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True))
        results = linear_logp(hidden, weight, target, bias=bias, backend=backend, chunk_size=3)
        assert all(x.requires_grad == any(needs) for x in results)
        if any(needs):
            torch.autograd.backward(results, grads)
        for x, need, expected in zip((hidden, weight, bias), needs, everything[3:], strict=True):
            assert torch.equal(x.grad, expected) if need else x.grad is None


@both
def test_each_result_alone(backend):
    inputs, target = head(7, vocab=20)
    for index in range(3):
        grads = [grad * (position == index) for position, grad in enumerate(upstream(target))]
        leaves = [x.detach().requires_grad_() for x in inputs]
        results = linear_logp(leaves[0], leaves[1], target, bias=leaves[2], backend=backend)
        alone = torch.autograd.grad(results[index], leaves, grads[index])
        assert all(map(torch.equal, alone, run(linear_logp, inputs, target, grads, backend=backend)[3:]))


@pytest.mark.parametrize(
    ("needs", "products"), [((True, True), 3), ((True, False), 2), ((False, True), 2), ((False, False), 1)]
)
def test_only_the_products_that_are_needed(needs, products, monkeypatch):
    """One product per chunk in the forward pass; the backward pass recomputes it and adds one per gradient."""
    calls, product = [], chunked._product
    monkeypatch.setattr(chunked, "_product", lambda *x, **k: (calls.append(x[0].shape), product(*x, **k)))
    inputs, target = head(7, vocab=20)
    hidden, weight = (x.requires_grad_(need) for x, need in zip(inputs[:2], needs, strict=True))
    result = linear_logp(hidden, weight, target, bias=inputs[2].requires_grad_(), chunk_size=3, backend="torch")
    assert calls == [(3, 20), (3, 20), (1, 20)]
    calls.clear()
    result.logp.sum().backward()
    assert len(calls) == 3 * products


@both
def test_one_tensor_as_hidden_and_weight(backend):
    x, target = random(6, 8), targets(6, vocab=6)
    grads = upstream(target)
    (found,), (truth,) = (
        torch.autograd.grad(function(leaf, leaf, target), [leaf], [g.to(leaf.dtype) for g in grads])
        for leaf, function in (
            (x.clone().requires_grad_(), lambda *a: linear_logp(*a, backend=backend)),
            (x.double().requires_grad_(), full),
        )
    )
    assert max(relative_errors(found, truth)) <= tolerance(torch.float32, dot=True)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    backend=st.sampled_from(BACKENDS),
    leading=st.lists(st.integers(0, 4), max_size=2),
    size=st.tuples(st.integers(1, 40), st.integers(1, 20)),
    chunk_size=st.integers(1, 20),
    bias=st.booleans(),
    absent=st.booleans(),
    temperature=st.floats(0.25, 4.0),
    seed=st.integers(0, 99),
)
def test_any_shape(backend, leading, size, chunk_size, bias, absent, temperature, seed):
    vocab, dim = size
    inputs, target = head(*leading, vocab=vocab, dim=dim, bias=bias, seed=seed)
    if absent:
        target.view(-1)[::2] = ABSENT
    options = {"temperature": temperature, "chunk_size": chunk_size, "backend": backend}
    assert_as_good_as_full(inputs, target, **options)
    _, _, entropy = linear_logp(inputs[0], inputs[1], target, bias=inputs[2], **options)
    assert (entropy >= 0).all()
    assert (entropy <= math.log(vocab) + tolerance(torch.float32)).all()


@pytest.mark.parametrize(
    ("module", "bugs", "probe"),
    [
        (kernel, mutants.KERNEL_MUTANTS, mutants.probe_rows),
        (rows, mutants.ROWS_MUTANTS, mutants.probe_rows),
        (chunked, mutants.CHUNK_MUTANTS, mutants.probe_chunks),
    ],
    ids=["kernel", "rows", "chunks"],
)
def test_no_planted_bug_survives(module, bugs, probe):
    assert [mutant.why for mutant in survivors(module, bugs, probe)] == []


def test_a_tenth_of_the_memory_and_the_same_gradients():
    found = bench.measure_memory()
    assert found["ratio"] <= 0.1
    assert found["hidden_error"] <= tolerance(torch.float32, dot=True)
    assert found["weight_error"] <= tolerance(torch.float32, dot=True)


def test_workloads_name_what_they_measure():
    device = torch.device("cpu")
    (quick,) = bench.workloads(device, quick=True)
    assert quick.op == "linear_logp"
    assert quick.backward.flops == 3 * quick.forward.flops
    inputs = quick.make_inputs(torch.Generator().manual_seed(0), device, torch.float64)
    assert torch.allclose(quick.peers["chunked"](*inputs), quick.reference(*inputs), rtol=tolerance(torch.float64))
