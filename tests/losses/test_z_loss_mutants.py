"""Planted bugs in the spherical losses: the probe must catch every one."""

import torch

from p2k.core.mutation import Mutant, survivors
from p2k.core.seeding import generator
from p2k.linalg.spherical import spherical_statistics
from p2k.losses import z_loss

MUTANTS = [
    Mutant("1.0) / statistics.classes", "1.0) / (statistics.classes - 1)", "sample variance"),
    Mutant("variance.sqrt(), 0.0)", "variance, 0.0)", "variance for the standard deviation"),
    Mutant("spread = statistics.scatter > 0", "spread = statistics.scatter >= 0", "no guard for equal outputs"),
    Mutant("short = location - target", "short = location + target", "sign of the score"),
    Mutant("short = location - target_z_score(statistics)", "short = -target_z_score(statistics)", "location lost"),
    Mutant("-sharpness * short.abs()))", "-short.abs()))", "sharpness inside lost"),
    Mutant("short.abs())) / sharpness", "short.abs()))", "sharpness outside lost"),
    Mutant("short.clamp(min=0) + torch", "torch", "linear part of the softplus lost"),
    Mutant("torch.exp(-sharpness * short.abs())", "torch.exp(sharpness * short)", "softplus twice"),
    Mutant("D * (1 + m)", "(1 + m)", "classes forgotten in Taylor's total"),
    Mutant("+ 0.5 * statistics.sum_of_squares", "+ statistics.sum_of_squares", "one half forgotten"),
    Mutant("(0.5 * (1 + (1 + o_c).square()))", "(0.5 * (1 + o_c).square())", "Taylor's constant forgotten"),
    Mutant("statistics.classes * eps", "eps", "eps added once"),
    Mutant("(o_c.square() + eps)", "(o_c.abs() + eps)", "square forgotten"),
    Mutant("- 2 * o_c + 1", "- o_c + 1", "cross term of the squared error"),
    Mutant("0.25 * statistics.scatter", "0.125 * statistics.scatter", "curvature of log-sum-exp underestimated"),
    Mutant("math.log(statistics.classes) + 0.25", "0.25", "bound without log D"),
    Mutant("0.5 * wide - 0.5 * wide[..., :1].detach()", "wide - wide[..., :1].detach()", "difference overflows"),
    Mutant("shifted.detach().abs().amax", "shifted.detach().amax", "largest signed deviation"),
    Mutant("abs().amax(-1, keepdim=True)", "abs().amax()", "one scale for all rows"),
    Mutant("torch.where(largest > 0, largest, 1.0)", "largest", "division by zero"),
    Mutant(
        "target, ignore_index=ignore_index),\n        sharpness", "target),\n        sharpness", "ignore_index lost"
    ),
]


def wrong(module) -> bool:
    """True when values or gradients leave their definitions; 1e-9 is far above rounding and below any planted bug."""
    rng = generator(0)
    o = 1 + torch.randn(4, 5, generator=rng, dtype=torch.float64)
    o[3] = 1e170 * o[2]
    c, a, b = torch.tensor([0, 4, 2, 2]), 2.0, 0.5
    o.requires_grad_()
    loss = module.z_loss(o, c, sharpness=a, location=b, reduction="none")
    plain = torch.cat([o[:3], 1e-170 * o[3:]])
    z = (plain - plain.mean(1, keepdim=True)) / plain.std(1, correction=0, keepdim=True)
    truth = torch.log1p(torch.exp(a * (b - z.gather(1, c[:, None])[:, 0]))) / a
    if not (loss - truth).abs().max() < 1e-9:
        return True
    slopes = [torch.autograd.grad(x.sum(), o)[0][:3] for x in (loss, truth)]
    if not (slopes[0] - slopes[1]).abs().max() < 1e-9:
        return True
    mixed = torch.tensor([[1.0, 2.0, 4.0], [1e-200, 2e-200, 4e-200]], dtype=torch.float64)
    each = module.z_loss(mixed, torch.tensor([2, 2]), sharpness=1.0, location=0.0, reduction="none")
    level = torch.full((1, 3), 0.1).requires_grad_()
    (flat,) = torch.autograd.grad(module.z_loss(level, torch.tensor([0]), sharpness=1.0, location=0.0), level)
    edge = torch.tensor([[1.7e308, -1.7e308, 0.0], [1.7, -1.7, 0.0]], dtype=torch.float64)
    edges = module.z_loss(edge, torch.tensor([0, 0]), sharpness=1.0, location=0.0, reduction="none")
    ignored = module.z_loss(mixed, torch.tensor([0, 2]), sharpness=1.0, location=0.0, ignore_index=0, reduction="none")
    if not abs(each[0] - each[1]) < 1e-9 or not abs(edges[0] - edges[1]) < 1e-9 or flat.any() or ignored[0] != 0:
        return True
    flat = spherical_statistics(torch.full((1, 3), 0.1).requires_grad_(), torch.tensor([0]))
    return not module.target_z_score(flat).isfinite().all() or relatives_wrong(module)


def relatives_wrong(module) -> bool:
    o, c = torch.randn(3, 4, generator=generator(1), dtype=torch.float64), torch.tensor([0, 3, 1])
    s, pick = spherical_statistics(o, c), c[:, None]
    taylor, square = 1 + o + o**2 / 2, o**2 + 1e-3
    pairs = [
        (module.taylor_softmax_of(s, reduction="none"), -(taylor / taylor.sum(1, keepdim=True)).log().gather(1, pick)),
        (
            module.spherical_softmax_of(s, reduction="none"),
            -(square / square.sum(1, keepdim=True)).log().gather(1, pick),
        ),
        (module.squared_error_of(s, reduction="none"), 0.5 * (o**2).sum(1, keepdim=True) - o.gather(1, pick) + 0.5),
    ]
    if any(not (got - want[:, 0]).abs().max() < 1e-9 for got, want in pairs):
        return True
    line = torch.tensor([[2.0, -2.0]], dtype=torch.float64)
    bound = [module.quadratic_bound_of(spherical_statistics(t * line, torch.tensor([0]))) for t in (0.0, 0.1)]
    truth = [torch.nn.functional.cross_entropy(t * line, torch.tensor([0])) for t in (0.0, 0.1)]
    return not abs(bound[0] - truth[0]) < 1e-9 or not 0 <= bound[1] - truth[1] < 1e-3


def test_every_planted_bug_is_caught():
    assert not [mutant.why for mutant in survivors(z_loss, MUTANTS, wrong)]
