import pytest
import torch

from p2k.data.preferences import SCENARIOS, Scenario, make_preferences

SMALL = {"steps": 6, "batch": 16, "test": 64}


def test_there_are_four_families_of_three_difficulties():
    assert len({scenario.name for scenario in SCENARIOS}) == 12
    assert len({scenario.family for scenario in SCENARIOS}) == 4
    assert {scenario.difficulty for scenario in SCENARIOS} == {"light", "medium", "heavy"}


def test_an_environment_does_not_depend_on_the_others():
    together = make_preferences(seeds=(3, 4), **SMALL)
    place = 12 + 5
    alone = make_preferences((SCENARIOS[5],), (4,), **SMALL)
    assert together.scenarios[place] == alone.scenarios[0]
    assert together.seeds[place] == 4
    for name in ("warm_contexts", "contexts", "items", "rewards"):
        assert torch.equal(getattr(together, name)[:, place], getattr(alone, name)[:, 0])
    for name in ("test_contexts", "test_rewards"):
        assert torch.equal(getattr(together, name)[place], getattr(alone, name)[0])


def test_seeds_differ_and_scenarios_of_a_seed_share_their_world():
    data = make_preferences(seeds=(0, 1), **SMALL)
    assert torch.equal(data.test_rewards[0], data.test_rewards[11])
    assert torch.equal(data.items[:, 0], data.items[:, 11])
    assert not torch.allclose(data.test_rewards[0], data.test_rewards[12])


def test_items_of_a_list_differ_and_warm_labels_are_the_best_items():
    data = make_preferences(SCENARIOS[:1], (0,), **SMALL)
    assert bool((data.items.sort(-1).values.diff(dim=-1) > 0).all())
    counts = torch.bincount(data.warm_best.flatten(), minlength=8)
    assert int((counts > 0).sum()) > 3


def test_corruptions_do_what_their_numbers_say():
    size = {"steps": 200, "batch": 32, "test": 1}
    clean = make_preferences((Scenario("none", "light"),), (0,), **size).rewards
    flipped = make_preferences((Scenario("flips", "x", flips=0.3),), (0,), **size).rewards
    turned = (flipped != clean).any(-1)
    assert torch.equal(flipped[turned], -clean[turned])
    # 6,400 lists: five standard errors of a share of 0.3 are 0.029.
    assert abs(turned.float().mean().item() - 0.3) < 0.029
    jumped = make_preferences((Scenario("outliers", "x", outliers=0.1),), (0,), **size).rewards - clean
    assert torch.allclose(jumped[jumped != 0].abs(), torch.tensor(5.0), atol=1e-5)  # a sum of float32 numbers near 10
    assert abs((jumped != 0).float().mean().item() - 0.1) < 0.01
    assert abs((jumped > 0).float().mean().item() - 0.05) < 0.01
    cauchy = make_preferences((Scenario("cauchy", "x", cauchy=0.6),), (0,), **size).rewards - clean
    # Half of a Cauchy distribution lies within its scale.
    assert abs((cauchy.abs() < 0.6).float().mean().item() - 0.5) < 0.016
    shifted = make_preferences((Scenario("shift", "x", shift=1.0),), (0,), **size)
    plain = make_preferences((Scenario("none", "x"),), (0,), **size)
    # Differences of float32 numbers near one.
    assert torch.allclose(shifted.contexts - plain.contexts, torch.tensor(0.5), atol=1e-6)
    assert torch.equal(shifted.test_contexts, plain.test_contexts)
    noise = make_preferences((Scenario("noise", "x", noise=1.5),), (0,), **size).rewards - clean
    assert abs(noise.std().item() - 1.5) < 0.05


@pytest.mark.parametrize("options", [{"candidates": 1}, {"candidates": 9}, {"steps": 0}, {"seeds": ()}])
def test_bad_sizes_are_named(options):
    with pytest.raises(ValueError, match="make_preferences"):
        make_preferences(**options)
