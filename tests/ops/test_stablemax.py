"""The StableMax reference: closed forms, limits, and what the public function promises."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from stablemax_cases import inputs, run
from torch._dynamo.testing import CompileCounterWithBackend

from p2k.core.errors import BackendUnavailable
from p2k.core.tolerance import relative_errors, tolerance
from p2k.ops.stablemax import reference, registration, stablemax_loss

DOUBLE = tolerance(torch.float64)


def wide(*shape, **options):
    return inputs(*shape, dtype=torch.float64, **options)


def test_s_times_s_of_the_opposite_is_one():
    z = torch.linspace(-30, 30, 601, dtype=torch.float64)
    assert (reference.s(z) * reference.s(-z) - 1).abs().max() <= 4 * torch.finfo(torch.float64).eps
    assert torch.equal(reference.s(torch.tensor([-1.0, 0.0, 1.0])), torch.tensor([0.5, 1.0, 2.0]))


@pytest.mark.parametrize("at", [0.0, -0.0])
def test_the_slope_at_zero_is_one_from_both_sides(at):
    for function in (reference.s, reference.symlog):
        z = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.grad(function(z), z)[0] == 1
        near = torch.tensor([-1e-12, 1e-12], dtype=torch.float64, requires_grad=True)
        slopes = torch.autograd.grad(function(near).sum(), near)[0]
        # s'' is at most 2 in size.
        assert (slopes - 1).abs().max() <= 1e-11


def test_stablemax_is_softmax_of_the_symmetric_logarithm():
    z, *_ = wide(20, 9, scale=20.0)
    paper = reference.s(z) / reference.s(z).sum(-1, keepdim=True)
    assert relative_errors(reference.stablemax(z), paper)[0] <= DOUBLE
    signed = (z.sign() * z.abs().log1p()).softmax(-1)
    assert relative_errors(signed, paper)[0] <= DOUBLE


def test_loss_is_minus_the_log_of_the_papers_ratio():
    z, y, _ = wide(20, 9, scale=20.0)
    picked = reference.s(z).gather(-1, y[:, None])[:, 0]
    assert relative_errors(stablemax_loss(z, y), -(picked / reference.s(z).sum(-1)).log())[0] <= DOUBLE


def test_not_shift_invariant():
    z, y, _ = wide(20, 9)
    assert (stablemax_loss(z, y) - stablemax_loss(z + 5, y)).abs().max() > 0.1
    assert relative_errors(F.cross_entropy(z, y), F.cross_entropy(z + 5, y))[0] <= DOUBLE


def test_softmax_collapses_where_stablemax_falls_like_one_over_the_scale():
    direction, label = torch.tensor([1.0, 0.0, -1.0]), torch.tensor(0)
    scales = torch.tensor([1e2, 1e3, 1e4, 1e5])
    softmax = torch.stack([F.cross_entropy(scale * direction, label) for scale in scales])
    stable = torch.stack([stablemax_loss(scale * direction, label) for scale in scales])
    assert not softmax.any()
    # (1 + 1 / (1 + scale)) / (1 + scale), up to its own square.
    assert ((stable * scales - 1).abs() <= 2 / scales).all()


def test_equal_to_torch_where_the_two_coincide():
    z, y, _ = wide(20, 9, scale=1.0)
    # Uniform rows, one class, absent rivals, and logits so small that both maps are 1 + z.
    assert relative_errors(stablemax_loss(0 * z + 7, y), F.cross_entropy(0 * z, y, reduction="none"))[0] <= DOUBLE
    assert not stablemax_loss(z[:, :1], 0 * y).any()
    alone = torch.full_like(z, -torch.inf).scatter(1, y[:, None], 3.0)
    assert not stablemax_loss(alone, y).any()
    for size in (1e-2, 1e-4):
        gap = stablemax_loss(size * z, y) - F.cross_entropy(size * z, y, reduction="none")
        # They differ from the second order on: e^z - s(z) = z^2 / 2 above 0, -z^2 / 2 below.
        assert gap.abs().max() <= 20 * size**2


def test_closed_form_gradient_and_its_differences():
    z, y, g = wide(11, 7)
    assert relative_errors(run(stablemax_loss, z, y, g)[1], reference.cross_entropy_backward(g, z, y))[0] <= DOUBLE
    assert torch.autograd.gradcheck(lambda x: stablemax_loss(x, y), z.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda x: stablemax_loss(x, y), z)


def test_gradients_at_the_seams_are_finite_in_every_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        z = torch.tensor([[1.0, -1.0, 0.0, -0.0]], dtype=dtype)
        slope = run(stablemax_loss, z, torch.tensor([0]), torch.ones(1))[1]
        expected = reference.cross_entropy_backward(torch.ones(1).double(), z.double(), torch.tensor([0]))
        assert relative_errors(slope, expected)[0] <= tolerance(dtype)


def test_both_boundary_traps_are_real():
    """What the obvious formulas do: NaN at z = 1 outside float64, and no gradient at z = 0."""
    one = torch.ones(1, requires_grad=True)
    naive = torch.where(one < 0, 1 / (1 - one + 1e-30), one + 1)
    assert torch.autograd.grad(naive.sum(), one)[0].isnan().all()
    zero = torch.zeros(1, requires_grad=True)
    assert torch.autograd.grad((zero.sign() * zero.abs().log1p()).sum(), zero)[0] == 0


def test_absent_tokens_and_infinities():
    z, y, g = wide(6, 5)
    z[2], z[3, 1], y[2] = torch.nan, -torch.inf, -100
    loss, slope = run(stablemax_loss, z, y, g)
    assert loss[2] == 0
    assert not slope[2].any()
    assert slope.isfinite().all()
    assert loss.isfinite().all() == (y[3] != 1)
    z[4, 0] = torch.inf
    assert stablemax_loss(z, y).isnan().tolist() == [False] * 4 + [True, False]


Z, Y = torch.ones(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
BAD = [
    ({"target": Y[:1]}, ValueError, r"target must have shape \(2, 3\), got \(1, 3\)"),
    ({"target": Y.int()}, TypeError, "target must be torch.int64, got torch.int32"),
    ({"logits": Z.long()}, TypeError, "logits must be floating point, got torch.int64"),
    ({"logits": Z[..., :0]}, ValueError, "logits must have a last dimension"),
    ({"logits": torch.ones(())}, ValueError, "logits must have a last dimension"),
    ({"target": Y.to("meta")}, ValueError, "target must be on cpu like logits, got meta"),
    ({"target": Y + 4}, ValueError, r"target must be in \[0, 4\) or ignore_index -100, got 4"),
    ({"target": Y - 1}, ValueError, "target must be in .*got -1"),
    ({"backend": "cuda"}, ValueError, "backend must be 'auto', 'torch' or 'triton', got 'cuda'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=f"stablemax_loss: {message}"):
        stablemax_loss(**({"logits": Z, "target": Y} | change))


CALL = """
import torch, sys; sys.modules['triton'] = None
from p2k.ops.stablemax import stablemax_loss
z, y = torch.ones(2, 3), torch.tensor([0, 1])
assert stablemax_loss(z, y).allclose(torch.tensor(3.0).log())
try:
    stablemax_loss(z, y, backend="triton")
except Exception as error:
    print(type(error).__name__, error)
"""


def test_everything_but_the_kernel_works_without_triton():
    result = subprocess.run([sys.executable, "-c", CALL], env=dict(os.environ), capture_output=True, text=True)
    assert result.stdout.startswith("BackendUnavailable stablemax_loss: backend='triton' cannot run"), result.stderr


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
@pytest.mark.parametrize("strided", [False, True])
def test_opcheck(strided):
    z, y, g = inputs(4, 5, 6)
    z = z.repeat_interleave(2, 0)[::2].transpose(0, 1) if strided else z
    y, g = (y.T, g.T.float()) if strided else (y, g.float())
    _, numbers = registration.forward_op(z, y, -100)
    for op, arguments in (
        (registration.forward_op, (z.detach().requires_grad_(), y, -100)),
        (registration.backward_op, (g, z, y, numbers, -100)),
    ):
        assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_compiled_whole_and_not_again_for_another_size(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(stablemax_loss, fullgraph=True, dynamic=True, backend=counter)
    frames = []
    for tokens, classes in ((6, 20), (7, 33), (9, 18)):
        z, y, g = inputs(tokens, classes)
        eager = run(stablemax_loss, z, y, g, backend=backend)
        assert all(map(torch.equal, run(compiled, z, y, g, backend=backend), eager))
        frames.append(counter.frame_count)
    assert frames[1] == frames[2]


def test_function_transforms_use_the_reference_and_refuse_the_kernel():
    z, y, _ = inputs(2, 5, 6)
    looped = torch.stack([stablemax_loss(*pair, backend="torch") for pair in zip(z, y, strict=True)])
    assert torch.allclose(torch.vmap(stablemax_loss)(z, y), looped)
    with pytest.raises(BackendUnavailable, match="a torch.func transform is active"):
        torch.vmap(lambda z, y: stablemax_loss(z, y, backend="triton"))(z, y)
