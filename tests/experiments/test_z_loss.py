import dataclasses

import pytest
import torch

from p2k.core.seeding import generator
from p2k.core.tolerance import tolerance
from p2k.experiments.z_loss import (
    BANDS,
    METRICS,
    Arm,
    Task,
    make_corpus,
    ranking_scores,
    run_study,
    seconds_per_step,
    train,
)

TASK = Task(words=120, width=6, steps=30, batch=16, heldout=64)
SHAPE = {"rate": 1.0, "a": 1.0, "b": 3.0}


def test_scores_of_a_known_ranking():
    truth = torch.tensor([[0.5, 0.3, 0.2] + [0.0] * 9], dtype=torch.float64)
    logits = torch.tensor([[1.0, 2.0, 0.0] + [-1.0] * 9])  # ranks 2, 1, 3
    found = ranking_scores(logits, truth)
    assert found["top1"] == pytest.approx(30)
    assert found["top5"] == found["top10"] == pytest.approx(100)
    assert found["mrr"] == pytest.approx(100 * (0.3 + 0.5 / 2 + 0.2 / 3))
    assert found["head"] == pytest.approx(100)
    assert {*found} == {*METRICS, *BANDS}


def test_bands_split_the_ten_best_guesses_and_the_truth_ranks_best():
    corpus = make_corpus(TASK, 0)
    noise = torch.randn(corpus.truth.shape, generator=generator(0))
    for logits in (corpus.truth, noise):
        found = ranking_scores(logits, corpus.truth)
        assert sum(found[band] for band in BANDS) == pytest.approx(found["top10"])
    best, other = ranking_scores(corpus.truth, corpus.truth), ranking_scores(noise, corpus.truth)
    assert all(best[name] > other[name] for name in METRICS)


@pytest.mark.parametrize(
    ("loss", "kind"), [("softmax", "sgd"), ("softmax", "adam"), ("z", "factored"), ("taylor", "factored")]
)
def test_every_arm_learns(loss, kind):
    corpus, arm = make_corpus(TASK, 1), Arm(loss, kind, ())
    rate = {"adam": 0.05, "sgd": 3.0}.get(kind, 10.0)
    still = train(arm, {**SHAPE, "rate": 1e-9}, corpus, dataclasses.replace(TASK, body_rate=1e-9))[0]
    assert train(arm, {**SHAPE, "rate": rate}, corpus, TASK)[0]["mrr"] > still["mrr"] + 1


@pytest.mark.parametrize("loss", ["z", "taylor"])
@pytest.mark.parametrize("final_rate", [0.0, 0.5, 1.0])
def test_the_factored_arm_is_the_dense_arm(loss, final_rate):
    task = dataclasses.replace(TASK, final_rate=final_rate)
    corpus = make_corpus(task, 2)
    runs = [train(Arm(loss, kind, ()), {**SHAPE, "rate": 3.0}, corpus, task) for kind in ("factored", "sgd")]
    # Thirty steps of Adam below the layer enlarge differences of rounding.
    assert runs[0][1] == pytest.approx(runs[1][1], rel=1000 * tolerance(torch.float64))
    assert runs[0][0]["mrr"] == pytest.approx(runs[1][0]["mrr"], rel=1000 * tolerance(torch.float64))


def test_rates_end_where_they_are_told_to():
    grown = []
    for final_rate in (0.0, 1.0):
        task = dataclasses.replace(TASK, final_rate=final_rate)
        grown.append(train(Arm("z", "factored", ()), {**SHAPE, "rate": 10.0}, make_corpus(task, 2), task)[1])
    assert grown[1] > 1.05 * grown[0]  # Every step adds to the norm, and constant rates make longer steps.


def test_a_study_tunes_on_its_own_seeds_and_pairs_the_rest():
    arms = {
        "a": Arm("softmax", "sgd", ({"rate": 1e-9}, {"rate": 3.0})),
        "b": Arm("z", "factored", (SHAPE, {**SHAPE, "rate": 1e-9})),
    }
    study = run_study(arms, seeds=[0, 1], tuning_seeds=[1000], task=TASK)
    assert study.chosen["a"] == {"rate": 3.0}
    assert study.chosen["b"] == SHAPE
    assert all(len(values) == 2 for scores in study.scores.values() for values in scores.values())
    gap = study.difference("a", "b", "mrr")
    assert gap.mean == pytest.approx(sum(study.scores["a"]["mrr"]) / 2 - sum(study.scores["b"]["mrr"]) / 2)
    assert all(best >= got for got, best in zip(study.scores["a"]["mrr"], study.best["mrr"], strict=True))
    assert min(study.scale["b"]) > 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tuning_seeds": [0]}, "must not be reported"),
        ({"metric": "luck"}, "metric must be one of"),
        ({"arms": {"a": Arm("softmax", "sgd", ({"rate": 1.0},)), "b": Arm("softmax", "sgd", ())}}, "same number"),
    ],
)
def test_bad_studies_are_refused(options, words):
    base = {"arms": {"a": Arm("softmax", "sgd", ({"rate": 1.0},))}, "seeds": [0, 1], "tuning_seeds": [9], "task": TASK}
    with pytest.raises(ValueError, match=words):
        run_study(**{**base, **options})


def test_times_are_means_over_calls():
    called = []
    found = seconds_per_step(lambda: called.append(1), repeats=3, calls=4)
    assert len(found) == 3
    assert len(called) == 1 + 3 * 4
    assert min(found) >= 0
