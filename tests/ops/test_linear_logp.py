"""linear_logp on both backends, the kernel in Triton's interpreter, against all logits in float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_logp_cases import (
    ABSENT,
    BACKENDS,
    DEVICE,
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


@both
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_huge_offset_of_all_logits_changes_nothing_but_their_sum(offset, backend, small_tiles):
    (hidden, weight, _), target = head(6, vocab=35, bias=False)
    # Eighths, so that the logits are exact with and without the offset.
    hidden, weight = (hidden.round(decimals=0), (weight * 2).round(decimals=0) / 8)
    grads = upstream(target)
    bias = torch.zeros(35, device=DEVICE)
    near, far = (run(linear_logp, (hidden, weight, b), target, grads, backend=backend) for b in (bias, bias + offset))
    for index, (x, y) in enumerate(zip(far, near, strict=True)):
        assert torch.equal(x, y) if index != 1 else torch.allclose(x - offset, y, atol=1e-3)  # one unit at 1e4
    assert_as_good_as_full((hidden, weight, bias + offset), target, backend=backend)


@both
def test_tokens_taken_out_of_the_vocabulary(backend, small_tiles):
    """A bias of -inf: as if the token were not there, and -inf for a target that is not."""
    (hidden, weight, bias), target = head(6, vocab=20)
    bias[3] = bias[17] = -torch.inf
    target[:] = torch.tensor([0, 1, 2, 4, 18, 19])
    kept = [index for index in range(20) if index not in (3, 17)]
    smaller = torch.tensor([0, 1, 2, 3, 16, 17], device=DEVICE)
    grads = upstream(target)
    *results, dhidden, dweight, dbias = run(linear_logp, (hidden, weight, bias), target, grads, backend=backend)
    truth = run(full, [x.double() for x in (hidden, weight[kept], bias[kept])], smaller, grads)
    for x, y in zip((*results, dhidden, dweight[kept], dbias[kept]), truth, strict=True):
        assert max(relative_errors(x, y)) <= tolerance(torch.float32, dot=True)
    assert not dweight[[3, 17]].any()
    target[0] = 3
    found = linear_logp(hidden, weight, target, bias=bias, backend=backend)
    assert found.logp[0] == -torch.inf
    assert found.logsumexp.isfinite().all()


@both
def test_absent_tokens(backend):
    """Their results and gradients are 0, and nothing they hold reaches the parameters."""
    inputs, target = head(3, 5, vocab=20)
    there = torch.ones(3, 5, dtype=torch.bool, device=DEVICE)
    there[0, :2] = there[2] = False
    grads = upstream(target)
    expected = run(linear_logp, (inputs[0][there], *inputs[1:]), target[there], [g[there] for g in grads],
                   backend=backend)  # fmt: skip
    for index in (ABSENT, 7, 10**12):
        marked = torch.where(there, target, index)
        dirty = [torch.where(there[..., None], inputs[0], torch.nan), *inputs[1:]]
        bad = [torch.where(there, grad, torch.nan) for grad in grads]
        if index == 7:
            marked[there & (target == 7)] = 8
        *found, dweight, dbias = run(linear_logp, dirty, marked, bad, backend=backend, ignore_index=index, chunk_size=4)
        for x in found:
            assert not x[~there].any()
        if index != 7:
            for x, y in zip((*(x[there] for x in found), dweight, dbias), expected, strict=True):
                assert max(relative_errors(x, y.double())) <= tolerance(torch.float32, dot=True)


@both
def test_all_absent(backend):
    inputs, target = head(5, vocab=20)
    found = run(linear_logp, inputs, torch.full_like(target, ABSENT), upstream(target), backend=backend)
    assert not any(x.any() for x in found)


@both
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_numbers_stay_in_their_token(bad, backend, small_tiles):
    inputs, target = head(9, vocab=35)
    grads = upstream(target)
    dirty = inputs[0].clone()
    dirty[3, 5] = bad
    clean = run(linear_logp, inputs, target, grads, backend=backend, chunk_size=4)
    found = run(linear_logp, (dirty, *inputs[1:]), target, grads, backend=backend, chunk_size=4)
    others = torch.arange(9, device=DEVICE) != 3
    for x, y in zip(found[:4], clean[:4], strict=True):
        assert torch.equal(x[others], y[others])
        assert not x[3].isfinite().all()
    assert not found[4].isfinite().all()


@both
def test_upstream_nan_stays_in_its_token(backend):
    inputs, target = head(9, vocab=20)
    grads = upstream(target)
    clean = run(linear_logp, inputs, target, grads, backend=backend)
    grads[2][3] = torch.nan
    found = run(linear_logp, inputs, target, grads, backend=backend)
    others = torch.arange(9, device=DEVICE) != 3
    assert torch.equal(found[3][others], clean[3][others])
    assert found[3][3].isnan().all()


@both
@pytest.mark.usefixtures("small_tiles")
def test_every_output_element_is_written(backend, monkeypatch):
    empty, new_empty = torch.empty_like, torch.Tensor.new_empty

    def poisoned(fresh):
        return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))
    for vocab in (13, 35):
        inputs, target = head(7, vocab=vocab)
        found = run(linear_logp, inputs, target, upstream(target), backend=backend, chunk_size=3)
        assert all(x.isfinite().all() for x in found)


@both
def test_inputs_stay_as_they_were(backend):
    inputs, target = head(7, vocab=20)
    target[2] = ABSENT
    grads = upstream(target)
    before = [x.clone() for x in (*inputs, target, *grads)]
    run(linear_logp, inputs, target, grads, backend=backend, chunk_size=3)
    assert all(map(torch.equal, before, (*inputs, target, *grads)))


@both
@pytest.mark.usefixtures("small_tiles")
def test_two_runs_agree_bit_for_bit(backend):
    inputs, target = head(23, vocab=35)
    grads = upstream(target)
    first, second = (run(linear_logp, inputs, target, grads, backend=backend, chunk_size=5) for _ in range(2))
    assert all(map(torch.equal, first, second))


@both
def test_half_gradients_are_summed_in_float32(backend):
    """Many small terms, of which none would move a bfloat16 sum of its size."""
    hidden = torch.ones(129, 1, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    target, grad = torch.zeros(129, dtype=torch.int64, device=DEVICE), torch.full((129,), 2.0**-6, device=DEVICE)
    grad[0] = 8
    (found,) = torch.autograd.grad(
        linear_logp(hidden, weight, target, chunk_size=1, backend=backend).logp, weight, grad
    )
    assert found.flatten().tolist() == [5.0, -5.0]  # half of 8 + 128 / 64


def test_agrees_with_cross_entropy():
    (hidden, weight, bias), target = head(9, vocab=20, dtype=torch.float64)
    found = linear_logp(hidden, weight, target, bias=bias)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), target, reduction="none")
    assert torch.allclose(-found.logp, expected, rtol=tolerance(torch.float64))
    distribution = torch.distributions.Categorical(logits=F.linear(hidden, weight, bias))
    assert torch.allclose(found.entropy, distribution.entropy(), rtol=tolerance(torch.float64))


@both
def test_identities_of_the_softmax(backend):
    """The gradient of logp and of entropy sums to zero over the vocabulary, that of log-sum-exp to the upstream's."""
    inputs, target = head(9, vocab=20, dtype=torch.float64)
    temperature = 0.5  # a power of two: the interpreter takes scalars in float32
    for index, expected in enumerate((0.0, 1 / temperature, 0.0)):
        bias = inputs[2].clone().requires_grad_()
        results = linear_logp(*inputs[:2], target, bias=bias, temperature=temperature, backend="torch")
        grad = random(9, dtype=torch.float64)
        (dbias,) = torch.autograd.grad(results[index], bias, grad)
        assert abs(dbias.sum() - expected * grad.sum()) <= 10 * tolerance(torch.float64)
    order = torch.randperm(20, device="cpu").to(DEVICE)
    place = order.argsort()
    inputs, target = head(9, vocab=20)
    grads = upstream(target)
    plain = run(linear_logp, inputs, target, grads, backend=backend)
    permuted = run(linear_logp, (inputs[0], inputs[1][order], inputs[2][order]), place[target], grads, backend=backend)
    for x, y in zip((*permuted[:4], permuted[4][place], permuted[5][place]), plain, strict=True):
        assert max(relative_errors(x, y.double())) <= tolerance(torch.float32, dot=True)


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
