"""OrthoGrad: the projection, what the wrapped optimizer sees, and what the user finds afterwards."""

import copy
import io

import pytest
import torch

from p2k.core.errors import P2KError
from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors, tolerance
from p2k.optim.stablemax import OrthoGrad, orthogonal_gradient


def pair(*shape, dtype=torch.float64, seed=0):
    source = generator(seed)
    return [torch.randn(shape, generator=source, dtype=torch.float64).to(dtype) for _ in range(2)]


def cosine(a, b):
    return (a.double().flatten() @ b.double().flatten() / a.double().norm() / b.double().norm()).item()


@pytest.mark.parametrize("shape", [(2,), (31, 17), (4, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_orthogonal_to_the_weight_and_as_long_as_the_gradient(shape, dtype):
    g, w = pair(*shape, dtype=dtype)
    before = g.clone(), w.clone()
    found = orthogonal_gradient(g, w)
    assert abs(cosine(found, w)) <= tolerance(dtype)
    assert abs(found.double().norm() / g.double().norm() - 1) <= tolerance(dtype)
    assert (found.dtype, found.shape) == (dtype, g.shape)
    assert torch.equal(g, before[0])
    assert torch.equal(w, before[1])


def test_the_formula():
    g, w = pair(5, 7)
    kept = g - (g * w).sum() / (w * w).sum() * w
    assert relative_errors(orthogonal_gradient(g, w), kept * g.norm() / kept.norm())[0] <= tolerance(torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_a_parallel_gradient_is_zero_and_not_stretched_rounding(dtype):
    for seed in range(20):
        _, w = pair(3, 11, dtype=dtype, seed=seed)
        # Powers of two: the gradient is parallel exactly, whatever its dtype.
        for factor in (1.0, -4.0, 0.125):
            assert not orthogonal_gradient(factor * w, w).any()
    assert not orthogonal_gradient(w[:1, :1], w[1:2, :1]).any()


def test_nearly_parallel_gradients_are_orthogonal_still():
    g, w = pair(400, dtype=torch.float32)
    # One part in 2**16 across: what one projection leaves of the other parts would be a hundredth of it.
    found = orthogonal_gradient(w * 2**16 + g, w)
    assert abs(cosine(found, w)) <= tolerance(torch.float32)


def test_zero_weights_zero_gradients_and_extreme_sizes():
    g, w = pair(6, dtype=torch.float32)
    assert relative_errors(orthogonal_gradient(g, 0 * w), g.double())[0] <= tolerance(torch.float32)
    assert not orthogonal_gradient(0 * g, w).any()
    for a, b in ((1e-30, 1.0), (1e30, 1e-30), (1e-30, 1e30)):
        assert relative_errors(orthogonal_gradient(a * g, b * w), a * orthogonal_gradient(g, w).double())[0] < 1e-5
    assert orthogonal_gradient(g.where(g != g[0], torch.nan), w).isnan().all()
    assert orthogonal_gradient(torch.ones(0), torch.ones(0)).shape == (0,)


def test_plain_descent_lengthens_the_weight_as_pythagoras_says():
    g, w = pair(8, 3)
    parameter = torch.nn.Parameter(w.clone())
    parameter.grad = g
    OrthoGrad(torch.optim.SGD([parameter], lr=0.3)).step()
    squared = w.square().sum() + 0.09 * g.square().sum()
    assert relative_errors(parameter.detach().square().sum(), squared)[0] <= tolerance(torch.float64)


BAD = [
    ((torch.ones(2), torch.ones(3)), ValueError, r"weight must have shape \(2,\), got \(3,\)"),
    ((torch.ones(2), torch.ones(2).double()), TypeError, "weight must have dtype"),
    ((torch.ones(2).long(), torch.ones(2).long()), TypeError, "gradient must be floating point"),
    ((torch.ones(2), torch.ones(2, device="meta")), ValueError, "weight must be on cpu"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=f"orthogonal_gradient: {message}"):
        orthogonal_gradient(*arguments)


INNER = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1),
    "foreach": lambda groups: torch.optim.AdamW(groups, lr=0.1, foreach=True),
    "fused": lambda groups: torch.optim.AdamW(groups, lr=0.1, fused=True),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.1, maximize=True),
}


def parameters(dtype=torch.float64):
    return [torch.nn.Parameter(pair(*shape, dtype=dtype, seed=i)[0]) for i, shape in enumerate([(3, 4), (5,), (2, 2)])]


def set_gradients(weights, step):
    for i, weight in enumerate(weights):
        weight.grad = pair(*weight.shape, dtype=weight.dtype, seed=100 * step + i)[1]


def train(optimizer, weights, steps):
    for step in steps:
        set_gradients(weights, step)
        optimizer.step()


@pytest.mark.parametrize("name", INNER)
def test_the_wrapped_optimizer_sees_the_projected_gradient_and_the_user_his_own(name):
    ours, plain = parameters(), parameters()
    wrapped, bare = OrthoGrad(INNER[name](ours)), INNER[name](plain)
    for step in range(3):
        set_gradients(ours, step)
        kept = [weight.grad for weight in ours]
        values = [gradient.clone() for gradient in kept]
        for weight, twin in zip(ours, plain, strict=True):
            twin.grad = orthogonal_gradient(weight.grad, weight.detach())
        wrapped.step()
        bare.step()
        assert all(weight.grad is gradient for weight, gradient in zip(ours, kept, strict=True))
        assert all(map(torch.equal, kept, values))
    assert all(map(torch.equal, ours, plain))


def test_foreach_and_fused_are_the_loop():
    found = []
    for options in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        weights = parameters()
        train(OrthoGrad(torch.optim.AdamW(weights, lr=0.1, **options)), weights, range(5))
        found.append(torch.cat([weight.detach().flatten() for weight in weights]))
    assert all(relative_errors(other, found[0])[0] <= tolerance(torch.float64) for other in found[1:])


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_resuming_is_as_good_as_going_on(name):
    whole, first = parameters(), parameters()
    train(OrthoGrad(INNER[name](whole)), whole, range(6))
    optimizer = OrthoGrad(INNER[name](first))
    train(optimizer, first, range(3))
    torch.save(optimizer.state_dict(), buffer := io.BytesIO())
    second = [torch.nn.Parameter(weight.detach().clone()) for weight in first]
    resumed = OrthoGrad(INNER[name](second))
    resumed.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    train(resumed, second, range(3, 6))
    assert all(map(torch.equal, whole, second))
    # A checkpoint fits the bare optimizer too.
    INNER[name](parameters()).load_state_dict(optimizer.state_dict())


def test_groups_schedules_and_copies_reach_the_wrapped_optimizer():
    weights = parameters()
    inner = torch.optim.SGD([{"params": weights[:1], "lr": 1.0}, {"params": weights[1:2]}], lr=0.5)
    optimizer = OrthoGrad(inner)
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    optimizer.add_param_group({"params": weights[2:], "lr": 2.0})
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    train(optimizer, weights, range(1))
    schedule.step()
    assert [group["lr"] for group in inner.param_groups] == pytest.approx([0.1, 0.05, 0.2])
    twin = copy.deepcopy(optimizer)
    assert [group["lr"] for group in twin.param_groups] == [group["lr"] for group in inner.param_groups]
    assert repr(optimizer).startswith("OrthoGrad(SGD")
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is inner.param_groups
    optimizer.zero_grad()
    assert all(weight.grad is None for weight in weights)


def test_a_group_can_stay_out():
    weights, twins = parameters(), parameters()
    optimizer = OrthoGrad(
        torch.optim.SGD([{"params": weights[:2]}, {"params": weights[2:], "orthogonal": False}], lr=1)
    )
    train(optimizer, weights, range(1))
    train(torch.optim.SGD(twins, lr=1), twins, range(1))
    assert torch.equal(weights[2], twins[2])
    assert not torch.equal(weights[0], twins[0])


def test_closures_are_projected_each_time():
    weight, target = torch.nn.Parameter(torch.tensor([3.0, 0.0])), torch.tensor([0.0, 3.0])
    optimizer = OrthoGrad(torch.optim.LBFGS([weight], max_iter=5))
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = (weight - target).square().sum()
        loss.backward()
        losses.append(loss.item())
        return loss

    assert optimizer.step(closure).item() == losses[0]
    assert len(losses) > 1
    # The gradient of the last evaluation, not its projection.
    assert weight.grad.norm() > 0
    simple = OrthoGrad(torch.optim.SGD([weight], lr=0.1))
    before = weight.detach().clone()
    assert simple.step(closure).item() == losses[-1]
    moved = weight.detach() - before
    assert abs(cosine(moved, before)) <= 10 * tolerance(torch.float32)
    assert torch.equal(weight.grad, 2 * (before - target))


def test_no_gradient_no_step_and_zero_gradients_are_fine():
    weights = parameters()
    before = [weight.detach().clone() for weight in weights]
    optimizer = OrthoGrad(torch.optim.AdamW(weights, lr=0.1, weight_decay=0.0))
    optimizer.step()
    for weight in weights[:2]:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert all(map(torch.equal, before, weights))


def test_sparse_and_complex_gradients_raise_and_nothing_moves():
    dense, sparse = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(4, 2))
    dense.grad, sparse.grad = torch.ones(3), torch.eye(4, 2).to_sparse()
    kept = dense.grad
    with pytest.raises(P2KError, match="dense and real, got a sparse one"):
        OrthoGrad(torch.optim.SGD([dense, sparse], lr=1)).step()
    assert dense.grad is kept
    assert torch.equal(dense.detach(), torch.ones(3))
    turning = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
    turning.grad = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(P2KError, match="got a complex one"):
        OrthoGrad(torch.optim.SGD([turning], lr=1)).step()


def test_only_an_optimizer_can_be_wrapped():
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got list"):
        OrthoGrad(parameters())
