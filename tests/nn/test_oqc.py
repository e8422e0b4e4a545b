"""The OQC blocks: what they promise about orthogonality, and that the controls do not promise it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from p2k.core.errors import BackendUnavailable
from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors, tolerance
from p2k.linalg.projection import cosine_overlap
from p2k.nn.ffn import GLUFeedForward
from p2k.nn.injection import DynamicGate, PlainAdd, ProjectOffDirection, ProjectOffMain, StaticGate
from p2k.nn.oqc import FEED_FORWARDS, OQCLowRankFeedForward, build_feed_forward
from p2k.nn.quadratic import QuadraticFeatures
from p2k.nn.rank_space import TiedRankSpace, UntiedRankSpace

DIM, HIDDEN, RANK, GRID = 24, 48, 6, (3, 4)
HOSTS = ["gelu", "glu", "afbo"]
# Rounding of a float32 projection: at most 2e-6 at a cosine of 0.99, measured; the bound leaves a factor of two.
ORTHOGONAL = 5e-6


def build(name, seed=0, **options):
    torch.manual_seed(seed)
    return build_feed_forward(name, DIM, HIDDEN, rank=RANK, grid=GRID, **options)


def main_width(name):
    return DIM if name.endswith("oqc-output") else HIDDEN


def tokens(*batch, seed=0, dtype=torch.float32):
    return torch.randn(*batch, 12, DIM, generator=generator(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_interface_and_gradient_flow(name):
    module = build(name)
    x = tokens(2).requires_grad_()
    y = module(x)
    assert y.shape == x.shape
    assert torch.equal(y, module.down(module.hidden(x)))
    assert (module.dim, module.hidden_features) == (DIM, main_width(name))
    y.square().sum().backward()
    for part in [x, *module.parameters()]:
        assert part.grad.isfinite().all()
        assert part.grad.any()


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_agrees_with_float64(name):
    module = build(name)
    result = module(tokens(2))
    truth = module.double()(tokens(2).double())
    # Three chained matrix products and a projection.
    assert relative_errors(result.detach(), truth.detach())[0] <= 3 * tolerance(torch.float32, HIDDEN)


@pytest.mark.parametrize("name", [name for name in FEED_FORWARDS if "+" in name])
def test_branches_add_up_and_keep_no_graph(name):
    module = build(name)
    main, aux, injected = module.branches(tokens(2))
    assert main.shape == aux.shape == injected.shape == (2, 12, main_width(name))
    assert not any(part.requires_grad for part in (main, aux, injected))
    torch.testing.assert_close(main + injected, module.hidden(tokens(2)).detach())
    assert torch.equal(main, module.host.hidden(tokens(2)))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("variant", ["oqc", "oqc-output", "oqc-wide", "oqc-static", "oqc-dynamic"])
def test_injected_part_is_orthogonal_to_main(host, variant):
    module = build(f"{host}+{variant}")
    module.injection.eps = 0.0
    main, aux, injected = module.branches(tokens(8))
    assert cosine_overlap(injected, main).max() < ORTHOGONAL
    assert cosine_overlap(aux, main).mean() > 0.02


def test_output_space_projects_off_the_output_of_the_host():
    """The complement joins after the output map; there the output map would tilt a complement of the hidden vector."""
    module, x = build("glu+oqc-output"), tokens(8)
    host, z = module.host.host, module.auxiliary(x)
    y = host(x)
    along = (z * y).sum(-1, keepdim=True) / (y.square().sum(-1, keepdim=True) + module.injection.eps)
    torch.testing.assert_close(module(x), y + z - along * y)
    full = build("glu+oqc")
    main, _, injected = full.branches(x)
    lowered = [part @ full.down.weight.mT for part in (main, injected)]
    assert cosine_overlap(*lowered).mean() > 1e3 * ORTHOGONAL


@pytest.mark.parametrize("host", HOSTS)
def test_stabiliser_leaves_what_the_formula_says(host):
    module = build(f"{host}+oqc").double()
    module.injection.eps = 1e-3
    main, aux, injected = module.branches(tokens(8, dtype=torch.float64))
    squared_length = main.square().sum(-1)
    left_over = (aux * main).sum(-1) * 1e-3 / (squared_length + 1e-3)
    torch.testing.assert_close((injected * main).sum(-1), left_over)


@pytest.mark.parametrize("name", [f"{host}+{control}" for host in HOSTS for control in ("aux", "fixed")])
def test_controls_are_not_orthogonal(name):
    main, _, injected = build(name).branches(tokens(8))
    assert cosine_overlap(injected, main).mean() > 1e3 * ORTHOGONAL


def test_squares_share_direction_with_their_host_until_projected():
    main, aux, injected = build("gelu+squares-oqc").branches(tokens(8))
    assert cosine_overlap(aux, main).mean() > 0.4
    assert cosine_overlap(injected, main).max() < ORTHOGONAL
    for control in ("gelu+squares", "gelu+squares-fixed"):
        assert cosine_overlap(build(control).branches(tokens(8)).injected, main).mean() > 0.1
    assert torch.equal(build("gelu+squares").host.up.weight, build("gelu+squares-fixed").host.up.weight)


def test_fixed_control_removes_its_direction():
    module = build("glu+fixed")
    injected = module.branches(tokens(8)).injected
    assert cosine_overlap(injected, module.injection.direction.expand_as(injected)).max() < ORTHOGONAL
    assert torch.equal(module.injection.direction, build("glu+fixed", seed=1).injection.direction)
    ones = build("gelu+squares-fixed").injection.direction
    torch.testing.assert_close(ones, torch.full((HIDDEN,), HIDDEN**-0.5))


@pytest.mark.parametrize("host", HOSTS)
def test_low_rank_is_orthogonal_in_rank_space_and_after_a_tied_lift_only(host):
    untied, tied = build(f"{host}+oqc-lr").double(), build(f"{host}+oqc-lr-tied").double()
    x = tokens(8, dtype=torch.float64)
    for module in (untied, tied):
        module.eps = 0.0
        lowered, _, complement = module.rank_branches(x)
        assert cosine_overlap(complement, lowered).max() < 1e3 * tolerance(torch.float64)
    main, aux, injected = tied.branches(x)
    assert cosine_overlap(injected, main).max() < 1e3 * tolerance(torch.float64)
    assert cosine_overlap(aux, main).mean() > 0.01
    main, aux, injected = untied.branches(x)
    before, after = cosine_overlap(aux, main).mean(), cosine_overlap(injected, main).mean()
    # The untied lift forgets the rank-space angle: a mean over 96 tokens stays within a fifth or so.
    assert after == pytest.approx(before.item(), rel=0.3)


@pytest.mark.parametrize("name", ["gelu+oqc-lr-tied", "glu+oqc-lr-tied"])
def test_tied_lift_is_orthogonal_in_float32_with_the_default_stabiliser(name):
    main, _, injected = build(name).branches(tokens(8))
    # The stabiliser leaves cos * eps / (|u|^2 + eps), at most 1e-5 at this small width.
    assert cosine_overlap(injected, main).max() < 2e-5


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize(
    "variant", ["oqc", "oqc-output", "oqc-static", "oqc-dynamic", "oqc-lr", "oqc-lr-tied", "oqc-wide"]
)
def test_zero_branch_leaves_the_host_bit_for_bit(host, variant):
    module = build(f"{host}+{variant}")
    for name, parameter in module.named_parameters():
        if name.endswith(("lift.weight", "up_map.weight", "auxiliary.maps.weight")):
            nn.init.zeros_(parameter)
    x = tokens(2).requires_grad_()
    (grad,) = torch.autograd.grad(module(x).sum(), x)
    (host_grad,) = torch.autograd.grad(module.host(x).sum(), x)
    assert torch.equal(module(x), module.host(x))
    assert torch.equal(grad, host_grad)


def test_zero_lift_still_learns():
    module = build("glu+oqc")
    nn.init.zeros_(module.auxiliary.lift.weight)
    module(tokens(2)).square().sum().backward()
    assert module.auxiliary.lift.weight.grad.abs().max() > 0


def test_features_are_quadratic_until_normalised():
    features = QuadraticFeatures(DIM, RANK)
    x = tokens(1)
    (left, right), (left3, right3) = features.factors(x), features.factors(3 * x)
    # One product and one norm in float32; at a hundredfold length the norm's stabiliser no longer shows.
    torch.testing.assert_close(left3 * right3, 9 * left * right, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features(300 * x), features(100 * x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features(100 * x).square().mean(-1), torch.ones(1, 12), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_tokens_are_exchangeable_unless_convolved(name):
    module = build(name).double()
    order = torch.randperm(12, generator=generator(1))
    x = tokens(2, dtype=torch.float64)
    error = (module(x[:, order]) - module(x)[:, order]).abs().max()
    if name.startswith("afbo"):
        assert error > 1e-3
    else:
        assert error <= tolerance(torch.float64)
    torch.testing.assert_close(module(x)[1:], module(x[1:]))


def test_static_and_dynamic_gates_start_at_the_same_factor():
    start = torch.sigmoid(torch.tensor(-2.0))
    x = tokens(2)
    assert torch.equal(StaticGate()(x), start)
    assert torch.equal(DynamicGate(DIM)(x), start.expand(2, 12, 1))
    ungated, static = build("glu+oqc"), build("glu+oqc-static")
    static.load_state_dict(ungated.state_dict(), strict=False)
    torch.testing.assert_close(static.branches(x).injected, start * ungated.branches(x).injected)
    assert build("gelu+squares").gate(x).item() == pytest.approx(0.3)


def test_lift_starts_small_and_reset_starts_again():
    for name, weight, fan_in in (("oqc", "auxiliary.lift", RANK), ("oqc-lr", "space.up_map", RANK)):
        module = build(f"glu+{name}")
        bound = 0.1 * fan_in**-0.5
        first = module.get_submodule(weight).weight.clone()
        assert 0.9 * bound < first.abs().max() <= bound
        module.reset_parameters()
        second = module.get_submodule(weight).weight
        assert not torch.equal(first, second)
        assert 0.9 * bound < second.abs().max() <= bound


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_reset_draws_like_a_new_module(name):
    module = build(name)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(9.0)
    module.reset_parameters()
    for (_, parameter), (_, fresh) in zip(module.named_parameters(), build(name).named_parameters(), strict=True):
        assert parameter.abs().max() <= 4 * fresh.abs().max() + 1e-9


def test_hosts_are_what_their_names_say():
    x = tokens(2)
    gelu, glu = build("gelu"), build("glu")
    torch.testing.assert_close(gelu(x), gelu.down(F.gelu(x @ gelu.up.weight.mT + gelu.up.bias)))
    gate, value = F.linear(x, glu.up.weight, glu.up.bias).split(HIDDEN, dim=-1)
    torch.testing.assert_close(glu(x), glu.down(gate * torch.sigmoid(gate) * value))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_feed_forward("swiglu", 8, 8, rank=2), "must be one of gelu, glu, afbo, gelu.aux"),
        (lambda: build_feed_forward("glu+squares", 8, 8, rank=2), "got 'glu.squares'"),
        (lambda: build_feed_forward("glu+oqc", 8, 8), "needs rank"),
        (lambda: build_feed_forward("glu+oqc", 8, 8, rank=0), "rank must be > 0"),
        (lambda: build_feed_forward("glu+oqc-lr", 8, 8, rank=0), "rank must be > 0"),
        (lambda: build_feed_forward("afbo", 8, 8), "needs grid"),
        (lambda: build_feed_forward("gelu", 0, 8), "dim must be > 0"),
        (lambda: build_feed_forward("glu", 8, 8)(torch.zeros(2, 3, 7)), r"x must be \[\*batch, tokens, 8\]"),
        (lambda: build_feed_forward("gelu+squares", 8, 8)(torch.zeros(8)), r"x must be \[\*batch, tokens, 8\]"),
        (lambda: ProjectOffMain(eps=-1.0), "eps must be >= 0"),
        (lambda: ProjectOffDirection(torch.zeros(3)), "other than zero"),
        (lambda: ProjectOffDirection(torch.ones(3, 2)), "one finite vector"),
    ],
)
def test_bad_values(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("name", ["glu+oqc", "glu+oqc-lr", "gelu+squares-oqc"])
def test_backend_is_passed_to_the_op(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    module = build(name, backend="triton").cpu()
    with pytest.raises(BackendUnavailable, match="cannot run"):
        module(tokens(1))


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_nan_stays_in_its_image_and_empty_batches_pass(name):
    module = build(name)
    x = tokens(3)
    x[1, 0, 0] = torch.nan
    y = module(x)
    assert y[[0, 2]].isfinite().all()
    assert y[1].isnan().any()
    assert module(x[:0]).shape == (0, 12, DIM)


def test_controls_share_everything_but_the_injection():
    assert isinstance(build("glu+aux").injection, PlainAdd)
    full, control = build("glu+oqc"), build("glu+aux")
    for (name, first), (other, second) in zip(full.named_parameters(), control.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(first, second)


def test_squares_are_of_the_preactivation():
    module, x = build("gelu+squares"), tokens(2)
    preactivation = F.linear(x, module.host.up.weight, module.host.up.bias)
    expected = F.gelu(preactivation) + 0.3 * preactivation**2
    torch.testing.assert_close(module.hidden(x), expected)


@pytest.mark.parametrize("space", [UntiedRankSpace, TiedRankSpace])
@pytest.mark.parametrize("gate", [StaticGate(), DynamicGate(DIM)])
def test_low_rank_takes_gates(space, gate):
    torch.manual_seed(0)
    module, x = OQCLowRankFeedForward(GLUFeedForward(DIM, HIDDEN), RANK, gate, space=space), tokens(2)
    gated, main = module.hidden(x), module.host.hidden(x)
    branches = module.branches(x)
    torch.testing.assert_close(main + branches.injected, gated)
    module.gate = None
    # Both gates start at the same factor.
    start = torch.sigmoid(torch.tensor(-2.0))
    torch.testing.assert_close(gated - main, start * (module.hidden(x) - main), rtol=1e-4, atol=1e-6)
