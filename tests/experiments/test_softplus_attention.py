"""The needle and the recall task, small, and the rules their arms obey."""

import pytest
import torch

from p2k.core.seeding import generator
from p2k.experiments import softplus_attention as study
from p2k.models.gpt import GPT

SMALL = study.RecallConfig(steps=10, batch_size=4, rates=(3e-3, 1e-2), longest=32)


def test_a_needle_gets_all_weight_alone_and_less_among_many():
    for arm in study.ARMS:
        assert torch.allclose(study.needle_mass(arm, 1, samples=3), torch.ones(3, dtype=torch.float64))
    masses = [study.needle_mass("LSSA", n, samples=4).mean() for n in (64, 256, 1024)]
    assert masses[0] > masses[1] > masses[2]
    # The second stage keeps what the first one dilutes, and so does the control.
    assert all(study.needle_mass(arm, 1024, samples=4).min() > 0.99 for arm in ("LSSAR, p = 15", "softmax, log N"))


@pytest.mark.parametrize("length", [12, 16, 40])
def test_every_query_has_one_answer_in_its_sequence(length):
    config = study.RecallConfig()
    tokens, values = study.recall_batch(config, count=50, length=length, source=generator(0))
    assert tokens.shape == (50, length)
    assert values.shape == (50, config.bindings)
    assert int(tokens.max()) < config.model("sdpa").vocab_size
    keys = tokens[:, -config.bindings :] - study.VALUES * (1 + config.bindings)
    assert torch.equal(keys.sort(-1).values, torch.arange(config.bindings).expand(50, -1))
    body = tokens[:, : -config.bindings]
    for column in range(config.bindings):
        answer = study.VALUES * (1 + keys[:, column : column + 1]) + values[:, column : column + 1]
        bound = (body >= study.VALUES) & (body // study.VALUES - 1 == keys[:, column : column + 1])
        assert torch.equal(bound.sum(-1), torch.ones(50, dtype=torch.long))
        assert ((body == answer) & bound).any(-1).all()


def test_arms_start_alike_and_train_apart():
    options = {"seeds": (0, 1), "tuning_seeds": (9,), "lengths": (16, 32), "tests": 4}
    first, swapped = study.recall("LSSA", SMALL, swaps=("LSSAR, p = 15",), **options)
    (again, _) = study.recall("LSSA", SMALL, swaps=("LSSAR, p = 3",), **options)
    (other,) = study.recall("softmax, log N", SMALL, **options)
    assert first.loss == again.loss
    assert first.loss != other.loss
    assert first.loss != swapped.loss
    assert swapped.arm == "LSSA, tested as LSSAR, p = 15"
    assert first.minus(other, 32, metric="loss").n == 2
    assert first.rate in SMALL.rates


def test_a_stacked_replica_is_the_model_alone():
    stack = study._Stack(SMALL, "softplus", (3, 4), torch.device("cpu"))
    tokens, _ = study.recall_batch(SMALL, count=2, length=20, source=generator(1))
    with torch.no_grad():
        together = stack.answers(torch.stack([tokens, tokens]))
        model = GPT(SMALL.model("softplus"))
        model.load_state_dict({name: p[1] for name, p in stack.parameters.items()})
        torch.testing.assert_close(together[1], model(tokens)[:, -SMALL.bindings :])


def test_bad_input():
    options = {"seeds": (0, 1), "lengths": (16,), "tests": 2}
    with pytest.raises(ValueError, match="arm must be one of"):
        study.recall("none", SMALL, tuning_seeds=(9,), **options)
    with pytest.raises(ValueError, match="seeds disjoint"):
        study.recall("LSSA", SMALL, tuning_seeds=(1,), **options)
    with pytest.raises(ValueError, match="must fit each other"):
        study.RecallConfig(length=8)
