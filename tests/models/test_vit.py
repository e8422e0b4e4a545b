"""The vision transformer: shapes, readouts, attention, presets and matching of whole models."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from beartype import beartype
from jaxtyping import jaxtyped
from torch.nn.attention import SDPBackend, sdpa_kernel

from p2k.core.errors import BudgetUnreachable
from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors, tolerance
from p2k.models.attention import ReAttention, SelfAttention
from p2k.models.readout import READOUTS
from p2k.models.vit import DIGITS, OQC_CIFAR100, OQC_TINYIMAGENET, ViT, build_vit, match_vit
from p2k.nn.matching import count_parameters
from p2k.nn.oqc import FEED_FORWARDS


def build(name="glu", seed=0, **changes):
    torch.manual_seed(seed)
    return build_vit(dataclasses.replace(DIGITS, **changes), name)


def images(count=3, config=DIGITS, seed=0):
    return torch.randn(count, config.in_channels, config.image_size, config.image_size, generator=generator(seed))


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_every_arm_trains(name):
    model = build(name)
    logits = model(images())
    assert logits.shape == (3, 10)
    F.cross_entropy(logits, torch.tensor([0, 1, 2])).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(parameter.grad.any() for parameter in model.parameters())


def test_patches_are_row_major_and_whole():
    model = build(image_size=4, in_channels=2)
    torch.nn.init.zeros_(model.positions)
    x = images(2, dataclasses.replace(DIGITS, image_size=4, in_channels=2))
    kernel = model.embed.weight.view(24, 2, 2, 2)
    expected = F.conv2d(x, kernel, model.embed.bias, stride=2).flatten(2).mT
    torch.testing.assert_close(model.tokens(x), expected)


def test_features_feed_the_head_and_follow_the_blocks():
    model = build()
    x = model.tokens(images())
    first = model.blocks[0](x)
    last = model.blocks[1](first)
    expected = model.readout.norm(last + first).mean(1)
    torch.testing.assert_close(model.features(images()), expected)
    assert torch.equal(model(images()), model.head(model.features(images())))


def test_feed_forward_inputs_are_what_the_blocks_see():
    model, seen = build("glu+oqc"), []
    for block in model.blocks:
        block.feed_forward.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    model(images())
    inputs = model.feed_forward_inputs(images())
    assert [torch.equal(a, b) for a, b in zip(inputs, seen[:2], strict=True)] == [True, True]
    assert not inputs[0].requires_grad
    assert model.blocks[1].feed_forward.branches(inputs[1]).injected.shape == (3, 16, 64)


def test_readouts_by_their_formulas():
    last, penultimate = images().flatten(1).view(3, 8, 8), images(seed=1).flatten(1).view(3, 8, 8)

    def norm(x):
        return F.layer_norm(x, (8,))

    expected = {
        "last": norm(last).mean(1),
        "penultimate": norm(last + penultimate).mean(1),
        "penultimate-normed": norm(last.mean(1)) + norm(penultimate.mean(1)),
    }
    assert expected.keys() == READOUTS.keys()
    for name, features in expected.items():
        torch.testing.assert_close(READOUTS[name](8)(last, penultimate), features)
        assert build(readout=name)(images()).shape == (3, 10)
    assert build(depth=1)(images()).shape == (3, 10)


def slow_attention(module, x, mix=None):
    """Attention with one loop per image and head, in the order of the definition."""
    dim, heads = x.shape[-1], module.heads
    width = dim // heads
    query, key, value = module.query_key_value(x).split(dim, dim=-1)
    rows = []
    for image in range(len(x)):
        maps, values = [], []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = query[image, :, part] @ key[image, :, part].T / math.sqrt(width)
            maps.append(scores.softmax(-1))
            values.append(value[image, :, part])
        if mix is not None:
            mixed = [sum(mix[h, g] * maps[h] for h in range(heads)) for g in range(heads)]
            maps = list(F.layer_norm(torch.stack(mixed, -1), (heads,)).unbind(-1))
        rows.append(torch.cat([weights @ v for weights, v in zip(maps, values, strict=True)], -1))
    return module.out(torch.stack(rows))


def test_attention_against_loops():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 12, generator=generator(0), dtype=torch.float64)
    plain, mixing = SelfAttention(12, 3).double(), ReAttention(12, 3).double()
    torch.testing.assert_close(plain(x), slow_attention(plain, x))
    torch.nn.init.normal_(mixing.mix)
    torch.testing.assert_close(mixing(x), slow_attention(mixing, x, mixing.mix))
    assert count_parameters(mixing) - count_parameters(plain) == 9 + 6
    assert build(attention="re-attention")(images()).shape == (3, 10)


@pytest.mark.parametrize("name", ["glu", "glu+oqc-lr", "glu+oqc-dynamic", "gelu+squares-oqc", "afbo+fixed"])
def test_vmap_over_seeds_equals_one_by_one(name):
    models = [build(name, seed) for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    skeleton = copy.deepcopy(models[0]).to("meta")
    labels = torch.tensor([1, 2, 3])

    def loss(parameters, buffers, images):
        return F.cross_entropy(torch.func.functional_call(skeleton, (parameters, buffers), (images,)), labels)

    # The fused attention kernel of the CPU has no batching rule; the plain one has.
    with sdpa_kernel(SDPBackend.MATH):
        grads, losses = torch.func.vmap(torch.func.grad_and_value(loss), (0, 0, None))(parameters, buffers, images())
    for index, model in enumerate(models):
        alone = F.cross_entropy(model(images()), labels)
        alone.backward()
        torch.testing.assert_close(losses[index], alone)
        for key, parameter in model.named_parameters():
            # Batched products sum in another order.
            torch.testing.assert_close(grads[key][index], parameter.grad, rtol=1e-4, atol=1e-5)


def test_compiles_without_graph_breaks():
    model = build("glu+oqc-dynamic")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images()), model(images()))


@pytest.mark.parametrize("attention", ["softmax", "re-attention"])
def test_autocast_and_float64(attention):
    model = build("glu+oqc-lr", attention=attention)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(images())
    plain = model(images())
    truth = model.double()(images().double()).detach()
    # Two blocks of about ten chained products.
    assert relative_errors(plain.detach(), truth)[0] <= 10 * tolerance(torch.float32)
    assert relative_errors(rounded.detach(), truth)[0] <= 10 * tolerance(torch.bfloat16)


def test_state_dict_round_trip():
    first, second = build("glu+fixed", 0), build("glu+fixed", 1)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(images()), second(images()))


def test_annotations_hold(monkeypatch):
    model = build("glu+oqc")
    for owner in {type(part) for part in model.modules() if type(part).__module__.startswith("p2k.models")}:
        for method in ("forward", "features", "tokens", "attend", "feed_forward_inputs"):
            if method in vars(owner):
                monkeypatch.setattr(owner, method, jaxtyped(vars(owner)[method], typechecker=beartype))
    assert model(images()).shape == (3, 10)
    assert len(model.feed_forward_inputs(images())) == 2


def test_presets_are_the_papers():
    for config, grid, classes in ((OQC_CIFAR100, (8, 8), 100), (OQC_TINYIMAGENET, (8, 8), 200)):
        assert (config.depth, config.dim, config.heads, config.rank) == (8, 256, 8, 56)
        assert (config.grid, config.num_classes, config.readout) == (grid, classes, "penultimate")
    model = build_vit(OQC_CIFAR100, "afbo", device="meta")
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 100)
    assert count_parameters(build_vit(DIGITS, "glu", device="meta")) == 15314


def test_every_arm_meets_the_budget_of_the_cifar_preset():
    budget = count_parameters(build_vit(OQC_CIFAR100, "glu", device="meta"))
    matches = match_vit(OQC_CIFAR100, list(FEED_FORWARDS))
    assert matches.keys() == FEED_FORWARDS.keys()
    for name, match in matches.items():
        built = count_parameters(build_vit(OQC_CIFAR100, name, hidden=match.hidden, device="meta"))
        assert built == match.parameters
        assert abs(built - budget) <= 0.005 * budget
    assert matches["glu"].hidden == OQC_CIFAR100.hidden
    assert matches["glu"].gap == 0


def test_matching_in_steps_and_against_another_arm():
    names = ["glu", "gelu+oqc", "afbo+oqc-lr"]
    matches = match_vit(OQC_CIFAR100, names, budget_of="afbo", rank=16, multiple_of=8)
    assert all(match.hidden % 8 == 0 for match in matches.values())
    assert match_vit(DIGITS, ["gelu", "gelu+squares"])["gelu"].hidden == 97
    with pytest.raises(BudgetUnreachable, match="nearest are"):
        match_vit(DIGITS, ["afbo+oqc"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "image_size must be a multiple of patch_size = 3, got 8"),
        ({"heads": 5}, "dim must be a multiple of heads = 5, got 24"),
        ({"depth": 0}, "depth must be > 0"),
        ({"readout": "cls"}, "readout must be one of last, penultimate"),
        ({"attention": "linear"}, "attention must be one of softmax, re-attention"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_bad_names_and_images():
    with pytest.raises(ValueError, match="must be one of"):
        build_vit(DIGITS, "moe")
    with pytest.raises(ValueError, match="must be one of"):
        match_vit(DIGITS, ["moe"])
    with pytest.raises(ValueError, match=r"images must be \[batch, \*\(1, 8, 8\)\], got \(2, 3, 8, 8\)"):
        build()(torch.zeros(2, 3, 8, 8))
    assert build()(images(0)).shape == (0, 10)


def test_feed_forward_is_any_callable():
    model = ViT(
        image_size=8,
        patch_size=4,
        in_channels=1,
        num_classes=2,
        dim=8,
        depth=3,
        heads=1,
        feed_forward=lambda dim: torch.nn.Linear(dim, dim),
    )
    assert len(model.blocks) == 3
    assert model(images()).shape == (3, 2)
