import pytest
import torch

from p2k.core.seeding import generator
from p2k.experiments.lucid import RecallTask, correlated_keys, recall, train_recall, tuned_recall

TASK, CONFIG = RecallTask(keys=6, values=3, pairs=4), {"dim": 8, "heads": 1, "depth": 1}


def test_keys_have_their_norm_and_share_a_direction():
    keys = correlated_keys(200, 16, 0.9, seed=0)
    assert keys.shape == (1, 1, 200, 16)
    torch.testing.assert_close(keys.norm(dim=-1), torch.full((1, 1, 200), 4.0, dtype=keys.dtype))
    cosine = (keys[0, 0] @ keys[0, 0].T / 16).triu(1)
    assert cosine[cosine != 0].mean() > 0.7
    assert correlated_keys(200, 16, 0.0, seed=0)[0, 0].mean(0).norm() < 1
    assert torch.equal(correlated_keys(5, 16, 1.0, seed=0)[0, 0, 0], correlated_keys(5, 16, 1.0, seed=0)[0, 0, 1])


def test_recall_of_dissimilar_and_of_similar_keys():
    values = torch.randn(1, 1, 64, 32, generator=generator(1), dtype=torch.float64)
    easy, hard = (correlated_keys(64, 64, common, seed=0) for common in (0.0, 0.9))
    assert recall(easy, values, preconditioned=False).accuracy == 1
    plain, solved = (recall(hard, values, preconditioned=p) for p in (False, True))
    assert solved.accuracy > plain.accuracy
    assert solved.cosine[-1] > 1 - 1e-9  # nothing is stored after the last pair
    assert plain.cosine.shape == (64,)


def test_a_sample_asks_for_every_key_once():
    tokens, answers = TASK.sample(50, generator(0))
    assert tokens.shape == (50, 8)
    stored, asked = tokens[:, :4], tokens[:, 4:] - 18
    assert tokens.max() < TASK.vocab
    assert torch.equal((stored // 3).sort(1).values, asked.sort(1).values)
    assert ((stored // 3).sort(1).values.diff(dim=1) > 0).all()
    place = (asked[:, :, None] == (stored // 3)[:, None]).long().argmax(2)
    assert torch.equal((stored % 3).gather(1, place), answers)


@pytest.mark.parametrize("attention", ["sdpa", "lucid"])
def test_stacked_runs_are_independent_and_learn(attention):
    options = {"config": CONFIG, "steps": 60, "batch": 8}
    both = train_recall(attention, TASK, seeds=[0, 1], rates=[0.02, 0.01], **options)
    alone = train_recall(attention, TASK, seeds=[1], rates=[0.01], **options)
    # One stack is summed in another order than the other, and Adam magnifies that; answers flip at most rarely.
    assert abs(both[1] - alone[0]) < 0.02
    assert both[0] > 0.4


def test_tuning_reports_other_seeds_at_the_best_rate():
    rate, values = tuned_recall(
        "sdpa", TASK, rates=[1e-6, 0.02], tuning_seeds=[7], seeds=[0, 1], config=CONFIG, steps=40, batch=8
    )
    assert rate == 0.02
    assert len(values) == 2


def test_bad_input():
    with pytest.raises(ValueError, match="a rate for each seed"):
        train_recall("sdpa", TASK, config=CONFIG, steps=1, seeds=[0], rates=[])
