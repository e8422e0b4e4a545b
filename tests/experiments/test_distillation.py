from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from p2k.core.seeding import generator
from p2k.core.tolerance import tolerance
from p2k.experiments import distillation
from p2k.experiments.distillation import DISTILLERS, distil, gaussian_logp, initial_students, measure, rollout
from p2k.losses.adpo import adpo_loss
from p2k.losses.targets import softmax_target

KD, SELF = DISTILLERS[0], DISTILLERS[1]


def test_matched_distillation_is_stationary_at_the_teacher():
    mean = torch.randn(5, 1, 2, dtype=torch.float64, generator=generator(0), requires_grad=True)
    log_std = torch.full((2,), 0.3, dtype=torch.float64).log().requires_grad_()
    actions = mean.detach() + torch.randn(5, 8, 2, dtype=torch.float64, generator=generator(1))
    target = softmax_target(gaussian_logp(actions, mean.detach(), log_std.detach()))
    logps = gaussian_logp(actions, mean, log_std)

    def slope(tau, anchor):
        loss, _ = adpo_loss(logps, anchor, target, tau=tau)
        return max(grad.abs().max().item() for grad in torch.autograd.grad(loss, (mean, log_std), retain_graph=True))

    # The slope is a sum of eight differences of order one in units of the inverse deviation squared.
    assert slope(1.0, torch.zeros_like(logps)) <= 1e3 * tolerance(torch.float64)
    assert slope(2.0, torch.zeros_like(logps)) > 1e-3
    assert slope(1.0, logps.detach() + torch.randn(5, 8, generator=generator(2))) > 1e-3


def test_distillation_recovers_the_teacher_and_a_fixed_anchor_does_not():
    seeds = (0, 1)
    matched, anchored = distil(KD, seeds), distil(SELF, seeds)
    teacher = rollout(None, seeds, 64)[0]
    # The list's target fixes the teacher exactly; what is left is the students' fit, far below the start's 1.5 nats.
    assert max(matched.divergences) < 0.02
    assert all(abs(a - b) < 0.05 * abs(b) for a, b in zip(matched.returns, teacher.tolist(), strict=True))
    assert all(a > b for a, b in zip(anchored.divergences, matched.divergences, strict=True))


def test_the_stack_equals_one_student_at_a_time():
    together, alone = distil(KD, (3, 4), steps=10), distil(KD, (4,), steps=10)
    # Returns are float32 sums of 60 costs behind ten optimizer steps.
    assert together.returns[1] == pytest.approx(alone.returns[0], rel=1e-4)
    assert together.divergences[1] == pytest.approx(alone.divergences[0], rel=1e-4)
    assert together.returns[0] != pytest.approx(together.returns[1], rel=1e-2)


def test_divergence_is_that_of_gaussians():
    parameters, seeds = initial_students((0,)), (0,)
    states = rollout(None, seeds, 64)[1]
    teacher = Normal(distillation.teacher_mean(states), distillation.TEACHER_STD)
    student = Normal(distillation.student_mean(parameters, states), parameters["log_std"].exp())
    expected = kl_divergence(teacher, student).sum(-1).mean().item()
    assert measure("start", parameters, seeds).divergences[0] == pytest.approx(expected, rel=1e-5)


def test_an_unknown_anchor_or_a_lone_candidate_is_refused():
    with pytest.raises(ValueError, match="candidates"):
        distil(KD, (0,), candidates=1)
    with pytest.raises(ValueError, match="name must be one of"):
        distil(replace(KD, anchor="none"), (0,), steps=1)
