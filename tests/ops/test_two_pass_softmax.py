import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2k.core.errors import BackendUnavailable
from p2k.core.tolerance import assert_as_good_as, relative_errors, tolerance
from p2k.ops.two_pass_softmax import native, reference, two_pass_softmax

BACKENDS = ["torch", "native"]


@pytest.mark.parametrize("span", [1.0, 100.0, 1e4, 1e8])
def test_pairs_are_exponentials_with_a_bounded_mantissa(span):
    x = torch.linspace(-span, span, 10001, dtype=torch.float64)
    p, n = reference.exponential_pair(x)
    assert torch.equal(n, n.round())
    # Rounding x / ln 2 to an integer can go wrong by its own rounding at a tie, and p then passes the edge by as much.
    slack = 1 + 4 * torch.finfo(torch.float64).eps * span
    assert (p >= 2**-0.5 / slack).all()
    assert (p <= 2**0.5 * slack).all()
    log = p.log() + n * math.log(2)
    assert (log - x).abs().max() <= tolerance(torch.float64) * span


def test_sum_of_pairs_does_not_depend_on_the_tree():
    x = torch.randn(3, 257, dtype=torch.float64) * 300
    m, v = reference.sum_exponentials(x)
    shuffled, w = reference.sum_exponentials(x[:, torch.randperm(257)])
    total = m.log2() + v
    assert (total - (shuffled.log2() + w)).abs().max() <= tolerance(torch.float64) * total.abs().max()
    assert torch.allclose(total * math.log(2), x.logsumexp(-1), rtol=tolerance(torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("columns", [1, 2, 63, 64, 65, 127, 200, 1000])
@pytest.mark.parametrize("span", [1.0, 1000.0, 1e4])
def test_softmax_is_as_good_as_torch(backend, columns, span):
    x = (torch.rand(5, columns) * 2 - 1) * span
    truth = torch.softmax(x.double(), -1)
    actual, eager = two_pass_softmax(x, backend=backend), torch.softmax(x, -1)
    if backend == "torch":
        assert_as_good_as(actual, truth, eager, factor=2, length=columns)
    # The native polynomial has degree five and is off by up to 1.7e-7: more than eager torch, within the table.
    assert relative_errors(actual, truth)[0] < tolerance(torch.float32, columns) / 2
    assert (actual.sum(-1) - 1).abs().max() < tolerance(torch.float32, columns)


def test_one_column_gives_one():
    """Exactly where the reference divides; p (1 / p) of the native code is one rounding off for some arguments."""
    x = torch.linspace(-1e4, 1e4, 999)[:, None]
    assert torch.equal(two_pass_softmax(x, backend="torch"), torch.ones(999, 1))
    off = (two_pass_softmax(x, backend="native") - 1).abs()
    assert (off > 0).any()
    assert off.max() <= 2**-23


@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values_match_torch(backend):
    inf, nan = math.inf, math.nan
    rows = [[-inf, 1.0, 2.0], [nan, 1.0, 2.0], [inf, 1.0, 2.0], [-inf, -inf, -inf], [0.0, -1e30, 5.0]]
    x = torch.tensor(rows)
    assert torch.allclose(two_pass_softmax(x, backend=backend), torch.softmax(x, -1), equal_nan=True)


@pytest.mark.parametrize("columns", [64, 200])
def test_special_values_inside_the_native_lanes(columns):
    inf, nan = math.inf, math.nan
    x = torch.randn(6, columns)
    x[0, 3], x[1, 5], x[2, -1] = nan, inf, nan
    x[3, :64], x[4], x[5, ::2] = -inf, -inf, -inf
    for name in native.PROGRAMS if columns > 64 else ("two_pass",):
        y, truth = native.program(name)(x), torch.softmax(x, -1)
        if name == "two_pass":
            assert torch.equal(y.isnan(), truth.isnan())
        finite = [5] if columns == 64 else [3, 5]
        assert torch.allclose(y[finite], truth[finite], atol=tolerance(torch.float32))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("low", [-1000.0, 0.0])
def test_long_rows_element_by_element(backend, low):
    """65,536 columns, uniform up to 1000 in size, and every visible probability judged against itself."""
    x = torch.rand(1, 65536) * (1000.0 - low) + low
    assert worst_relative_error(two_pass_softmax(x, backend=backend), x) < tolerance(torch.float32) / 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_out_of_range(backend):
    """As the docstring says: below -1e9 an argument is -inf, also where torch would find a row of equals."""
    x = torch.tensor([[0.0, torch.finfo(torch.float32).min], [-2e9, -2e9]])
    y = two_pass_softmax(x, backend=backend)
    assert torch.equal(y[0], torch.tensor([1.0, 0.0]))
    assert y[1].isnan().all()


@pytest.mark.parametrize("lanes", [8, 32])
def test_the_number_of_native_lanes_changes_rounding_only(lanes, tmp_path, monkeypatch):
    x = torch.randn(20, 1000)
    usual = two_pass_softmax(x, backend="native")
    edited = tmp_path / "native.cpp"
    edited.write_text(native.SOURCE.read_text().replace("LANES = 64", f"LANES = {lanes}"))
    monkeypatch.setattr(native, "SOURCE", edited)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    native._library.cache_clear()
    other = two_pass_softmax(x, backend="native")
    native._library.cache_clear()
    assert not torch.equal(other, usual)
    assert ((other - usual).abs() / usual).max() <= tolerance(torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 7), (7,), (2, 3, 4)])
def test_shapes(backend, shape):
    x = torch.randn(shape)
    y = two_pass_softmax(x, backend=backend)
    assert y.shape == x.shape
    assert torch.allclose(y, torch.softmax(x, -1), atol=tolerance(torch.float32))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_with_random_upstream(backend):
    x = torch.randn(4, 50, requires_grad=True)
    upstream = torch.randn(4, 50)
    truth_x = x.detach().double().requires_grad_()
    truth = torch.autograd.grad(torch.softmax(truth_x, -1), truth_x, upstream.double())[0]
    eager = torch.autograd.grad(torch.softmax(x, -1), x, upstream)[0]
    actual = torch.autograd.grad(two_pass_softmax(x, backend=backend), x, upstream)[0]
    if backend == "torch":
        assert_as_good_as(actual, truth, eager, factor=3)
    assert relative_errors(actual, truth)[0] < tolerance(torch.float32)


def test_gradcheck_of_the_reference():
    x = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(two_pass_softmax, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_once(dtype):
    x = torch.randn(4, 300).to(dtype) * 10
    assert torch.equal(two_pass_softmax(x), torch.softmax(x.double(), -1).to(dtype))


@given(st.integers(1, 200), st.floats(-5e3, 5e3))
def test_a_common_shift_changes_rounding_only(columns, shift):
    x = torch.randn(columns, generator=torch.Generator().manual_seed(columns))
    moved = two_pass_softmax((x + shift), backend="native")
    truth = torch.softmax((x + shift).double(), -1)
    assert relative_errors(moved, truth)[0] < tolerance(torch.float32, columns)


@pytest.mark.parametrize("name", native.PROGRAMS)
@pytest.mark.parametrize("columns", [1, 64, 100, 5000])
def test_native_programs_agree_with_float64(name, columns):
    x = torch.randn(3, columns) * 20
    truth = torch.softmax(x.double(), -1)
    assert relative_errors(native.program(name)(x), truth)[0] < tolerance(torch.float32, columns) / 2


def test_strided_input_is_copied():
    x = torch.randn(6, 40).t()
    assert torch.allclose(two_pass_softmax(x, backend="native"), torch.softmax(x, -1), atol=tolerance(torch.float32))


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.ones(3, dtype=torch.int64), {}, TypeError, "x must be floating point, got torch.int64"),
        (torch.ones(3, 0), {}, ValueError, "last dimension of at least 1"),
        (torch.tensor(1.0), {}, ValueError, "last dimension of at least 1"),
        (
            torch.ones(3),
            {"backend": "cuda"},
            ValueError,
            "backend must be .* 'triton' or 'native', got 'cuda'",
        ),
        (torch.ones(3).double(), {"backend": "native"}, BackendUnavailable, "float32 on a CPU, got torch.float64"),
    ],
)
def test_bad_input(x, options, error, message):
    with pytest.raises(error, match=message):
        two_pass_softmax(x, **options)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(native.shutil, "which", lambda tool: None if tool == "g++" else tool)
    native._library.cache_clear()
    with pytest.raises(BackendUnavailable, match=r"g\+\+ not found: install a C\+\+ compiler"):
        two_pass_softmax(torch.ones(3), backend="native")


# Edits of the C++ source that must each change a result beyond the tolerance.
PLANTED = [
    ("0x1.62E43p-1f", "0x1.62E42p-1f", "last digit of ln 2"),
    ("x < LOWEST ? 0.0f : p", "p", "-inf is not zero"),
    ("+ 127) << 23", "+ 126) << 23", "powers of two halved"),
    ("0x1.555A80p-3f", "0x1.555A80p-4f", "wrong cubic coefficient"),
    ("for (; i < n; ++i) add(total, exponential(x[i]));", "", "tail lost"),
    ("k >= -127.0f ? k : -127.0f", "k", "exponent field wraps around"),
    ("term.exponent - total.exponent", "total.exponent - total.exponent", "exponent lost in the second pass"),
    ("sum.mantissa * power_of_two(sum.exponent - top)", "sum.mantissa", "old sum not rescaled"),
]


@pytest.mark.parametrize(("find", "replace", "why"), PLANTED)
def test_planted_bugs_are_caught(find, replace, why, tmp_path, monkeypatch):
    source = native.SOURCE.read_text()
    assert source.count(find) >= 1, f"{why}: the edit no longer applies"
    mutant = tmp_path / "native.cpp"
    mutant.write_text(source.replace(find, replace, 1))
    monkeypatch.setattr(native, "SOURCE", mutant)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    native._library.cache_clear()
    x = torch.cat([torch.linspace(-1e3, 1e3, 300).repeat(2, 1), torch.full((2, 1), -math.inf)], dim=1)
    x[1] = torch.cat([torch.randn(300) * 5, torch.tensor([-math.inf])])
    caught = worst_relative_error(two_pass_softmax(x, backend="native"), x)
    native._library.cache_clear()
    assert not caught <= tolerance(torch.float32), f"survived: {why}"


def test_the_same_probe_passes_the_unedited_source():
    x = torch.linspace(-1e3, 1e3, 300).repeat(2, 1)
    assert worst_relative_error(two_pass_softmax(x, backend="native"), x) <= tolerance(torch.float32)


def worst_relative_error(actual, x):
    """Error of each probability relative to itself: small ones count as much as large ones."""
    truth = torch.softmax(x.double(), -1)
    visible = (truth > 1e-30) | (truth == 0)
    return ((actual - truth).abs() / truth.clamp_min(1e-30))[visible].max().item()
