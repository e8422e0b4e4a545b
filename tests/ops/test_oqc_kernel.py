"""The OQC kernels, in Triton's interpreter, against float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oqc_cases import (
    STAGES,
    assert_kernel_as_good_as_eager,
    inject,
    inject_inputs,
    leaves,
    random,
    rank,
    run,
)

from p2k.core.mutation import survivors
from p2k.core.tolerance import relative_errors, tolerance
from p2k.ops.oqc import kernel, mutants

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
both = pytest.mark.parametrize("name", STAGES)
SIZES = [1, 2, 31, 33, 127, 128, 200, 257]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 columns in groups of 4 rows, two partial sums: wide rows and many groups at small sizes."""
    monkeypatch.setattr(kernel, "LAUNCH", {16: (4, 4)})
    monkeypatch.setattr(kernel, "PARTIALS", 2)


@both
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_odd_sizes(name, size, dtype):
    stage, inputs = STAGES[name]
    assert_kernel_as_good_as_eager(stage, inputs(5, size, dtype=dtype))


@both
@pytest.mark.parametrize("tokens", SIZES)
def test_odd_token_counts(name, tokens):
    stage, inputs = STAGES[name]
    assert_kernel_as_good_as_eager(stage, inputs(tokens, 24))


@both
@pytest.mark.parametrize("width", [1, 16, 17, 32, 47, 50])
@pytest.mark.parametrize("gate", ["none", "scalar", "token"])
def test_rows_wider_than_a_tile(name, width, gate, small_tiles):
    stage, inputs = STAGES[name]
    assert_kernel_as_good_as_eager(stage, inputs(11, width, gate=gate))


@both
def test_row_wider_than_the_largest_tile(name):
    stage, inputs = STAGES[name]
    assert_kernel_as_good_as_eager(stage, inputs(2, max(kernel.LAUNCH) + 3))


@both
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 1, 3, 7)], ids=str)
@pytest.mark.parametrize("gate", ["none", "scalar", "token"])
def test_leading_shapes_and_gates(name, shape, gate):
    stage, inputs = STAGES[name]
    assert_kernel_as_good_as_eager(stage, inputs(*shape, gate=gate))


def test_inject_without_channel_gate():
    for gate in ("none", "scalar", "token"):
        assert_kernel_as_good_as_eager(inject, inject_inputs(5, 33, gate=gate, pre_gate=False))


LAYOUTS = {
    "columns of a wider tensor": lambda x: torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[:1].expand_as(x),
    "every second column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "leading dimensions that do not merge": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@both
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(name, layout):
    stage, inputs = STAGES[name]
    dense = inputs(3, 4, 20)
    strided = [layout(x) if x is not None and x.ndim == 3 and x.shape[-1] > 1 else x for x in dense]
    assert_kernel_as_good_as_eager(stage, strided)
    # Read through strides and copied first must agree to the last bit; so must a strided upstream gradient.
    grad = random(3, 4, 20, seed=7)
    direct = run(stage, leaves(strided), layout(grad))
    copied = run(stage, [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in strided],
                 layout(grad).contiguous())  # fmt: skip
    assert all(map(torch.equal, direct, copied))


def test_strided_gate_and_channel_gate():
    main, aux, _, _ = inject_inputs(6, 20)
    gate, pre_gate = random(6, 3, seed=5)[:, 1:2], random(20, 2, seed=6)[:, 0]
    assert_kernel_as_good_as_eager(inject, [main, aux, gate, pre_gate])


@both
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("gate", ["scalar", "token"])
def test_no_tokens(name, shape, gate):
    stage, inputs = STAGES[name]
    present = leaves(inputs(*shape, gate=gate))
    out, *gradients = run(stage, present, torch.empty(shape))
    assert out.shape == shape
    for gradient, x in zip(gradients, present, strict=True):
        assert gradient.shape == x.shape
        assert torch.equal(gradient, torch.zeros_like(gradient))


@both
def test_each_subset_of_gradients(name):
    stage, inputs = STAGES[name]
    dense, grad = inputs(5, 20), random(5, 20, seed=9)
    everything = run(stage, leaves(dense), grad)
    for needs in itertools.product([False, True], repeat=len(dense)):
        chosen = [x.detach().requires_grad_(need) for x, need in zip(dense, needs, strict=True)]
        out = stage(*chosen)
        assert torch.equal(out, everything[0])
        assert out.requires_grad == any(needs)
        if any(needs):
            out.backward(grad)
        for x, need, expected in zip(chosen, needs, everything[1:], strict=True):
            assert torch.equal(x.grad, expected) if need else x.grad is None


@both
def test_gradients_not_asked_for_are_not_computed(name):
    stage, inputs = STAGES[name]
    dense = inputs(5, 20)
    out, c, inverse = getattr(kernel, f"{name}_forward")(*dense, *([1e-3] * (1 if name == "inject" else 2)))
    arguments = (out, *dense, c, inverse, *([] if name == "inject" else [1e-3]))
    for asked in range(len(dense)):
        needs = [index == asked for index in range(len(dense))]
        gradients = getattr(kernel, f"{name}_backward")(*arguments, needs)
        assert [gradient is not None for gradient in gradients] == needs


def test_one_tensor_passed_twice():
    x, grad = random(5, 20), random(5, 20, seed=1)
    for stage, build in ((inject, lambda x: (x, x, None, None)), (rank, lambda x: (x, x, x, x[0], None))):
        found, truth = (
            torch.autograd.grad(stage(*build(leaf), backend=backend), leaf, grad.to(leaf.dtype))[0]
            for leaf, backend in ((x.clone().requires_grad_(), "triton"), (x.double().requires_grad_(), "torch"))
        )
        scale = torch.maximum(truth.abs(), grad.double().abs())
        assert max(relative_errors(found, truth, scale=scale)) <= tolerance(torch.float32)


@both
@pytest.mark.usefixtures("small_tiles")
def test_every_output_element_is_written(name, monkeypatch):
    stage, inputs = STAGES[name]
    empty, new_empty = torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(torch.nan))
    for width, gate in ((13, "token"), (35, "scalar")):
        for result in run(stage, leaves(inputs(11, width, gate=gate)), random(11, width)):
            assert result.isfinite().all()


@both
def test_inputs_stay_as_they_were(name):
    stage, inputs = STAGES[name]
    dense, grad = inputs(5, 20), random(5, 20, seed=9)
    before = [x.clone() for x in (*dense, grad)]
    run(stage, leaves(dense), grad)
    assert all(map(torch.equal, before, (*dense, grad)))


@both
@pytest.mark.usefixtures("small_tiles")
def test_two_runs_agree_bit_for_bit(name):
    stage, inputs = STAGES[name]
    for width in (13, 35):
        dense, grad = inputs(23, width, gate="scalar"), random(23, width, seed=9)
        assert all(map(torch.equal, run(stage, leaves(dense), grad), run(stage, leaves(dense), grad)))


@both
def test_eager_torch_is_matched_far_from_the_origin(name):
    stage, inputs = STAGES[name]
    shifted = [x + 1e4 if x.ndim == 2 and x.shape[1] > 1 else x for x in inputs(6, 33)]
    # Parallel rows leave nothing but rounding; what counts is the size of the terms that cancel.
    grad = random(6, 33, seed=9)
    truth = run(stage, leaves(shifted, wide=True), grad.double(), backend="torch")
    eager = run(stage, leaves(shifted), grad, backend="torch")
    for found, exact, base in zip(run(stage, leaves(shifted), grad), truth, eager, strict=True):
        error, eager_error = (max(relative_errors(x, exact)) for x in (found, base))
        # Of two random draws of rounding error neither is the larger by an order of magnitude; a lost digit would be.
        assert error <= 10 * eager_error + tolerance(torch.float32)


def test_near_the_largest_half():
    """Squares overflow float16 from 256 on; the sums are float32, so only a result out of range may become inf."""
    main = (random(4, 33).clamp(-2, 2) * 3e4).half()
    aux = random(4, 33, seed=1, dtype=torch.float16)
    assert_kernel_as_good_as_eager(inject, [main, aux, None, None])
    overflown = inject(main, aux, torch.tensor(6e4).half(), None)
    assert overflown.isinf().any()
    assert not overflown.isnan().any()


@both
def test_denormals_and_zero_rows(name):
    stage, inputs = STAGES[name]
    # Down to squares that underflow: such a row has no direction, and its auxiliary vector passes whole.
    for scale in (1e-3, 1e-18, 1e-20, 1e-30, 1e-42, 0.0):
        for eps in (0.0, 1e-6):
            dense = inputs(5, 20)
            dense[0 if name == "inject" else 2] *= scale
            assert all(x.isfinite().all() for x in run(stage, leaves(dense), random(5, 20), eps=eps))
    assert torch.equal(stage(*dense, eps=0.0), stage(*dense, eps=1.0))


@both
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_numbers_stay_in_their_token(name, bad, small_tiles):
    stage, inputs = STAGES[name]
    for position, width in itertools.product(range(2 if name == "inject" else 3), (13, 35)):
        clean, grad = inputs(9, width), random(9, width, seed=9)
        dirty = [x.clone() for x in clean]
        dirty[position][3, 5] = bad
        others = torch.arange(9) != 3
        for x, y in zip(run(stage, leaves(clean), grad), run(stage, leaves(dirty), grad), strict=True):
            if x.shape[0] == 9 and x.ndim == 2:
                assert torch.equal(x[others], y[others])
        assert not stage(*dirty)[3].isfinite().all()


@both
def test_no_second_derivative(name):
    stage, inputs = STAGES[name]
    x = leaves(inputs(3, 5))
    (gradient,) = torch.autograd.grad(stage(*x).square().sum(), x[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='torch'"):
        gradient.sum().backward()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(STAGES)),
    leading=st.lists(st.integers(0, 4), max_size=2),
    width=st.integers(1, 40),
    gate=st.sampled_from(["none", "scalar", "token"]),
    seed=st.integers(0, 99),
)
def test_any_shape(name, leading, width, gate, seed):
    stage, inputs = STAGES[name]
    assert_kernel_as_good_as_eager(stage, inputs(*leading, width, gate=gate, seed=seed))


def test_no_planted_bug_survives():
    assert [mutant.why for mutant in survivors(kernel, mutants.MUTANTS, mutants.probe)] == []
