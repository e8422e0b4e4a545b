"""PolyReLU and PolyNorm as modules, and the feed-forwards around them."""

import copy

import pytest
import torch
import torch.nn.functional as F

from p2k.core.seeding import generator
from p2k.models.gpt import GPT, GPTConfig
from p2k.nn.ffn import GELUFeedForward
from p2k.nn.matching import count_parameters, decayed_names
from p2k.nn.polycom import (
    FEED_FORWARDS,
    ActivationFeedForward,
    NormedGELU,
    PolyNorm,
    PolyReLU,
    SquaredReLU,
    build_feed_forward,
)

modules = pytest.mark.parametrize("module", [PolyReLU, PolyNorm])


def random(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


@modules
@pytest.mark.parametrize("bias", [0.0, 1.0])
def test_published_start_and_both_bias_conventions(module, bias):
    layer = module(bias, dtype=torch.float64)
    assert layer.weight.tolist() == [1 / 3] * 3
    assert layer.bias.item() == bias
    x = random(4, 9)
    assert torch.allclose(layer(x) - bias, module(dtype=torch.float64)(x))
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.fill_(7.0)
    layer.reset_parameters()
    assert (layer.weight.tolist(), layer.bias.item()) == ([1 / 3] * 3, bias)


def test_formulas():
    x = random(3, 8)
    thirds = [(power / power.square().mean(-1, keepdim=True).add(1e-6).sqrt()) / 3 for power in (x, x**2, x**3)]
    assert torch.allclose(PolyNorm(dtype=torch.float64)(x), sum(thirds))
    r = x.relu()
    assert torch.allclose(PolyReLU(dtype=torch.float64)(x), (r + r**2 + r**3) / 3)
    assert torch.equal(SquaredReLU()(x), r * r)
    gelu = F.gelu(x)
    assert torch.allclose(NormedGELU()(x), gelu / gelu.square().mean(-1, keepdim=True).add(1e-6).sqrt())


@modules
def test_state_dict_round_trip_and_copies(module):
    layer = module(dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(random(3))
    other = module(dtype=torch.float64)
    other.load_state_dict(layer.state_dict())
    x = random(2, 5)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@modules
def test_autocast_keeps_coefficients_in_float32(module):
    block = ActivationFeedForward(6, 10, module())
    x = torch.randn(3, 6, generator=generator(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = block(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert block.activation.weight.grad.dtype == torch.float32
    assert torch.allclose(out.float(), block(x), rtol=0, atol=0.05)  # three roundings to eight bits


@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_feed_forwards_inside_a_language_model(name):
    dim, hidden = 8, 12
    model = GPT(GPTConfig(11, 6, dim=dim, depth=2, heads=2), lambda width: build_feed_forward(name, width, hidden))
    logits = model(torch.arange(6)[None])
    logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    maps = 3 if name == "swiglu" else 2
    extra = {"polyrelu": 4, "polynorm": 4}.get(name, 0)
    expected = maps * dim * hidden + (maps - 1) * hidden + dim + extra
    assert count_parameters(model.blocks[0].feed_forward) == expected


def test_coefficients_take_no_weight_decay():
    block = build_feed_forward("polynorm", 4, 6)
    assert decayed_names(block) == {"up.weight", "down.weight"}


def test_a_gelu_activation_is_the_gelu_baseline():
    block, baseline = ActivationFeedForward(4, 6, torch.nn.GELU()), GELUFeedForward(4, 6)
    baseline.load_state_dict(block.state_dict())
    x = torch.randn(2, 4, generator=generator(0))
    assert torch.equal(block(x), baseline(x))


def test_polynorm_feed_forward_ignores_the_size_of_its_first_map():
    block = ActivationFeedForward(4, 16, PolyNorm(), bias=False).double()
    x = random(5, 4)
    before = block(x)
    with torch.no_grad():
        block.up.weight.mul_(1000.0)
    assert torch.allclose(block(x), before, rtol=0, atol=1e-3)  # eps against the sixth power of small rows


def test_bad_input():
    with pytest.raises(ValueError, match="build_feed_forward: name must be one of gelu, swiglu"):
        build_feed_forward("tanh", 4, 4)
    with pytest.raises(ValueError, match="ActivationFeedForward: hidden must be > 0"):
        ActivationFeedForward(4, 0, PolyReLU())
    with pytest.raises(ValueError, match=r"x must be \[\*batch, tokens, 4\]"):
        ActivationFeedForward(4, 6, PolyReLU())(torch.ones(3, 5))
    for module in (PolyNorm, NormedGELU):
        with pytest.raises(ValueError, match="eps must be > 0"):
            module(eps=0.0)
    assert "eps=1e-06" in repr(PolyNorm())
