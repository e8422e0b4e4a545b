"""Every arm under torch's transforms: compile, vmap over stacked parameters, autocast, state dicts, shape checks."""

import copy

import pytest
import torch
from beartype import beartype
from jaxtyping import TypeCheckError, jaxtyped

from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors, tolerance
from p2k.linalg import projection, spectrum
from p2k.nn import injection, quadratic
from p2k.nn.oqc import FEED_FORWARDS, build_feed_forward

SIZES = {"dim": 16, "hidden": 24, "rank": 5, "grid": (2, 3)}


def build(name, seed=0, **options):
    torch.manual_seed(seed)
    return build_feed_forward(name, **SIZES, **options)


def tokens(*batch, seed=0):
    return torch.randn(*batch, 6, SIZES["dim"], generator=generator(seed))


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_vmap_over_stacked_parameters_equals_one_by_one(name):
    modules = [build(name, seed) for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    skeleton = copy.deepcopy(modules[0]).to("meta")
    x = tokens(3, 2)

    def loss(parameters, buffers, x):
        return torch.func.functional_call(skeleton, (parameters, buffers), (x,)).square().sum()

    grads, losses = torch.func.vmap(torch.func.grad_and_value(loss))(parameters, buffers, x)
    for index, module in enumerate(modules):
        alone = module(x[index]).square().sum()
        alone.backward()
        torch.testing.assert_close(losses[index], alone)
        for key, parameter in module.named_parameters():
            # Batched products sum in another order.
            torch.testing.assert_close(grads[key][index], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gelu", "glu+oqc-dynamic", "glu+oqc-lr-tied", "afbo+fixed", "gelu+squares-oqc"])
def test_compiles_without_graph_breaks(name):
    module, x = build(name), tokens(2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    gradients = torch.autograd.grad(compiled(x).square().sum(), list(module.parameters()))
    expected = torch.autograd.grad(module(x).square().sum(), list(module.parameters()))
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_autocast_rounds_and_nothing_else(name):
    module, x = build(name), tokens(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = x + module(x)
        module(x).float().square().sum().backward()
    assert y.dtype == torch.float32
    truth = module.double()(x.double())
    # Three bfloat16 products in a row.
    assert relative_errors((y - x).detach(), truth.detach())[0] <= 2 * tolerance(torch.bfloat16)
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize("name", ["glu+oqc", "glu+oqc-dynamic"])
def test_autocast_keeps_the_projection_in_float32(name):
    module = build(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        main, _, injected = module.branches(tokens(8))
    assert main.dtype == torch.bfloat16
    # What is left is the rounding of the injected vector itself; reductions in bfloat16 would leave 1e-2 and more.
    assert projection.cosine_overlap(injected, main).max() < 2e-3


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_whole_module_in_bfloat16_and_float64(name):
    for dtype in (torch.bfloat16, torch.float64):
        module = build(name, dtype=dtype)
        assert {parameter.dtype for parameter in module.parameters()} == {dtype}
        assert module(tokens(2).to(dtype)).dtype == dtype


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_state_dict_round_trip(name):
    first, second = build(name, 0), build(name, 1)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(tokens(2)), second(tokens(2)))
    if name.endswith("fixed"):
        assert "injection.direction" in first.state_dict()


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_repr_and_meta(name):
    assert "hidden=24" in repr(build(name))
    module = build(name, device="meta")
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}


def checked(function):
    return jaxtyped(function, typechecker=beartype)


def test_annotations_hold(monkeypatch):
    seen = set()
    for owner in (type(part) for name in FEED_FORWARDS for part in build(name).modules()):
        if not owner.__module__.startswith("p2k.") or owner in seen:
            continue
        seen.add(owner)
        for method in ("forward", "hidden", "pair", "factors", "lower", "lift", "injected", "preactivation"):
            if method in vars(owner):
                monkeypatch.setattr(owner, method, checked(vars(owner)[method]))
    assert injection.ProjectOffMain in seen
    for name in FEED_FORWARDS:
        module = build(name)
        module(tokens(2))
        module(tokens())
        if "+" in name:
            module.branches(tokens(2, 3))
    with pytest.raises(TypeCheckError):
        injection.PlainAdd()(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(TypeCheckError):
        quadratic.QuadraticFeatures(4, 2)(torch.zeros(3, 4, dtype=torch.int64))


def test_annotations_of_functions_hold():
    vectors, labels = tokens(2), torch.arange(6) % 2
    flat = vectors[0]
    assert checked(projection.project_off)(vectors, flat[0]).shape == vectors.shape
    assert checked(projection.project_onto)(vectors, vectors).shape == vectors.shape
    assert checked(projection.project_off_subspace)(vectors, flat[:2]).shape == vectors.shape
    assert checked(projection.cosine_overlap)(vectors, vectors).shape == (2, 6)
    assert checked(spectrum.effective_rank)(vectors).shape == ()
    assert checked(spectrum.participation_ratio)(vectors).shape == ()
    assert checked(spectrum.class_separation)(flat, labels).shape == ()
    with pytest.raises(TypeCheckError):
        checked(projection.cosine_overlap)(vectors, flat[:, :3])
