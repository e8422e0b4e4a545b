"""A network along a complex line: against functional_call, autograd, its own zeros, poles and planted bugs."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jvp

from p2k.core.mutation import Mutant, survivors
from p2k.core.seeding import generator
from p2k.experiments import ghost_lines
from p2k.experiments import ghosts_of_softmax as study
from p2k.linalg.ghosts_of_softmax import log_partition_series, series_radius
from p2k.linalg.partition_zeros import nearest_zeros, partition, zeros_in_box


@pytest.fixture(scope="module")
def data():
    return study.load(dtype=torch.float64)


@pytest.fixture(scope="module")
def trained(data):
    model = study.build_mlp(nn.Tanh, seed=3, dtype=torch.float64)
    study.train(model, data, seed=3, steps=60)
    return model


@pytest.fixture(scope="module")
def line(data, trained):
    return ghost_lines.descent(trained, *ghost_lines.first_batch(data, 3))


def shifted(line, t):
    return {name: p + t * line.direction[name] for name, p in line.parameters.items()}


def test_the_line_is_the_network_at_real_and_complex_steps(line):
    for t in (torch.tensor([0.0, 0.7, -2.0]).double(), torch.tensor([0.3 + 0.8j, -1j]).to(torch.complex128)):
        expected = torch.stack([functional_call(line.module, shifted(line, s), (line.images.to(t.dtype),)) for s in t])
        assert (line.at(t) - expected).abs().max() < 1e-11  # 128-term sums of numbers near ten
    tangent = jvp(lambda p: functional_call(line.module, p, (line.images,)), (line.parameters,), (line.direction,))[1]
    assert (line.slopes - tangent).abs().max() < 1e-12
    assert math.hypot(*(d.norm().item() for d in line.direction.values())) == pytest.approx(1)


def test_descent_points_downhill_and_random_directions_are_drawn(data, trained, line):
    step = torch.tensor([1e-4], dtype=torch.float64)
    assert ghost_lines.one_step_damage(line, step).loss_ratio.item() < 1
    other = ghost_lines.random_direction(trained, line.images, line.labels, seed=1)
    again = ghost_lines.random_direction(trained, line.images, line.labels, seed=1)
    assert all(torch.equal(d, again.direction[n]) for n, d in other.direction.items())
    assert other.bound > line.bound


def test_zeros_of_the_true_partition_approach_the_linear_ones_when_only_the_head_moves(line):
    head = {name: d * (name[0] == "2") for name, d in line.direction.items()}
    only = ghost_lines._line(line.module, head, line.images, line.labels)
    example, b = 0, only.only(0).bound
    box = (complex(-4 * b, 0.5 * b), complex(4 * b, 4 * b))
    true = zeros_in_box(ghost_lines.true_partition(only, example), box, spacing=0.5 * b)
    linear = zeros_in_box(partition(only.logits[example], only.slopes[example]), box, spacing=0.5 * b)
    # The head's logits are exactly linear in the step; the derivative in Newton's method is a difference.
    assert (true - linear).abs().max() < 1e-9 * b


def test_tanh_is_infinite_at_its_poles(line):
    poles = ghost_lines.activation_poles(line, 2)
    p, d = line.parameters, line.direction
    start, slope = (F.linear(line.images[2], part["0.weight"], part["0.bias"]) for part in (p, d))
    assert (start + poles * slope).cosh().abs().max() < 1e-9
    assert (poles.abs() >= math.pi / 2 / slope.abs() * (1 - 1e-12)).all()


def test_taylor_coefficients_of_the_true_loss(line):
    nearest = nearest_zeros(line.logits, line.slopes).abs().min().item()
    series = ghost_lines.line_taylor(line, radius=0.5 * nearest, order=40)
    assert series[0].item() == pytest.approx(F.cross_entropy(line.logits, line.labels).item(), rel=1e-10)

    def loss(t):
        return F.cross_entropy(functional_call(line.module, shifted(line, t), (line.images,)), line.labels)

    slope = torch.func.grad(loss)(torch.tensor(0.0, dtype=torch.float64))
    assert series[1].item() == pytest.approx(slope.item(), rel=1e-8)
    t = torch.tensor(0.3 * nearest, dtype=torch.float64)
    total = (series * t ** torch.arange(41)).sum()
    assert total.item() == pytest.approx(loss(t).item(), rel=1e-9)
    linear = log_partition_series(line.logits, line.slopes, 40)
    assert series_radius(linear, tail=20).min() == pytest.approx(nearest, rel=0.05)


def test_calibration_is_at_least_one(line):
    found = ghost_lines.calibrate(line)
    assert (found >= 1).all()
    assert found.max() < 100


def test_damage_by_hand(line):
    steps = torch.tensor([0.0, 5.0], dtype=torch.float64)
    found = ghost_lines.one_step_damage(line, steps, temperature=2.0)
    far = functional_call(line.module, shifted(line, 5.0), (line.images,))
    ratio = F.cross_entropy(far / 2, line.labels) / F.cross_entropy(line.logits / 2, line.labels)
    assert found.loss_ratio.tolist() == pytest.approx([1.0, ratio.item()])
    right = (far.argmax(-1) == line.labels).double().mean().item()
    assert found.accuracy[1].item() == pytest.approx(100 * right)
    assert found.flips[0] == 0
    assert found.flips[1].item() == (far.argmax(-1) != line.logits.argmax(-1)).double().mean().item()


def test_ranking_quality_is_the_probability_of_the_right_order():
    rng = generator(0)
    score, event = torch.randint(0, 6, (40,), generator=rng).double(), torch.rand(40, generator=rng) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in score[event] for b in score[~event]]
    assert ghost_lines.ranking_quality(score, event) == pytest.approx(sum(map(float, pairs)) / len(pairs))
    with pytest.raises(ValueError, match="happen to some"):
        ghost_lines.ranking_quality(score, event & False)


def test_flips_of_linear_logits_are_known_before_the_step(line):
    head = {name: -d * (name[0] == "2") for name, d in line.direction.items()}
    uphill = ghost_lines._line(line.module, head, line.images, line.labels)
    found = ghost_lines.flip_rankings(uphill, ratio=4.0)
    assert found["linear"] == 1.0
    assert set(found) == {"spread", "exact", "margin", "linear", "share"}
    assert all(0 <= value <= 1 for value in found.values())


def test_onsets_use_their_units():
    data = study.load()
    found = ghost_lines.temperature_onsets(data, seed=1, temperatures=(1.0, 4.0), steps=5, threshold=1.5)
    assert set(found) == {"raw", "radius", "rms"}
    assert all(len(values) == 2 and all(map(math.isfinite, values)) for values in found.values())


MUTANTS = [
    Mutant("return fixed + t * moving", "return fixed + moving", "head moved by one"),
    Mutant("self.module[1](start + t * slope)", "self.module[1](start + t.real * slope)", "hidden layer stays real"),
    Mutant("[-g for g in slopes]", "list(slopes)", "uphill"),
    Mutant("name: d / length for", "name: d for", "direction without unit length"),
    Mutant("math.pi / 2)) / slope[moves]", "math.pi)) / slope[moves]", "poles of the sigmoid"),
    Mutant("(plus - minus) / (2 * reach)", "(plus - minus) / reach", "difference over half its length"),
    Mutant("real / points", "real", "integral without its mean"),
    Mutant("/ radius ** torch", "* radius ** torch", "coefficients in the wrong unit"),
    Mutant("turn.cumsum(0)", "turn", "branch of the logarithm jumps"),
    Mutant("- target\n", "\n", "label forgotten"),
    Mutant("* logit_spread(line.slopes).double() / math.pi", "/ math.pi", "calibration with a unit"),
    Mutant("return Damage(loss / start,", "return Damage(loss,", "loss not relative"),
]


def test_every_planted_bug_is_caught(line):
    t = torch.tensor([0.2 + 0.4j], dtype=torch.complex128)
    expected = functional_call(line.module, shifted(line, t[0]), (line.images.to(t.dtype),))
    nearest = nearest_zeros(line.logits, line.slopes).abs()
    loss = F.cross_entropy(functional_call(line.module, shifted(line, 0.4), (line.images,)), line.labels)

    def wrong(module) -> bool:
        made = module.descent(line.module, line.images, line.labels)
        if not (made.at(t)[0] - expected).abs().max() < 1e-9:
            return True
        poles = module.activation_poles(line, 0)
        if not (poles.imag.abs() - math.pi / 2 / _slopes(line, 0)).abs().max() < 1e-9:
            return True
        value, slope = module.true_partition(made, 0)(t)
        ahead = module.true_partition(made, 0)(t + 1e-5)[0]
        # Both values are scaled by the same largest term only to first order, so this holds to about 1e-4.
        scale = (made.only(0).at(t + 1e-5).real.amax() - made.only(0).at(t).real.amax()).exp()
        if not ((ahead * scale - value) / 1e-5 / slope - 1).abs().max() < 1e-3:
            return True
        series = module.line_taylor(made, radius=0.8 * nearest.min().item(), order=60)
        if not abs((series * 0.4 ** torch.arange(61)).sum() - loss) < 1e-6:
            return True
        low, high = made.slopes.aminmax(dim=1)
        if not (module.calibrate(made) / (nearest * (high - low) / math.pi) - 1).abs().max() < 1e-9:
            return True
        return abs(module.one_step_damage(made, torch.tensor([0.0]).double()).loss_ratio.item() - 1) > 1e-9

    alive = survivors(ghost_lines, MUTANTS, wrong)
    assert not alive, [mutant.why for mutant in alive]


def _slopes(line, example):
    slope = F.linear(line.images[example], line.direction["0.weight"], line.direction["0.bias"])
    return slope[slope != 0].abs()
