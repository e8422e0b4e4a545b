"""Planted bugs in the water-filling and the losses on it: the probe must catch every one."""

import pytest
import torch

from p2k.core.mutation import Mutant, survivors
from p2k.core.seeding import generator
from p2k.losses import gopo

MUTANTS = [
    Mutant("- mu * (1 - filled)", "- mu * filled", "level computed from the mass of the free samples"),
    Mutant("- mu * (1 - filled)", "+ mu * (1 - filled)", "clamped samples give mass instead of taking it"),
    Mutant("free = ordered - candidates > -mu", "free = ordered - candidates > mu", "sign of the bound"),
    Mutant("free = ordered - candidates > -mu", "free = ordered - candidates > 0", "simplex at 0 instead of -mu"),
    Mutant("free = ordered - candidates > -mu", "free = ordered > -mu", "bound tested without the multiplier"),
    Mutant(".sort(-1, descending=True)", ".sort(-1)", "worst samples first"),
    Mutant("keepdim=True) - 1).clamp(min=0)", "keepdim=True)).clamp(max=g.shape[-1] - 1)", "one sample too many"),
    Mutant("keepdim=True) - 1).clamp(min=0)", "keepdim=True) - 2).clamp(min=0)", "one sample too few"),
    Mutant("mass = pi.gather(-1, order)", "mass = pi", "weights left in the order of the input"),
    Mutant("lam = candidates.gather(-1, last) + center", "lam = candidates.gather(-1, last)", "center not restored"),
    Mutant("torch.where(heavy, g - center, 0.0)", "(g - center)", "samples without mass take part"),
    Mutant("(mass * ordered).cumsum(-1)", "ordered.cumsum(-1)", "unweighted sum of drives"),
    Mutant("(mass * ordered).cumsum(-1)", "(mass * ordered).sum(-1, keepdim=True)", "total instead of prefix"),
    Mutant("- lam) / mu).clamp(min=-1.0), lam", "- lam) / mu).clamp(min=0.0), lam", "bound at no change"),
    Mutant("- lam) / mu).clamp(min=-1.0), lam", "- lam) / mu), lam", "bound forgotten"),
    Mutant("- lam) / mu).clamp(min=-1.0), lam", "- lam)).clamp(min=-1.0), lam", "stiffness forgotten"),
    Mutant("return pi / torch.where(total > 0, total, 1.0)", "return pi", "weights not normalised"),
    Mutant("    return (g - lam) / mu, lam", "    return g / mu, lam", "linear drive not centred"),
    Mutant("rho = torch.where(clamped & (rho", "rho = torch.where((rho", "hard stop for free samples too"),
    Mutant(
        "(rho - (1 + change)).square(), keep", "(rho - change).square(), keep", "target of the change, not the ratio"
    ),
    Mutant("masked_mean(0.5 * mu * (rho - (1 + change)", "masked_mean(mu * (rho - (1 + change)", "lost one half"),
    Mutant("bounded_projection(advantages, mu, weights=keep)", "bounded_projection(advantages, mu)", "mask not passed"),
    Mutant("- mu * change * rho, keep", "+ mu * change * rho, keep", "ascent on the advantage"),
]


def cases():
    """Groups where the bound is inactive, active for one and active for most; with weights and holes."""
    rng = generator(0)
    spread = torch.tensor([0.05, 0.5, 2.0, 20.0], dtype=torch.float64).view(4, 1)
    g = spread * torch.randn(4, 7, generator=rng, dtype=torch.float64) + 3.0
    weights = torch.rand(4, 7, generator=rng, dtype=torch.float64)
    holes = weights.clone()
    holes[:, [1, 4]] = 0.0
    return g, (torch.ones_like(g), weights, holes)


def wrong(module) -> bool:
    """True when the module violates a defining property: the constraint, the conditions, or the loss's own formula."""
    mu, small = 0.5, 1e-9  # far above rounding and far below any planted difference
    g, weightings = cases()
    for weights in weightings:
        pi = weights / weights.sum(-1, keepdim=True)
        change, lam = module.bounded_projection(g, mu, weights=weights)
        if (change < -1).any() or (pi * change).sum(-1).abs().max() > small:
            return True
        if (change - ((g - lam) / mu).clamp(min=-1)).abs().max() > small:
            return True
        if (pi * module.linear_projection(g, mu, weights=weights)[0]).sum(-1).abs().max() > small:
            return True
    keep = weightings[-1] > 0
    poisoned = torch.where(keep, g, torch.nan)
    clean = module.water_fill(g, mu, weights=keep)
    if not (module.water_fill(poisoned, mu, weights=keep) - clean).abs().max() < small:
        return True
    logps = torch.randn(4, 7, generator=generator(1), dtype=torch.float64).requires_grad_()
    old = torch.zeros_like(g)
    change, _ = gopo.bounded_projection(g, mu, weights=keep)
    linear, _ = gopo.linear_projection(g, mu, weights=keep)
    rho, count = logps.detach().exp(), keep.sum(-1, keepdim=True)
    for loss, target in ((module.gopo_loss, change), (module.linear_gopo_loss, linear)):
        value = loss(logps, old, g, mu=mu, mask=keep, reduction="none")[0]
        grad = torch.autograd.grad(value.sum(), logps)[0]
        expected = torch.where(keep, mu * rho * (rho - 1 - target) / count, 0.0)
        if (grad - expected).abs().max() > small:
            return True
    value = module.gopo_loss(logps, old, g, mu=mu, mask=keep, stop_ratio=10.0, reduction="none")[0]
    stopped = torch.autograd.grad(value.sum(), logps)[0] == 0
    return not torch.equal(stopped, ~keep | (change <= -1))


def test_every_planted_bug_is_caught():
    alive = survivors(gopo, MUTANTS, wrong)
    assert not alive, [mutant.why for mutant in alive]


def test_an_edit_that_does_not_apply_is_refused():
    with pytest.raises(ValueError, match="expected 1"):
        survivors(gopo, [Mutant("no such text", "", "nothing")], lambda module: False)
