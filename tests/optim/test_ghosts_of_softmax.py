"""The step controller: the cap, steps it must leave alone, torch's conventions for optimizers, and planted bugs."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from p2k.core.errors import P2KError
from p2k.core.mutation import Mutant, survivors
from p2k.core.seeding import generator
from p2k.core.tolerance import tolerance
from p2k.optim import ghosts_of_softmax as control

INNER = {
    "sgd": lambda p, lr: torch.optim.SGD(p, lr=lr),
    "momentum": lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True),
    "adam": lambda p, lr: torch.optim.Adam(p, lr=lr),
    "adamw": lambda p, lr: torch.optim.AdamW(p, lr=lr, weight_decay=0.1),
}


def network(dtype=torch.float64, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).to(dtype)


def batch(dtype=torch.float64, count=6, seed=1):
    rng = generator(seed)
    images = torch.randn(count, 5, generator=rng, dtype=torch.float64).to(dtype)
    return images, torch.randint(0, 4, (count,), generator=rng)


def backward(module, images, labels):
    module.zero_grad()
    loss = F.cross_entropy(module(images), labels)
    loss.backward()
    return loss


def values(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def spread_of(module, start, change, images):
    """The largest spread of the first-order change, by a central difference; no code shared with the controller."""
    moved = []
    for sign in (1, -1):
        twin = copy.deepcopy(module)
        nn.utils.vector_to_parameters(start + sign * 1e-5 * change, twin.parameters())
        moved.append(twin(images).detach())
    slopes = (moved[0] - moved[1]) / 2e-5
    return (slopes.amax(-1) - slopes.amin(-1)).max().item()


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("measure", [control.logit_change, control.logit_change_by_difference])
def test_a_long_step_is_cut_to_the_radius_and_keeps_its_direction(name, measure):
    module, (images, labels) = network(), batch()
    twin = copy.deepcopy(module)
    start = values(module)
    for model in (module, twin):
        backward(model, images, labels)
    free = INNER[name](twin.parameters(), 30.0)
    free.step()
    controller = control.RadiusController(INNER[name](module.parameters(), 30.0), module, measure=measure)
    controller.step(inputs=images)
    proposed, taken = values(twin) - start, values(module) - start
    length = spread_of(module, start, proposed, images) / math.pi
    # The reference is a central difference of step 1e-5, and the forward one errs by a few 1e-8 of a curved map.
    assert controller.last_ratio == pytest.approx(length, rel=1e-5)
    assert controller.last_ratio > 1
    assert spread_of(module, start, taken, images) == pytest.approx(math.pi, rel=1e-5)
    assert controller.last_scale == pytest.approx(1 / controller.last_ratio)
    assert (taken - proposed * controller.last_scale).abs().max() < tolerance(torch.float64) * proposed.abs().max()


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_step_within_the_radius_is_bitwise_the_inner_one(name, dtype):
    module, (images, labels) = network(dtype), batch(dtype)
    twin = copy.deepcopy(module)
    free = INNER[name](twin.parameters(), 1e-3)
    controller = control.RadiusController(INNER[name](module.parameters(), 1e-3), module)
    for _ in range(5):
        for model in (module, twin):
            backward(model, images, labels)
        free.step()
        controller.step(inputs=images)
        assert 0 < controller.last_ratio < 1
        assert controller.last_scale == 1.0
        assert torch.equal(values(module), values(twin))


def test_the_ratio_ignores_a_shift_and_scales_with_the_step():
    found = []
    for rate, shift in ((0.01, 0.0), (0.02, 0.0), (0.01, 5.0)):
        module, (images, labels) = network(), batch()
        module[2].bias.data += shift
        backward(module, images, labels)
        controller = control.RadiusController(torch.optim.SGD(module.parameters(), lr=rate), module)
        controller.step(inputs=images)
        found.append(controller.last_ratio)
    # The step is read off as a difference of parameters, which costs the digits by which it is smaller than they.
    assert found[1] == pytest.approx(2 * found[0], rel=1e-9)
    assert found[2] == pytest.approx(found[0], rel=1e-9)


def test_max_ratio_sets_the_cap():
    module, (images, labels) = network(), batch()
    start = values(module)
    backward(module, images, labels)
    controller = control.RadiusController(torch.optim.SGD(module.parameters(), lr=100.0), module, max_ratio=0.25)
    controller.step(inputs=images)
    # As above: the check itself is a difference.
    assert spread_of(module, start, values(module) - start, images) == pytest.approx(0.25 * math.pi, rel=1e-5)


def test_huge_steps_do_not_overflow():
    module, (images, labels) = network(torch.float32), batch(torch.float32)
    backward(module, images, labels)
    controller = control.RadiusController(torch.optim.SGD(module.parameters(), lr=1e37), module)
    controller.step(inputs=images)
    assert controller.last_ratio > 1e30
    assert values(module).isfinite().all()


def test_no_gradient_and_zero_gradient_are_no_step():
    module, (images, labels) = network(), batch()
    controller = control.RadiusController(torch.optim.Adam(module.parameters(), lr=1.0), module)
    start = values(module)
    controller.step(inputs=images)
    assert torch.equal(values(module), start)
    assert controller.last_ratio == 0.0
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    controller.step(inputs=images)
    assert torch.equal(values(module), start)
    backward(module, images, labels)
    module[0].weight.grad = None
    kept = module[0].weight.detach().clone()
    controller.step(inputs=images)
    assert torch.equal(module[0].weight, kept)
    assert controller.last_ratio > 0


def test_parameters_outside_the_optimizer_stay():
    module, (images, labels) = network(), batch()
    backward(module, images, labels)
    controller = control.RadiusController(torch.optim.SGD(module[2].parameters(), lr=100.0), module)
    kept = module[0].weight.detach().clone()
    controller.step(inputs=images)
    assert torch.equal(module[0].weight, kept)
    assert controller.last_scale < 1


def test_a_closure_is_evaluated_and_its_loss_returned():
    module, (images, labels) = network(), batch()
    controller = control.RadiusController(torch.optim.LBFGS(module.parameters(), lr=1.0, max_iter=3), module)

    def closure():
        with torch.enable_grad():
            return backward(module, images, labels)

    expected = F.cross_entropy(module(images), labels).item()
    assert controller.step(closure, inputs=images).item() == pytest.approx(expected)
    assert controller.last_ratio > 0


def test_groups_and_state_are_shared_and_schedulers_work_on_the_wrapper():
    module, (images, labels) = network(), batch()
    inner = torch.optim.Adam([{"params": module[0].parameters(), "lr": 0.5}, {"params": module[2].parameters()}], lr=1)
    controller = control.RadiusController(inner, module)
    scheduler = torch.optim.lr_scheduler.StepLR(controller, step_size=1, gamma=0.1)
    backward(module, images, labels)
    controller.step(inputs=images)
    scheduler.step()
    assert [group["lr"] for group in inner.param_groups] == [0.05, 0.1]
    assert controller.param_groups is inner.param_groups
    assert controller.state is inner.state
    controller.zero_grad()
    assert all(p.grad is None for p in module.parameters())


def test_groups_can_be_added_to_either():
    module, (images, labels) = network(), batch()
    controller = control.RadiusController(torch.optim.SGD(module[0].parameters(), lr=0.1), module)
    controller.add_param_group({"params": module[2].weight, "lr": 0.2})
    controller.optimizer.add_param_group({"params": [module[2].bias]})
    assert [group["lr"] for group in controller.param_groups] == [0.1, 0.2, 0.1]
    backward(module, images, labels)
    start = module[2].weight.detach().clone()
    controller.step(inputs=images)
    assert not torch.equal(module[2].weight, start)
    with pytest.raises(ValueError, match="not in the module"):
        controller.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


@pytest.mark.parametrize("name", INNER)
def test_a_resumed_run_equals_an_uninterrupted_one(name):
    (images, labels), rate = batch(), 3.0
    whole = network()
    first = control.RadiusController(INNER[name](whole.parameters(), rate), whole, max_ratio=0.5)
    for step in range(6):
        if step == 3:
            saved = copy.deepcopy((whole.state_dict(), first.state_dict()))
        backward(whole, images, labels)
        first.step(inputs=images)
    part = network(seed=5)
    second = control.RadiusController(INNER[name](part.parameters(), 1e-9), part)
    part.load_state_dict(saved[0])
    second.load_state_dict(saved[1])
    assert second.max_ratio == 0.5
    assert second.state is second.optimizer.state
    for _ in range(3):
        backward(part, images, labels)
        second.step(inputs=images)
    assert torch.equal(values(part), values(whole))


def test_a_state_of_the_inner_optimizer_alone_can_be_loaded():
    module, (images, labels) = network(), batch()
    inner = torch.optim.Adam(module.parameters(), lr=0.1)
    backward(module, images, labels)
    inner.step()
    controller = control.RadiusController(torch.optim.Adam(module.parameters(), lr=9.0), module, max_ratio=2.0)
    controller.load_state_dict(inner.state_dict())
    assert controller.max_ratio == 2.0
    assert controller.param_groups[0]["lr"] == 0.1
    inner.load_state_dict({k: v for k, v in controller.state_dict().items() if k != "controller"})


def test_a_copy_is_whole():
    module, (images, labels) = network(), batch()
    controller = control.RadiusController(torch.optim.Adam(module.parameters(), lr=1.0), module)
    twin = copy.deepcopy(controller)
    for each in (controller, twin):
        backward(each.module, images, labels)
        each.step(inputs=images)
    assert torch.equal(values(controller.module), values(twin.module))
    assert twin.optimizer is not controller.optimizer
    assert twin.param_groups is twin.optimizer.param_groups


@pytest.mark.parametrize("measure", [control.logit_change, control.logit_change_by_difference])
def test_measuring_leaves_buffers_and_random_state_alone(measure):
    (images, labels), module = batch(torch.float32), network(torch.float32)
    noisy = nn.Sequential(module[0], nn.BatchNorm1d(7), nn.Dropout(0.5), module[1], module[2])
    controller = control.RadiusController(torch.optim.SGD(noisy.parameters(), lr=1.0), noisy, measure=measure)
    backward(noisy, images, labels)
    buffers = {name: b.clone() for name, b in noisy.named_buffers()}
    state = torch.get_rng_state()
    controller.step(inputs=images)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, buffers[name]) for name, b in noisy.named_buffers())
    assert controller.last_ratio > 0


def test_both_measures_agree_in_float32():
    module, (images, _) = network(torch.float32), batch(torch.float32)
    start = {name: p.detach() for name, p in module.named_parameters()}
    step = {name: torch.randn(p.shape, generator=generator(4)) for name, p in start.items()}
    exact, near = (
        m(module, start, step, (images,)) for m in (control.logit_change, control.logit_change_by_difference)
    )
    # A forward difference keeps about half of float32's digits.
    assert ((exact - near).abs().max() / exact.abs().max()) < 5e-3
    assert control.logit_change_by_difference(module, start, {n: 0 * s for n, s in step.items()}, (images,)).any() == 0


def test_logits_are_picked_from_an_output_and_ratios_reduced():
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, images, factor):
            return {"logits": factor * self.inner(images)}

    images, labels = batch()
    ratios, seen = [], []
    for reduce in (lambda ratio: ratio, lambda ratio: 3 * ratio):
        module = Wrapped(network())
        F.cross_entropy(module(images, 2.0)["logits"], labels).backward()
        inner = torch.optim.SGD(module.parameters(), lr=1e-3)
        controller = control.RadiusController(inner, module, logits=lambda out: out["logits"], reduce=reduce)
        controller.step(inputs=(images, 2.0))
        ratios.append(controller.last_ratio)
        seen.append(values(module))
    assert ratios[1] == pytest.approx(3 * ratios[0])


def test_what_is_not_finite_raises_and_puts_the_parameters_back():
    module, (images, labels) = network(), batch()
    controller = control.RadiusController(torch.optim.SGD(module.parameters(), lr=1.0), module)
    start = values(module)
    for poison in (math.nan, math.inf):
        backward(module, images, labels)
        module[0].weight.grad[0, 0] = poison
        with pytest.raises(P2KError, match="not finite"):
            controller.step(inputs=images)
        assert torch.equal(values(module), start)


def test_a_step_that_is_nan_behind_parameters_that_stand_still_is_refused():
    module, (images, labels) = network(), batch()
    controller = control.RadiusController(torch.optim.SGD(module.parameters(), lr=1.0), module)
    start = values(module)
    backward(module, images, labels)
    for p in module.parameters():
        p.grad.zero_()
    module[2].bias.grad.fill_(math.nan)
    with pytest.raises(P2KError, match="not finite"):
        controller.step(inputs=images)
    assert torch.equal(values(module), start)


@pytest.mark.parametrize("depth", [1, 6])
def test_two_numbers_are_fetched_from_the_device_at_any_depth(depth, monkeypatch):
    images, labels = batch()
    module = nn.Sequential(*[nn.Linear(5, 5, dtype=torch.float64) for _ in range(depth)])
    backward(module, images, labels)
    controller = control.RadiusController(torch.optim.SGD(module.parameters(), lr=1.0), module)
    fetched, item = [], torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: fetched.append(1) or item(tensor))
    controller.step(inputs=images)
    assert len(fetched) == 2


@pytest.mark.parametrize("measure", [control.logit_change, control.logit_change_by_difference])
def test_tied_parameters_move_together_in_the_measure(measure):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.embedding(tokens))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Tied().double()
    tokens, start = torch.tensor([0, 1, 3, 2]), values(module)
    backward(module, tokens, torch.tensor([1, 2, 0, 3]))
    controller = control.RadiusController(torch.optim.SGD(module.parameters(), lr=50.0), module, measure=measure)
    controller.step(inputs=tokens)
    assert controller.last_ratio > 1
    # As in the first test: the check is a difference.
    assert spread_of(module, start, values(module) - start, tokens) == pytest.approx(math.pi, rel=1e-5)


def test_a_state_survives_a_file(tmp_path):
    module, (images, labels) = network(), batch()
    controller = control.RadiusController(torch.optim.Adam(module.parameters(), lr=1.0), module, max_ratio=0.5)
    backward(module, images, labels)
    controller.step(inputs=images)
    torch.save(controller.state_dict(), tmp_path / "state.pt")
    twin = copy.deepcopy(module)
    second = control.RadiusController(torch.optim.Adam(twin.parameters(), lr=9.0), twin)
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for each in (controller, second):
        backward(each.module, images, labels)
        each.step(inputs=images)
    assert second.max_ratio == 0.5
    assert torch.equal(values(twin), values(module))


def test_bad_arguments_are_refused():
    module = network()
    inner = torch.optim.SGD(module.parameters(), lr=1.0)
    with pytest.raises(TypeError, match="must be a torch Optimizer, got Sequential"):
        control.RadiusController(module, module)
    for ratio in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="max_ratio"):
            control.RadiusController(inner, module, max_ratio=ratio)
    with pytest.raises(ValueError, match="not in the module"):
        control.RadiusController(inner, module[0])
    phases = nn.Linear(2, 3, dtype=torch.complex64)
    with pytest.raises(TypeError, match="must be real"):
        control.RadiusController(torch.optim.SGD(phases.parameters(), lr=1.0), phases)
    controller = control.RadiusController(inner, module)
    with pytest.raises(ValueError, match="must hold the batch"):
        controller.step()
    table = nn.Sequential(nn.Embedding(5, 4, sparse=True))
    table(torch.tensor([1, 2])).sum().backward()
    controller = control.RadiusController(torch.optim.SGD(table.parameters(), lr=1.0), table)
    with pytest.raises(RuntimeError, match="sparse"):
        controller.step(inputs=torch.tensor([1, 2]))


@pytest.mark.parametrize("pick", [lambda out: out[:, :1], lambda out: out[:0]])
def test_logits_of_the_wrong_shape_are_refused_and_the_step_undone(pick):
    module, (images, labels) = network(), batch()
    start = values(module)
    backward(module, images, labels)
    controller = control.RadiusController(torch.optim.SGD(module.parameters(), lr=1.0), module, logits=pick)
    with pytest.raises(ValueError, match="logits must be floating point"):
        controller.step(inputs=images)
    assert torch.equal(values(module), start)


MUTANTS = [
    Mutant("start[name] + self.last_scale * change[name]", "start[name] + change[name]", "step not shortened"),
    Mutant("start[name] + self.last_scale * change[name]", "self.last_scale * p", "parameters shrunk, not the step"),
    Mutant("self.max_ratio / self.last_ratio) if", "self.last_ratio / self.max_ratio) if", "scale upside down"),
    Mutant("min(1.0, self.max_ratio", "max(1.0, self.max_ratio", "short steps lengthened"),
    Mutant("if self.last_ratio > self.max_ratio:", "if self.last_ratio > 1.0:", "limit ignored in the test"),
    Mutant("p.detach() - start[name] for", "start[name] - 2 * p.detach() for", "change from the wrong end"),
    Mutant("p.detach().clone() for name, p in live", "p.detach() for name, p in live", "snapshot is a view"),
    Mutant("self.module, start, unit,", "self.module, dict(live), unit,", "slopes at the far end of the step"),
    Mutant("size * self._reduce(", "self._reduce(", "ratio of the unit step"),
    Mutant("self._reduce(step_ratio(moved))", "step_ratio(moved)", "ratios of other processes ignored"),
    Mutant(
        "(values, _buffers(module)), inputs))\n\n    with", "values, inputs))\n\n    with", "running statistics moved"
    ),
    Mutant("self.max_ratio = state_dict.get", "_ = state_dict.get", "limit not resumed"),
    Mutant(
        "self.optimizer.load_state_dict(inner)\n", "super().load_state_dict(inner)\n", "inner optimizer not resumed"
    ),
    Mutant(
        "if not math.isfinite(ratio):\n            self._restore(live, start)",
        "if not math.isfinite(ratio):",
        "NaN kept",
    ),
]


def wrong(module) -> bool:
    """True when the cap, the untouched short step, the resumed run or the restored parameters are not as documented."""
    try:
        for rate, limit in ((30.0, 0.5), (1e-3, 1e-6), (1e-4, 1.0), (1.0, 1e6)):
            model, (images, labels) = network(), batch()
            twin, start = copy.deepcopy(model), values(model)
            for each in (model, twin):
                backward(each, images, labels)
            INNER["momentum"](twin.parameters(), rate).step()
            inner = INNER["momentum"](model.parameters(), rate)
            module.RadiusController(inner, model, max_ratio=limit).step(inputs=images)
            proposed = values(twin) - start
            length = spread_of(model, start, proposed, images) / math.pi
            expected = start + min(1.0, limit / length) * proposed
            if not (values(model) - expected).abs().max() < 1e-5 * proposed.abs().max():
                return True
        saved = module.RadiusController(inner, model, max_ratio=limit).state_dict()
        fresh = module.RadiusController(INNER["momentum"](twin.parameters(), 0.1), twin, reduce=lambda ratio: 7 * ratio)
        fresh.load_state_dict(saved)
        if fresh.max_ratio != limit or fresh.optimizer.param_groups[0]["lr"] != 1.0:
            return True
        if not fresh.optimizer.state or fresh.state is not fresh.optimizer.state:
            return True
        backward(twin, images, labels)
        start = values(twin)
        fresh.step(inputs=images)
        if abs(fresh.last_ratio / spread_of(twin, start, values(twin) - start, images) * math.pi - 7) > 1e-3:
            return True
        normed = nn.Sequential(nn.Linear(5, 4, dtype=torch.float64), nn.BatchNorm1d(4, dtype=torch.float64))
        backward(normed, images, labels)
        mean, rows = normed[1].running_mean.clone(), normed[1].weight.detach().clone()
        held = module.RadiusController(torch.optim.SGD(normed.parameters(), lr=1.0), normed)
        held.step(inputs=images)
        if not torch.equal(normed[1].running_mean, mean) or torch.equal(normed[1].weight, rows):
            return True
        start = values(normed)
        normed[0].weight.grad[0, 0] = math.nan
        try:
            held.step(inputs=images)
        except P2KError:
            return not torch.equal(values(normed), start)
        return True
    except (RuntimeError, KeyError, ValueError):
        return True


def test_every_planted_bug_is_caught():
    alive = survivors(control, MUTANTS, wrong)
    assert not alive, [mutant.why for mutant in alive]
