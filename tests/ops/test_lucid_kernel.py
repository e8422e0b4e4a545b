"""The kernels of the preconditioned values, in Triton's interpreter, against float64."""

import itertools

import pytest
import torch

from p2k.core.mutation import survivors
from p2k.core.seeding import generator
from p2k.core.tolerance import assert_as_good_as, relative_errors, tolerance
from p2k.ops.lucid import (
    blocked,
    budget,
    kernel,
    lucid_attention,
    mutants,
    precondition_values,
    reference,
    registration,
)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


@pytest.fixture
def small_tiles(monkeypatch):
    """Blocks of 16: chains and tails at sizes an interpreter can afford."""
    for name, value in mutants.SMALL.items():
        monkeypatch.setattr(kernel, name, value)


def kv(keys=37, *, batch=1, heads=2, width=8, value_width=5, common=0.0, dtype=torch.float32):
    k, v = random(batch, heads, keys, width), random(batch, heads, keys, value_width, seed=1)
    return [(k + common).to(dtype), v.to(dtype)]


def run(function, inputs, upstream):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))


def assert_as_good_as_dense(inputs, live=None, upstream=None):
    scale = inputs[0].shape[-1] ** -0.5
    upstream = random(*inputs[1].shape, seed=7, dtype=inputs[1].dtype) if upstream is None else upstream

    def dense(k, v):
        return reference.precondition_values(k, v, live, scale)

    truth = run(dense, [x.double() for x in inputs], upstream)
    eager = run(dense, inputs, upstream)
    found = run(lambda k, v: precondition_values(k, v, live, backend="triton"), inputs, upstream)
    # dk is the part of a larger gradient at right angles to the key: its error is small against that one.
    keys = blocked.unit_keys(inputs[0].double()).requires_grad_()
    values = inputs[1].double().requires_grad_()
    du, _ = torch.autograd.grad(
        blocked.solve(keys, values, None if live is None else live.double(), scale * keys.shape[-1]),
        (keys, values), upstream.double(),
    )  # fmt: skip
    size = du / inputs[0].double().norm(dim=-1, keepdim=True).clamp_min(1e-30)
    for name, a, exact, base, scales in zip(("w", "dk", "dv"), found, truth, eager, (None, size, None), strict=True):
        assert_as_good_as(
            a, exact, base, factor=2 if name == "w" else 3, length=keys.shape[2], dot=True, scale=scales, name=name
        )


@pytest.mark.parametrize("keys", [1, 31, 65])
def test_odd_lengths_with_the_shipped_blocks(keys):
    assert_as_good_as_dense(kv(keys, heads=1))


@pytest.mark.parametrize("size", [16, 17, 33, 48])
@pytest.mark.usefixtures("small_tiles")
def test_lengths_around_small_blocks(size):
    assert_as_good_as_dense(kv(size, heads=1))


@pytest.mark.parametrize("widths", [(1, 1), (3, 17), (33, 40)], ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_odd_widths(widths):
    assert_as_good_as_dense(kv(20, width=widths[0], value_width=widths[1], common=0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("small_tiles")
def test_half_precision(dtype):
    assert_as_good_as_dense(kv(20, dtype=dtype, common=0.5))


@pytest.mark.parametrize("common", [0.0, 2.0, 1e4])
@pytest.mark.usefixtures("small_tiles")
def test_similar_keys_and_masks(common):
    inputs = kv(20, batch=2, heads=1, common=common)
    assert_as_good_as_dense(inputs)
    assert_as_good_as_dense(inputs, random(2, 1, 20, seed=5) > -0.5)


@pytest.mark.usefixtures("small_tiles")
def test_a_mask_that_leaves_no_key_leaves_the_values():
    k, v = kv(20)
    assert torch.equal(precondition_values(k, v, torch.zeros(1, 1, 1, dtype=torch.bool), backend="triton"), v)


def test_identical_keys_in_a_whole_block():
    """Powers of the triangle of ones would hold 4.7e17 here; the recursion subtracts neighbours."""
    v = random(1, 1, 70, 3)
    w = precondition_values(torch.ones(1, 1, 70, 4), v, backend="triton")
    expected = torch.cat((v[:, :, :1], v.diff(dim=2)), 2)
    assert max(relative_errors(w, expected.double())) <= tolerance(torch.float32, dot=True)


LAYOUTS = {
    "[B, T, H, D] seen head by head": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "columns of a wider tensor": lambda x: torch.cat([x, x], -1)[..., x.shape[-1] :],
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded heads": lambda x: x[:, :1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.usefixtures("small_tiles")
def test_layouts(layout):
    inputs, upstream = [layout(x) for x in kv(20)], layout(random(1, 2, 20, 5, seed=7))

    def solve(k, v):
        return precondition_values(k, v, backend="triton")

    strided = run(solve, inputs, upstream)
    copied = run(solve, [x.contiguous() for x in inputs], upstream.contiguous())
    for a, b in zip(strided, copied, strict=True):
        # Not bit for bit: torch sums the squares of strided keys in another order.
        assert max(relative_errors(a, b.double())) <= tolerance(torch.float32, dot=True)


@pytest.mark.usefixtures("small_tiles")
def test_each_subset_of_gradients():
    inputs, upstream = kv(20), random(1, 2, 20, 5, seed=7)
    everything = run(lambda k, v: precondition_values(k, v, backend="triton"), inputs, upstream)[1:]
    for needs in itertools.product([False, True], repeat=2):
        leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
        out = precondition_values(*leaves, backend="triton")
        assert out.requires_grad == any(needs)
        if any(needs):
            out.backward(upstream)
        for x, need, expected in zip(leaves, needs, everything, strict=True):
            assert torch.equal(x.grad, expected) if need else x.grad is None


@pytest.mark.usefixtures("small_tiles")
def test_every_output_is_written_and_no_input_is(monkeypatch):
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(torch.nan))
    inputs, upstream = kv(), random(1, 2, 37, 5, seed=7)
    before = [x.clone() for x in inputs]
    results = [run(lambda k, v: precondition_values(k, v, backend="triton"), inputs, upstream) for _ in range(2)]
    assert all(x.isfinite().all() for x in results[0])
    assert all(map(torch.equal, *results))
    assert all(map(torch.equal, before, inputs))


@pytest.mark.usefixtures("small_tiles")
def test_attention_on_the_kernel():
    q, (k, v) = random(1, 4, 20, 8, seed=3), kv(20)
    mask = random(1, 1, 20, 20, seed=4) > 0
    mask[..., 3, :] = False
    found = lucid_attention(q, k, v, mask, enable_gqa=True, backend="triton")
    assert (found[:, :, 3] == 0).all()
    truth = reference.lucid_attention(q.double(), k.double(), v.double(), mask, False, 8**-0.5)
    assert_as_good_as(found, truth, reference.lucid_attention(q, k, v, mask, False, 8**-0.5), factor=2, dot=True)


def test_empty_and_one_tensor_twice():
    for shape in ((0, 2, 5, 8), (1, 2, 0, 8)):
        found = run(
            lambda k, v: precondition_values(k, v, backend="triton"), [torch.ones(shape)] * 2, torch.ones(shape)
        )
        assert all(x.shape == shape for x in found)
    x, upstream = random(1, 1, 20, 8), random(1, 1, 20, 8, seed=7)
    found, truth = (
        torch.autograd.grad(precondition_values(y, y, backend=b), y, upstream.to(y.dtype))[0]
        for y, b in ((x.clone().requires_grad_(), "triton"), (x.double().requires_grad_(), "torch"))
    )
    assert_as_good_as(found, truth, truth.float(), factor=3, dot=True)


@pytest.mark.usefixtures("small_tiles")
def test_a_bad_number_reaches_later_keys_only():
    k, v = kv(heads=1)
    k[..., 20, 2] = torch.nan
    w = precondition_values(k, v, backend="triton")
    assert w[:, :, :16].isfinite().all()  # the blocks before
    assert w[:, :, 21:].isnan().all()


@pytest.mark.usefixtures("small_tiles")
def test_gradcheck_through_the_interpreter():
    inputs = [x.requires_grad_() for x in kv(18, heads=1, width=2, value_width=1, dtype=torch.float64)]
    assert torch.autograd.gradcheck(
        lambda k, v: precondition_values(k, v, backend="triton"), inputs, fast_mode=True
    )  # fmt: skip


def test_no_second_derivative():
    k, v = (x.requires_grad_() for x in kv(5))
    (gradient,) = torch.autograd.grad(precondition_values(k, v, backend="triton").sum(), k, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='torch'"):
        gradient.sum().backward()


@pytest.mark.parametrize("fused", [True, False])
def test_opcheck(fused):
    k, v = kv(20)
    u, live = blocked.unit_keys(k), torch.ones(1, 1, 20)
    torch.library.opcheck(registration.forward_op, (u.requires_grad_(), v.requires_grad_(), live, 2.0, fused))
    u, v = u.detach(), v.detach()
    w, inverse = registration.forward_op(u, v, live, 2.0, fused)
    for need in (True, False):
        arguments = (torch.ones_like(w), u, live, w, inverse, 2.0, need, fused)
        torch.library.opcheck(registration.backward_op, arguments, test_utils=["test_schema", "test_faketensor"])


def test_compile_fullgraph_with_dynamic_lengths():
    def function(k, v):
        return precondition_values(k, v, backend="triton").square().sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (20, 33):
        inputs = [x.requires_grad_() for x in kv(length)]
        found = torch.autograd.grad(compiled(*inputs), inputs)
        assert all(map(torch.equal, found, torch.autograd.grad(function(*inputs), inputs)))


def test_no_planted_bug_survives():
    assert survivors(kernel, mutants.MUTANTS, mutants.probe) == []


def test_no_budget_allows_a_spill_or_products_outside_the_tensor_cores():
    kernels = budget.load()["kernels"]
    assert {entry["spilled_bytes"] for entry in kernels.values()} == {0}
    assert all(entry["tensor_core"] > 0 for entry in kernels.values())
