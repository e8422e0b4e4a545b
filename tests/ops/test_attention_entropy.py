"""Attention with row entropies: the reference against closed forms, the op's promises and its bad input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from p2k.core.errors import BackendUnavailable
from p2k.core.seeding import generator
from p2k.core.tolerance import tolerance
from p2k.ops.attention_entropy import attention_entropy, entropy_by_second_call, reference

FLOAT64 = tolerance(torch.float64, dot=True)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def qkv(batch=2, heads=3, *, queries=5, keys=7, width=4, groups=None, value_width=6, dtype=torch.float64):
    groups = groups or heads
    shapes = (batch, heads, queries, width), (batch, groups, keys, width), (batch, groups, keys, value_width)
    return [random(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def close(a, b, bound=FLOAT64):
    torch.testing.assert_close(a, b, rtol=bound, atol=bound)


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "additive"])
def test_output_is_torch_attention_and_entropy_that_of_its_weights(kind):
    q, k, v = qkv()
    mask = {"bool": random(1, 3, 5, 7, seed=9) > -1, "additive": random(2, 1, 5, 7, seed=9)}.get(kind)
    out, entropy = attention_entropy(q, k, v, mask, is_causal=kind == "causal", scale=0.7)
    options = {"attn_mask": mask, "is_causal": kind == "causal", "scale": 0.7}
    close(out, scaled_dot_product_attention(q, k, v, **options))
    # Values that are unit vectors read the attention weights out of torch's own attention.
    weights = scaled_dot_product_attention(q, k, torch.eye(7, dtype=q.dtype).expand(2, 3, 7, 7), **options)
    close(entropy, reference.attention_row_entropy(weights))


def test_entropy_of_known_rows():
    q, k, v = qkv()
    _, equal = attention_entropy(torch.zeros_like(q), k, v)
    close(equal, torch.full((2, 3, 5), math.log(7), dtype=q.dtype))
    # One key scores 1e4 above the others: the row is one-hot to the last bit.
    k[:, :, 1:], k[:, :, 0] = 0, 100
    _, sharp = attention_entropy(torch.full_like(q, 25.0), k, v, scale=1.0)
    close(sharp, torch.zeros(2, 3, 5, dtype=q.dtype))
    _, one = attention_entropy(q, k[:, :, :1], v[:, :, :1])
    close(one, torch.zeros(2, 3, 5, dtype=q.dtype))
    # Two keys with odds e^d: H = log(1 + e^-d) + d / (1 + e^d).
    d = torch.linspace(0, 30, 5, dtype=q.dtype)
    pair = torch.stack([d, torch.zeros_like(d)], -1).reshape(1, 1, 5, 2)
    _, binary = attention_entropy(pair, torch.eye(2, dtype=q.dtype)[None, None], v[:1, :1, :2], scale=1.0)
    close(binary[0, 0], torch.log1p(torch.exp(-d)) + d / (1 + torch.exp(d)))


def test_entropy_is_bounded_and_blind_to_key_order_and_row_shifts():
    q, k, v = qkv()
    entropy = attention_entropy(q, k, v)[1]
    assert (entropy >= 0).all()
    assert (entropy <= math.log(7) + FLOAT64).all()
    order = torch.randperm(7, generator=generator(0))
    close(attention_entropy(q, k[:, :, order], v[:, :, order])[1], entropy)
    close(attention_entropy(q, k, v, random(2, 3, 5, 1, seed=5))[1], entropy)


def test_padded_keys_count_for_nothing():
    q, k, v = qkv()
    mask = torch.arange(7) < 4
    poisoned = [x.clone().index_fill_(2, torch.arange(4, 7), 1e30) for x in (k, v)]
    for given_mask in (mask, torch.zeros(7, dtype=q.dtype).masked_fill(~mask, -torch.inf)):
        padded = attention_entropy(q, *poisoned, given_mask)
        for found, expected in zip(padded, attention_entropy(q, k[:, :, :4], v[:, :, :4]), strict=True):
            close(found, expected)


def test_a_row_that_sees_nothing_is_zero_and_passes_no_gradient():
    q, k, v = (x.requires_grad_() for x in qkv())
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    for given_mask in (mask, torch.zeros(5, 7, dtype=q.dtype).masked_fill(~mask, -torch.inf)):
        out, entropy = attention_entropy(q, k, v, given_mask)
        assert (out[:, :, 2] == 0).all()
        assert (entropy[:, :, 2] == 0).all()
        gradients = torch.autograd.grad((out.sum() + entropy.sum()), (q, k, v))
        assert all(x.isfinite().all() for x in gradients)
        assert (gradients[0][:, :, 2] == 0).all()
    nothing = attention_entropy(q, k[:, :, :0], v[:, :, :0])
    assert all((x == 0).all() for x in nothing)


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "additive"])
def test_gradcheck_and_gradgradcheck_of_the_reference(kind):
    inputs = [x.requires_grad_() for x in qkv(1, 2, queries=3, keys=4, width=2, groups=1, value_width=2)]
    mask = {"bool": random(1, 2, 3, 4, seed=3) > 0, "additive": random(3, 4, seed=3)}.get(kind)

    def function(q, k, v):
        return attention_entropy(q, k, v, mask, is_causal=kind == "causal", enable_gqa=True)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_closed_form_backward_is_autograd():
    q, k, v = (x.requires_grad_() for x in qkv())
    grad, grad_entropy = random(2, 3, 5, 6, seed=7), random(2, 3, 5, seed=8)
    found = reference.attention_entropy_backward(grad, grad_entropy, q, k, v, scale=0.5)
    truth = torch.autograd.grad(attention_entropy(q, k, v, scale=0.5), (q, k, v), (grad, grad_entropy))
    for a, b in zip(found, truth, strict=True):
        close(a, b)


def test_score_gradient_of_the_entropy_sums_to_zero():
    scores = random(40, 9).requires_grad_()
    a = scores.softmax(-1)
    entropy = reference.attention_row_entropy(a)
    (gradient,) = torch.autograd.grad(entropy.sum(), scores)
    close(gradient, -a * (a.log() + entropy[:, None]))
    close(gradient.sum(-1), torch.zeros(40, dtype=scores.dtype))


@pytest.mark.parametrize("is_causal", [False, True])
def test_second_call_identity(is_causal):
    q, k, v = qkv()
    entropy = attention_entropy(q, k, v, is_causal=is_causal, scale=0.4)[1]
    close(entropy_by_second_call(q, k, is_causal=is_causal, scale=0.4), entropy)
    q, k, v = qkv(width=32, dtype=torch.float32)
    exact = attention_entropy(q.double(), k.double(), v.double(), is_causal=is_causal)[1]
    # lse and the mean score cancel: the error grows with the scores, from 1e-6 to 2e-5 at usual sizes.
    close(entropy_by_second_call(q, k, is_causal=is_causal).double(), exact, 2e-5)


def test_second_call_on_a_gpu_has_the_right_shapes():
    """No GPU needed: meta tensors carry the shapes of torch's fused call, whose rows are padded."""
    q, k = (torch.empty(2, 3, n, 16, device="meta", dtype=torch.float16) for n in (37, 50))
    _, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, k, None, True, 0.0, False, scale=1.0)
    assert lse.shape[:2] == (2, 3)
    assert lse.shape[2] >= 37
    assert lse.dtype == torch.float32


def test_half_precision_is_computed_wide():
    """Inputs rounded to bfloat16 and float32 arithmetic: what an eager bfloat16 softmax cannot do."""
    q, k, v = qkv(2, 4, queries=64, keys=64, width=32, dtype=torch.bfloat16)
    exact = attention_entropy(q.double(), k.double(), v.double())[1]
    found = attention_entropy(q, k, v)[1]
    assert found.dtype == torch.float32
    close(found.double(), exact, tolerance(torch.float32, dot=True))
    eager = (q @ k.mT * 32**-0.5).softmax(-1)
    error = (reference.attention_row_entropy(eager).double() - exact).abs().max()
    # The negative control loses two decimals; without that the bound above would mean nothing.
    assert error > 1e-2


def test_extreme_scores():
    for dtype in (torch.float32, torch.float64):
        for size in (1e-20, 1e2, 1e15):
            q, k, v = (x.to(dtype) for x in qkv())
            out, entropy = attention_entropy(q * size, k, v)
            assert out.isfinite().all()
            bound = tolerance(dtype)
            assert ((entropy >= -bound) & (entropy <= math.log(7) + bound)).all()


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 2),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    queries=st.integers(1, 6),
    keys=st.integers(1, 6),
    width=st.integers(1, 5),
)
def test_any_shape(batch, heads, queries, keys, width):
    q, k, v = qkv(batch, heads[0], groups=heads[1], queries=queries, keys=keys, width=width)
    out, entropy = attention_entropy(q, k, v, enable_gqa=True)
    k, v = (x.repeat_interleave(heads[0] // heads[1], 1) for x in (k, v))
    weights = (q @ k.mT * width**-0.5).softmax(-1)
    close(out, weights @ v)
    close(entropy, reference.attention_row_entropy(weights))


BAD = {
    "three dimensions": ({"q": random(3, 5, 4)}, ValueError, r"q must be \[batch, heads, length, width\]"),
    "batch": ({"k": random(1, 3, 7, 4)}, ValueError, "k must have shape"),
    "width": ({"k": random(2, 3, 7, 5)}, ValueError, "k must have shape"),
    "values": ({"v": random(2, 3, 6, 6)}, ValueError, r"v must have shape \(2, 3, 7, 'value width'\)"),
    "heads": ({"k": random(2, 1, 7, 4), "v": random(2, 1, 7, 6)}, ValueError, "or pass enable_gqa=True"),
    "groups": (
        {"k": random(2, 2, 7, 4), "v": random(2, 2, 7, 6), "enable_gqa": True}, ValueError, "a divisor of its heads",
    ),
    "dropout": ({"dropout_p": 0.1}, ValueError, "dropout_p must be 0"),
    "scale": ({"scale": -1.0}, ValueError, "scale must be > 0"),
    "two masks": ({"attn_mask": torch.ones(5, 7) > 0, "is_causal": True}, ValueError, "attn_mask or is_causal"),
    "mask shape": ({"attn_mask": torch.ones(5, 6) > 0}, ValueError, r"broadcast to \(2, 3, 5, 7\)"),
    "mask dtype": ({"attn_mask": torch.ones(5, 7).long()}, TypeError, "bool or floating"),
    "mask gradient": ({"attn_mask": torch.ones(5, 7).requires_grad_()}, ValueError, "must not require a gradient"),
    "dtype": ({"k": random(2, 3, 7, 4, dtype=torch.float32)}, TypeError, "k must have dtype"),
    "integer": ({"q": torch.ones(2, 3, 5, 4).long()}, TypeError, "q must be floating"),
    "device": ({"v": torch.empty(2, 3, 7, 6, device="meta", dtype=torch.float64)}, ValueError, "v must be on"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be"),
    "wide head": (
        {"q": random(2, 3, 5, 129), "k": random(2, 3, 7, 129), "backend": "triton"}, ValueError, "heads up to 128 wide",
    ),
    "wide half-precision values": (
        {name: random(2, 3, 7, width, dtype=torch.float16) for name, width in (("q", 4), ("k", 4), ("v", 257))}
        | {"backend": "triton"},
        ValueError, "heads up to 256 wide in torch.float16, got 257",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, error, message = BAD[case]
    q, k, v = qkv()
    with pytest.raises(error, match=message):
        attention_entropy(**({"q": q, "k": k, "v": v} | changes))


def test_triton_without_interpreter_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailable, match="attention_entropy: backend='triton' cannot run"):
        attention_entropy(*qkv(dtype=torch.float32), backend="triton")


def test_second_call_bad_input():
    q, k, _ = qkv(groups=1)
    with pytest.raises(ValueError, match="k must have 3 heads"):
        entropy_by_second_call(q, k)
