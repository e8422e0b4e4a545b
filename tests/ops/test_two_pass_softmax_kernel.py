"""The row programs of softmax, in Triton's interpreter, against float64."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from p2k.core.errors import BackendUnavailable, P2KError
from p2k.core.mutation import survivors
from p2k.core.seeding import generator
from p2k.core.tolerance import assert_as_good_as, relative_errors, tolerance
from p2k.ops.two_pass_softmax import budget, kernel, mutants, registration, two_pass_softmax, work

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
each = pytest.mark.parametrize("program", kernel.PROGRAMS)
FORWARD, BACKWARD = 2, 3


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed, DEVICE), dtype=torch.float64, device=DEVICE).to(dtype)


@pytest.fixture
def small_tiles():
    """Two parts or tiles of 16 columns: wide rows at small sizes."""
    with mutants.small_tiles(kernel):
        yield


def run(function, x, grad):
    leaf = x.detach().requires_grad_()
    out = function(leaf)
    return out.detach(), torch.autograd.grad(out, leaf, grad.to(out.dtype))[0]


def assert_as_good_as_eager(program, x, *, seed=9):
    """Forward within twice, the gradient within three times the error of torch in the same dtype."""
    grad = random(*x.shape, seed=seed, dtype=x.dtype)
    truth = run(lambda x: torch.softmax(x, -1), x.double(), grad.double())
    eager = run(lambda x: torch.softmax(x, -1), x, grad)
    found = run(lambda x: registration.softmax(x, program), x, grad)
    # A gradient y (g - <g, y>) is a difference: with one column of two equal terms, which leave nothing.
    terms = truth[0] * (grad.double().abs() + (grad.double() * truth[0]).sum(-1, keepdim=True).abs())
    for actual, exact, base, factor, scale in zip(found, truth, eager, (2, 3), (truth[0], terms), strict=True):
        assert actual.dtype == x.dtype
        assert_as_good_as(actual, exact, base, factor=factor, length=x.shape[-1], scale=scale, name=program)


@each
@pytest.mark.parametrize("columns", [1, 2, 31, 33, 127, 128, 200, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_odd_sizes(program, columns, dtype):
    assert_as_good_as_eager(program, 3 * random(5, columns, dtype=dtype))


@each
@pytest.mark.parametrize("columns", [1, 7, 8, 9, 16, 17, 32, 47, 50])
def test_parts_and_tiles(program, columns, small_tiles):
    assert_as_good_as_eager(program, 3 * random(11, columns))


@pytest.mark.parametrize("rows", [1, 2, 31, 33, 128])
def test_odd_row_counts(rows):
    assert_as_good_as_eager("pair", random(rows, 24))


def test_row_wider_than_a_part_and_than_a_tile():
    assert_as_good_as_eager("pair", random(1, kernel.PART + 3))
    assert_as_good_as_eager("pair", random(2, kernel.WIDEST + 3))


@each
@pytest.mark.parametrize("span", [1.0, 100.0, 1e4, 1e5])
def test_equal_to_torch_over_a_wide_range(program, span, small_tiles):
    for columns in (13, 50):
        uniform = (torch.rand(5, columns, generator=generator(columns, DEVICE), device=DEVICE) * 2 - 1) * span
        truth = torch.softmax(uniform.double(), -1)
        for actual in (registration.softmax(uniform, program), torch.softmax(uniform, -1)):
            assert max(relative_errors(actual, truth)) < tolerance(torch.float32)


@each
@pytest.mark.parametrize("offset", [1e4, -1e4, 3e5, -3e5])
def test_huge_common_offsets(program, offset, small_tiles):
    """The offset rounds the arguments; what is left of them is what every form has to agree on."""
    for columns in (13, 50):
        assert_as_good_as_eager(program, random(6, columns) + offset)


@each
def test_special_rows_match_torch(program, small_tiles):
    inf, nan = math.inf, math.nan
    rows = [[-inf, 1.0, 2.0], [nan, 1.0, 2.0], [inf, 1.0, 2.0], [-inf] * 3, [0.0, -1e30, 5.0], [-inf, nan, -inf]]
    narrow = torch.tensor(rows)
    behind, before = torch.nn.functional.pad(narrow, (0, 30), value=-inf), torch.full((6, 30), -inf)
    for x in (narrow, behind, torch.cat([before, narrow], 1), torch.tensor([[-inf], [nan], [inf], [7.0]])):
        actual, eager = registration.softmax(x, program), torch.softmax(x, -1)
        assert torch.equal(actual.isnan(), eager.isnan())
        assert torch.allclose(actual, eager, atol=tolerance(torch.float32), equal_nan=True)
        assert (actual[x == -inf].nan_to_num() == 0).all()


@each
def test_one_column_is_one_up_to_a_rounding(program):
    """p (1 / p) need not be 1: the pair form promises it to one rounding only, the others exactly."""
    x = torch.linspace(-1e4, 1e4, 999)[:, None]
    error = (registration.softmax(x, program) - 1).abs().max()
    assert error <= (2**-23 if program == "pair" else 0)


def test_small_probabilities_keep_their_digits(small_tiles):
    """Without x - max to round, a probability of 1e-30 is as exact as one of 1/2; with it, digits go."""
    x = torch.cat([torch.full((8, 1), 66.0), random(8, 40)], 1)
    truth = torch.softmax(x.double(), -1)
    pair, online, eager = (
        ((y - truth) / truth).abs().max().item()
        for y in (registration.softmax(x), registration.softmax(x, "online"), torch.softmax(x, -1))
    )
    assert pair < tolerance(torch.float32)
    assert min(online, eager) > tolerance(torch.float32)


def test_probabilities_below_the_normal_range_are_zero():
    x = torch.tensor([[0.0, -87.0, -88.5, -200.0]])
    y = registration.softmax(x)
    assert (y[0, :2] > 0).all()
    assert (y[0, 2:] == 0).all()


LAYOUTS = {
    "columns of a wider tensor": lambda x: torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda x: x[:1].expand_as(x),
    "every second column": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "leading dimensions that do not merge": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("columns", [9, 35])
def test_layouts(layout, columns, small_tiles):
    x, grad = layout(random(3, 4, columns)), layout(random(3, 4, columns, seed=7))
    assert_as_good_as_eager("pair", x)
    copied = run(registration.softmax, x.clone(memory_format=torch.contiguous_format), grad.contiguous())
    assert all(map(torch.equal, run(registration.softmax, x, grad), copied))


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (0, 5), (2, 0, 5)], ids=str)
def test_shapes(shape):
    x, grad = random(*shape), random(*shape, seed=1)
    y, dx = run(lambda x: two_pass_softmax(x, backend="triton"), x, grad)
    assert y.shape == dx.shape == shape
    assert torch.allclose(y, torch.softmax(x, -1), atol=tolerance(torch.float32))


def test_a_gradient_only_where_one_is_asked_for():
    x = random(5, 20)
    assert not two_pass_softmax(x, backend="triton").requires_grad
    assert two_pass_softmax(x.requires_grad_(), backend="triton").requires_grad


@each
@pytest.mark.usefixtures("small_tiles")
def test_every_output_element_is_written_and_no_input(program, monkeypatch):
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: new_empty(*a, **k).fill_(torch.nan))
    for columns in (13, 16, 35):
        x, grad = random(11, columns), random(11, columns, seed=3)
        before = x.clone(), grad.clone()
        results = run(lambda x: registration.softmax(x, program), x, grad)
        assert all(result.isfinite().all() for result in results)
        assert all(map(torch.equal, before, (x, grad)))


@each
@pytest.mark.usefixtures("small_tiles")
def test_two_runs_agree_bit_for_bit(program):
    x, grad = random(5, 35), random(5, 35, seed=3)
    first, second = (run(lambda x: registration.softmax(x, program), x, grad) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_near_the_largest_half():
    assert_as_good_as_eager("pair", (random(4, 33).clamp(-2, 2) * 3e4).half())


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    program=st.sampled_from(sorted(kernel.PROGRAMS)),
    leading=st.lists(st.integers(0, 4), max_size=2),
    columns=st.integers(1, 40),
    span=st.sampled_from([0.0, 1.0, 300.0]),
    seed=st.integers(0, 99),
)
def test_any_shape(program, leading, columns, span, seed):
    assert_as_good_as_eager(program, span * random(*leading, columns, seed=seed))


def test_no_second_derivative():
    x = random(3, 5).requires_grad_()
    (gradient,) = torch.autograd.grad(registration.softmax(x).square().sum(), x, create_graph=True)
    with pytest.raises(P2KError, match="no second derivative; use backend='torch'"):
        gradient.sum().backward()


@pytest.mark.parametrize("strided", [False, True])
def test_opcheck(strided):
    x = random(4, 5, 6)
    x = (x.repeat_interleave(2, 0)[::2].transpose(0, 1) if strided else x).requires_grad_()
    for program in kernel.PROGRAMS:
        assert set(torch.library.opcheck(registration.forward_op, (x, program)).values()) == {"SUCCESS"}
    y = x.detach().softmax(-1)
    assert set(torch.library.opcheck(registration.backward_op, (y, y)).values()) == {"SUCCESS"}


def test_compiled_whole_and_not_again_for_another_size():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda x: two_pass_softmax(x, backend="triton"), fullgraph=True, dynamic=True, backend=counter
    )
    frames = []
    for rows, columns in ((6, 20), (7, 30), (9, 18)):
        x, grad = random(rows, columns), random(rows, columns, seed=9)
        eager = run(lambda x: two_pass_softmax(x, backend="triton"), x, grad)
        assert all(map(torch.equal, run(compiled, x, grad), eager))
        frames.append(counter.frame_count)
    assert frames[1] == frames[2]
    names = {str(node.target) for graph in counter.graphs for node in graph.graph.nodes}
    assert any("p2k.softmax_rows_forward" in name for name in names)


def test_auto_is_the_reference_on_a_cpu():
    x = torch.randn(5, 20, device="cpu")
    assert torch.equal(two_pass_softmax(x), two_pass_softmax(x, backend="torch"))
    batched = torch.randn(2, 3, 7, device="cpu")
    mapped = torch.vmap(two_pass_softmax)(batched)
    assert torch.allclose(mapped, torch.softmax(batched, -1), atol=tolerance(torch.float32))
    with pytest.raises(BackendUnavailable, match="a torch.func transform is active"):
        torch.vmap(lambda x: two_pass_softmax(x, backend="triton"))(batched)


def test_a_cpu_without_interpreter_is_told_what_is_missing():
    code = (
        "import torch; from p2k.ops.two_pass_softmax import two_pass_softmax as f; f(torch.ones(2), backend='triton')"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if not torch.cuda.is_available():
        assert "two_pass_softmax: backend='triton' cannot run: the tensor is on cpu" in result.stderr


def test_no_planted_bug_survives():
    assert [mutant.why for mutant in survivors(kernel, mutants.MUTANTS, mutants.probe)] == []
    for part in ("pairs", "online", "three passes", "backward"):
        assert sum(part in mutant.why for mutant in mutants.MUTANTS) >= 3


def test_no_budget_allows_a_spill_and_passes_show_in_the_machine_code():
    kernels = budget.load()["kernels"]
    assert all(used["spilled_bytes"] == 0 for used in kernels.values())
    # A tile of 4,096 float32 columns is four 128-bit loads per thread of 8 warps, once per pass.
    loads = {name: kernels[f"fp32 128256 {name}_program sm_90"]["wide_loads"] for name in kernel.PROGRAMS}
    assert loads == {"pair": 2 * 4, "online": 2 * 4, "three_pass": 3 * 4}


def test_recorded_instruction_counts_are_those_of_the_present_code():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "p2k.ops.two_pass_softmax.work", "fp32"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    measured, recorded = json.loads(result.stdout)["per_element"], work.load()["per_element"]
    for name, counts in measured.items():
        # Another compiler moves an instruction here or there.
        assert all(abs(count - recorded[name][kind]) <= 1 for kind, count in counts.items())
