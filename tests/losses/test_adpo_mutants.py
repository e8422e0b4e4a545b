"""Planted bugs in ADPO's loss, lists, targets, anchors and temperature: the probes must catch every one."""

import math

import pytest
import torch

from p2k.core.mutation import Mutant, survivors
from p2k.core.seeding import generator
from p2k.losses import adpo, anchors, lists, schedules, targets

SMALL = 1e-9  # far above float64's rounding and far below any planted difference

LOSS = [
    Mutant("losses = -torch", "losses = torch", "ascent"),
    Mutant("target * log_policy, 0.0)", "target * logits, 0.0)", "normaliser forgotten"),
    Mutant("target * log_policy, 0.0)", "log_policy.exp() * target.log(), 0.0)", "reverse divergence"),
    Mutant("-torch.where(target > 0, target * log_policy, 0.0)", "-(target * log_policy)", "0 * inf where masked"),
    Mutant("logits.log_softmax(-1)\n    target", "logits.log_softmax(0)\n    target", "softmax over the batch"),
    Mutant("targets.detach().to(", "targets.to(", "target keeps its gradient", count=2),
    Mutant("(keep, targets.detach()", "(keep | ~keep, targets.detach()", "masked target enters", count=2),
    Mutant("(op, tau, beta), mask=keep", "(op, beta, tau), mask=keep", "tau and beta exchanged", count=2),
    Mutant("(op, tau, beta), mask=keep", "(op, tau, beta)", "masked candidates in the softmax", count=2),
    Mutant("reduce(losses, reduction, keep.any(-1))", "reduce(losses, reduction)", "empty list in the mean", count=2),
    Mutant("- linear\n", "+ linear\n", "decoupled loss pushes the target away"),
    Mutant(".sum(-1) / keep.sum(-1).clamp(min=1)", ".mean(-1)", "decoupled mean over padding"),
    Mutant("0.0).sum(-1) / keep", "0.0).sum(-1).log() / keep", "logarithm of the normaliser kept"),
    Mutant("target * logits, 0.0)", "target * logits.log_softmax(-1), 0.0)", "decoupled loss coupled again"),
    Mutant('("ADPOLoss", tau, beta)', '("ADPOLoss", beta, tau)', "module exchanges tau and beta"),
    Mutant("tau=self.tau, mask=mask,", "tau=self.tau,", "module drops the mask"),
]
LISTS = [
    Mutant("return 1.0 / beta", "return beta", "beta not inverted"),
    Mutant("wide(logps) - wide(ref_logps)", "wide(logps) + wide(ref_logps)", "sign of the anchor"),
    Mutant("(wide(logps) - wide(ref_logps).detach())", "wide(logps)", "anchor forgotten"),
    Mutant("wide(ref_logps).detach()", "wide(ref_logps)", "anchor keeps its gradient"),
    Mutant("(wide(logps) - wide(ref_logps).detach())", "(logps - ref_logps.detach())", "computed in half precision"),
    Mutant(".detach()) / tau", ".detach()) * tau", "temperature inverted"),
    Mutant("torch.where(empty, 0.0, -torch.inf)", "torch.where(empty, 0.0, 0.0)", "masked candidates at the anchor"),
    Mutant("torch.where(empty, 0.0, -torch.inf)", "torch.where(empty, -torch.inf, -torch.inf)", "empty list is NaN"),
    Mutant("return highest > lowest", "return highest >= lowest", "equal rewards count as informative"),
    Mutant("(keep, rewards, torch.inf).amin", "(keep, rewards, 0.0).amin", "hole counts as the worst reward"),
    Mutant("targets * (targets.log() - log_policy)", "targets * -log_policy", "entropy of the target left in"),
    Mutant("entropy = -torch", "entropy = torch", "sign of the entropy"),
    Mutant("log_ratio.abs(), keep", "log_ratio, keep", "signed distance from the anchor"),
    Mutant("masked_mean(divergence, filled)", "divergence.mean()", "empty list dilutes the metric"),
]
TARGETS = [
    Mutant("rewards.detach()) / beta_reward", "rewards.detach()) * beta_reward", "target temperature inverted"),
    Mutant("return torch.where(keep, filled.softmax(-1), 0.0)", "return filled.softmax(-1)", "empty list is uniform"),
    Mutant("values - masked_mean(values, keep, -1).unsqueeze(-1)", "values", "deviation about zero"),
    Mutant("keepdim=True) - 1).clamp", "keepdim=True)).clamp", "biased deviation"),
    Mutant(" / degrees).sqrt()", " / degrees)", "variance for the deviation"),
    Mutant("(deviation + eps), beta_reward=beta_reward, mask=keep", "(deviation + eps), mask=keep", "beta lost"),
    Mutant("-torch.inf).argmax", "-torch.inf).argmin", "worst candidate takes all"),
    Mutant("torch.where(keep, values, -torch.inf).argmax", "values.argmax", "hole takes all"),
    Mutant("new_tensor([1 - label_smoothing, label", "new_tensor([label_smoothing, 1 - label", "label turned round"),
    Mutant("1.06 * torch.minimum", "1.06 * torch.maximum", "wider of the two spreads"),
    Mutant("spread / IQR_OF_NORMAL", "spread", "quartile range as a deviation"),
    Mutant("count**-0.2", "count**0.2", "bandwidth grows with the list"),
    Mutant("ordered, 0.25)", "ordered, 0.5)", "median for the lower quartile"),
    Mutant("h = h.clamp(min=SMALLEST_BANDWIDTH)", "h = h + 0.0", "equal rewards divide by zero"),
    Mutant(".unsqueeze(-1) - r.unsqueeze(-2)", ".unsqueeze(-2) - r.unsqueeze(-1)", "order turned round"),
    Mutant("torch.logit(F.clamp(CDF_MARGIN, 1 - CDF_MARGIN))", "torch.logit(F)", "margin forgotten in long lists"),
    Mutant("torch.logit(F.clamp(CDF_MARGIN, 1 - CDF_MARGIN))", "F", "ranks instead of their log-odds"),
    Mutant("kde_scores(rewards), beta_reward=beta_reward", "kde_scores(rewards)", "KDE target ignores beta"),
]
ANCHORS = [
    Mutant("% self.every == 0", "% self.every == 1", "copies one step late"),
    Mutant("tensor.dtype), 1 - self.decay", "tensor.dtype), self.decay", "decay is the weight on the new policy"),
    Mutant("mean() > self.threshold", "mean() < self.threshold", "copies while near"),
    Mutant("torch.where(moves, torch.nan, self.recent)", "self.recent", "window not restarted"),
    Mutant("self.recent.copy_(self.recent.roll(1))", "self.recent.fill_(0.0)", "window of one"),
    Mutant("tensor.detach().clone() for", "tensor.detach() for", "anchor shares the policy's memory"),
    Mutant("return logps.detach()", "return logps", "on-policy anchor has a gradient"),
    Mutant("torch.zeros_like(logps)", "torch.ones_like(logps).cumsum(-1)", "uniform anchor prefers something"),
    Mutant(
        "with torch.no_grad():\n            return compute",
        "if True:\n            return compute",
        "fixed anchor learns",
    ),
]
TEMPERATURE = [
    Mutant("factor = 1 + entropy", "factor = 1 - entropy", "older rule: down with the entropy"),
    Mutant("* (1 - H) * (1 - R)\n", "* H * (1 - R)\n", "up where unsure and wrong"),
    Mutant("* (1 - H) * (1 - R)\n", "* (1 - H) * R\n", "up where sure and right"),
    Mutant(".clamp(*tau_range)", ".clamp(min=tau_range[0])", "upper end forgotten"),
    Mutant("entropy.detach()).clamp(0.0, 1.0).mean(-1)", "entropy.detach()).mean(-1)", "entropy not clamped"),
    Mutant("_unit_range(wide(rewards.detach()).mean(-1))", "wide(rewards.detach()).mean(-1)", "raw mean reward"),
]


def off(actual, expected) -> bool:
    """True where the two differ; NaN differs from everything."""
    return not (actual - expected).abs().max() < SMALL


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def gradient(loss, x):
    return torch.autograd.grad(loss.sum(), x, retain_graph=True)[0]


def wrong_loss(module) -> bool:
    """The cross-entropy, its gradient and the decoupled form by hand, with a hole that holds NaN and an empty list."""
    logps, ref, tau = draw(3, 5).requires_grad_(), draw(3, 5, seed=1).requires_grad_(), 0.6
    keep = torch.tensor([[True] * 5, [True, True, False, True, True], [False] * 5])
    q = (draw(3, 5, seed=2).exp() * keep).requires_grad_()
    weights = q.detach() / q.detach().sum(-1, keepdim=True).clamp(min=1e-300)
    poisoned = torch.where(keep, weights, torch.nan).requires_grad_()
    u = ((logps - ref) / tau).detach()
    total, count = (u.exp() * keep).sum(-1, keepdim=True), keep.sum(-1)
    policy = torch.where(keep, u.exp() / total.clamp(min=1e-300), 0.0)
    coupled = torch.where(keep.any(-1), total[:, 0].log() - (weights * u).sum(-1), 0.0)
    decoupled = total[:, 0] / count.clamp(min=1) - (weights * u).sum(-1)
    apart = torch.where(keep, u.exp(), 0.0) / count.clamp(min=1)[:, None]
    cases = ((module.adpo_loss, coupled, policy), (module.decoupled_adpo_loss, decoupled, apart))
    for loss, value, pull in cases:
        for options in ({"tau": tau}, {"beta": 1 / tau}):
            each = loss(logps, ref, poisoned, mask=keep, reduction="none", **options)[0]
            if off(each.detach(), value) or off(gradient(each, logps), (pull - weights) / tau):
                return True
        mean = loss(logps, ref, poisoned, mask=keep, tau=tau)[0]
        if off(mean.detach(), value.sum() / 2):
            return True
        if torch.autograd.grad(mean, (ref, poisoned), allow_unused=True) != (None, None):
            return True
    twin = module.ADPOLoss(beta=1 / tau, reduction="none")(logps, ref, poisoned, keep)[0]
    return off(twin.detach(), coupled)


def wrong_lists(module) -> bool:
    """Anchored logits, both names of the temperature, informative lists and the metrics by hand."""
    logps, ref, q = draw(3, 4).requires_grad_(), draw(3, 4, seed=1).requires_grad_(), draw(3, 4, seed=2).softmax(-1)
    keep = torch.tensor([[True] * 4, [True, False, True, True], [False] * 4])
    u = module.anchored_logits(logps, ref, tau=module.resolve_temperature("probe", None, 2.0), mask=keep)
    expected = torch.where(keep, 2 * (logps - ref).detach(), -torch.inf)
    expected[2] = 0.0
    if not torch.allclose(u.detach(), expected, rtol=SMALL, atol=SMALL):
        return True
    if (
        gradient(u[keep], logps).sum() != 14
        or torch.autograd.grad(u[keep].sum(), ref, allow_unused=True)[0] is not None
    ):
        return True
    if module.anchored_logits(logps.bfloat16(), ref.bfloat16()).dtype != torch.float32:
        return True
    rewards = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, torch.nan, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0]])
    some = torch.tensor([[True] * 4, [True, False, True, True], [True] * 4])
    if module.informative(rewards, some).tolist() != [False, False, True]:
        return True
    log_p, target = torch.where(keep, u.detach(), -torch.inf).log_softmax(-1), torch.where(keep, q, 0.0)
    log_p[2] = 0.25
    found = module.list_metrics(log_p, target, (logps - ref).detach(), keep)
    first, second = log_p[0], log_p[1, keep[1]]
    entropy = -(first.exp() @ first + second.exp() @ second) / 2
    fits = ((q[0], first), (q[1, keep[1]], second))
    divergence = sum((a * (a.log() - b)).sum() for a, b in fits) / 2
    distance = (logps - ref).detach()[keep].abs().mean()
    pairs = ((found["entropy"], entropy), (found["kl"], divergence), (found["log_ratio/mean_abs"], distance))
    return any(off(a, b) for a, b in pairs)


def wrong_targets(module) -> bool:
    """Every target against its formula written for one row, on lists with a hole, equal rewards and many candidates."""
    r, beta = draw(4, 6), 0.4
    keep = torch.ones(4, 6, dtype=torch.bool)
    keep[1, 2], keep[3] = False, False
    holed = torch.where(keep, r, 100.0)
    soft, scaled, best = torch.zeros(4, 6).double(), torch.zeros(4, 6).double(), torch.zeros(4, 6).double()
    for row in range(3):
        values = r[row, keep[row]]
        soft[row, keep[row]] = (values / beta).softmax(-1)
        scaled[row, keep[row]] = ((values - values.mean()) / (values.std() + 1e-8) / beta).softmax(-1)
        best[row, keep[row]] = (values == values.max()).double()
    options = {"beta_reward": beta, "mask": keep}
    if off(module.softmax_target(holed, **options), soft) or off(module.standardised_target(holed, **options), scaled):
        return True
    if (
        off(module.best_target(holed, mask=keep), best)
        or module.pair_target(r[:, :2], label_smoothing=0.2)[0, 0] != 0.8
    ):
        return True
    for row in (*r, torch.ones(6).double()):
        quartiles = torch.quantile(row, torch.tensor([0.25, 0.75]).double())
        h = max(1.06 * min(row.std(), (quartiles[1] - quartiles[0]) / 1.349) * 6**-0.2, 1e-3)
        ranks = torch.stack([0.5 * (1 + torch.erf((x - row) / (h * math.sqrt(2)))) for x in row]).mean(-1)
        scores = (ranks / (1 - ranks)).log()
        if off(module.kde_scores(row), scores) or off(
            module.kde_target(row, beta_reward=beta), (scores / beta).softmax(-1)
        ):
            return True
    long = module.kde_scores(torch.cat([torch.arange(999.0), torch.tensor([1e6])]).double())
    return off(long[-1], math.log(999.0))


def wrong_anchors(module) -> bool:
    """When each anchor moves and to what, what it shares with the policy, and that no gradient reaches it."""

    def at(value):
        return {"w": torch.full((2,), float(value), dtype=torch.float64)}

    source, logps = at(0), draw(3).requires_grad_()
    options = {
        "fixed": {},
        "dynamic": {"every": 2},
        "ema": {"decay": 0.75},
        "kl_triggered": {"threshold": 0.1, "window": 2},
    }
    built = {kind: module.build_anchor(kind, source, **each) for kind, each in options.items()}
    source["w"].fill_(99.0)
    path = {kind: [] for kind in built}
    for step, far in enumerate((0.3, 0.3, 0.05, 0.0, 0.0, 0.3), start=1):
        for kind, anchor in built.items():
            anchor.step(at(step), torch.tensor(far))
            path[kind].append(anchor.parameters["w"][0].item())
    ema = [sum(0.25 * 0.75 ** (n - k) * k for k in range(1, n + 1)) for n in range(1, 7)]
    expected = {"fixed": [0] * 6, "dynamic": [0, 2, 2, 4, 4, 6], "ema": ema, "kl_triggered": [0, 2, 2, 2, 2, 6]}
    if any(off(torch.tensor(path[kind]).double(), torch.tensor(row).double()) for kind, row in expected.items()):
        return True
    built["fixed"].parameters["w"].requires_grad_()
    fixed = built["fixed"].reference(logps, lambda named: 3 * named["w"])
    stored, flat = (module.build_anchor(kind).reference(logps) for kind in ("on_policy", "uniform"))
    return fixed.requires_grad or stored.requires_grad or not torch.equal(stored, logps.detach()) or flat.any().item()


def wrong_temperature(module) -> bool:
    """The adaptive temperature of three prompts by hand, with one entropy above one, and both ends of its range."""
    entropy = torch.tensor([[0.2, 0.4], [0.9, 0.5], [0.5, 4.0]], dtype=torch.float64)
    rewards = torch.tensor([[-3.0, -1.0], [1.0, 0.0], [5.0, 7.0]], dtype=torch.float64)
    H, R = (0.3, 0.7, 0.75), (0.0, 2.5 / 8, 1.0)
    by_hand = [0.8 * (1 + 0.5 * h + 2.0 * (1 - h) * (1 - r)) for h, r in zip(H, R, strict=True)]
    weights = {"tau": 0.8, "entropy_weight": 0.5, "failure_weight": 2.0}
    for low, high in ((0.1, 5.0), (1.2, 1.8)):
        found = module.adaptive_temperature(entropy, rewards, tau_range=(low, high), **weights)
        if off(found[:, 0], torch.tensor(by_hand, dtype=torch.float64).clamp(low, high)):
            return True
    return False


CASES = {
    "loss": (adpo, LOSS, wrong_loss),
    "lists": (lists, LISTS, wrong_lists),
    "targets": (targets, TARGETS, wrong_targets),
    "anchors": (anchors, ANCHORS, wrong_anchors),
    "temperature": (schedules, TEMPERATURE, wrong_temperature),
}


@pytest.mark.parametrize(("module", "mutants", "wrong"), CASES.values(), ids=CASES)
def test_every_planted_bug_is_caught(module, mutants, wrong):
    alive = survivors(module, mutants, wrong)
    assert not alive, [mutant.why for mutant in alive]
