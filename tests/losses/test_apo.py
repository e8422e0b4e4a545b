"""APO's exact properties, each against an independent formula in float64."""

import math

import pytest
import torch

from p2k.core.seeding import generator
from p2k.core.tolerance import tolerance
from p2k.losses.adpo import adpo_loss
from p2k.losses.apo import APOLoss, apo_loss, effective_sample_size
from p2k.losses.schedules import guarded_alpha
from p2k.losses.targets import softmax_target

TIGHT = tolerance(torch.float64)
ALPHAS = [1e-5, 0.35, 0.5, 0.9, 1 - 1e-5]


def close(actual, expected, factor=1.0):
    """Equality up to the table's float64 entry, relative to the larger of 1 and the expected value."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected.expand(actual.shape), rtol=factor * TIGHT, atol=factor * TIGHT)


def lists(seed=0, count=3, length=6):
    rng = generator(seed)
    logps, ref = (torch.randn(count, length, generator=rng, dtype=torch.float64) for _ in range(2))
    return logps.requires_grad_(), ref, torch.randn(count, length, generator=rng, dtype=torch.float64).softmax(-1)


def divergence(q, p, alpha):
    """The textbook form, which cancels near both ends."""
    if alpha in (0, 1):
        a, b = (q, p) if alpha == 1 else (p, q)
        return (a * (a / b).log()).sum(-1)
    return (1 - (q**alpha * p ** (1 - alpha)).sum(-1)) / (alpha * (1 - alpha))


def value(logps, ref, q, alpha, **options):
    return apo_loss(logps, ref, q, alpha=alpha, reduction="none", **options)[0]


def gradient(loss, x):
    return torch.autograd.grad(loss.sum(), x, retain_graph=True)[0]


@pytest.mark.parametrize("eps", [1e-3, 1e-6, 1e-9])
def test_01_value_limits_are_first_order(eps):
    logps, ref, q = lists(1)
    p = (logps - ref).detach().softmax(-1)
    assert (value(logps, ref, q, 1 - eps) - divergence(q, p, 1)).abs().max() < 10 * eps
    assert (value(logps, ref, q, eps) - divergence(q, p, 0)).abs().max() < 10 * eps


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_02_gradient_is_continuous_up_to_the_ends(end):
    logps, ref, q = lists(2)
    p = (logps - ref).detach().softmax(-1)
    forward = p - q
    s = (p / q).log()
    reverse = p * (s - (p * s).sum(-1, keepdim=True))
    expected = forward if end == 1 else reverse
    close(gradient(value(logps, ref, q, end), logps), expected, factor=10)
    near = gradient(value(logps, ref, q, abs(end - 1e-6)), logps)
    assert (near - expected).abs().max() < 1e-5  # first order in the distance of 1e-6
    close(value(logps, ref, q, end).detach(), divergence(q, p, end), factor=10)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_03_gradient_forms_agree(alpha):
    logps, ref, q = lists(3)
    ours = gradient(value(logps, ref, q, alpha), logps)
    p = (logps - ref).softmax(-1)
    m = q**alpha * p ** (1 - alpha)
    # The closed forms divide rounding errors by alpha or 1 - alpha, at most 1e5 here.
    loose = 100 / min(alpha, 1 - alpha)
    close(ours, gradient(divergence(q, p, alpha), logps), factor=loose)
    close(ours, ((m.sum(-1, keepdim=True) * p - m) / alpha).detach(), factor=loose)
    surrogate = -(m.detach() * p.log()).sum(-1) / alpha
    close(ours, gradient(surrogate, logps), factor=loose)


@pytest.mark.parametrize("alpha", [1e-3, 1e-5])
def test_03_float32_gradient_does_not_cancel(alpha):
    logps, ref, q = lists(4)
    truth = gradient(value(logps, ref, q, alpha), logps)
    single = logps.detach().float().requires_grad_()
    ours = gradient(value(single, ref.float(), q.float(), alpha), single).double()
    p, q32 = (single - ref.float()).softmax(-1), q.float()
    m = q32**alpha * p ** (1 - alpha)
    naive = ((m.sum(-1, keepdim=True) * p - m) / alpha).detach().double()
    error, naive_error = (ours - truth).norm() / truth.norm(), (naive - truth).norm() / truth.norm()
    assert error < tolerance(torch.float32)
    assert naive_error > 10 * error


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_04_gradient_sums_to_zero_and_shifts_do_not_matter(alpha):
    logps, ref, q = lists(5)
    loss = value(logps, ref, q, alpha)
    close(gradient(loss, logps).sum(-1), 0.0, factor=10)
    shift = torch.tensor([[3.0], [-2.0], [50.0]], dtype=torch.float64)
    # A shift of 50 costs two digits of the shifted numbers.
    close(value(logps + shift, ref, q, alpha).detach(), loss.detach(), factor=100)
    close(value(logps, ref + shift, q, alpha).detach(), loss.detach(), factor=100)
    rewards = torch.randn(3, 6, generator=generator(16), dtype=torch.float64)
    first, second = (softmax_target(r, beta_reward=0.3) for r in (rewards, rewards + shift))
    # The target divides the shift by its temperature of 0.3.
    close(value(logps, ref, second, alpha).detach(), value(logps, ref, first, alpha).detach(), factor=1000)


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_05_duality_sign_zero_and_bound(alpha):
    logps, ref, q = lists(6)
    p = (logps - ref).detach().softmax(-1)
    loss = value(logps, ref, q, alpha).detach()
    swapped = value(q.log(), torch.zeros_like(q), p, 1 - alpha)
    close(loss, swapped, factor=10)
    assert (loss > 0).all()
    close(value(q.log(), torch.zeros_like(q), q, alpha), 0.0)
    far = torch.tensor([[400.0, 0.0, -400.0]], dtype=torch.float64)
    disjoint = value(far, torch.zeros_like(far), torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64), alpha)
    if 0 < alpha < 1:
        close(disjoint, 1 / (alpha * (1 - alpha)))
    else:
        assert disjoint > 500


def test_05_one_half_is_the_hellinger_distance():
    logps, ref, q = lists(7)
    p = (logps - ref).detach().softmax(-1)
    close(value(logps, ref, q, 0.5).detach(), 2 * (q.sqrt() - p.sqrt()).square().sum(-1))


def hessian(ref, q, at, alpha, tau=1.0):
    return torch.autograd.functional.hessian(lambda x: apo_loss(x, ref, q, alpha=alpha, tau=tau)[0], at)


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.35, 0.5, 0.9, 1.0])
def test_06_hessian_at_the_optimum_is_the_same_for_every_alpha(alpha):
    _, ref, q = lists(8, count=1)
    ref, q, tau = ref[0], q[0], 0.7
    close(hessian(ref, q, ref + tau * q.log(), alpha, tau), (torch.diag(q) - torch.outer(q, q)) / tau**2, factor=100)


@pytest.mark.parametrize("alpha", [0.1, 0.35, 0.9, 1.0])
def test_07_general_hessian(alpha):
    logps, ref, q = lists(9, count=1)
    at, ref, q = logps.detach()[0], ref[0], q[0]
    p = (at - ref).softmax(-1)
    m = q**alpha * p ** (1 - alpha)
    total, outer = m.sum(), torch.outer
    spread = torch.diag(m) - outer(m, p) - outer(p, m) + total * outer(p, p)
    expected = (total * (torch.diag(p) - outer(p, p)) - (1 - alpha) * spread) / alpha
    close(hessian(ref, q, at, alpha), expected, factor=100)


def test_07_indefinite_below_alpha_one_and_convex_at_one():
    at = torch.tensor([4.0, 0.0, 0.0], dtype=torch.float64)
    q, ref = torch.tensor([0.01, 0.01, 0.98], dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    assert torch.linalg.eigvalsh(hessian(ref, q, at, 0.35)).min() < -0.01
    assert torch.linalg.eigvalsh(hessian(ref, q, at, 1.0)).min() > -1e-12  # rounding of the null vector


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_08_alpha_one_is_adpo_minus_the_entropy_of_the_target(tau):
    logps, ref, q = lists(10)
    ours = value(logps, ref, q, 1.0, tau=tau)
    adpo = adpo_loss(logps, ref, q, tau=tau, reduction="none")[0]
    close(ours.detach(), (adpo + (q * q.log()).sum(-1)).detach(), factor=10)
    close(gradient(ours, logps), gradient(adpo, logps), factor=10)


def on_policy_gradient(rewards, alpha, tau, beta_reward):
    q = softmax_target(rewards, beta_reward=beta_reward)
    at = torch.zeros_like(rewards, requires_grad=True)
    return -gradient(value(at, torch.zeros_like(rewards), q, alpha, tau=tau), at), q


@pytest.mark.parametrize("alpha", [0.0, 0.35, 0.9, 1.0])
def test_09_on_policy_coefficients(alpha):
    rewards = torch.randn(2, 8, generator=generator(11), dtype=torch.float64)
    tau, beta_reward, size = 0.5, 0.3, 8
    grad, q = on_policy_gradient(rewards, alpha, tau, beta_reward)
    if alpha == 0:
        expected = (rewards - rewards.mean(-1, keepdim=True)) / (size * tau * beta_reward)
    else:
        powers = q**alpha
        expected = size ** (alpha - 1) / (alpha * tau) * (powers - powers.mean(-1, keepdim=True))
    close(grad, expected, factor=10)


@pytest.mark.parametrize(
    ("correct", "alpha", "up", "down"),
    [(1, 0.0, 0.365, -0.052), (1, 0.9, 0.614, -0.088), (4, 0.35, 0.155, -0.155), (7, 1.0, 0.017, -0.120)],
)
def test_09_binary_coefficients_of_the_table(correct, alpha, up, down):
    rewards = (torch.arange(8) < correct).double().unsqueeze(0)
    grad, _ = on_policy_gradient(rewards - rewards.mean(), alpha, 1.0, 0.3)
    # The table prints three decimals.
    assert abs(grad[0, 0].item() - up) < 6e-4
    assert abs(grad[0, -1].item() - down) < 6e-4


@pytest.mark.parametrize("alpha", [0.0, 0.35, 0.6, 0.9, 1.0])
def test_09_binary_rewards_all_point_along_the_centred_reward(alpha):
    for correct in range(1, 8):
        rewards = (torch.arange(8) < correct).double().unsqueeze(0)
        grad, _ = on_policy_gradient(rewards, alpha, 0.5, 0.3)
        cosine = torch.nn.functional.cosine_similarity(grad, rewards - rewards.mean())
        close(cosine, 1.0)


def test_10_low_alpha_seeks_a_mode_and_high_alpha_covers():
    grid = torch.linspace(-6, 6, 121, dtype=torch.float64)

    def normal(mean, deviation):
        return (-0.5 * ((grid - mean) / deviation) ** 2).softmax(-1)

    q = 0.65 * normal(2.2, 0.6) + 0.35 * normal(-2.4, 0.6)
    alphas = torch.tensor([0.0, 0.05, 0.35, 0.6, 0.9, 1.0], dtype=torch.float64)
    # All alphas and all starts are fitted at once: at small alpha two local minima exist, so the best start counts.
    starts = torch.tensor([[2.2, -0.5], [-2.4, -0.5], [0.0, 0.7], [0.7, 0.9]], dtype=torch.float64)
    parameters = starts.repeat(len(alphas), 1, 1).requires_grad_()
    optimizer = torch.optim.Adam([parameters], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    target = q.expand(len(alphas), len(starts), len(grid))
    for _ in range(400):
        optimizer.zero_grad()
        mean, log_deviation = parameters[..., :1], parameters[..., 1:]
        logits = -0.5 * ((grid - mean) * (-log_deviation).exp()) ** 2
        losses = value(logits, torch.zeros_like(logits), target, alphas.view(-1, 1, 1))
        losses.sum().backward()
        optimizer.step()
        schedule.step()
    fits = parameters.detach()
    best = fits[torch.arange(len(alphas)), losses.argmin(-1)]
    mean, deviation = best[:, 0], best[:, 1].exp()
    # The recorded fits, to their printed decimals; a step of 0.05 that decays to nothing is finer than that.
    assert (mean[:2] - 2.2).abs().max() < 0.02
    assert (deviation[:2] - 0.6).abs().max() < 0.02
    assert abs(mean[-1].item() - 0.65) < 0.05
    assert abs(deviation[-1].item() - 2.39) < 0.05
    fitted = (-0.5 * ((grid - mean[:, None]) / deviation[:, None]) ** 2).softmax(-1)
    right = (fitted * (grid > 0)).sum(-1)
    assert right[:2].min() > 0.999
    assert abs(right[-1].item() - 0.595) < 0.01
    covering = fits[1:, 2, 1].exp()  # the wide start ends in the covering minimum for every alpha above 0
    assert (covering.diff() > 0).all()
    recorded = torch.tensor([2.09, 2.27, 2.34, 2.38, 2.39], dtype=torch.float64)
    assert (covering - recorded).abs().max() < 0.02


def test_11_effective_sample_size_falls_from_the_group_to_that_of_the_target():
    rewards = (torch.arange(8) < 1).double()
    q = softmax_target(rewards, beta_reward=0.3)
    alphas = torch.tensor([0.0, 0.05, 0.35, 0.6, 0.9, 1.0], dtype=torch.float64).unsqueeze(-1)
    uniform = torch.full((8,), 0.125, dtype=torch.float64).log()
    sizes = effective_sample_size(uniform, q, alphas)
    close(sizes[0], 8.0)
    close(sizes[-1], 1 / q.square().sum())
    assert (sizes.diff() < 0).all()
    expected = torch.tensor([8.0, 7.97, 6.0, 3.4, 1.8, 1.55], dtype=torch.float64)
    assert (sizes - expected).abs().max() < 0.06  # the table prints one decimal


def test_12_guarded_schedule_stays_in_range_and_only_falls():
    unit = torch.linspace(0, 1, 11, dtype=torch.float64)
    surface = guarded_alpha(unit.unsqueeze(0), unit.unsqueeze(1))
    assert surface.min() >= 0.35 - 1e-12
    assert surface.max() <= 0.9 + 1e-12
    assert (surface.diff(dim=0) <= 0).all()
    assert (surface.diff(dim=1) <= 0).all()
    assert (surface[0] == 0.9).all()


def test_the_on_policy_gradient_does_not_vanish():
    # The published comment says it does and replaces the loss there; the baseline it drops makes the sum zero.
    grad, q = on_policy_gradient(torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64), 0.6, 0.5, 0.3)
    assert grad.abs().max() > 0.1
    m = q**0.6
    replaced = m / m.sum()
    assert (replaced > 0).all()
    assert grad.min() < 0


@pytest.mark.parametrize("alpha", [0.0, 1e-6, 0.35, 0.5, 0.9, 1.0])
def test_underflowed_probabilities_stay_finite(alpha):
    logps = torch.tensor([[0.0, -2000.0, -5.0]], requires_grad=True)
    q = torch.tensor([[0.0, 0.3, 0.7]])
    loss = value(logps, torch.zeros_like(q), q, alpha)
    grad = gradient(loss, logps)
    assert loss.isfinite().all()
    assert grad.isfinite().all()
    truth = logps.detach().double().requires_grad_()
    exact = value(truth, torch.zeros(1, 3).double(), q.double(), alpha)
    if alpha >= 0.35:
        # Below, the floor under a zero target probability, which depends on the dtype, is what one measures.
        torch.testing.assert_close(grad.double(), gradient(exact, truth), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.35, 0.9])
def test_impossible_candidate_has_no_gradient_below_alpha_one(alpha):
    logps = torch.tensor([[0.0, -torch.inf, 1.0]], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([[0.3, 0.2, 0.5]], dtype=torch.float64)
    loss = value(logps, torch.zeros_like(q), q, alpha)
    assert loss.isfinite().all()
    grad = gradient(loss, logps)
    assert grad.isfinite().all()
    assert grad[0, 1] == 0
    p = logps.detach().softmax(-1)
    expected = divergence(q, p, alpha) if alpha > 0 else torch.special.xlogy(p, p / q).sum(-1)
    close(loss.detach(), expected, factor=10)


def test_impossible_candidate_makes_the_forward_loss_infinite():
    logps = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    assert value(logps, torch.zeros_like(logps), torch.tensor([[0.5, 0.5]]).double(), 1.0).item() == math.inf
    assert value(logps, torch.zeros_like(logps), torch.tensor([[1.0, 0.0]]).double(), 1.0).item() == 0.0


def test_alpha_as_tensor_equals_alpha_as_number_and_varies_by_list():
    logps, ref, q = lists(12)
    alphas = torch.tensor([[0.0], [0.4], [1.0]], dtype=torch.float64)
    together = value(logps, ref, q, alphas)
    for row, alpha in enumerate(alphas.squeeze(-1).tolist()):
        close(
            together[row].detach(), value(logps[row : row + 1], ref[row : row + 1], q[row : row + 1], alpha)[0].detach()
        )


def test_custom_backward_works_under_vmap():
    logps, ref, q = lists(13, count=4)
    batched = torch.func.vmap(torch.func.grad(lambda x, r, t: apo_loss(x, r, t, alpha=0.35)[0]))
    close(batched(logps.detach(), ref, q), gradient(value(logps, ref, q, 0.35), logps))


def test_module_twin_takes_a_scheduled_alpha():
    logps, ref, q = lists(14)
    module = APOLoss(0.9, tau=0.5)
    assert module(logps, ref, q)[0] == apo_loss(logps, ref, q, alpha=0.9, tau=0.5)[0]
    assert module(logps, ref, q, alpha=0.2)[0] == apo_loss(logps, ref, q, alpha=0.2, tau=0.5)[0]


@pytest.mark.parametrize("alpha", [-0.1, 1.5, math.nan])
def test_alpha_out_of_range_raises(alpha):
    with pytest.raises(ValueError, match="alpha must lie in"):
        apo_loss(*lists(15), alpha=alpha)
