"""Planted bugs in the alpha-divergence, its gradient and its schedules: the probes must catch every one."""

import math

import pytest
import torch

from p2k.core.mutation import Mutant, survivors
from p2k.core.seeding import generator
from p2k.losses import apo, schedules

SMALL = 1e-9  # far above float64's rounding at the alphas below and far below any planted difference

LOSS = [
    Mutant("torch.expm1(k * s)", "(torch.exp(k * s) - 1)", "cancellation near both ends"),
    Mutant(
        "torch.where(at_zero, s, torch.expm1(k * s) / safe_k)", "torch.expm1(k * s) / safe_k", "limit at k = 0 lost"
    ),
    Mutant("near = a * torch", "near = torch", "weight of the candidate forgotten"),
    Mutant("log_b - torch.where(gone, 0.0, log_a))", "torch.where(gone, 0.0, log_a) - log_b)", "sign of s"),
    Mutant(
        "return torch.where(gone & ~at_zero, (mixed.exp() - a) / safe_k, near)", "return near", "underflow: 0 * inf"
    ),
    Mutant("safe_k * log_b + (1 - safe_k) * log_a", "(1 - safe_k) * log_b + safe_k * log_a", "exponents exchanged"),
    Mutant("(log_p, log_q, alpha) / (alpha - 1)", "(log_q, log_p, alpha) / (alpha - 1)", "p and q exchanged below 1/2"),
    Mutant("(log_q, log_p, 1 - alpha) / alpha", "(log_p, log_q, 1 - alpha) / alpha", "p and q exchanged above 1/2"),
    Mutant("(log_q, log_p, 1 - alpha) / alpha", "(log_q, log_p, alpha) / alpha", "alpha for 1 - alpha"),
    Mutant(" / (alpha - 1).clamp(max=-0.25)", " * -1.0", "lost 1 / (1 - alpha)"),
    Mutant(" / alpha.clamp(min=0.25)\n", "\n", "lost 1 / alpha"),
    Mutant("(alpha - 1).clamp(max=-0.25)", "(alpha - 1).clamp(max=-0.75)", "divisor clamped inside its range"),
    Mutant("alpha.clamp(min=0.25)", "alpha.clamp(min=0.75)", "divisor clamped inside its range"),
    Mutant("torch.where(alpha < 0.5, low, high)", "torch.where(alpha < 0.5, high, low)", "halves exchanged"),
    Mutant("(policy * pull.sum(-1, keepdim=True) - pull)", "(-pull)", "baseline M p dropped: the published fix"),
    Mutant("(policy * pull.sum(-1, keepdim=True) - pull)", "(pull - policy * pull.sum(-1, keepdim=True))", "ascent"),
    Mutant("(policy * pull.sum", "(pull.sum", "baseline not weighted by the policy"),
    Mutant("grad.unsqueeze(-1) * (", "(", "upstream gradient dropped"),
    Mutant("_floored_log(q), alpha), 0.0)", "_floored_log(q), 1 - alpha), 0.0)", "gradient of the dual"),
    Mutant("q.clamp(min=torch.finfo(q.dtype).tiny).log()", "q.log()", "reverse end infinite where q is 0"),
    Mutant("targets.detach().to(u.dtype), 0.0)", "targets.to(u.dtype), 0.0)", "target keeps its graph"),
    Mutant("(op, tau, None), mask=keep)", "(op, tau, None))", "masked candidates in the softmax"),
    Mutant("(op, tau, None)", "(op, None, tau)", "tau read as beta"),
    Mutant("reduce(losses, reduction, keep.any(-1))", "reduce(losses, reduction)", "empty list dilutes the mean"),
    Mutant("if not isinstance(alpha, Tensor) and not 0 <= alpha <= 1:", "if False:", "alpha out of range accepted"),
    Mutant(
        "alpha * _floored_log(targets) + (1 - alpha)", "(1 - alpha) * _floored_log(targets) + alpha", "ess of the dual"
    ),
    Mutant("total = m.square().sum(-1)", "total = m.amax(-1)", "inverse of the largest weight"),
    Mutant("self.alpha if alpha is None else alpha", "self.alpha", "module ignores the schedule"),
    Mutant("tau=self.tau, mask=mask,", "tau=self.tau,", "module drops the mask"),
]
SCHEDULES = [
    Mutant("1 - (-wide(mean_logps", "(-wide(mean_logps", "doubt for confidence"),
    Mutant("/ log_vocab).clamp(0.0, 1.0)", "/ log_vocab)", "likelihood not clamped"),
    Mutant("(2 * _unit_range(wide(advantages.detach())).mean() - 1)", "_unit_range(advantages).mean()", "no threshold"),
    Mutant(".mean() - 1).clamp(min=0.0)", ".mean() - 1)", "bad rewards raise alpha"),
    Mutant("_unit_range(wide(advantages.detach()))", "wide(advantages.detach())", "advantages not scaled"),
    Mutant("alpha_max - (alpha_max - alpha_min) *", "alpha_min + (alpha_max - alpha_min) *", "schedule turned round"),
    Mutant("* certainty * progress", "* certainty", "good rewards not asked for"),
    Mutant("* certainty * progress", "* progress", "confidence not asked for"),
    Mutant("self.calls > self.warmup", "self.calls >= self.warmup", "warm-up one call short"),
    Mutant("self.target * u.shape[-1]", "self.target", "fraction read as a count"),
    Mutant("(1 - self.decay) * (wanted", "self.decay * (wanted", "weight on the new alpha"),
    Mutant("(wanted - self.alpha)).clamp(-self.max_step, self.max_step)", "(wanted - self.alpha))", "step not limited"),
    Mutant("torch.where(held, self.alpha_max, (", "torch.where(held, self.alpha, (", "on-policy keeps the old alpha"),
    Mutant(
        "u.abs().mean() < self.on_policy_below", "u.mean() < self.on_policy_below", "signed distance from the anchor"
    ),
    Mutant(".abs().argmin()", ".argmin()", "smallest size instead of the nearest"),
]


def off(actual, expected, bound=SMALL) -> bool:
    """True where the two differ; NaN differs from everything."""
    return not (actual - expected).abs().max() < bound


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def textbook(p, q, alpha):
    """Value and gradient in u from the definition, for lists of positive probabilities."""
    s, kl = (q / p).log(), {0.0: (p * (p / q).log()).sum(-1), 1.0: (q * (q / p).log()).sum(-1)}
    if alpha == 0:
        return kl[0.0], p * (-s - kl[0.0][:, None])
    m = q**alpha * p ** (1 - alpha)
    total = m.sum(-1, keepdim=True)
    value = kl[1.0] if alpha == 1 else (1 - total[:, 0]) / (alpha * (1 - alpha))
    return value, (total * p - m) / alpha


def wrong_loss(module) -> bool:
    """Value, gradient and effective size against the definition, then the mask, the extremes and the module twin."""
    logps, ref, tau = draw(4, 5).requires_grad_(), draw(4, 5, seed=1), 0.7
    q, upstream = draw(4, 5, seed=2).softmax(-1).requires_grad_(), torch.tensor([1.0, -2.0, 0.5, 3.0]).double()
    p = ((logps - ref) / tau).softmax(-1).detach()
    for alpha in (0.0, 0.1, 0.35, 0.5, 0.6, 0.9, 1.0):
        value, pull = textbook(p, q.detach(), alpha)
        each, metrics = module.apo_loss(logps, ref, q, alpha=alpha, tau=tau, reduction="none")
        grads = torch.autograd.grad((upstream * each).sum(), (logps, q), allow_unused=True)
        if off(each.detach(), value) or off(grads[0], upstream[:, None] * pull / tau) or grads[1] is not None:
            return True
        if any(tensor.requires_grad for tensor in metrics.values()):
            return True
        m = q.detach() ** alpha * p ** (1 - alpha)
        if off(metrics["ess"], (m.sum(-1) ** 2 / m.square().sum(-1)).mean()):
            return True
    return wrong_extremes(module, logps.detach(), ref, q.detach(), tau) or wrong_in_float32(module)


def wrong_extremes(module, logps, ref, q, tau) -> bool:
    """Holes with NaN, an empty list, underflow on either side, and an alpha out of range."""
    keep = torch.ones(4, 5, dtype=torch.bool)
    keep[1, 2], keep[3] = False, False
    poisoned = torch.where(keep, q / (q * keep).sum(-1, keepdim=True).clamp(min=0.01), torch.nan)
    twin = module.APOLoss(0.9, tau=tau)
    for alpha in (0.35, 0.6):
        rows = [(logps[i, keep[i]], ref[i, keep[i]], poisoned[i, keep[i]]) for i in range(3)]
        values = [textbook(((a - b) / tau).softmax(-1)[None], c[None], alpha)[0] for a, b, c in rows]
        expected = torch.cat(values).mean()
        for found in (
            module.apo_loss(logps, ref, poisoned, alpha=alpha, tau=tau, mask=keep)[0],
            twin(logps, ref, poisoned, mask=keep, alpha=alpha)[0],
        ):
            if off(found, expected):
                return True
    lost = torch.tensor([[0.0, -2000.0]]).double().requires_grad_()
    for alpha in (0.1, 0.6):
        value = module.apo_loss(
            lost, torch.zeros_like(lost), torch.tensor([[0.3, 0.7]], dtype=torch.float64), alpha=alpha
        )[0]
        if off(value.detach(), (1 - 0.3**alpha) / (alpha * (1 - alpha))):
            return True
        if not torch.autograd.grad(value, lost)[0].isfinite().all():
            return True
    # A candidate whose probability has underflowed still has a weight m near the forward end.
    log_p, alpha = torch.tensor([0.0, -720.0], dtype=torch.float64), 0.99
    edge, share = log_p[None].clone().requires_grad_(), torch.tensor([[0.3, 0.7]], dtype=torch.float64)
    (pull,) = torch.autograd.grad(module.apo_loss(edge, torch.zeros_like(share), share, alpha=alpha)[0], edge)
    m = (alpha * share.log() + (1 - alpha) * log_p).exp()
    if off(pull, (m.sum() * log_p.exp() - m) / alpha):
        return True
    sharp = module.apo_loss(
        torch.zeros(1, 2).double(), torch.zeros(1, 2).double(), torch.eye(2)[:1].double(), alpha=0.0
    )
    if not sharp[0].isfinite():
        return True
    try:
        module.apo_loss(logps, ref, q, alpha=1.5)
    except ValueError:
        return False
    return True


def wrong_in_float32(module) -> bool:
    """True when float32 loses digits near an end: what the expm1 form is for."""
    single, q = draw(8, 6, seed=3).float().requires_grad_(), draw(8, 6, seed=4).softmax(-1).float()
    exact = single.detach().double().requires_grad_()
    grads = []
    for x in (single, exact):
        value = module.apo_loss(x, torch.zeros_like(x), q.to(x), alpha=1e-4, reduction="sum")[0]
        grads.append(torch.autograd.grad(value, x)[0].double())
    # A thousand times what one float32 rounding costs would be 1e-4; exp(x) - 1 at alpha 1e-4 loses three digits.
    return off(grads[0], grads[1], bound=1e-5)


def wrong_schedules(module) -> bool:
    """Confidence, improvement and the guarded alpha by hand; the effective-size rule against a slow copy of it."""
    means, log_vocab = torch.tensor([-0.5, -1.0, -40.0, 0.0]).double(), 4.0
    if off(module.confidence(means, log_vocab), 1 - (0.125 + 0.25 + 1.0 + 0.0) / 4):
        return True
    for right, expected in ((2, 0.0), (6, 0.5), (7, 0.75)):
        rewards = (torch.arange(8) < right).double()
        if off(module.improvement(3 * (rewards - right / 8)), expected):
            return True
    half = torch.tensor(0.5).double()
    if off(module.guarded_alpha(half, half / 2), 0.9 - 0.55 * 0.125):
        return True
    logits, q = 2 * draw(3, 8, seed=5) - 3, (draw(3, 8, seed=6) / 0.3).softmax(-1)
    return any(wrong_rule(module, logits, q, decay, limit) for decay, limit in ((0.8, 0.03), (0.7, 1.0)))


def wrong_rule(module, logits, q, decay, limit) -> bool:
    """Six moves after two calls of warm-up, then the return to the start on-policy."""
    rule = module.ESSAlpha(warmup=2, max_step=limit, decay=decay, target=0.6)
    alpha, p, grid = 0.9, logits.softmax(-1), torch.linspace(0.35, 0.9, 11)
    for call in range(1, 9):
        if call > 2:
            weights = [q**a * p ** (1 - a) for a in grid.double()]
            sizes = torch.stack([(m.sum(-1) ** 2 / m.square().sum(-1)).mean() for m in weights])
            change = (1 - decay) * (grid[(sizes - 0.6 * 8).abs().argmin()].item() - alpha)
            alpha += math.copysign(min(abs(change), limit), change)
        # The grid is stored in float32.
        if off(rule.step(logits, q), alpha, bound=1e-6):
            return True
    return off(rule.step(torch.zeros_like(logits), q), 0.9, bound=1e-6)


CASES = {"loss": (apo, LOSS, wrong_loss), "schedules": (schedules, SCHEDULES, wrong_schedules)}


@pytest.mark.parametrize(("module", "mutants", "wrong"), CASES.values(), ids=CASES)
def test_every_planted_bug_is_caught(module, mutants, wrong):
    alive = survivors(module, mutants, wrong)
    assert not alive, [mutant.why for mutant in alive]
