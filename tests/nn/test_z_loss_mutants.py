"""Planted bugs in the factored layer: the probe must catch every one."""

import torch

from p2k.core.errors import P2KError
from p2k.core.mutation import Mutant, survivors
from p2k.core.seeding import generator
from p2k.linalg.spherical import spherical_statistics
from p2k.nn import z_loss

MUTANTS = [
    Mutant("grads[0] / self.classes, 2 * grads[1", "grads[0], 2 * grads[1", "mean's share of each row"),
    Mutant("2 * grads[1, :, None]", "grads[1, :, None]", "factor 2 of the square"),
    Mutant("@ self.factor + self.shift\n        numbers", "@ self.factor\n        numbers", "target without the shift"),
    Mutant("self.mean_row -= common @ H", "self.mean_row += common @ H", "ascent of the mean row"),
    Mutant("cross -= bH.mT @ (H @ cross)", "pass", "cross term not shrunk"),
    Mutant("gram -= bH.mT @ (H @ gram)", "pass", "gram shrunk from one side"),
    Mutant("gH.mT @ (same @ gH)", "gH.mT @ gH", "repeated targets taken for different ones"),
    Mutant(" - torch.outer(total, total) / self.classes", "", "update not centred in the gram"),
    Mutant("- cross - cross.mT", "+ cross + cross.mT", "sign of the cross terms"),
    Mutant("- cross - cross.mT", "- cross", "half of the cross terms"),
    Mutant("self.shift += total / self.classes - (", "self.shift += total / self.classes + 0 * (", "shift not shrunk"),
    Mutant("self.shift += total / self.classes", "self.shift += 0 * total", "rows' mean not followed"),
    Mutant("factor = self.factor - (", "factor = self.factor + (", "growing instead of shrinking"),
    Mutant("- bH @ H.mT\n", "+ bH @ H.mT\n", "sign inside Woodbury"),
    Mutant("return self.inverse + H.mT @ solved", "return self.inverse - H.mT @ solved", "sign outside Woodbury"),
    Mutant("dtype=H.dtype, device=H.device) - bH.mT @ H", "dtype=H.dtype, device=H.device) + bH.mT @ H", "sign of M"),
    Mutant("(gH @ inverse)", "(gH @ self.factor)", "factor for its inverse"),
    Mutant("(gH @ inverse)", "(gH @ inverse.mT)", "inverse not transposed"),
    Mutant("alpha=-1", "alpha=1", "ascent of the target rows"),
    Mutant("spoilt = not factor", "spoilt = False and not factor", "singular factors kept"),
    Mutant("self.rows.copy_(self.rows.to(factor.dtype) @ factor)", "pass", "rows not multiplied out"),
    Mutant("self.mean_row += left", "pass", "mean lost when centring"),
    Mutant("self.mean_row += mean", "self.mean_row += 1e-3", "rounding of the stored rows misplaced"),
    Mutant("self.gram.copy_((stored - mean)", "self.gram.copy_(2 * (stored - mean)", "gram recomputed wrongly"),
    Mutant("self.shift.copy_(-mean)", "self.shift.copy_(mean + 1e-3)", "shift after a repair"),
    Mutant("offset = h @ (self.mean_row + self.shift)", "offset = h @ self.mean_row", "outputs without the shift"),
    Mutant("h @ self.mean_row, ", "h @ self.shift, ", "mean read from the shift"),
    Mutant("torch.where(counted[..., None], hidden", "torch.where(counted[..., None] | True, hidden", "NaN let in"),
    Mutant("self.steps.item() % self.refactor_every == 0", "False", "schedule forgotten"),
]


def taylor(s):
    o_c = s.mean + s.deviation
    total = s.classes * (1 + s.mean) + s.sum_of_squares / 2
    return torch.where(s.counted, total.log() - (1 + o_c + o_c**2 / 2).log(), 0.0).sum()


def squared(s):
    return torch.where(s.counted, 0.5 * s.sum_of_squares - s.mean - s.deviation, 0.0).sum()


def follows(layer, h, c, loss, rate) -> bool:
    """Whether one step, its gradient in h and its outputs are the dense ones."""
    keep = c != -100
    W, x = layer.weight.requires_grad_(), h[keep].clone().requires_grad_()
    slope, back = torch.autograd.grad(loss(spherical_statistics(x @ W.mT, c[keep])), (W, x))
    h = h.clone().requires_grad_()
    loss(layer(h, c)).backward()
    try:
        layer.step(rate)
    except P2KError:  # a gradient that is not finite
        return False
    want = W - rate * slope
    outputs = torch.where(keep[:, None], h, 0.0).detach()
    errors = [layer.weight - want, h.grad[keep] - back, layer.logits(outputs) - outputs @ want.mT]
    return all(error.abs().max() < 1e-9 for error in errors) and bool(h.grad.isfinite().all())


def wrong(module) -> bool:
    """True when steps, small and large batches, leave the dense ones by 1e-9, far above rounding."""
    rng = generator(0)
    layer = module.FactoredOutput(4, 7, dtype=torch.float64, refactor_every=4)
    layer.set_weight(start := 1 + torch.randn(7, 4, generator=rng, dtype=torch.float64))
    if not (layer.weight - start).abs().max() < 1e-9:
        return True
    for items in (1, 3, 6, 2, 3):
        h = torch.randn(items, 4, generator=rng, dtype=torch.float64)
        c = torch.randint(7, (items,), generator=rng)
        if items == 3:
            h[1], c[1] = torch.nan, -100
            c[2] = c[0]
        if not follows(layer, h, c, taylor, 0.05):
            return True
        if (layer.steps.item() == 4) != torch.equal(layer.factor, torch.eye(4, dtype=torch.float64)):
            return True
    h = torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    return any(not follows(layer, h.roll(i, 1), torch.tensor([2]), squared, 1.0) for i in range(2))


def test_every_planted_bug_is_caught():
    assert not [mutant.why for mutant in survivors(z_loss, MUTANTS, wrong)]
