"""GOPO's exact properties, each against an independent formula in float64."""

import math

import pytest
import torch
from scipy.optimize import minimize

from p2k.core.seeding import generator
from p2k.core.tolerance import tolerance
from p2k.losses.gopo import (
    GOPOLoss,
    bounded_projection,
    gopo_loss,
    linear_gopo_loss,
    linear_projection,
    stiffness_for_radius,
    token_gopo_losses,
    water_fill,
)

TIGHT = tolerance(torch.float64)
# Free samples and clamped ones, inactive bounds, ties: groups of 8 at several spreads.
MU = 0.5


def close(actual, expected, factor=1.0):
    """Equality up to the table's float64 entry, relative to the larger of 1 and the expected value."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected.expand(actual.shape), rtol=factor * TIGHT, atol=factor * TIGHT)


def groups(seed=0, count=40, size=8):
    rng = generator(seed)
    spread = torch.logspace(-1, 1, count, dtype=torch.float64).unsqueeze(-1)
    return spread * torch.randn(count, size, generator=rng, dtype=torch.float64)


def bisect(g, mu, weights=None, rounds=200):
    """The multiplier by halving an interval that contains it."""
    weights = torch.full_like(g, 1 / g.shape[-1]) if weights is None else weights / weights.sum(-1, keepdim=True)
    low = g.amin(-1, keepdim=True) - mu * g.shape[-1] / weights.min()
    high = g.amax(-1, keepdim=True) + mu
    for _ in range(rounds):
        middle = (low + high) / 2
        positive = (weights * ((g - middle) / mu).clamp(min=-1)).sum(-1, keepdim=True) > 0
        low, high = torch.where(positive, middle, low), torch.where(positive, high, middle)
    return (low + high) / 2


def gradient(loss, x):
    return torch.autograd.grad(loss.sum(), x, retain_graph=True)[0]


def test_01_zero_mean_and_bound():
    change, _ = bounded_projection(groups(), MU)
    close(change.mean(-1), 0.0, factor=100)
    assert change.min() == -1.0
    linear, multiplier = linear_projection(groups(), MU)
    close(linear.mean(-1), 0.0, factor=100)
    close(multiplier.squeeze(-1), groups().mean(-1))


def test_02_idempotent_and_non_expansive():
    change, _ = bounded_projection(groups(1), MU)
    again, multiplier = bounded_projection(MU * change, MU)
    close(again, change, factor=100)
    close(multiplier, 0.0, factor=100)
    other = groups(2)
    apart = (change - bounded_projection(other, MU)[0]).norm(dim=-1)
    assert (apart <= (groups(1) - other).norm(dim=-1) / MU + 1e-12).all()


def test_03_matches_bisection_and_satisfies_the_optimality_conditions():
    g = groups(3)
    change, lam = bounded_projection(g, MU)
    close(lam, bisect(g, MU), factor=100)
    eta = torch.where(change <= -1, lam - MU - g, 0.0)
    close(g - MU * change - lam + eta, 0.0, factor=100)
    assert (eta >= 0).all()
    assert (eta * (change + 1) == 0).all()


@pytest.mark.parametrize("row", [0, 20, 39])
def test_03_matches_a_quadratic_program(row):
    g = groups(4)[row]
    solution = minimize(
        lambda v: 0.5 * MU * (v @ v) - g.numpy() @ v,
        x0=g.new_zeros(8).numpy(),
        jac=lambda v: MU * v - g.numpy(),
        bounds=[(-1, None)] * 8,
        constraints={"type": "eq", "fun": lambda v: v.sum(), "jac": lambda v: v * 0 + 1},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    # The iterative solver stops at about the root of its function tolerance.
    assert (bounded_projection(g, MU)[0] - torch.from_numpy(solution.x)).abs().max() < 1e-6


def test_04_is_the_projection_onto_a_scaled_simplex():
    g = groups(5)
    change, _ = bounded_projection(g, MU)
    # Michelot's rounds, without a sort: project 1 + g / mu onto {w >= 0, sum w = G}.
    point, size = 1 + g / MU, g.shape[-1]
    active = torch.ones_like(g, dtype=torch.bool)
    for _ in range(size):
        shift = (torch.where(active, point, 0.0).sum(-1, keepdim=True) - size) / active.sum(-1, keepdim=True)
        active = active & (point > shift)
    close(1 + change, (point - shift).clamp(min=0), factor=100)


def test_05_shift_scale_and_permutation():
    g = groups(6)
    change, lam = bounded_projection(g, MU)
    shifted, shifted_lam = bounded_projection(g + 1000.0, MU)
    # A shift of 1,000 costs three digits.
    close(shifted, change, factor=1000)
    close(shifted_lam, lam + 1000.0, factor=10)
    scaled, scaled_lam = bounded_projection(7 * g, 7 * MU)
    close(scaled, change, factor=100)
    close(scaled_lam, 7 * lam, factor=100)
    order = torch.randperm(8, generator=generator(7))
    close(bounded_projection(g[:, order], MU)[0], change[:, order], factor=100)


def test_06_multiplier_vanishes_exactly_while_the_bound_is_inactive():
    g = groups(8)
    g = g - g.mean(-1, keepdim=True)
    lam = water_fill(g, MU).squeeze(-1)
    inactive = g.amin(-1) >= -MU
    assert inactive.any()
    assert (~inactive).any()
    close(lam[inactive], 0.0)
    assert (lam[~inactive] > 1e-9).all()
    # Leaving the multiplier out of an active group creates probability.
    naive = (g / MU).clamp(min=-1)
    excess = -torch.where(g < -MU, g / MU + 1, 0.0).sum(-1)
    close(naive.sum(-1)[~inactive], excess[~inactive], factor=100)
    assert (excess[~inactive] > 0).all()


def batch(seed=9, spread=1.0, count=4, size=6):
    rng = generator(seed)
    logps, old, g = (torch.randn(count, size, generator=rng, dtype=torch.float64) for _ in range(3))
    return logps.requires_grad_(), old, spread * (g - g.mean(-1, keepdim=True))


def test_07_linear_and_bounded_agree_up_to_a_constant_while_inactive():
    logps, old, g = batch(spread=0.1)
    linear, _ = linear_gopo_loss(logps, old, g, mu=MU, reduction="none")
    bounded, _ = gopo_loss(logps, old, g, mu=MU, reduction="none")
    close(gradient(linear, logps), gradient(bounded, logps), factor=10)
    close((linear - bounded).detach(), -g.mean(-1) - g.square().mean(-1) / (2 * MU), factor=10)
    logps, old, g = batch(spread=3.0)
    far = gradient(linear_gopo_loss(logps, old, g)[0], logps) - gradient(gopo_loss(logps, old, g)[0], logps)
    assert far.abs().max() > 1e-2


@pytest.mark.parametrize("loss", [gopo_loss, linear_gopo_loss])
def test_08_curvature_in_the_ratio_is_constant(loss):
    _, old, g = batch(10, spread=2.0)
    count, size = g.shape
    for ratios in (torch.ones(count * size), torch.linspace(0.2, 3.0, count * size)):
        matrix = torch.autograd.functional.hessian(
            lambda rho: loss(rho.view(count, size).log() + old, old, g, mu=0.7)[0], ratios.double()
        )
        close(matrix, 0.7 / (count * size) * torch.eye(count * size, dtype=torch.float64), factor=10)


# A step of 2 / mu = 4 is the edge: below it the distance shrinks, at 4.2 it grows. The last three overshoot, so their
# targets stay away from zero, where there is no room on the far side.
@pytest.mark.parametrize(("eta", "spread"), [(0.6, 1.0), (2.5, 0.05), (3.8, 0.05), (4.2, 0.05)])
def test_09_gradient_descent_in_ratio_space_contracts(eta, spread):
    _, old, g = batch(11, spread)
    target = 1 + bounded_projection(g, MU)[0]
    rho = start = target + 0.2
    size = g.shape[-1]
    for steps in range(1, 6):
        x = rho.clone().requires_grad_()
        # The mean over the group divides the gradient by its size; the step size is per sample.
        loss = gopo_loss(x.log() + old, old, g, mu=MU, reduction="none")[0]
        rho = rho - eta * size * gradient(loss, x)
        close(rho - target, (1 - eta * MU) ** steps * (start - target), factor=100)
    assert ((rho - target).abs().amax() < (start - target).abs().amax()) == (eta < 2 / MU)


def test_10_slope_in_the_ratio_is_stiffness_times_distance():
    _, old, g = batch(12)
    rho = torch.linspace(0.1, 4.0, g.numel(), dtype=torch.float64).view(g.shape).requires_grad_()
    loss = gopo_loss(rho.log() + old, old, g, mu=MU, reduction="none")[0]
    target = 1 + bounded_projection(g, MU)[0]
    close(g.shape[-1] * gradient(loss, rho), MU * (rho.detach() - target), factor=10)


def clamped_batch():
    """Seven of eight are right, so the wrong one's target is 0."""
    rewards = torch.tensor([[1.0] * 7 + [0.0]], dtype=torch.float64)
    old = torch.zeros_like(rewards)
    return rewards, old


def test_11a_clamped_target_is_zero_and_its_pull_fades_but_never_ends():
    rewards, old = clamped_batch()
    change, _ = bounded_projection(rewards, MU)
    assert change[0, -1] == -1
    pulls = []
    for log_ratio in (0.0, -1.0, -3.0, -4.9):
        at = torch.full_like(rewards, log_ratio).requires_grad_()
        pull = 8 * gradient(gopo_loss(at, old, rewards, mu=MU)[0], at)[0, -1].item()
        assert pull == pytest.approx(MU * math.exp(2 * log_ratio), rel=TIGHT)
        pulls.append(pull)
    assert pulls == sorted(pulls, reverse=True)
    assert pulls[-1] > 0


def test_11b_hard_stop_is_exactly_zero():
    rewards, old = clamped_batch()
    at = torch.full_like(rewards, -3.0).requires_grad_()
    grad = gradient(gopo_loss(at, old, rewards, mu=MU, stop_ratio=0.1)[0], at)
    assert grad[0, -1] == 0
    assert (grad[0, :-1] != 0).all()
    above = gradient(gopo_loss(at, old, rewards, mu=MU, stop_ratio=0.01)[0], at)
    assert above[0, -1] > 0


def relu_form(rho, advantage, mu):
    """The loss of the first version: its ReLU was to spare bad answers and silences good ones instead."""
    return (-advantage * rho + 0.5 * mu * (rho - 1).square()).relu()


def test_11c_the_relu_form_never_reinforces_a_right_answer():
    advantage, mu = 0.5, 0.5
    middle = 1 + advantage / mu
    reach = math.sqrt((advantage / mu) ** 2 + 2 * advantage / mu)
    assert (middle - reach, middle + reach) == pytest.approx((0.268, 3.732), abs=1e-3)
    inside = torch.linspace(middle - reach + 1e-6, middle + reach - 1e-6, 101, dtype=torch.float64, requires_grad=True)
    assert (gradient(relu_form(inside, advantage, mu), inside) == 0).all()
    edges = torch.tensor([middle - reach - 1e-6, middle + reach + 1e-6], dtype=torch.float64, requires_grad=True)
    assert (gradient(relu_form(edges, advantage, mu), edges) != 0).all()
    # For a bad answer it changes nothing at all.
    ratios = torch.linspace(0.01, 5, 101, dtype=torch.float64, requires_grad=True)
    plain = 0.5 * ratios + 0.5 * mu * (ratios - 1).square()
    close(gradient(relu_form(ratios, -0.5, mu), ratios), gradient(plain, ratios))
    # Ours pulls a right answer up on-policy.
    rewards, old = clamped_batch()
    at = torch.zeros_like(rewards, requires_grad=True)
    assert (gradient(gopo_loss(at, old, rewards, mu=MU)[0], at)[0, :-1] < 0).all()


@pytest.mark.parametrize("correct", range(1, 8))
@pytest.mark.parametrize("mu", [0.25, 0.5, 0.9])
def test_12_binary_closed_forms(correct, mu):
    rewards = (torch.arange(8) < correct).double().unsqueeze(0)
    rate = correct / 8
    change, lam = bounded_projection(rewards - rate, mu)
    up, down = 1 + change[0, 0], 1 + change[0, -1]
    if rate <= mu:
        expected = (0.0, 1 + (1 - rate) / mu, 1 - rate / mu)
    else:
        expected = ((1 - rate) * (1 - mu / rate), 1 / rate, 0.0)
    close(torch.stack([lam[0, 0], up, down]), torch.tensor(expected, dtype=torch.float64), factor=10)


def test_12_on_policy_identities():
    _, old, g = batch(13, spread=2.0)
    at = old.clone().requires_grad_()
    size = g.shape[-1]
    for mu in (0.2, 5.0):
        # The stiffness has no say in the first linear step.
        linear = -gradient(linear_gopo_loss(at, old, g, mu=mu, reduction="none")[0], at)
        close(linear, g / size, factor=10)
        leave_one_out = g - (g.sum(-1, keepdim=True) - g) / (size - 1)
        close(linear, leave_one_out * (size - 1) / size / size, factor=10)
        bounded = -gradient(gopo_loss(at, old, g, mu=mu, reduction="none")[0], at)
        close(bounded, (g - water_fill(g, mu)).clamp(min=-mu) / size, factor=10)
        close(bounded.sum(-1), 0.0, factor=100)


def test_12_the_stiffness_acts_from_the_second_step_on():
    logps, old, g = batch(13, spread=0.1)
    soft, stiff = (gradient(linear_gopo_loss(logps, old, g, mu=mu)[0], logps) for mu in (0.5, 2.0))
    rho = (logps - old).detach().exp()
    close(stiff - soft, 1.5 * rho * (rho - 1) / g.numel(), factor=10)


def test_13_weighted_target_is_a_distribution_within_pinsker_like_reach():
    g = groups(14)
    weights = torch.rand(g.shape, generator=generator(15), dtype=torch.float64)
    behaviour = weights / weights.sum(-1, keepdim=True)
    change, lam = bounded_projection(g, MU, weights=weights)
    target = behaviour * (1 + change)
    close(target.sum(-1), 1.0, factor=10)
    assert (target >= 0).all()
    close(lam, bisect(g, MU, weights), factor=100)
    variation = 0.5 * (target - behaviour).abs().sum(-1)
    chi_square = (behaviour * change.square()).sum(-1)
    assert (variation <= 0.5 * chi_square.sqrt() + 1e-12).all()


@pytest.mark.parametrize("delta", [0.01, 0.3, 0.99])
def test_14_log_ratio_surrogate_bound(delta):
    log_ratio = torch.linspace(-delta, delta, 101, dtype=torch.float64)
    assert ((torch.expm1(log_ratio) - log_ratio).abs() <= 0.5 * delta**2 * math.exp(delta)).all()


@pytest.mark.parametrize("loss", [gopo_loss, linear_gopo_loss])
def test_15_equal_rewards_pull_back_to_the_old_policy(loss):
    logps, old, _ = batch(16)
    rewards = torch.full_like(old, 0.3)
    value = loss(logps, old, rewards, mu=MU)[0]
    rho = (logps - old).detach().exp()
    close(value.detach(), 0.5 * MU * (rho - 1).square().mean(), factor=10)
    at = old.clone().requires_grad_()
    close(gradient(loss(at, old, rewards, mu=MU)[0], at), 0.0)
    pull = gradient(value, logps)
    assert (pull.sign() == (rho - 1).sign()).all()


def test_stiffness_for_a_radius_is_met():
    g = groups(17)
    for radius in (0.01, 0.1):
        change, _ = linear_projection(g, stiffness_for_radius(g, radius))
        close(change.square().mean(-1), radius, factor=10)


def test_weights_of_zero_and_masks_leave_the_group():
    g = groups(18)
    padded = torch.cat([g[:, :3], torch.full((40, 2), 1e9, dtype=torch.float64), g[:, 3:]], -1)
    mask = torch.tensor([True] * 3 + [False] * 2 + [True] * 5).expand(padded.shape)
    close(water_fill(padded, MU, weights=mask), water_fill(g, MU), factor=10)
    padded[:, 3] = torch.nan
    close(water_fill(padded, MU, weights=mask), water_fill(g, MU), factor=10)
    close(water_fill(padded, MU, weights=torch.zeros_like(mask)), 0.0)


def test_ties_and_single_samples():
    close(water_fill(torch.full((1, 4), 2.5, dtype=torch.float64), MU), 2.5)
    close(water_fill(torch.tensor([[3.0]], dtype=torch.float64), MU), 3.0)
    tied = torch.tensor([[1.0, 1.0, -4.0, -4.0]], dtype=torch.float64)
    close(bounded_projection(tied, MU)[0], torch.tensor([[1.0, 1.0, -1.0, -1.0]], dtype=torch.float64))


def test_clamped_log_ratio_has_no_gradient():
    _, old, g = batch(19)
    at = (old + 6.0).requires_grad_()
    loss, metrics = gopo_loss(at, old, g)
    assert (gradient(loss, at) == 0).all()
    close(metrics["conservation"], math.expm1(5.0))
    below = (old - 6.0).requires_grad_()
    assert (gradient(gopo_loss(below, old, g)[0], below) == 0).all()
    assert (gradient(gopo_loss(at, old, g, log_ratio_clip=None)[0], at) != 0).any()


def test_log_space_loss_is_not_convex_below_half_the_target():
    # Published as a gradient that does not saturate: true of the ratio, not of the log-probability.
    rewards = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    target = 1 + bounded_projection(rewards, MU)[0][0, 0].item()

    def curvature(log_ratio):
        at = torch.tensor([[log_ratio, 0.0]], dtype=torch.float64)
        return torch.autograd.functional.hessian(lambda x: gopo_loss(x, at * 0, rewards, mu=MU)[0], at)[0, 0, 0, 0]

    assert curvature(math.log(0.4 * target)) < 0
    assert curvature(math.log(0.6 * target)) > 0


def test_token_losses_regress_each_token_to_its_samples_target():
    rng = generator(20)
    logps, old = (torch.randn(2, 4, 3, generator=rng, dtype=torch.float64) for _ in range(2))
    g = torch.randn(2, 4, generator=rng, dtype=torch.float64)
    mask = torch.ones_like(logps, dtype=torch.bool)
    mask[0, 1] = False
    mask[1, :, 2] = False
    losses, _ = token_gopo_losses(logps, old, g, mu=MU, mask=mask)
    kept = torch.tensor([[True, False, True, True], [True] * 4])
    target = 1 + bounded_projection(g, MU, weights=kept)[0].unsqueeze(-1)
    expected = 0.5 * MU * ((logps - old).exp() - target).square()
    close(losses, torch.where(mask, expected, 0.0), factor=10)


def test_module_twin():
    logps, old, g = batch(21)
    assert GOPOLoss(0.7)(logps, old, g)[0] == gopo_loss(logps, old, g, mu=0.7)[0]


@pytest.mark.parametrize("options", [{"mu": 0.0}, {"mu": -1.0}, {"log_ratio_clip": 0.0}, {"stop_ratio": -0.1}])
def test_bad_options_raise(options):
    with pytest.raises(ValueError, match="> 0"):
        gopo_loss(*batch(22), **options)


def test_bad_tensors_raise():
    logps, old, g = batch(23)
    with pytest.raises(ValueError, match="logps must have shape"):
        gopo_loss(logps[:, :2], old, g)
    with pytest.raises(TypeError, match="floating point"):
        water_fill(torch.ones(2, 3, dtype=torch.long), MU)
    with pytest.raises(ValueError, match="a sample or more"):
        water_fill(torch.ones(2, 0), MU)
    with pytest.raises(ValueError, match="weights must have shape"):
        water_fill(g, MU, weights=torch.ones(3))
