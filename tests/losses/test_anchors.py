"""Anchors: when they move, that they keep no gradient, and that their state survives a restart."""

import pytest
import torch

from p2k.losses.anchors import ANCHORS, build_anchor


def parameters(value):
    return {"weight": torch.full((2,), float(value), requires_grad=True), "bias": torch.full((1,), -float(value))}


def weight(anchor):
    return anchor.parameters["weight"][0].item()


def compute(named):
    return named["weight"] * 3


def test_uniform_prefers_nothing():
    anchor = build_anchor("uniform")
    logps = torch.tensor([1.0, 2.0], requires_grad=True)
    assert torch.equal(anchor.reference(logps), torch.zeros(2))
    anchor.step(parameters(1))


def test_on_policy_is_what_was_stored_at_sampling_time():
    stored = torch.tensor([1.0, 2.0], requires_grad=True)
    reference = build_anchor("on_policy").reference(stored)
    assert torch.equal(reference, stored)
    assert not reference.requires_grad


def test_fixed_never_moves_and_is_a_copy():
    source = parameters(1)
    anchor = build_anchor("fixed", source)
    with torch.no_grad():
        source["weight"].add_(5)
    anchor.step(parameters(9))
    assert weight(anchor) == 1.0
    reference = anchor.reference(torch.zeros(2), compute)
    assert torch.equal(reference, torch.full((2,), 3.0))
    assert not reference.requires_grad


def test_dynamic_copies_every_few_steps():
    anchor = build_anchor("dynamic", parameters(0), every=3)
    seen = []
    for step in range(1, 8):
        anchor.step(parameters(step))
        seen.append(weight(anchor))
    assert seen == [0, 0, 3, 3, 3, 6, 6]


def test_ema_weights_the_old_anchor_by_its_decay():
    anchor = build_anchor("ema", parameters(0), decay=0.75)
    expected = 0.0
    for step in range(1, 5):
        anchor.step(parameters(step))
        expected = 0.75 * expected + 0.25 * step
        assert weight(anchor) == pytest.approx(expected, rel=1e-6)  # a float32 rounding per step


def test_kl_triggered_copies_when_a_full_window_exceeds_the_threshold():
    anchor = build_anchor("kl_triggered", parameters(0), threshold=0.1, window=3)
    seen = []
    for step, divergence in enumerate([5.0, 5.0, 0.0, 0.0, 0.0, 0.2, 0.2, 0.2], start=1):
        anchor.step(parameters(step), torch.tensor(divergence))
        seen.append(weight(anchor))
    # Two steps are no window; the third fills it (mean 3.3), copies and starts over; 0, 0, .2 stays at the threshold
    # or below, and 0, .2, .2 exceeds it.
    assert seen == [0, 0, 3, 3, 3, 3, 7, 7]


def test_kl_triggered_needs_a_divergence():
    with pytest.raises(ValueError, match="needs the divergence"):
        build_anchor("kl_triggered", parameters(0)).step(parameters(1))


@pytest.mark.parametrize(
    ("name", "options"), [("fixed", {}), ("dynamic", {"every": 3}), ("ema", {}), ("kl_triggered", {"window": 2})]
)
def test_state_survives_a_restart(name, options):
    steps = [(parameters(step), torch.tensor(0.15)) for step in range(1, 8)]
    through = build_anchor(name, parameters(0), **options)
    for step in steps:
        through.step(*step)
    first = build_anchor(name, parameters(0), **options)
    for step in steps[:4]:
        first.step(*step)
    second = build_anchor(name, parameters(5), **options)
    second.load_state_dict(first.state_dict())
    first.step(*steps[0])
    for step in steps[4:]:
        second.step(*step)
    state, expected = second.state_dict(), through.state_dict()
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(state[key], tensor, rtol=0, atol=0, equal_nan=True)


def test_bad_input_raises():
    with pytest.raises(ValueError, match=", ".join(ANCHORS)):
        build_anchor("nope")
    with pytest.raises(ValueError, match="needs parameters"):
        build_anchor("ema")
    with pytest.raises(ValueError, match="keeps no parameters"):
        build_anchor("uniform", parameters(1))
    with pytest.raises(ValueError, match="decay must lie"):
        build_anchor("ema", parameters(1), decay=1.5)
    with pytest.raises(ValueError, match="every must be"):
        build_anchor("dynamic", parameters(1), every=0)
    with pytest.raises(ValueError, match="threshold must be"):
        build_anchor("kl_triggered", parameters(1), threshold=0.0)
    with pytest.raises(ValueError, match="must be named weight, bias"):
        build_anchor("fixed", parameters(1)).step({"other": torch.ones(1)})
    with pytest.raises(ValueError, match="state must hold"):
        build_anchor("fixed", parameters(1)).load_state_dict({})
    with pytest.raises(ValueError, match="has no state"):
        build_anchor("uniform").load_state_dict({"a": torch.ones(1)})
