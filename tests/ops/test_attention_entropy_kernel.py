"""The attention kernels, in Triton's interpreter, against float64."""

import itertools

import pytest
import torch

from p2k.core.mutation import survivors
from p2k.core.seeding import generator
from p2k.core.tolerance import assert_as_good_as, relative_errors
from p2k.ops.attention_entropy import attention_entropy, budget, kernel, mutants, reference, registration

# The interpreter warns where a compiled kernel would quietly compute the NaN that the next line discards.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def qkv(batch=1, heads=2, *, queries=20, keys=20, width=8, groups=None, value_width=None, dtype=torch.float32):
    groups, value_width = groups or heads, value_width or width
    shapes = (batch, heads, queries, width), (batch, groups, keys, width), (batch, groups, keys, value_width)
    return [random(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def run(inputs, mask=None, *, backend="triton", upstream=None, **options):
    """(output, entropy, dq, dk, dv) under a random upstream gradient of both results."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = attention_entropy(*leaves, mask, enable_gqa=True, backend=backend, **options)
    grads = upstream or [random(*x.shape, seed=7 + i, dtype=inputs[0].dtype) for i, x in enumerate(results)]
    gradients = torch.autograd.grad(results, leaves, [g.to(x.dtype) for g, x in zip(grads, results, strict=True)])
    return *(x.detach() for x in results), *gradients


def terms(inputs, mask, upstream, *, is_causal=False, scale=None):
    """Size of the terms that dq and dk add and subtract: where they cancel, an error is small against these."""
    q, k, v = (x.double() for x in inputs)
    grad, grad_entropy = (x.double() for x in upstream)
    scale = scale or q.shape[-1] ** -0.5
    scores, visible = reference.scores(q, k, mask, is_causal, scale)
    log_a = scores.log_softmax(-1).nan_to_num(nan=0.0, neginf=0.0)
    a = log_a.exp() if visible is None else log_a.exp() * visible
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    d_a = (grad @ v.mT).abs()
    size = d_a + (a * d_a).sum(-1, keepdim=True)
    size = scale * a * (size + grad_entropy.abs()[..., None] * (log_a.abs() - (a * log_a).sum(-1, keepdim=True)))
    dk = size.mT @ q.abs()
    return size @ k.abs(), dk.unflatten(1, (inputs[1].shape[1], -1)).sum(2) if dk.numel() else dk


def assert_as_good_as_eager(inputs, mask=None, *, upstream=None, **options):
    shape = (*inputs[0].shape[:-1], inputs[2].shape[-1])
    upstream = upstream or [random(*shape, seed=7, dtype=inputs[0].dtype), random(*shape[:-1], seed=8)]
    truth = run([x.double() for x in inputs], mask, backend="torch", upstream=upstream, **options)
    eager = run(inputs, mask, backend="torch", upstream=upstream, **options)
    found = run(inputs, mask, upstream=upstream, **options)
    names = ("out", "entropy", "dq", "dk", "dv")
    scales = (None, torch.ones_like(truth[1]), *terms(inputs, mask, upstream, **options), None)
    for name, a, exact, base, size in zip(names, found, truth, eager, scales, strict=True):
        factor = 2 if name in ("out", "entropy") else 3
        # The floor of a sum of products: a tenth of the table's entry for dots.
        assert_as_good_as(a, exact, base, factor=factor, length=inputs[1].shape[2], dot=True, scale=size, name=name)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 by 16: loops, tails and skipped tiles at sizes an interpreter can afford."""
    monkeypatch.setattr(kernel, "LAUNCH", mutants.SMALL_TILES)


@pytest.mark.parametrize("length", [1, 2, 31, 33, 127, 128, 200])
def test_odd_lengths(length):
    assert_as_good_as_eager(qkv(queries=length, keys=max(1, length - 3)))


@pytest.mark.parametrize("width", [1, 3, 16, 31, 64, 65, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_odd_widths(width, dtype):
    assert_as_good_as_eager(qkv(width=width, value_width=129 - width, dtype=dtype))


@pytest.mark.parametrize("width", [129, 256])
def test_wide_heads_in_half_precision(width):
    assert_as_good_as_eager(qkv(queries=40, keys=40, width=width, value_width=385 - width, dtype=torch.float16))


MASKS = {
    "none": None,
    "per key": random(23, seed=3) > -0.5,
    "per query and key": random(17, 23, seed=3) > 0,
    "per head": random(1, 4, 17, 23, seed=3) > 0,
    "per batch": random(2, 1, 1, 23, seed=3) > -1,
    "full additive": random(2, 4, 17, 23, seed=3),
    "additive with -inf": random(2, 1, 17, 23, seed=3).masked_fill(random(2, 1, 17, 23, seed=4) > 0.5, -torch.inf),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.usefixtures("small_tiles")
def test_masks_and_grouped_heads(mask):
    assert_as_good_as_eager(qkv(2, 4, groups=2, queries=17, keys=23), mask)


@pytest.mark.parametrize("lengths", [(33, 33), (17, 40), (40, 17)], ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_causal(lengths):
    assert_as_good_as_eager(qkv(queries=lengths[0], keys=lengths[1]), is_causal=True)


@pytest.mark.usefixtures("small_tiles")
def test_rows_that_see_nothing():
    mask = torch.ones(20, 20, dtype=torch.bool)
    mask[3], mask[5:, :16], mask[16:] = False, False, False
    found = run(qkv(), mask)
    assert all(x.isfinite().all() for x in found)
    blind = ~mask.any(-1)
    for x in found[:3]:
        assert (x[:, :, blind] == 0).all()
    assert_as_good_as_eager(qkv(), mask)
    for queries, keys in ((0, 5), (5, 0)):
        assert all((x == 0).all() for x in run(qkv(queries=queries, keys=keys)))
    assert run(qkv(batch=0))[2].shape == (0, 2, 20, 8)


LAYOUTS = {
    "[B, T, H, D] seen head by head": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "columns of a wider tensor": lambda x: torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "every second column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded heads": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout):
    strided = [layout(x) for x in qkv(2)]
    upstream = [layout(random(2, 2, 20, 8, seed=7)), random(2, 2, 20, seed=8).mT.contiguous().mT]
    assert_as_good_as_eager(strided, upstream=upstream)
    copied = [x.contiguous() for x in strided]
    assert all(
        map(torch.equal, run(strided, upstream=upstream), run(copied, upstream=[x.contiguous() for x in upstream]))
    )


def test_each_subset_of_gradients_and_of_upstream():
    inputs = qkv()
    everything = run(inputs)[2:]
    for needs in itertools.product([False, True], repeat=3):
        leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
        out, entropy = attention_entropy(*leaves, backend="triton")
        assert out.requires_grad == any(needs)
        if any(needs):
            torch.autograd.backward((out, entropy), (random(*out.shape, seed=7), random(*entropy.shape, seed=8)))
        for x, need, expected in zip(leaves, needs, everything, strict=True):
            assert torch.equal(x.grad, expected) if need else x.grad is None
    leaves = [x.detach().requires_grad_() for x in inputs]
    out, entropy = attention_entropy(*leaves, backend="triton")
    grad, grad_entropy = random(*out.shape, seed=7), random(*entropy.shape, seed=8)
    alone = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    rest = torch.autograd.grad(entropy, leaves[:2], grad_entropy)
    for a, b, both in zip(alone[:2], rest, everything, strict=False):
        torch.testing.assert_close(a + b, both, rtol=1e-4, atol=1e-5)  # two sums of float32 in another order
    # Without a gradient of the entropy the programs do plain attention's work, to the last bit.
    zeros = run(inputs, upstream=[grad, torch.zeros_like(entropy)])[2:]
    assert all(map(torch.equal, alone, zeros))


def test_one_tensor_passed_three_times():
    x, grads = random(1, 2, 20, 8), (random(1, 2, 20, 8, seed=1), random(1, 2, 20, seed=2))
    found, truth = (
        torch.autograd.grad(attention_entropy(y, y, y, backend=backend), y, [g.to(y.dtype) for g in grads])[0]
        for y, backend in ((x.clone().requires_grad_(), "triton"), (x.double().requires_grad_(), "torch"))
    )
    assert_as_good_as(found, truth, truth.float(), factor=3, dot=True)


@pytest.mark.usefixtures("small_tiles")
def test_every_output_is_written_and_no_input_is(monkeypatch):
    empty, new_empty = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(torch.nan))
    for mask, causal in ((None, False), (None, True), (random(20, 20, seed=5) > 0, False)):
        inputs = qkv()
        before = [x.clone() for x in inputs]
        assert all(x.isfinite().all() for x in run(inputs, mask, is_causal=causal))
        assert all(map(torch.equal, before, inputs))


@pytest.mark.usefixtures("small_tiles")
def test_two_runs_agree_bit_for_bit():
    inputs = qkv(2, 4, groups=2, queries=33, keys=33)
    assert all(map(torch.equal, run(inputs), run(inputs)))


@pytest.mark.parametrize("size", [1e-20, 30.0])
def test_extreme_scores(size):
    q, k, v = qkv()
    assert_as_good_as_eager([q * size, k, v])


def test_scores_of_ten_thousand():
    q, k, v = qkv()
    inputs = [q * 1e4, k, v]
    found, truth = run(inputs), run([x.double() for x in inputs], backend="torch")
    upstream = [random(1, 2, 20, 8, seed=7), random(1, 2, 20, seed=8)]
    # The two gradient programs round a score of 1e4 differently, by 1e-3: a one-hot row is 1 within that.
    score = (inputs[0] @ k.mT).abs().max() * 8**-0.5 * torch.finfo(torch.float32).eps
    for a, b, size in zip(
        found[:4], truth, (None, torch.ones_like(truth[1]), *terms(inputs, None, upstream)), strict=False
    ):
        assert max(relative_errors(a, b, scale=size)) <= score


def test_scores_far_from_the_origin():
    q, k, v = qkv()
    q[..., 0], k[..., 0] = 100.0, 100.0
    assert_as_good_as_eager([q, k, v], scale=1.0)
    assert_as_good_as_eager(qkv(), torch.full((20, 20), torch.finfo(torch.float32).min).triu(1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_numbers_stay_in_their_row(bad):
    q, k, v = qkv()
    clean = run([q, k, v])
    q = q.clone()
    q[0, 0, 3, 2] = bad
    dirty = run([q, k, v])
    others = torch.arange(20) != 3
    for x, y in zip(clean[:3], dirty[:3], strict=True):
        assert torch.equal(x[0, 0, others], y[0, 0, others])
        assert not y[0, 0, 3].isfinite().all()


@pytest.mark.usefixtures("small_tiles")
def test_gradcheck_through_the_interpreter(monkeypatch):
    monkeypatch.setattr(kernel, "LAUNCH", {name: {(4, 64): (16, 16, 4, 1)} for name in kernel.LAUNCH})
    inputs = [x.requires_grad_() for x in qkv(1, 2, groups=1, queries=3, keys=4, width=2, dtype=torch.float64)]

    def function(q, k, v):
        return attention_entropy(q, k, v, scale=0.5, enable_gqa=True, backend="triton")

    assert torch.autograd.gradcheck(function, inputs)


def test_no_second_derivative():
    q, k, v = (x.requires_grad_() for x in qkv())
    out, _ = attention_entropy(q, k, v, backend="triton")
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='torch'"):
        gradient.sum().backward()


@pytest.mark.parametrize("kind", ["plain", "transposed", "bool", "additive"])
def test_opcheck(kind):
    q, k, v = qkv(groups=1)
    if kind == "transposed":
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    mask = {"bool": random(1, 1, 20, 20) > 0, "additive": random(1, 1, 1, 20)}.get(kind)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(registration.forward_op, (*leaves, mask, kind == "plain", 0.5))
    detached = [x.detach() for x in leaves]
    rows = registration.forward_op(*detached, mask, False, 0.5)
    for needs in ([True] * 3, [True, False, False]):
        arguments = (torch.ones_like(rows[0]), torch.ones_like(rows[1]), detached, mask, rows, False, 0.5, needs)
        torch.library.opcheck(registration.backward_op, arguments, test_utils=["test_schema", "test_faketensor"])


def test_compile_fullgraph_with_dynamic_lengths():
    def function(q, k, v):
        out, entropy = attention_entropy(q, k, v, is_causal=True, backend="triton")
        return out.square().sum() + entropy.sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (20, 33):
        inputs = qkv(queries=length, keys=length)
        found, expected = (
            torch.autograd.grad(f(*leaves), leaves)
            for f in (compiled, function)
            for leaves in [[x.detach().requires_grad_() for x in inputs]]
        )
        assert all(map(torch.equal, found, expected))


def test_planted_bugs_are_caught():
    assert len(mutants.MUTANTS) >= 8
    assert survivors(kernel, mutants.MUTANTS, mutants.probe) == []


def test_no_budget_allows_a_spill_or_narrow_loads():
    kernels = budget.load()["kernels"]
    assert {entry["spilled_bytes"] for entry in kernels.values()} == {0}
    assert all(entry["wide_loads"] > 0 for entry in kernels.values())
