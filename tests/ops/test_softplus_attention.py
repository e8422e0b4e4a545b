"""Softplus attention: the reference against closed forms and torch, the op's promises and its bad input."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention

from p2k.core.errors import BackendUnavailable
from p2k.core.seeding import generator
from p2k.core.tolerance import tolerance
from p2k.ops.softplus_attention import (
    log_length_attention,
    reference,
    reweighted_softplus_attention,
    softplus_attention,
)

FLOAT64 = tolerance(torch.float64, dot=True)
ALL = {
    "plain": softplus_attention,
    "power 3": functools.partial(reweighted_softplus_attention, power=3),
    "power 15": reweighted_softplus_attention,
    "control": log_length_attention,
}
every = pytest.mark.parametrize("attend", ALL.values(), ids=ALL)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def qkv(batch=2, heads=3, *, queries=5, keys=7, width=4, groups=None, value_width=6, dtype=torch.float64):
    groups = groups or heads
    shapes = (batch, heads, queries, width), (batch, groups, keys, width), (batch, groups, keys, value_width)
    return [random(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def close(a, b, bound=FLOAT64):
    torch.testing.assert_close(a, b, rtol=bound, atol=bound)


def matrix(attend, q, k, *args, **options):
    """The weights of an attention: its output where the values are unit vectors."""
    v = torch.eye(k.shape[2], dtype=k.dtype).expand(*k.shape[:3], k.shape[2])
    return attend(q, k, v, *args, **options)


def naive(q, k, power=None, *, visible=None):
    """The formulas row by row, in the paper's order; for float64 rows without ties."""
    q, k = (x / x.norm(dim=-1, keepdim=True) for x in (q, k))
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool) if visible is None else visible
    rows = []
    for i, seen in enumerate(visible):
        n = int(seen.sum())
        a = torch.log1p(torch.exp(math.log(q.shape[3]) * math.log(n) * (q[:, :, i : i + 1] @ k.mT))) * seen
        a = a / a.sum(-1, keepdim=True)
        if power is not None:
            b = torch.relu(n * a - float(n > 3)) ** power
            a = b / b.sum(-1, keepdim=True)
        rows.append(a)
    return torch.cat(rows, 2)


@pytest.mark.parametrize("power", [None, 1.0, 3.0, 15.0])
@pytest.mark.parametrize("causal", [False, True])
def test_weights_are_the_formulas_and_rows_sum_to_one(power, causal):
    q, k, _ = qkv(queries=9, keys=9)
    attend = ALL["plain"] if power is None else functools.partial(reweighted_softplus_attention, power=power)
    found = matrix(attend, q, k, is_causal=causal)
    close(found, naive(q, k, power, visible=torch.ones(9, 9, dtype=torch.bool).tril() if causal else None))
    close(found.sum(-1), torch.ones(2, 3, 9, dtype=q.dtype))
    assert (found >= 0).all()


@every
def test_only_directions_of_queries_and_keys_matter(attend):
    q, k, v = qkv()
    for size in (1e-25, 3.0, 1e25):
        close(attend(size * q, k / size, v), attend(q, k, v))
    low = [x.float() for x in (q, k, v)]
    for size in (1e-25, 1e25):
        close(attend(size * low[0], low[1] / size, low[2]), attend(*low), tolerance(torch.float32, dot=True) * 15)


@every
def test_a_common_offset_of_the_mask_changes_nothing(attend):
    q, k, v = qkv()
    bias = random(5, 7, seed=4)
    for offset in (-1e4, 1e4):
        # The offset rounds the mask itself, by 1e4 round-offs; the power multiplies that.
        close(attend(q, k, v, bias + offset), attend(q, k, v, bias), 1e4 * 15 * FLOAT64)


def test_a_floating_mask_multiplies_the_first_weights():
    q, k, _ = qkv()
    bias = random(5, 7, seed=4)
    a = matrix(softplus_attention, q, k) * bias.exp()
    A = a / a.sum(-1, keepdim=True)
    close(matrix(softplus_attention, q, k, bias), A)
    b = torch.relu(7 * A - 1) ** 3
    close(matrix(ALL["power 3"], q, k, bias), b / b.sum(-1, keepdim=True))


@every
def test_masks_hide_keys_and_count_what_they_leave(attend):
    q, k, v = qkv()
    mask = torch.arange(7) < 4
    poisoned = [x.clone().index_fill_(2, torch.arange(4, 7), 1e30) for x in (k, v)]
    alone = attend(q, k[:, :, :4], v[:, :, :4])
    for given_mask in (mask, torch.zeros(7, dtype=q.dtype).masked_fill(~mask, -torch.inf)):
        close(attend(q, *poisoned, given_mask), alone)
    # Repeated along the keys: a mask of one column hides rows, not keys.
    column = torch.tensor([True, True, False, True, True])[:, None]
    close(attend(q, k, v, column), attend(q, k, v) * column)


@every
def test_causal_is_the_triangle_and_the_last_row_of_a_cache(attend):
    q, k, v = qkv(queries=7)
    whole = attend(q, k, v, is_causal=True)
    close(whole, attend(q, k, v, torch.ones(7, 7, dtype=torch.bool).tril()))
    for row in range(7):
        seen = [x[:, :, : row + 1] for x in (k, v)]
        close(attend(q[:, :, row : row + 1], *seen), whole[:, :, row : row + 1])


@every
def test_a_row_that_sees_nothing_is_zero_and_passes_no_gradient(attend):
    q, k, v = (x.requires_grad_() for x in qkv())
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    for given_mask in (mask, torch.zeros(5, 7, dtype=q.dtype).masked_fill(~mask, -torch.inf)):
        out = attend(q, k, v, given_mask)
        assert (out[:, :, 2] == 0).all()
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(x.isfinite().all() for x in gradients)
        assert (gradients[0][:, :, 2] == 0).all()
    assert (attend(q, k[:, :, :0], v[:, :, :0]) == 0).all()


@every
def test_one_token(attend):
    q, k, v = qkv(queries=1, keys=1)
    for options in ({}, {"is_causal": True}):
        assert torch.equal(attend(q, k, v, **options), v)  # log 1 = 0: the score is 0 times the cosine, the weight 1


@every
def test_uniform_where_torch_is(attend):
    q, k, v = qkv()
    uniform = scaled_dot_product_attention(torch.zeros_like(q), k, v)
    close(attend(torch.zeros_like(q), k, v), uniform)
    parallel = k[:, :, :1] * random(2, 3, 7, 1, seed=5).exp()
    for dtype in (torch.float32, torch.float64):
        low = [x.to(dtype) for x in (q, parallel, v)]
        close(attend(*low), uniform.to(dtype), tolerance(dtype, dot=True))


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "additive"])
def test_the_control_is_torch_attention_on_scaled_cosines(kind):
    q, k, v = qkv(queries=7)
    mask = {"bool": random(7, 7, seed=9) > -1, "additive": random(7, 7, seed=9)}.get(kind)
    count = torch.full((7, 1), 7) if kind in ("none", "additive") else None
    count = torch.arange(1, 8)[:, None] if kind == "causal" else count
    count = mask.sum(-1, keepdim=True) if kind == "bool" else count
    q_hat, k_hat = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    found = log_length_attention(q, k, v, mask, is_causal=kind == "causal")
    options = {"attn_mask": mask, "is_causal": kind == "causal", "scale": math.log(4)}
    close(found, scaled_dot_product_attention(count.double().log() * q_hat, k_hat, v, **options))


def test_softplus_approaches_the_control_below_and_the_mean_above():
    """Far below 0 softplus is the exponential, far above it is linear: shift the scores by a shared component."""
    q, k, v = qkv(batch=1, heads=1, queries=1, width=3)
    shared = torch.nn.functional.pad(torch.nn.functional.normalize(q, dim=-1) * 1e-2, (0, 1), value=-1.0)
    keys = torch.nn.functional.pad(torch.nn.functional.normalize(k, dim=-1) * 1e-2, (0, 1), value=1.0)
    scale = 200 / math.log(7)
    # All scores lie near -200 and differ by a few hundredths.
    close(softplus_attention(shared, keys, v, scale=scale), log_length_attention(shared, keys, v, scale=scale))
    above = matrix(softplus_attention, -shared, keys, scale=scale)
    assert (above - 1 / 7).abs().max() < 1e-4


def test_limits_of_the_power():
    q, k, _ = qkv(queries=40, keys=40, width=16)
    first = matrix(softplus_attention, q, k, is_causal=True)
    sharp = matrix(functools.partial(reweighted_softplus_attention, power=400), q, k, is_causal=True)
    assert torch.equal(sharp.argmax(-1), first.argmax(-1))
    # Short rows keep everything, so that there a power of 1 is no re-weighting.
    soft = matrix(functools.partial(reweighted_softplus_attention, power=1), q, k, is_causal=True)
    close(soft[:, :, :3], first[:, :, :3])
    # Below the average a weight is exactly 0.
    count = torch.arange(1, 41)[:, None]
    below = (count * first < 1) & (count > 3)
    assert (soft[below] == 0).all()
    assert (soft[~below & (first > 0)] > 0).all()


def test_a_constant_in_the_denominator_loses_mass_and_the_stable_form_does_not():
    q, k = random(1, 1, 4, 64), random(1, 1, 1024, 64, seed=1)
    A = reference.weights(q, k, None, False, math.log(64))
    count = torch.tensor(1024.0, dtype=torch.float64)
    close(reference.reweighted(A, count, 15.0).sum(-1), torch.ones(1, 1, 4, dtype=A.dtype))
    faint = 0.01 * A + 0.99 / 1024  # nearly uniform rows, whose powers vanish against the constant
    close(reference.reweighted(faint, count, 15.0).sum(-1), torch.ones(1, 1, 4, dtype=A.dtype))
    assert (reference.naive_reweighting(faint, count, 15.0).sum(-1) < 0.9).all()
    assert not reference.naive_reweighting(A.half() * 0 + 1, count.half(), 15.0).isfinite().any()


@pytest.mark.parametrize("power", [None, 3.0, 15.0])
def test_closed_form_backward_is_autograd(power):
    q, k, v = (x.requires_grad_() for x in qkv(queries=8, keys=12))
    grad = random(2, 3, 8, 6, seed=7)
    attend = ALL["plain"] if power is None else functools.partial(reweighted_softplus_attention, power=power)
    truth = torch.autograd.grad(attend(q, k, v, scale=1.3), (q, k, v), grad)
    with torch.no_grad():
        found = reference.attention_backward(grad, q, k, v, scale=1.3, power=power)
    for a, b in zip(found, truth, strict=True):
        close(a, b, 10 * FLOAT64)


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "additive"])
@every
def test_gradcheck_of_the_reference(attend, kind):
    inputs = [x.requires_grad_() for x in qkv(1, 2, queries=3, keys=5, width=2, groups=1, value_width=1)]
    mask = {"bool": random(1, 2, 3, 5, seed=3) > 0, "additive": random(3, 5, seed=3)}.get(kind)

    def function(q, k, v):
        return attend(q, k, v, mask, is_causal=kind == "causal", enable_gqa=True)

    assert torch.autograd.gradcheck(function, inputs)


def test_second_derivatives_of_the_reference():
    inputs = [x.requires_grad_() for x in qkv(1, 1, queries=2, keys=5, width=2, value_width=1)]
    assert torch.autograd.gradgradcheck(ALL["plain"], inputs)
    assert torch.autograd.gradgradcheck(ALL["power 3"], inputs)


def test_zero_vectors_have_no_gradient():
    q, k, v = qkv()
    q[:, :, 1], k[:, :, 2] = 0, 0
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for attend in (ALL["plain"], ALL["power 15"]):
        gradients = torch.autograd.grad(attend(*leaves).square().sum(), leaves)
        assert all(x.isfinite().all() for x in gradients)
        assert (gradients[0][:, :, 1] == 0).all()
        assert (gradients[1][:, :, 2] == 0).all()


@every
def test_half_precision_is_computed_in_float32(attend):
    q, k, v = qkv(width=16, dtype=torch.bfloat16)
    found = attend(q, k, v)
    assert found.dtype == torch.bfloat16
    if attend is not log_length_attention:
        assert torch.equal(found, attend(q.float(), k.float(), v.float()).bfloat16())
    # The control rounds its scaled queries: scores of up to 4 carry 2^-9 of that.
    close(found.double(), attend(q.double(), k.double(), v.double()), 4 * tolerance(torch.bfloat16))


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 2),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    queries=st.integers(1, 6),
    keys=st.integers(1, 6),
    width=st.integers(2, 5),
)
def test_any_shape(batch, heads, queries, keys, width):
    q, k, v = qkv(batch, heads[0], groups=heads[1], queries=queries, keys=keys, width=width)
    wide = [x.repeat_interleave(heads[0] // heads[1], 1) for x in (k, v)]
    close(softplus_attention(q, k, v, enable_gqa=True), naive(q, wide[0]) @ wide[1])
    for attend in ALL.values():
        close(attend(q, k, v, enable_gqa=True), attend(q, *wide))


# Plain and power share their masks.
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("plain", "causal"),
        *((name, kind) for name in ("power 15", "control") for kind in ("causal", "bool", "additive")),
    ],
)
def test_compiles_in_one_graph_with_dynamic_lengths_under_every_mask(name, kind):
    torch._dynamo.reset()
    attend = ALL[name]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for length in (7, 9, 8):
        leaves, up = [x.requires_grad_() for x in qkv(1, 1, queries=length, keys=length)], random(1, 1, length, 6)
        mask = random(length, length, seed=3)
        mask = {"bool": mask > 0, "additive": mask.masked_fill(mask < -1, -torch.inf)}.get(kind)
        if mask is not None:
            mask[2] = False if kind == "bool" else -torch.inf
        # Unlike `dynamic=True` this is an error where a length becomes a constant.
        for x in leaves:
            torch._dynamo.mark_dynamic(x, 2)
        if mask is not None:
            torch._dynamo.mark_dynamic(mask, [0, 1])
        found, expected = (f(*leaves, mask, is_causal=kind == "causal") for f in (compiled, attend))
        close(found, expected)
        assert mask is None or (found[:, :, 2] == 0).all()
        for x, y in zip(*(torch.autograd.grad(out, leaves, up) for out in (found, expected)), strict=True):
            close(x, y, 15 * FLOAT64)
    assert counter.frame_count == 1


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_blind_rows_are_zero_in_every_dtype(attend, dtype):
    leaves = [x.requires_grad_() for x in qkv(width=16, queries=33, keys=40, dtype=dtype)]
    mask = torch.ones(33, 40, dtype=torch.bool)
    mask[4], mask[20:, 7:] = False, False
    for given_mask in (mask, torch.zeros(33, 40, dtype=dtype).masked_fill(~mask, -torch.inf)):
        out = attend(*leaves, given_mask)
        assert (out[:, :, 4] == 0).all()
        gradients = torch.autograd.grad(out.float().sum(), leaves)
        assert all(x.isfinite().all() for x in (out, *gradients))
        assert (gradients[0][:, :, 4] == 0).all()


BAD = {
    "three dimensions": ({"q": random(3, 5, 4)}, ValueError, r"q must be \[batch, heads, length, width\]"),
    "dropout": ({"dropout_p": 0.1}, ValueError, "dropout_p must be 0"),
    "scale": ({"scale": -1.0}, ValueError, "scale must be > 0"),
    "two masks": ({"attn_mask": torch.ones(5, 7) > 0, "is_causal": True}, ValueError, "attn_mask or is_causal"),
    "mask dtype": ({"attn_mask": torch.ones(5, 7).long()}, TypeError, "bool or floating"),
    "dtype": ({"k": random(2, 3, 7, 4, dtype=torch.float32)}, TypeError, "k must have dtype"),
    "power": ({"power": 0.5}, ValueError, "power must be at least 1"),
    "infinite power": ({"power": math.inf}, ValueError, "power must be at least 1"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be"),
    "floating mask": ({"attn_mask": random(5, 7), "backend": "triton"}, ValueError, "the kernel takes bool masks"),
    "wide head": (
        {"q": random(2, 3, 5, 65), "k": random(2, 3, 7, 65), "backend": "triton"}, ValueError, "heads up to 64 wide",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, error, message = BAD[case]
    q, k, v = qkv()
    with pytest.raises(error, match=message):
        reweighted_softplus_attention(**({"q": q, "k": k, "v": v} | changes))


def test_triton_without_interpreter_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailable, match="softplus_attention: backend='triton' cannot run"):
        softplus_attention(*qkv(dtype=torch.float32), backend="triton")
