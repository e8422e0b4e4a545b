"""The StableMax kernel, in Triton's interpreter, against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stablemax_cases import DEVICE, assert_kernel_as_good_as_eager, eager, inputs, run

from p2k.core.mutation import survivors
from p2k.core.tolerance import relative_errors, tolerance
from p2k.ops.stablemax import kernel, mutants, stablemax_loss

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
SIZES = [1, 2, 31, 33, 127, 128, 200, 257]


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 columns in groups of 4 rows: wide rows and many groups at small sizes."""
    monkeypatch.setattr(kernel, "LAUNCH", {16: (4, 4)})


@pytest.mark.parametrize("classes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_odd_sizes(classes, dtype):
    assert_kernel_as_good_as_eager(*inputs(5, classes, dtype=dtype))


@pytest.mark.parametrize("tokens", SIZES)
def test_odd_token_counts(tokens):
    assert_kernel_as_good_as_eager(*inputs(tokens, 24))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("classes", [1, 16, 17, 32, 47, 50])
def test_rows_wider_than_a_tile(classes):
    assert_kernel_as_good_as_eager(*inputs(11, classes))


def test_row_wider_than_the_largest_tile():
    assert_kernel_as_good_as_eager(*inputs(2, max(kernel.LAUNCH) + 3))


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (2, 1, 3, 7), (0, 7), (2, 0, 7)], ids=str)
def test_leading_shapes_and_no_tokens(shape):
    assert_kernel_as_good_as_eager(*inputs(*shape))


LAYOUTS = {
    "columns of a wider tensor": lambda x: torch.cat([x, x, x], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "every other row": lambda x: x.repeat_interleave(2, 0)[::2],
    "transposed": lambda x: x.T.contiguous().T,
    "one row repeated": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    logits, target, grad = inputs(6, 20)
    assert_kernel_as_good_as_eager(LAYOUTS[layout](logits), target, grad)
    spread = torch.stack([grad, grad], -1)[..., 0]
    assert_kernel_as_good_as_eager(logits, torch.stack([target, target], -1)[..., 1], spread)
    assert_kernel_as_good_as_eager(logits, target, grad[:1].expand_as(grad))


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e30, -1e30, 2e38, -2e38])
def test_huge_common_offsets(offset):
    """The sum of ten numbers near 2e38 leaves float32; in the kernel's units it does not."""
    # A wide scale, so that the row is not one number many times over. Float32 logs of that size carry 88 eps.
    logits, target, grad = inputs(6, 20, offset=offset, scale=abs(offset) / 5)
    assert_kernel_as_good_as_eager(logits, target, grad)


def test_compensated_sums_at_ten_thousand_match_float64():
    logits, target, grad = inputs(3, 5000, offset=1e4, scale=1e4)
    truth = run(stablemax_loss, logits.double(), target, grad, backend="torch")
    found = run(stablemax_loss, logits, target, grad, backend="triton")
    for actual, exact in zip(found, truth, strict=True):
        # No allowance for the length of the sum.
        assert max(relative_errors(actual, exact)) <= tolerance(torch.float32)


@pytest.mark.parametrize("ahead", [1e3, 1e5, 1e7, 1e9, 1e12])
def test_small_losses_keep_their_relative_accuracy(ahead):
    """Where float32's softmax of the symmetric logarithm has lost every digit of loss and target gradient."""
    logits, target, grad = inputs(1, 40)
    logits[0, target] = ahead
    truth = run(stablemax_loss, logits.double(), target, grad, backend="torch")
    found = run(stablemax_loss, logits, target, grad, backend="triton")
    plain = run(eager, logits, target, grad)
    # Float64 itself loses digits there: its loss is a difference too.
    slack = 1e-15 / truth[0].item()
    assert relative_errors(found[0], truth[0])[0] <= tolerance(torch.float32) + slack
    target_slopes = [x[1].gather(1, target[:, None]) for x in (found, truth, plain)]
    assert relative_errors(*target_slopes[:2])[0] <= tolerance(torch.float32) + slack
    if ahead >= 1e9:
        assert target_slopes[2].item() == 0 != target_slopes[0].item()


def test_near_the_largest_half():
    logits, target, grad = inputs(4, 33, dtype=torch.float16)
    assert_kernel_as_good_as_eager((logits.float().clamp(-2, 2) * 3e4).half(), target, grad)


def test_denormal_logits_are_zeros():
    logits, target, grad = inputs(4, 20, scale=1e-41)
    assert_kernel_as_good_as_eager(logits, target, grad)


INF = float("inf")
ROWS = [
    [-INF, 0.0, 1.0],
    [2.0, -INF, -INF],
    [-INF, -INF, -INF],
    [INF, 0.0, 0.0],
    [0.0, INF, INF],
    [0.0, float("nan"), 1.0],
    [float("nan"), 0.0, -INF],
]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("label", [0, 1])
def test_infinities_and_nan_are_those_of_torch(label):
    logits, target = torch.tensor(ROWS), torch.full((len(ROWS),), label)
    grad = torch.linspace(1, 2, len(ROWS))
    truth = run(stablemax_loss, logits.double(), target, grad, backend="torch")
    found = run(stablemax_loss, logits, target, grad, backend="triton")
    for actual, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(actual.double(), exact, equal_nan=True, rtol=tolerance(torch.float32), atol=0)


@pytest.mark.parametrize("absent", [-100, 3])
def test_absent_tokens_have_neither_loss_nor_gradient(absent):
    logits, target, grad = inputs(6, 20)
    target[2:4] = absent
    assert_kernel_as_good_as_eager(logits, target, grad, ignore_index=absent)
    logits[2], logits[3], grad[2] = float("nan"), INF, float("nan")
    loss, slope = run(stablemax_loss, logits, target, grad, ignore_index=absent, backend="triton")
    assert not loss[2:4].any()
    assert not slope[2:4].any()
    assert loss.isfinite().all()


def test_a_target_out_of_range_is_nan_where_nobody_looks():
    logits, target, _ = inputs(4, 20)
    target[1], target[2] = 20, -1
    loss, numbers = kernel.forward(logits, target, -100)
    slope = kernel.backward(torch.ones_like(loss), logits, target, numbers, -100)
    assert loss.isnan().tolist() == slope.isnan().all(-1).tolist() == [False, True, True, False]


@pytest.mark.usefixtures("small_tiles")
def test_every_output_is_written_and_no_input(monkeypatch):
    logits, target, grad = inputs(11, 35)
    before = [x.clone() for x in (logits, target, grad)]
    empty = torch.Tensor.new_empty

    def poisoned(x, *size, **options):
        made = empty(x, *size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    assert all(x.isfinite().all() for x in run(stablemax_loss, logits, target, grad.float(), backend="triton"))
    assert all(map(torch.equal, before, (logits, target, grad)))


@pytest.mark.usefixtures("small_tiles")
def test_two_runs_agree_bit_for_bit_and_the_order_of_classes_hardly_matters():
    logits, target, grad = inputs(7, 50)
    first, again = (run(stablemax_loss, logits, target, grad, backend="triton") for _ in range(2))
    assert all(map(torch.equal, first, again))
    order = torch.randperm(50, device=DEVICE)
    moved = run(stablemax_loss, logits[:, order], order.argsort()[target], grad, backend="triton")
    assert relative_errors(moved[0], first[0].double())[0] <= tolerance(torch.float32)


def test_no_second_derivative():
    logits, target, _ = inputs(3, 5)
    leaf = logits.requires_grad_()
    (slope,) = torch.autograd.grad(stablemax_loss(leaf, target, backend="triton").sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; use backend='torch'"):
        slope.sum().backward()


@settings(max_examples=10, deadline=None, derandomize=True)
@given(leading=st.lists(st.integers(0, 4), max_size=2), classes=st.integers(1, 40), seed=st.integers(0, 99))
def test_any_shape(leading, classes, seed):
    assert_kernel_as_good_as_eager(*inputs(*leading, classes, seed=seed))


def test_no_planted_bug_survives():
    assert [mutant.why for mutant in survivors(kernel, mutants.MUTANTS, mutants.probe)] == []
