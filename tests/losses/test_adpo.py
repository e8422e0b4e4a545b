"""ADPO's exact properties, each against an independent formula in float64."""

import math

import pytest
import torch
from torch.nn import functional as F

from p2k.core.seeding import generator
from p2k.core.tolerance import tolerance
from p2k.losses.adpo import ADPOLoss, adpo_loss, decoupled_adpo_loss
from p2k.losses.dpo import dpo_loss
from p2k.losses.lists import anchored_logits, informative
from p2k.losses.listwise import plackett_luce_loss
from p2k.losses.targets import best_target, pair_target, softmax_target, standardised_target

TIGHT = tolerance(torch.float64)


def close(actual, expected, factor=1.0):
    """Equality up to the table's float64 entry, relative to the larger of 1 and the expected value."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected.expand(actual.shape), rtol=factor * TIGHT, atol=factor * TIGHT)


def lists(seed=0, count=3, length=5):
    """Log-probabilities, anchor and target of random lists."""
    rng = generator(seed)
    logps, ref = (torch.randn(count, length, generator=rng, dtype=torch.float64) for _ in range(2))
    target = torch.randn(count, length, generator=rng, dtype=torch.float64).softmax(-1)
    return logps.requires_grad_(), ref, target


def gradient(loss, x):
    return torch.autograd.grad(loss, x, retain_graph=True)[0]


def minimise(ref, target, tau):
    """The exact minimiser ``ref + tau log q``, as log-probabilities over the list."""
    return (ref + tau * target.log()).log_softmax(-1)


def test_01_sft_is_cross_entropy_over_the_vocabulary():
    logits = torch.randn(4, 11, generator=generator(1), dtype=torch.float64)
    labels = torch.tensor([0, 3, 10, 3])
    logps = logits.log_softmax(-1)
    loss, _ = adpo_loss(logps, torch.zeros_like(logps), F.one_hot(labels, 11).double())
    close(loss, F.cross_entropy(logits, labels))


def test_02_kd_is_cross_entropy_of_softened_distributions():
    rng = generator(2)
    student, teacher = (torch.randn(4, 7, generator=rng, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    heat = 2.5
    q = softmax_target(teacher, beta_reward=heat)
    loss, _ = adpo_loss(student.log_softmax(-1), torch.zeros_like(q), q, tau=heat)
    expected = -(q * (student / heat).log_softmax(-1)).sum(-1).mean()
    close(loss, expected.detach())
    # Hinton's T^2 KL has T^2 times this gradient; the value differs by the target's entropy as well.
    hinton = heat**2 * F.kl_div((student / heat).log_softmax(-1), q, reduction="batchmean")
    close(heat**2 * gradient(loss, student), gradient(hinton, student))


def test_02_kd_at_another_temperature_is_not_kd():
    student = torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[1.0, 0.0, 2.0]], dtype=torch.float64)
    q = softmax_target(teacher, beta_reward=2.0)
    wrong, _ = adpo_loss(student.log_softmax(-1), torch.zeros_like(q), q, tau=1.0)
    right = -(q * (student / 2.0).log_softmax(-1)).sum()
    wrong_grad, right_grad = gradient(wrong, student), gradient(right, student)
    cosine = F.cosine_similarity(wrong_grad, right_grad, dim=-1)
    # Not even parallel: no factor such as T^2 repairs a student that is softened by another temperature.
    assert cosine.item() < 0.99


def test_03_max_entropy_minimiser_and_not_its_gradient():
    value = torch.randn(2, 6, generator=generator(3), dtype=torch.float64)
    alpha = 0.7
    q = softmax_target(value, beta_reward=alpha)
    best = (value / alpha).log_softmax(-1).requires_grad_()
    close(gradient(adpo_loss(best, torch.zeros_like(q), q)[0], best), 0.0)
    elsewhere = torch.zeros_like(best, requires_grad=True)
    forward = gradient(adpo_loss(elsewhere.log_softmax(-1), torch.zeros_like(q), q)[0], elsewhere)
    policy = elsewhere.softmax(-1)
    soft_return = (policy * value).sum(-1) - alpha * (policy * policy.log()).sum(-1)
    reverse = gradient(-soft_return.mean() / alpha, elsewhere)
    assert F.cosine_similarity(forward, reverse, dim=-1).max() < 0.999


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_04_dpo_is_the_hard_pair(beta):
    logps, ref, _ = lists(4, length=2)
    loss, _ = adpo_loss(logps, ref, pair_target(logps), beta=beta, reduction="none")
    expected, _ = dpo_loss(*logps.unbind(-1), *ref.unbind(-1), beta=beta, reduction="none")
    close(loss, expected.detach())
    close(gradient(loss.sum(), logps), gradient(expected.sum(), logps))


def test_04_conservative_dpo_is_the_smoothed_pair():
    logps, ref, _ = lists(5, length=2)
    loss, _ = adpo_loss(logps, ref, pair_target(logps, label_smoothing=0.2), beta=0.5)
    expected, _ = dpo_loss(*logps.unbind(-1), *ref.unbind(-1), beta=0.5, label_smoothing=0.2)
    close(loss, expected.detach())


def test_04_plackett_luce_of_two_is_dpo():
    logps, ref, _ = lists(6, length=2)
    rewards = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(logps.shape)
    loss, _ = plackett_luce_loss(logps, ref, rewards, beta=0.3)
    close(loss, dpo_loss(*logps.unbind(-1), *ref.unbind(-1), beta=0.3)[0].detach())


def implied_target(loss_type, smoothing):
    """The first entry of the pair target that would give ADPO this loss's slope, margin by margin."""
    margin = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    zero, options = torch.zeros_like(margin), {"loss_type": loss_type, "label_smoothing": smoothing}
    loss, _ = dpo_loss(margin, zero, zero, zero, beta=1.0, reduction="sum", **options)
    return margin.detach().sigmoid() - gradient(loss, margin)


def test_04_ipo_and_robust_dpo_are_no_special_cases():
    close(implied_target("sigmoid", 0.0), 1.0)
    close(implied_target("sigmoid", 0.2), 0.8)
    # The robust loss asks for the constant (1 - eps) / (1 - 2 eps), which is above 1 and hence no probability.
    close(implied_target("robust", 0.2), 0.8 / 0.6)
    # IPO asks for another target at every margin.
    wanted = implied_target("ipo", 0.0)
    assert wanted.max() > 1
    assert wanted.min() < 0


def test_05_kl_regularised_optimum_and_the_doubled_reference():
    ref = torch.randn(2, 6, generator=generator(7), dtype=torch.float64).log_softmax(-1)
    reward, beta = torch.randn(2, 6, generator=generator(8), dtype=torch.float64), 0.4
    q = softmax_target(reward, beta_reward=beta)
    best = (ref + reward / beta).log_softmax(-1).requires_grad_()
    close(gradient(adpo_loss(best, ref, q)[0], best), 0.0)
    # A target that contains the reference as well counts it twice.
    doubled = (ref + reward / beta).softmax(-1)
    twice = (2 * ref + reward / beta).log_softmax(-1).requires_grad_()
    close(gradient(adpo_loss(twice, ref, doubled)[0], twice), 0.0)
    assert gradient(adpo_loss(best, ref, doubled)[0], best).abs().max() > 1e-3


@pytest.mark.parametrize("tau", [0.3, 1.0, 4.0])
def test_06_gradient_is_policy_minus_target_over_tau(tau):
    logps, ref, q = lists(9)
    grad = gradient(adpo_loss(logps, ref, q, tau=tau, reduction="sum")[0], logps)
    policy = ((logps.detach() - ref) / tau).softmax(-1)
    close(grad, (policy - q) / tau, factor=10)
    close(grad.sum(-1), 0.0, factor=10)
    assert (grad.abs().sum(-1) <= 2 / tau).all()


def test_06_gradient_stays_bounded_for_huge_log_ratios():
    logps = torch.tensor([[1e6, -1e6, 0.0]], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64)
    loss, _ = adpo_loss(logps, torch.zeros_like(q), q)
    close(loss, 2e6)
    assert gradient(loss, logps).abs().sum() <= 2


def test_07_shift_invariance():
    logps, ref, q = lists(10)
    shift = torch.tensor([[3.0], [-2.0], [50.0]], dtype=torch.float64)
    value = adpo_loss(logps, ref, q, reduction="none")[0].detach()
    # A shift of 50 costs two digits of the shifted numbers.
    close(adpo_loss(logps + shift, ref, q, reduction="none")[0].detach(), value, factor=100)
    close(adpo_loss(logps, ref + shift, q, reduction="none")[0].detach(), value, factor=100)
    rewards = torch.randn(3, 5, generator=generator(11), dtype=torch.float64)
    for target in (softmax_target, standardised_target):
        close(target(rewards + shift), target(rewards), factor=100)


def hessian(ref, q, at, tau):
    return torch.autograd.functional.hessian(lambda x: adpo_loss(x, ref, q, tau=tau)[0], at)


def test_08_hessian_is_the_policy_covariance_whatever_the_target():
    logps, ref, q = lists(12, count=1)
    logps, ref, q, tau = logps.detach()[0], ref[0], q[0], 0.6
    policy = ((logps - ref) / tau).softmax(-1)
    covariance = (torch.diag(policy) - torch.outer(policy, policy)) / tau**2
    other = torch.full_like(q, 0.2)
    for target in (q, other):
        close(hessian(ref, target, logps, tau), covariance, factor=10)
    values = torch.linalg.eigvalsh(covariance)
    assert values.min() > -1e-12  # rounding of a positive semidefinite matrix of unit size
    assert values.max() <= 1 / (2 * tau**2)
    close(covariance.sum(-1), 0.0, factor=10)


def test_08_hessian_at_the_anchor_and_at_the_optimum():
    _, ref, q = lists(13, count=1)
    ref, q, tau, length = ref[0], q[0], 0.6, 5
    at_anchor = torch.linalg.eigvalsh(hessian(ref, q, ref.clone(), tau))
    close(at_anchor, torch.tensor([0.0] + [1 / (length * tau**2)] * (length - 1), dtype=torch.float64), factor=10)
    at_optimum = hessian(ref, q, ref + tau * q.log(), tau)
    close(at_optimum, (torch.diag(q) - torch.outer(q, q)) / tau**2, factor=10)


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_09_local_quadratic_carries_tau_in_log_probabilities_only(tau):
    _, ref, q = lists(14, count=1)
    best = ref + tau * q.log()
    entropy = -(q * q.log()).sum()
    errors = []
    for size in (1e-2, 1e-3):
        step = size * torch.tensor([[1.0, -2.0, 0.5, 0.0, 1.5]], dtype=torch.float64)
        divergence = adpo_loss(best + step, ref, q, tau=tau)[0] - entropy
        covariance = torch.diag(q[0]) - torch.outer(q[0], q[0])
        quadratic = (step @ covariance @ step.T).squeeze() / (2 * tau**2)
        errors.append((divergence - quadratic).abs().item())
    # Third order: a tenth of the step, a thousandth of the error (allowing for the rounding of the divergence).
    assert errors[1] < errors[0] / 500


def test_10_stationary_up_to_a_constant():
    _, ref, q = lists(15)
    for constant in (0.0, 7.0, -30.0):
        at = (ref + 0.5 * q.log() + constant).requires_grad_()
        close(gradient(adpo_loss(at, ref, q, tau=0.5)[0], at), 0.0, factor=100)


def test_11_uniform_target_leaves_the_policy_at_the_anchor():
    _, ref, q = lists(16)
    at = ref.clone().requires_grad_()
    assert gradient(adpo_loss(at, ref, torch.full_like(q, 0.2))[0], at).abs().max() < 1e-16  # one rounding of 0.2


def test_12_a_moving_anchor_keeps_sharpening():
    _, ref, q = lists(17)
    tau, start = 0.5, ref.log_softmax(-1)
    policy, sharpness = start, []
    for solves in range(1, 6):
        policy = minimise(policy, q, tau)
        at = policy.clone().requires_grad_()
        close(policy, (start + solves * tau * q.log()).log_softmax(-1), factor=100)
        # With the anchor at the policy itself the target still pulls: there is no fixed point.
        assert gradient(adpo_loss(at, policy, q, tau=tau)[0], at).abs().max() > 1e-3
        sharpness.append(policy.exp().gather(-1, q.argmax(-1, keepdim=True)).mean().item())
    assert sharpness == sorted(sharpness)


def test_13_soft_loss_is_the_expected_hard_loss():
    logps, ref, q = lists(18)
    hard = torch.stack(
        [adpo_loss(logps, ref, torch.eye(5).double()[i].expand(3, 5), reduction="none")[0] for i in range(5)], -1
    )
    close(adpo_loss(logps, ref, q, reduction="none")[0].detach(), (q * hard).sum(-1).detach())


@pytest.mark.parametrize("correct", [1, 3, 7])
def test_14_binary_rewards_follow_the_centred_reward(correct):
    size, tau, beta_reward = 8, 0.8, 0.5
    rewards = (torch.arange(size) < correct).double().unsqueeze(0)
    q = softmax_target(rewards, beta_reward=beta_reward)
    logps = torch.randn(1, size, generator=generator(19), dtype=torch.float64, requires_grad=True)
    grad = -gradient(adpo_loss(logps, logps.detach(), q, tau=tau)[0], logps)
    weight = (q[0, 0] - 1 / size) / (tau * (1 - correct / size))
    close(grad, weight * (rewards - rewards.mean()))


def test_15_masked_candidates_change_nothing():
    logps, ref, q = lists(20)
    value, metrics = adpo_loss(logps, ref, q)
    junk = torch.full((3, 2), torch.nan, dtype=torch.float64)
    padded = torch.cat([logps.detach(), junk], -1).requires_grad_()
    mask = torch.arange(7).expand(3, 7) < 5
    padded_ref, padded_q = torch.cat([ref, junk], -1), torch.cat([q, junk], -1)
    loss, padded_metrics = adpo_loss(padded, padded_ref, padded_q, mask=mask)
    close(loss.detach(), value.detach())
    grad = gradient(loss, padded)
    close(grad[:, :5], gradient(value, logps))
    assert (grad[:, 5:] == 0).all()
    for name, number in metrics.items():
        close(padded_metrics[name], number)


def test_self_normalised_weights_approach_the_divergence_to_the_optimum():
    # Samples of the anchor, tau = 1 and a Boltzmann target: the list loss estimates a KL over the whole space.
    space = 6
    rng = generator(21)
    anchor, policy, reward = (torch.randn(space, generator=rng, dtype=torch.float64) for _ in range(3))
    anchor, policy = anchor.log_softmax(-1), policy.log_softmax(-1)
    best = (anchor + reward).log_softmax(-1)
    exact = (best.exp() * (best - policy)).sum()
    draws = torch.multinomial(anchor.exp(), 200_000, replacement=True, generator=rng).unsqueeze(0)
    loss, metrics = adpo_loss(policy[draws], anchor[draws], softmax_target(reward[draws]))
    # 200,000 draws of weights of order 1: a standard error near 0.005.
    assert abs(metrics["kl"].item() - exact.item()) < 0.02
    assert loss > metrics["kl"]


def test_decoupled_loss_touches_the_coupled_one_at_the_anchor():
    logps, ref, q = lists(22)
    coupled, _ = adpo_loss(logps, ref, q, reduction="none")
    apart, _ = decoupled_adpo_loss(logps, ref, q, reduction="none")
    assert (apart >= coupled - math.log(5) + 1).all()
    # Shifted so that the mean of exp(u) is 1, the two are equal.
    u = logps.detach() - ref
    level = (u - u.exp().mean(-1, keepdim=True).log() + ref).requires_grad_()
    close(decoupled_adpo_loss(level, ref, q)[0].detach(), adpo_loss(level, ref, q)[0].detach() - math.log(5) + 1)
    at = ref.clone().requires_grad_()
    close(gradient(decoupled_adpo_loss(at, ref, q)[0], at), gradient(adpo_loss(at, ref, q)[0], at))
    assert abs((decoupled_adpo_loss(logps + 1, ref, q)[0] - apart.mean()).item()) > 1e-3


def test_equal_rewards_pull_back_to_the_anchor_unless_masked():
    logps, ref, _ = lists(23)
    rewards = torch.ones(3, 5, dtype=torch.float64)
    q = standardised_target(rewards)
    close(q, 0.2)
    assert gradient(adpo_loss(logps, ref, q)[0], logps).abs().max() > 1e-3
    kept = informative(rewards).unsqueeze(-1).expand(3, 5)
    loss, _ = adpo_loss(logps, ref, q, mask=kept)
    assert loss == 0
    assert (gradient(loss, logps) == 0).all()


def test_anchor_and_target_receive_no_gradient():
    logps, ref, q = lists(24)
    ref.requires_grad_()
    q.requires_grad_()
    loss, metrics = adpo_loss(logps, ref, q)
    loss.backward()
    assert ref.grad is None
    assert q.grad is None
    assert not any(tensor.requires_grad for tensor in metrics.values())
    assert not anchored_logits(logps.detach(), ref).requires_grad


def test_module_twin_and_temperature_per_list():
    logps, ref, q = lists(25)
    assert ADPOLoss(beta=0.5)(logps, ref, q)[0] == adpo_loss(logps, ref, q, tau=2.0)[0]
    taus = torch.tensor([[0.5], [1.0], [2.0]], dtype=torch.float64)
    together = adpo_loss(logps, ref, q, tau=taus, reduction="none")[0]
    for row, tau in enumerate(taus.squeeze(-1).tolist()):
        close(together[row].detach(), adpo_loss(logps[row], ref[row], q[row], tau=tau)[0].detach())


@pytest.mark.parametrize(
    "options",
    [{"tau": 1.0, "beta": 1.0}, {"tau": 0.0}, {"tau": -1.0}, {"beta": float("inf")}, {"reduction": "batchmean"}],
)
def test_bad_options_raise(options):
    with pytest.raises(ValueError, match=r"tau|beta|reduction"):
        adpo_loss(*lists(26), **options)


def test_bad_tensors_raise():
    logps, ref, q = lists(27)
    with pytest.raises(ValueError, match="targets must have shape"):
        adpo_loss(logps, ref, q[:, :4])
    with pytest.raises(TypeError, match="floating point"):
        adpo_loss(logps, ref, best_target(q).long())
    with pytest.raises(ValueError, match="a candidate or more"):
        adpo_loss(logps[:, :0], ref[:, :0], q[:, :0])
    with pytest.raises(ValueError, match="mask must have shape"):
        adpo_loss(logps, ref, q, mask=torch.ones(3, 1, dtype=torch.bool))
