"""The polycom kernels, in Triton's interpreter, against float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from polycom_cases import DEVICE, NAMES, assert_kernel_as_good_as_eager, inputs, leaves, random, run
from torch._dynamo.testing import CompileCounterWithBackend

from p2k.core.mutation import survivors
from p2k.core.tolerance import relative_errors, tolerance
from p2k.ops.polycom import budget, kernel, mutants, poly_norm, poly_relu, reference, registration

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
both = pytest.mark.parametrize("name", NAMES)
SIZES = [1, 2, 31, 33, 127, 128, 200, 257]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 columns in groups of 4 rows, blocks of 16, two partial sums: many groups at small sizes."""
    monkeypatch.setattr(kernel, "LAUNCH", {16: (4, 4)})
    monkeypatch.setattr(kernel, "BLOCK", 16)
    monkeypatch.setattr(kernel, "PARTIALS", 2)


@both
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_odd_sizes(name, size, dtype):
    assert_kernel_as_good_as_eager(name, inputs(5, size, dtype=dtype))


@both
@pytest.mark.parametrize("tokens", SIZES)
def test_odd_token_counts(name, tokens):
    assert_kernel_as_good_as_eager(name, inputs(tokens, 24))


@both
@pytest.mark.parametrize("width", [1, 16, 17, 32, 47, 50])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_wider_than_a_tile(name, width, bias, small_tiles):
    assert_kernel_as_good_as_eager(name, inputs(11, width, bias=bias))


@both
def test_row_wider_than_the_largest_tile(name):
    assert_kernel_as_good_as_eager(name, inputs(2, max(kernel.LAUNCH) + 3))


@both
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 1, 3, 7)], ids=str)
def test_leading_shapes(name, shape):
    assert_kernel_as_good_as_eager(name, inputs(*shape))


def test_polyrelu_of_a_single_number():
    assert_kernel_as_good_as_eager("relu", [torch.tensor(0.7), *inputs(1)[1:]])


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
    x, weight, bias = inputs(3, 4, 20)
    strided, grad = [layout(x), weight.repeat_interleave(2)[::2], bias], random(3, 4, 20, seed=7)
    assert_kernel_as_good_as_eager(name, strided, grad=grad)
    # Read through strides and copied first must agree to the last bit; so must a strided upstream gradient.
    copies = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in strided]
    direct, copied = run(name, leaves(strided), layout(grad)), run(name, copies, layout(grad).contiguous())
    assert all(map(torch.equal, direct, copied))


@both
@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)], ids=str)
def test_no_tokens(name, shape):
    present = leaves(inputs(*shape))
    out, *gradients = run(name, present, torch.empty(shape))
    assert out.shape == shape
    for gradient, x in zip(gradients, present, strict=True):
        assert gradient.shape == x.shape
        assert torch.equal(gradient, torch.zeros_like(gradient))


@both
def test_each_subset_of_gradients(name):
    dense, grad = inputs(5, 20), random(5, 20, seed=9)
    everything = run(name, leaves(dense), grad)
    for needs in itertools.product([False, True], repeat=3):
        chosen = [x.detach().requires_grad_(need) for x, need in zip(dense, needs, strict=True)]
        out = NAMES[name](*chosen, backend="triton")
        assert torch.equal(out, everything[0])
        assert out.requires_grad == any(needs)
        if any(needs):
            out.backward(grad)
        for x, need, expected in zip(chosen, needs, everything[1:], strict=True):
            assert torch.equal(x.grad, expected) if need else x.grad is None
        saved = getattr(kernel, f"{name}_forward")(*dense, *([1e-6] if name == "norm" else []))[1]
        found = getattr(kernel, f"{name}_backward")(grad, *dense[:2], saved, list(needs))
        assert tuple(gradient is not None for gradient in found) == needs


@both
@pytest.mark.usefixtures("small_tiles")
def test_every_output_element_is_written(name, monkeypatch):
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(torch.nan))
    for width in (13, 35):
        for result in run(name, leaves(inputs(11, width)), random(11, width)):
            assert result.isfinite().all()


@both
def test_inputs_stay_as_they_were(name):
    """Also the upstream gradient, which a peer overwrites by default."""
    dense, grad = inputs(5, 20), random(5, 20, seed=9)
    before = [x.clone() for x in (*dense, grad)]
    run(name, leaves(dense), grad)
    assert all(map(torch.equal, before, (*dense, grad)))


@both
@pytest.mark.usefixtures("small_tiles")
def test_two_runs_agree_bit_for_bit(name):
    for width in (13, 35):
        dense, grad = inputs(23, width), random(23, width, seed=9)
        assert all(map(torch.equal, run(name, leaves(dense), grad), run(name, leaves(dense), grad)))


@both
def test_half_precision_at_fifty(name):
    """50^3 = 125,000 is beyond float16; the result is not, and neither is a gradient of this size."""
    x = (torch.sign(random(6, 64)) * 50 + random(6, 64, seed=1)).half()
    weight, bias = torch.full((3,), 1 / 3).half(), torch.tensor(1.0).half()
    grad = random(6, 64, seed=9) * 1e-3
    found = run(name, leaves([x, weight, bias]), grad.half())
    truth = run(name, leaves([x, weight, bias], wide=True), grad.half().double(), backend="torch")
    for result, exact in zip(found[:2], truth, strict=False):
        assert max(relative_errors(result, exact)) <= tolerance(torch.float16)
    # The cubes themselves do not fit, so that a kernel with half-precision powers returns inf or NaN.
    assert (x**3).isinf().any()


@pytest.mark.parametrize("size", [1e3, 2.7e6, 1e20, 3e38])
@pytest.mark.parametrize("width", [13, 35])
def test_rows_of_huge_values(size, width, small_tiles):
    """Sixth powers leave float32 at 2.6e6, and squares at 2e19; PolyNorm does not depend on the size at all."""
    x, weight, bias = inputs(9, width)
    x = x / x.abs().max() * size
    x[:3] = x[:3] / size  # rows of ordinary size among them
    out, dx, dweight, _ = run("norm", leaves([x, weight, bias]), random(9, width, seed=9))
    truth = run("norm", leaves([x, weight, bias], wide=True), random(9, width, seed=9).double(), backend="torch")
    for found, exact in ((out, truth[0]), (dweight, truth[2])):
        assert max(relative_errors(found, exact)) <= tolerance(torch.float32)
    assert max(relative_errors(dx[:3], truth[1][:3])) <= tolerance(torch.float32)
    if size < 1e30:  # beyond, the gradient of a row is below the smallest normal float32
        assert max(relative_errors(dx[3:], truth[1][3:])) <= tolerance(torch.float32)
    assert dx.isfinite().all()


def test_bfloat16_keeps_the_same_rows():
    """The interpreter truncates bfloat16 stores, so what is read is compared where it is kept in float32."""
    x, weight, bias = inputs(5, 33, dtype=torch.bfloat16)
    wide = kernel.norm_forward(x.float(), weight.float(), bias.float(), 1e-6)
    half = kernel.norm_forward(x, weight, bias, 1e-6)
    assert torch.equal(half[1], wide[1])
    assert torch.equal((x * 1e30).isfinite(), torch.ones_like(x, dtype=torch.bool))
    assert kernel.norm_forward(x * 1e30, weight, bias, 1e-6)[0].isfinite().all()


@pytest.mark.parametrize("size", [1e-3, 1e-10, 1e-20, 1e-42, 0.0])
def test_denormals_and_zero_rows(size):
    x, weight, bias = inputs(5, 20)
    results = run("norm", leaves([x * size, weight, bias]), random(5, 20, seed=9))
    assert all(result.isfinite().all() for result in results)
    assert_kernel_as_good_as_eager("norm", [x * max(size, 1e-3), weight, bias])
    if size == 0.0:
        assert torch.equal(results[0], bias.expand(5, 20))


def test_a_large_common_offset():
    x, weight, bias = inputs(6, 33)
    assert_kernel_as_good_as_eager("norm", [x + 1e4, weight, bias])


@both
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_numbers_stay_in_their_row(name, bad, small_tiles):
    clean, grad = inputs(9, 35), random(9, 35, seed=9)
    dirty = [x.clone() for x in clean]
    dirty[0][3, 5] = bad
    others = torch.arange(9) != 3
    found, expected = run(name, leaves(dirty), grad), run(name, leaves(clean), grad)
    assert all(torch.equal(x[others], y[others]) for x, y in zip(found[:2], expected[:2], strict=True))
    if name == "norm" or bad != -float("inf"):
        assert not found[0][3].isfinite().all()
    eager = NAMES[name](*dirty, backend="torch")
    assert torch.equal(found[0][3].isnan(), eager[3].isnan())


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coefficients_in_float32_beside_half_inputs(name, dtype):
    """What autocast hands over: half activations, float32 parameters, whose gradients stay float32."""
    x, weight, bias = leaves([inputs(4, 33, dtype=dtype)[0], *inputs(4, 33)[1:]])
    out, dx, dweight, dbias = run(name, [x, weight, bias], random(4, 33, seed=9))
    assert [t.dtype for t in (out, dx, dweight, dbias)] == [dtype, dtype, torch.float32, torch.float32]
    wide = leaves([x, weight, bias], wide=True)
    truth = run(name, wide, random(4, 33, seed=9).to(dtype).double(), backend="torch")
    assert max(relative_errors(dweight, truth[2])) <= tolerance(torch.float32)


@both
def test_no_second_derivative(name):
    x = leaves(inputs(3, 5))
    loss = NAMES[name](*x, backend="triton").square().sum()
    (gradient,) = torch.autograd.grad(loss, x[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='torch'"):
        gradient.sum().backward()


@both
@pytest.mark.parametrize("strided", [False, True])
def test_opcheck(name, strided):
    x, weight, bias = leaves(inputs(4, 5, 6))
    x = x.detach().transpose(0, 1).requires_grad_() if strided else x
    forward, backward = (getattr(registration, f"{name}_{way}") for way in ("forward", "backward"))
    scalars = (1e-3,) if name == "norm" else ()
    plain = [t.detach() for t in (x, weight, bias)]
    out, saved = forward(*plain, *scalars)
    for op, arguments in (
        (forward, (x, weight, bias, *scalars)),
        (backward, (out, *plain[:2], saved, [True, True, False])),
    ):
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@both
def test_compiled_whole_and_not_again_for_another_size(name):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda *t: NAMES[name](*t, backend="triton"), fullgraph=True, dynamic=True, backend=counter
    )
    frames = []
    for tokens, width in ((6, 20), (7, 33), (9, 18)):
        dense, grad = inputs(tokens, width), random(tokens, width, seed=9)
        found = leaves(dense)
        out = compiled(*found)
        results = (out.detach(), *torch.autograd.grad(out, found, grad))
        assert all(map(torch.equal, results, run(name, leaves(dense), grad)))
        frames.append(counter.frame_count)
    assert frames[1] == frames[2]


def test_gradcheck_through_the_interpreter(monkeypatch):
    if DEVICE == "cuda":
        return  # compiled kernels take no float64
    monkeypatch.setattr(kernel, "LAUNCH", {4: (2, 4)})
    monkeypatch.setattr(kernel, "BLOCK", 4)
    for width in (3, 6):
        tensors = leaves(inputs(2, width, dtype=torch.float64))
        # A power of two, because the interpreter hands scalars over in float32.
        assert torch.autograd.gradcheck(
            lambda *t: poly_norm(*t, eps=2**-10, backend="triton"), tensors, fast_mode=width > 4
        )
        assert torch.autograd.gradcheck(lambda *t: poly_relu(*t, backend="triton"), tensors, fast_mode=width > 4)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(sorted(NAMES)),
    leading=st.lists(st.integers(0, 4), max_size=2),
    width=st.integers(1, 40),
    scale=st.sampled_from([1e-2, 1.0, 10.0]),
    seed=st.integers(0, 99),
)
def test_any_shape(name, leading, width, scale, seed):
    x, weight, bias = inputs(*leading, width, seed=seed)
    assert_kernel_as_good_as_eager(name, [scale * x, weight, bias])


def test_kernel_and_reference_agree_on_the_exponent():
    x = torch.tensor([[0.5], [1.0], [2.0], [3.9], [1e10], [3e38]])
    assert torch.equal(kernel.norm_forward(x, torch.ones(3), None, 1e-6)[1][0], reference.exponent(x)[:, 0])


def test_no_planted_bug_survives():
    assert [mutant.why for mutant in survivors(kernel, mutants.MUTANTS, mutants.probe)] == []


def test_no_budget_allows_a_spill_or_narrow_loads():
    kernels = budget.load()["kernels"]
    assert {entry["spilled_bytes"] for entry in kernels.values()} == {0}
    assert all(entry["wide_loads"] > 0 for name, entry in kernels.items() if " 57 " not in name)
