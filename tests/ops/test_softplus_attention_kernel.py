"""The softplus attention kernels, in Triton's interpreter, against float64."""

import functools
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2k.core.mutation import survivors
from p2k.core.seeding import generator
from p2k.core.tolerance import assert_as_good_as, relative_errors, tolerance
from p2k.ops.softplus_attention import (
    budget,
    kernel,
    layout,
    mutants,
    registration,
    reweighted_softplus_attention,
    softplus_attention,
)

# The interpreter warns where a compiled kernel would quietly compute the NaN that the next line discards.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
BOTH = {"plain": softplus_attention, "power 5": functools.partial(reweighted_softplus_attention, power=5)}
both = pytest.mark.parametrize("attend", BOTH.values(), ids=BOTH)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 16 by 16: loops, tails and skipped tiles at sizes an interpreter can afford."""
    monkeypatch.setattr(layout, "LAUNCH", mutants.SMALL_TILES)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def qkv(batch=1, heads=1, *, queries=20, keys=20, width=8, groups=None, value_width=None, dtype=torch.float32):
    groups, value_width = groups or heads, value_width or width
    shapes = (batch, heads, queries, width), (batch, groups, keys, width), (batch, groups, keys, value_width)
    return [random(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def run(attend, inputs, mask=None, *, backend="triton", upstream=None, **options):
    """(output, dq, dk, dv) under a random upstream gradient."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = attend(*leaves, mask, enable_gqa=True, backend=backend, **options)
    grad = random(*out.shape, seed=7, dtype=inputs[0].dtype) if upstream is None else upstream
    return out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))


def assert_as_good_as_eager(attend, inputs, mask=None, *, upstream=None, **options):
    shape = (*inputs[0].shape[:3], inputs[2].shape[3])
    grad = random(*shape, seed=7, dtype=inputs[0].dtype) if upstream is None else upstream
    settings = {"upstream": grad, **options}
    truth = run(attend, [x.double() for x in inputs], mask, backend="torch", **settings)
    eager = run(attend, inputs, mask, backend="torch", **settings)
    found = run(attend, inputs, mask, **settings)
    for name, a, exact, base in zip(("out", "dq", "dk", "dv"), found, truth, eager, strict=True):
        options = {"factor": 2 if name == "out" else 3, "length": inputs[1].shape[2], "dot": True, "name": name}
        # Where every term of a gradient cancels, one key or a uniform row say, there is nothing to be relative to.
        scale = exact.abs().clamp_min(1e-3)
        assert_as_good_as(a, exact, base, scale=scale, **options)


@pytest.mark.parametrize("length", [1, 17, 33])
@both
def test_odd_lengths(attend, length):
    assert_as_good_as_eager(attend, qkv(queries=length, keys=max(1, length - 3)))


@pytest.mark.parametrize(("width", "dtype"), [(3, torch.float32), (33, torch.float16)], ids=str)
@both
def test_odd_widths_and_dtypes(attend, width, dtype):
    assert_as_good_as_eager(attend, qkv(width=width, value_width=40 - width, dtype=dtype), is_causal=True)


@both
def test_bfloat16(attend):
    """Products take rounded operands, as tensor cores do; eager torch computes in float32, which is no measure."""
    inputs = qkv(width=16, dtype=torch.bfloat16)
    found, truth = run(attend, inputs), run(attend, [x.double() for x in inputs], backend="torch")
    for a, exact in zip(found, truth, strict=True):
        assert max(relative_errors(a, exact)) <= tolerance(torch.bfloat16)


@both
def test_float64_in_the_interpreter(attend):
    inputs = qkv(1, 2, groups=1, dtype=torch.float64)
    found, truth = (run(attend, inputs, backend=backend) for backend in ("triton", "torch"))
    for a, exact in zip(found, truth, strict=True):
        assert max(relative_errors(a, exact)) <= tolerance(torch.float64, dot=True)


MASKS = {
    "per key": random(18, seed=3) > -0.5,
    "per query and head": random(1, 2, 17, 18, seed=3) > 0,
    "per batch": random(2, 1, 1, 18, seed=3) > -1,
    "per query, of one column": random(17, 1, seed=3) > -1,
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_and_grouped_heads(mask):
    assert_as_good_as_eager(BOTH["power 5"], qkv(2, 2, groups=1, queries=17, keys=18), mask)


def test_grouped_heads_without_a_mask():
    assert_as_good_as_eager(BOTH["plain"], qkv(1, 4, groups=2, queries=9, keys=18))


@pytest.mark.parametrize("lengths", [(17, 33), (33, 17)], ids=str)
@both
def test_causal(attend, lengths):
    assert_as_good_as_eager(attend, qkv(queries=lengths[0], keys=lengths[1]), is_causal=True)


@both
def test_the_tiles_that_ship(monkeypatch, attend):
    monkeypatch.undo()
    assert_as_good_as_eager(attend, qkv(queries=40, keys=40), is_causal=True)


@both
def test_rows_that_see_nothing(attend):
    mask = torch.ones(20, 20, dtype=torch.bool)
    mask[3], mask[5:, :16], mask[16:] = False, False, False
    found = run(attend, qkv(), mask)
    assert all(x.isfinite().all() for x in found)
    for x in found[:2]:
        assert (x[:, :, ~mask.any(-1)] == 0).all()
    for queries, keys in ((0, 5), (5, 0)):
        assert all((x == 0).all() for x in run(attend, qkv(queries=queries, keys=keys)))
    assert run(attend, qkv(batch=0))[1].shape == (0, 1, 20, 8)


LAYOUTS = {
    "[B, T, H, D] seen head by head": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "columns of a wider tensor": lambda x: torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded heads": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("shape", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(shape):
    strided, up = [shape(x) for x in qkv(2, 2, queries=6, keys=6)], shape(random(2, 2, 6, 8, seed=7))
    found = run(BOTH["power 5"], strided, upstream=up)
    copied = run(BOTH["power 5"], [x.contiguous() for x in strided], upstream=up.contiguous())
    assert all(map(torch.equal, found, copied))


@both
def test_each_subset_of_gradients(attend):
    inputs = qkv(queries=6, keys=6)
    everything = run(attend, inputs)[1:]
    for needs in itertools.product([False, True], repeat=3):
        leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
        out = attend(*leaves, backend="triton")
        assert out.requires_grad == any(needs)
        if any(needs):
            out.backward(random(*out.shape, seed=7))
        for x, need, expected in zip(leaves, needs, everything, strict=True):
            assert torch.equal(x.grad, expected) if need else x.grad is None


def test_one_tensor_passed_three_times():
    x, grad = random(1, 1, 20, 8), random(1, 1, 20, 8, seed=1)
    found, truth, eager = (
        torch.autograd.grad(softplus_attention(y, y, y, backend=backend), y, grad.to(y.dtype))[0]
        for y, backend in (
            (x.clone().requires_grad_(), "triton"),
            (x.double().requires_grad_(), "torch"),
            (x.clone().requires_grad_(), "torch"),
        )
    )
    assert_as_good_as(found, truth, eager, factor=3, dot=True)


@both
def test_every_output_is_written_and_no_input_is(monkeypatch, attend):
    empty, new_empty = torch.empty_like, torch.Tensor.new_empty
    poisoned = lambda x: x.fill_(torch.nan) if x.is_floating_point() else x  # noqa: E731
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))
    for mask, causal in ((None, True), (random(20, 20, seed=5) > 0, False)):
        inputs = qkv()
        before = [x.clone() for x in inputs]
        assert all(x.isfinite().all() for x in run(attend, inputs, mask, is_causal=causal))
        assert all(map(torch.equal, before, inputs))


@both
def test_two_runs_agree_bit_for_bit(attend):
    inputs = qkv(1, 2, groups=1)
    assert all(map(torch.equal, run(attend, inputs), run(attend, inputs)))


@both
def test_huge_common_offsets_and_sizes(attend):
    q, k, v = qkv()
    assert_as_good_as_eager(attend, [q * 1e15, k * 1e-15, v])
    # A component that all queries and keys share: cosines differ in their last digits, eager's as well.
    q[..., 0], k[..., 0] = 100.0, 100.0
    assert_as_good_as_eager(attend, [q, k, v])


def test_all_keys_opposite_keep_their_digits():
    """Weights of the size e^-30 would vanish beside 1 in log(1 + u), and in float16 at all."""
    q = random(1, 1, 1, 8).expand(1, 1, 20, 8).contiguous()
    k, v = -q + 0.1 * random(1, 1, 20, 8, seed=1), random(1, 1, 20, 8, seed=2)
    assert_as_good_as_eager(softplus_attention, [q, k, v], scale=10.0)
    # The gradient of float16 is a difference of its own roundings here.
    inputs = [x.half() for x in (q, k, v)]
    found, eager = (softplus_attention(*inputs, scale=10.0, backend=backend) for backend in ("triton", "torch"))
    truth = softplus_attention(*(x.double() for x in inputs), scale=10.0)
    assert_as_good_as(found, truth, eager, factor=2, dot=True)


@both
def test_uniform_rows_stay_uniform(attend):
    q, _, v = qkv()
    k = q[:, :, :1] * random(1, 1, 20, 1, seed=5).exp()
    out, dq, *_ = run(attend, [q, k, v])
    assert_as_good_as(out, v.double().mean(2, keepdim=True).expand_as(out), v.mean(2, keepdim=True).expand_as(out),
                      factor=2, dot=True)  # fmt: skip
    assert dq.isfinite().all()


@both
def test_bad_numbers_stay_in_their_row(attend):
    q, k, v = qkv()
    clean = run(attend, [q, k, v])
    for bad in (torch.nan, torch.inf, -torch.inf):
        q = q.clone()
        q[0, 0, 3, 2] = bad
        dirty = run(attend, [q, k, v])
        others = torch.arange(20) != 3
        for x, y in zip(clean[:2], dirty[:2], strict=True):
            assert torch.equal(x[0, 0, others], y[0, 0, others])
            assert not y[0, 0, 3].isfinite().all()


def test_no_second_derivative():
    q, k, v = (x.requires_grad_() for x in qkv())
    (gradient,) = torch.autograd.grad(softplus_attention(q, k, v, backend="triton").sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='torch'"):
        gradient.sum().backward()


@pytest.mark.parametrize("power", [None, 5.0], ids=["plain", "power 5"])
@pytest.mark.parametrize("kind", ["causal", "bool"])
def test_opcheck(kind, power):
    q, k, v = qkv(1, 2, groups=1, queries=6, keys=6)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    mask = random(1, 1, 6, 6) > 0 if kind == "bool" else None
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(registration.forward_op, (*leaves, mask, kind == "causal", 0.5, power))
    detached = [x.detach() for x in leaves]
    saved = registration.forward_op(*detached, mask, False, 0.5, power)
    for needs in ([True] * 3, [True, False, False]):
        arguments = (torch.ones_like(saved[0]), detached, mask, saved, False, 0.5, power, needs)
        torch.library.opcheck(registration.backward_op, arguments, test_utils=["test_schema", "test_faketensor"])


@both
def test_compile_fullgraph_with_dynamic_lengths(attend):
    def function(q, k, v):
        return attend(q, k, v, is_causal=True, backend="triton").square().sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 9):
        inputs = qkv(queries=length, keys=length)
        found, expected = (
            torch.autograd.grad(f(*leaves), leaves)
            for f in (compiled, function)
            for leaves in [[x.detach().requires_grad_() for x in inputs]]
        )
        assert all(map(torch.equal, found, expected))


@both
def test_a_bad_key_stays_with_the_rows_that_see_it(attend):
    q, k, v = qkv()
    clean = run(attend, [q, k, v], is_causal=True)[0]
    for bad in (torch.nan, torch.inf, -torch.inf):
        dirty = [q, k.clone(), v]
        dirty[1][0, 0, 18, 3] = bad  # in the last tile, past the end of all earlier ones
        found, eager = (run(attend, dirty, is_causal=True, backend=backend)[0] for backend in ("triton", "torch"))
        assert torch.equal(found[:, :, :18], clean[:, :, :18])
        assert not found[:, :, 18:].isfinite().any()
        assert torch.equal(found.isfinite(), eager.isfinite())


# The fixture only makes tiles small, and does so once for all examples.
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(0, 2),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    queries=st.integers(1, 35),
    keys=st.integers(1, 35),
    widths=st.tuples(st.integers(2, 20), st.integers(1, 20)),
    kind=st.sampled_from(["none", "causal", "bool"]),
    power=st.sampled_from([None, 1.0, 5.0]),
)
def test_any_shape(batch, heads, queries, keys, widths, kind, power):
    attend = functools.partial(reweighted_softplus_attention, power=power) if power else softplus_attention
    shape = {"queries": queries, "keys": keys, "width": widths[0], "value_width": widths[1]}
    mask = random(batch, 1, queries, keys, seed=5) > 0 if kind == "bool" else None
    inputs = qkv(batch, heads[0], groups=heads[1], **shape)
    assert_as_good_as_eager(attend, inputs, mask, is_causal=kind == "causal")


def test_planted_bugs_are_caught():
    assert len(mutants.MUTANTS) >= 8
    assert survivors(kernel, mutants.MUTANTS, mutants.probe) == []


def test_no_budget_allows_a_spill_or_narrow_loads():
    kernels = budget.load()["kernels"]
    assert {entry["spilled_bytes"] for entry in kernels.values()} == {0}
    assert all(entry["wide_loads"] > 0 for entry in kernels.values())
