"""The losses in verl's registries, on a stand-in for the module that holds them."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from p2k.core.errors import MissingDependency
from p2k.core.seeding import generator
from p2k.core.tolerance import tolerance
from p2k.losses.adapters import GROUP_LOSSES, policy_loss_trainer, register_with_verl
from p2k.losses.registry import get_adv_estimator, get_policy_loss

MODULE = "verl.trainer.ppo.core_algos"


@pytest.fixture
def verl(monkeypatch):
    """Its two registries and their decorators, holding what verl has under a name of ours."""
    module = ModuleType(MODULE)
    module.POLICY_LOSS_REGISTRY = dict.fromkeys(("vanilla", "gspo", "gpg", "geo_mean"), "theirs")
    module.ADV_ESTIMATOR_REGISTRY = dict.fromkeys(("gae", "grpo", "rloo"), "theirs")

    def into(table):
        return lambda name: lambda function: table.setdefault(name, function)

    module.register_policy_loss = into(module.POLICY_LOSS_REGISTRY)
    module.register_adv_est = into(module.ADV_ESTIMATOR_REGISTRY)
    parts = MODULE.split(".")
    for end in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
    monkeypatch.setitem(sys.modules, MODULE, module)
    return module


def batch(rows=8, tokens=3):
    rng = generator(0)
    old = -torch.rand(rows, tokens, generator=rng, dtype=torch.float64)
    new = old + 0.3 * torch.randn(rows, tokens, generator=rng, dtype=torch.float64)
    advantages = torch.randn(rows, 1, generator=rng, dtype=torch.float64).expand_as(old)
    return {"old_log_prob": old, "log_prob": new, "advantages": advantages, "response_mask": torch.ones(rows, tokens)}


def actor(**settings):
    """The fields of verl's actor configuration that reach a loss."""
    return SimpleNamespace(**{"rollout_n": 4, "use_dynamic_bsz": False, "global_batch_info": {}, **settings})


def test_what_verl_lacks_is_entered_once_and_nothing_is_replaced(verl):
    assert sorted(register_with_verl()) == sorted([*GROUP_LOSSES, "dr_grpo"])
    assert register_with_verl() == []
    assert verl.POLICY_LOSS_REGISTRY["vanilla"] == verl.ADV_ESTIMATOR_REGISTRY["rloo"] == "theirs"


@pytest.mark.parametrize("name", GROUP_LOSSES)
def test_an_entered_loss_is_ours_on_groups_of_the_rollouts_size(verl, name):
    register_with_verl()
    call = {**batch(), "loss_agg_mode": "seq-mean-token-mean"}
    loss, metrics = verl.POLICY_LOSS_REGISTRY[name](**call, config=actor(), rollout_is_weights=None)
    expected, tensors = get_policy_loss(name)(**call, config={"num_generations": 4})
    assert loss == expected
    assert metrics == {key: value.item() for key, value in tensors.items()}


def test_micro_batches_sum_to_the_loss_of_the_mini_batch(verl):
    register_with_verl(options={"gopo": {"mu": 0.3}})
    gopo, whole = verl.POLICY_LOSS_REGISTRY["gopo"], batch()
    config = actor(global_batch_info={"dp_size": 1, "global_batch_size": 8})
    halves = [{key: value[part] for key, value in whole.items()} for part in (slice(4), slice(4, 8))]
    total = sum(gopo(**half, loss_agg_mode="seq-mean-token-mean", config=config)[0] for half in halves)
    expected, _ = get_policy_loss("gopo")(**whole, config={"num_generations": 4, "mu": 0.3})
    torch.testing.assert_close(total, expected, rtol=tolerance(torch.float64), atol=0)


def test_an_entered_estimator_is_called_as_verl_calls_it(verl):
    register_with_verl()
    rewards, index = torch.rand(4, 3, generator=generator(1)), ["a", "a", "b", "b"]
    call = {"token_level_rewards": rewards, "response_mask": torch.ones(4, 3), "index": index}
    found, _ = verl.ADV_ESTIMATOR_REGISTRY["dr_grpo"](**call, config=SimpleNamespace(gamma=1.0, lam=1.0))
    expected, _ = get_adv_estimator("dr_grpo")(**call)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(("mode", "settings"), [("token-mean", {}), ("seq-mean-token-mean", {"use_dynamic_bsz": True})])
def test_settings_of_verl_that_break_groups_raise(verl, mode, settings):
    register_with_verl()
    with pytest.raises(ValueError, match="seq-mean-token-mean"):
        verl.POLICY_LOSS_REGISTRY["adpo"](**batch(), loss_agg_mode=mode, config=actor(**settings))


def test_options_for_a_loss_that_is_not_entered_raise(verl):
    with pytest.raises(ValueError, match="vanilla"):
        register_with_verl(options={"vanilla": {"clip_ratio": 0.1}})


def test_a_missing_trainer_says_what_to_install(monkeypatch):
    # The module itself, which another test may have imported where verl is installed.
    monkeypatch.setitem(sys.modules, MODULE, None)
    monkeypatch.setitem(sys.modules, "trl", None)
    for call in (register_with_verl, lambda: policy_loss_trainer("gopo")):
        with pytest.raises(MissingDependency, match="trainers"):
            call()


def test_an_unknown_loss_raises_before_anything_is_imported():
    with pytest.raises(ValueError, match="gopher"):
        policy_loss_trainer("gopher")
