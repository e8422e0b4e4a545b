"""LUCID attention: the solve against closed forms, the blocked form against the dense one, masks, and bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from p2k.core.errors import BackendUnavailable
from p2k.core.seeding import generator
from p2k.core.tolerance import assert_as_good_as, tolerance
from p2k.ops.lucid import blocked, lucid_attention, precondition_values, reference

FLOAT64 = tolerance(torch.float64, dot=True)


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def qkv(batch=2, heads=4, *, queries=9, keys=9, width=4, groups=None, value_width=6, dtype=torch.float64):
    groups = groups or heads
    shapes = (batch, heads, queries, width), (batch, groups, keys, width), (batch, groups, keys, value_width)
    return [random(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(shapes)]


def close(a, b, bound=FLOAT64):
    torch.testing.assert_close(a, b, rtol=bound, atol=bound)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of four rows: a chain of blocks at sizes that a test can afford."""
    monkeypatch.setattr(blocked, "BLOCK", 4)


@pytest.mark.parametrize("keys", [1, 2, 63, 64, 65, 150])
def test_blocked_solve_is_the_dense_one_forward_and_backward(keys):
    k, v, grad = random(2, 1, keys, 8), random(2, 1, keys, 5, seed=1), random(2, 1, keys, 5, seed=2)
    live = random(2, 1, keys, seed=3) > -1
    leaves = k.requires_grad_(), v.requires_grad_()
    for mask in (None, live):
        found, truth = precondition_values(k, v, mask), reference.precondition_values(k, v, mask, 8**-0.5)
        close(found, truth)
        close(reference.preconditioner(k, mask, 8**-0.5) @ found, v)
        for a, b in zip(*(torch.autograd.grad(x, leaves, grad) for x in (found, truth)), strict=True):
            close(a, b, 10 * FLOAT64)


def test_the_preconditioner_is_unit_lower_triangular_with_entries_up_to_one():
    t = reference.preconditioner(random(2, 3, 40, 8), None, 8**-0.5)
    assert torch.equal(t, t.tril())
    assert (t.diagonal(dim1=-2, dim2=-1) == 1).all()
    below = t[..., torch.ones(40, 40).tril(-1).bool()]
    assert ((below > 0) & (below <= 1)).all()


@pytest.mark.parametrize("common", [0.0, 1.0, 3.0, 100.0])
def test_the_inverse_has_norm_at_most_two_for_any_keys(common):
    """T + T' - I is a matrix of inner products: its symmetric part is at least one half."""
    k = random(6, 1, 60, 4) * random(6, 1, 60, 1, seed=1) + common
    singular = torch.linalg.svdvals(reference.preconditioner(k, None, 0.5))
    assert (singular[..., -1] >= 0.5 - FLOAT64).all()
    assert (singular[..., 0] <= (60 * 61 / 2) ** 0.5).all()


def test_recurrence_and_delta_rule():
    k, v = random(1, 1, 20, 8), random(1, 1, 20, 3, seed=1)
    w = precondition_values(k, v)[0, 0]
    gram = reference.preconditioner(k, None, 8**-0.5)[0, 0]
    gram = gram + gram.tril(-1).mT
    features = torch.linalg.cholesky(gram)  # rows with the kernel's inner products
    memory, rows = torch.zeros(3, 20, dtype=v.dtype), []
    for feature, value in zip(features, v[0, 0], strict=True):
        rows.append(value - memory @ feature)
        memory = memory + torch.outer(rows[-1], feature)
    close(torch.stack(rows), w, 10 * FLOAT64)
    for t in range(20):
        close(v[0, 0, t] - gram[t, :t] @ w[:t], w[t])


@pytest.mark.usefixtures("small_blocks")
def test_identical_keys_keep_the_difference_of_neighbours():
    v = random(1, 2, 11, 3)
    w = precondition_values(torch.ones(1, 2, 11, 8, dtype=v.dtype), v)
    close(w[:, :, 1:], v.diff(dim=2))
    close(w[:, :, 0], v[:, :, 0])


@pytest.mark.usefixtures("small_blocks")
def test_orthogonal_keys_give_torch_attention_as_the_coupling_dies():
    q, k, v = qkv(keys=8, queries=8, width=8)
    k = torch.linalg.qr(k)[0]
    gaps = []
    for scale in (0.5, 1.0, 2.0, 10.0):  # couplings exp(-8 scale)
        gap = lucid_attention(q, k, v, scale=scale) - scaled_dot_product_attention(q, k, v, scale=scale)
        gaps.append(gap.abs().max().item())
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 1e-3
    assert gaps[-1] <= FLOAT64


@pytest.mark.usefixtures("small_blocks")
def test_later_keys_change_no_earlier_value():
    k, v = random(1, 1, 11, 4), random(1, 1, 11, 3, seed=1)
    before = precondition_values(k, v)
    k[:, :, 6:], v[:, :, 6:] = 9.0, -9.0
    assert torch.equal(precondition_values(k, v)[:, :, :6], before[:, :, :6])


@pytest.mark.usefixtures("small_blocks")
def test_gradcheck_and_gradgradcheck():
    inputs = random(1, 2, 6, 3).requires_grad_(), random(1, 2, 6, 2, seed=1).requires_grad_()
    live = torch.tensor([[[True, False, True, True, True, False]]])
    for mask in (None, live):
        assert torch.autograd.gradcheck(lambda k, v, mask=mask: precondition_values(k, v, mask), inputs)
        assert torch.autograd.gradgradcheck(lambda k, v, mask=mask: precondition_values(k, v, mask), inputs)


def test_vmap_runs_models_side_by_side():
    q, k, v = (x.requires_grad_() for x in (random(3, 1, 2, 70, 4, seed=s) for s in range(3)))
    with sdpa_kernel(SDPBackend.MATH):  # torch's fused attention has no batching rule
        found = torch.func.vmap(lambda *x: lucid_attention(*x, is_causal=True))(q, k, v)
    one_by_one = torch.stack([lucid_attention(*x, is_causal=True) for x in zip(q, k, v, strict=True)])
    close(found, one_by_one)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (found, one_by_one)), strict=True):
        close(a, b, 10 * FLOAT64)


OFFSETS = {"common offset": lambda k: k + 1e4, "huge": lambda k: k * 1e30, "tiny": lambda k: k * 1e-30}


@pytest.mark.parametrize("change", OFFSETS.values(), ids=OFFSETS)
def test_huge_offsets_and_sizes_in_float32(change):
    k, v = change(random(1, 1, 90, 8, dtype=torch.float32)), random(1, 1, 90, 4, seed=1, dtype=torch.float32)
    truth = reference.precondition_values(k.double(), v.double(), None, 8**-0.5)
    eager = reference.precondition_values(k, v, None, 8**-0.5)
    assert_as_good_as(precondition_values(k, v), truth, eager, factor=2, dot=True)


def test_zero_keys_are_finite_and_pass_no_gradient():
    k, v = random(1, 1, 5, 4), random(1, 1, 5, 3, seed=1)
    k[:, :, 2] = 0
    k.requires_grad_()
    w = precondition_values(k, v)
    close(w, reference.precondition_values(k, v, None, 0.5))
    (slope,) = torch.autograd.grad(w.square().sum(), k)
    assert slope.isfinite().all()
    assert (slope[:, :, 2] == 0).all()


def test_half_precision_is_solved_wide_and_rounded_once():
    k, v = random(1, 1, 90, 16, dtype=torch.bfloat16) + 1, random(1, 1, 90, 4, seed=1, dtype=torch.bfloat16)
    found = precondition_values(k, v)
    truth = reference.precondition_values(k.double(), v.double(), None, 0.25)
    assert found.dtype == torch.bfloat16
    close(found.double(), truth, 2**-8)  # one rounding to bfloat16


def test_no_matrix_of_all_pairs_is_held():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                self.size = max(self.size, x.numel() if isinstance(x, torch.Tensor) else 0)
            return out

    k, v = random(1, 1, 640, 8, dtype=torch.float32).requires_grad_(), random(1, 1, 640, 8, dtype=torch.float32)
    with Largest() as blocks:
        precondition_values(k, v).sum().backward()
    assert blocks.size <= blocked.BLOCK * 640
    with Largest() as dense:
        reference.precondition_values(k, v, None, 1.0)
    assert dense.size >= 640 * 640


MASKS = {
    "none": None,
    "padding": random(2, 1, 1, 9, seed=3) > -0.7,
    "one for all": random(9, 9, seed=3) > 0,
    "per head": random(2, 4, 9, 9, seed=3) > 0,
    "queries only": random(1, 1, 9, 1, seed=3) > 0,
    "additive": random(9, 9, seed=3),
    "additive with -inf": random(2, 1, 9, 9, seed=3).masked_fill(random(2, 1, 9, 9, seed=4) > 0.5, -torch.inf),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.usefixtures("small_blocks")
def test_masks_and_grouped_heads(mask):
    leaves = [x.requires_grad_() for x in qkv(groups=2)]
    grad = random(2, 4, 9, 6, seed=8)
    full = mask if mask is None else mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    found = lucid_attention(*leaves, mask, enable_gqa=True)
    truth = reference.lucid_attention(*leaves, full, False, 0.5)
    close(found, truth)
    for a, b in zip(*(torch.autograd.grad(x, leaves, grad) for x in (found, truth)), strict=True):
        close(a, b, 10 * FLOAT64)


def test_causal_is_top_left_like_torch():
    for queries, keys in ((9, 9), (5, 9), (9, 5)):
        q, k, v = qkv(queries=queries, keys=keys)
        w = precondition_values(k, v)
        close(lucid_attention(q, k, v, is_causal=True), scaled_dot_product_attention(q, k, w, is_causal=True))
        mask = torch.ones(queries, keys, dtype=torch.bool).tril()
        if queries == keys:
            close(lucid_attention(q, k, v, mask), lucid_attention(q, k, v, is_causal=True))


@pytest.mark.usefixtures("small_blocks")
def test_padded_keys_drop_out_of_the_preconditioner():
    q, k, v = qkv()
    keep = torch.tensor([1, 1, 0, 1, 0, 1, 1, 1, 0]).bool()
    poisoned = [x.clone().masked_fill(~keep[:, None], 1e30) for x in (k, v)]
    expected = lucid_attention(q, k[:, :, keep], v[:, :, keep])
    for mask in (keep, torch.zeros(9, dtype=q.dtype).masked_fill(~keep, -torch.inf)):
        close(lucid_attention(q, *poisoned, mask), expected)
    # Padding that sees itself, as in a causal model, is padding all the same.
    causal = torch.ones(9, 9, dtype=torch.bool).tril() & keep | torch.eye(9, dtype=torch.bool)
    rows = [0, 1, 3, 5, 6, 7]
    close(lucid_attention(q, *poisoned, causal)[:, :, rows],
          lucid_attention(q[:, :, keep], k[:, :, keep], v[:, :, keep], is_causal=True))  # fmt: skip


def test_a_window_enters_the_softmax_only():
    q, k, v = qkv()
    window = torch.ones(9, 9, dtype=torch.bool).tril().triu(-2)
    expected = scaled_dot_product_attention(q, k, precondition_values(k, v), attn_mask=window)
    close(lucid_attention(q, k, v, window), expected)


def test_a_row_that_sees_nothing_is_zero_and_passes_no_gradient():
    leaves = [x.requires_grad_() for x in qkv()]
    mask = torch.ones(9, 9, dtype=torch.bool)
    mask[2] = False
    for given_mask in (mask, torch.zeros(9, 9, dtype=torch.float64).masked_fill(~mask, -torch.inf)):
        out = lucid_attention(*leaves, given_mask)
        assert (out[:, :, 2] == 0).all()
        gradients = torch.autograd.grad(out.sum(), leaves)
        assert all(x.isfinite().all() for x in gradients)
        assert (gradients[0][:, :, 2] == 0).all()
    q, k, v = leaves
    assert (lucid_attention(q, k[:, :, :0], v[:, :, :0]) == 0).all()
    assert (lucid_attention(q, k, v, torch.zeros(9, dtype=torch.bool)) == 0).all()


def test_one_token_and_no_batch():
    q, k, v = qkv(queries=1, keys=1)
    close(lucid_attention(q, k, v), v)
    assert lucid_attention(*qkv(batch=0)).shape == (0, 4, 9, 6)
    assert lucid_attention(*qkv(queries=0)).shape == (2, 4, 0, 6)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 2),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    queries=st.integers(1, 6),
    keys=st.integers(1, 6),
    width=st.integers(1, 5),
)
def test_any_shape(batch, heads, queries, keys, width):
    inputs = qkv(batch, heads[0], groups=heads[1], queries=queries, keys=keys, width=width)
    found = lucid_attention(*inputs, enable_gqa=True)
    close(found, reference.lucid_attention(*inputs, None, False, width**-0.5))


def test_compile_fullgraph_with_dynamic_lengths():
    def function(q, k, v, mask):
        return lucid_attention(q, k, v, mask).square().sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (20, 70):
        leaves = [x.requires_grad_() for x in qkv(1, 2, queries=length, keys=length)]
        mask = random(1, 1, length, length, seed=5) > 0
        found = torch.autograd.grad(compiled(*leaves, mask), leaves)
        for a, b in zip(found, torch.autograd.grad(function(*leaves, mask), leaves), strict=True):
            close(a, b, 10 * FLOAT64)


BAD = {
    "three dimensions": ({"q": random(3, 5, 4)}, ValueError, r"q must be \[batch, heads, length, width\]"),
    "dropout": ({"dropout_p": 0.1}, ValueError, "dropout_p must be 0"),
    "two masks": ({"attn_mask": torch.ones(9, 9) > 0, "is_causal": True}, ValueError, "attn_mask or is_causal"),
    "mask shape": ({"attn_mask": torch.ones(5, 6) > 0}, ValueError, r"broadcast to \(2, 4, 9, 9\)"),
    "dtype": ({"k": random(2, 4, 9, 4, dtype=torch.float32)}, TypeError, "k must have dtype"),
    "backend": ({"backend": "cuda"}, ValueError, "backend must be"),
    "wide head": ({"q": random(2, 4, 9, 129), "k": random(2, 4, 9, 129), "backend": "triton"}, ValueError, "up to 128"),
}  # fmt: skip
BAD_SOLVE = {
    "three dimensions": ({"k": random(9, 4, 4)}, ValueError, r"k must be \[batch, heads, keys, width\]"),
    "values": ({"v": random(2, 4, 8, 6)}, ValueError, r"v must have shape \(2, 4, 9, 'value width'\)"),
    "mask dtype": ({"key_mask": torch.ones(2, 4, 9)}, TypeError, "key_mask must be bool"),
    "mask shape": ({"key_mask": torch.ones(9) > 0}, ValueError, r"key_mask must have shape \(2, 4, 9\)"),
    "scale": ({"scale": 0.0}, ValueError, "scale must be > 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    changes, error, message = BAD[case]
    with pytest.raises(error, match=f"lucid_attention: .*{message}"):
        lucid_attention(**(dict(zip("qkv", qkv(), strict=True)) | changes))


@pytest.mark.parametrize("case", BAD_SOLVE)
def test_bad_input_of_the_solve(case):
    changes, error, message = BAD_SOLVE[case]
    _, k, v = qkv()
    with pytest.raises(error, match=f"precondition_values: .*{message}"):
        precondition_values(**({"k": k, "v": v} | changes))


def test_triton_without_interpreter_on_a_cpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendUnavailable, match="lucid_attention: backend='triton' cannot run"):
        lucid_attention(*qkv(dtype=torch.float32), backend="triton")
