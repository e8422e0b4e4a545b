"""The study of the filter measures what it says, on cases whose answer is known."""

import pytest
import torch

from p2k.experiments.cut_cross_entropy import (
    Arm,
    Head,
    dropped_mass,
    filter_effect,
    make_language,
    memory_of_losses,
    random_head,
    train_bigram,
    tuned_rate,
)

TILE = (8, 16)


def test_a_flat_softmax_keeps_the_tiles_of_targets_and_drops_the_rest():
    head = random_head(16, 256, dim=4, peakiness=0.0)
    assert (head.weight == 0).all()
    found = filter_effect(head, filter_eps=1 / 128, sort_vocab=False, tile=TILE)
    kept = [len({int(t) // 16 for t in part}) for part in head.target.split(8)]
    assert found.skipped == pytest.approx(1 - sum(kept) / 32)
    # Each tile holds a sixteenth of a flat softmax over 256 entries.
    assert found.mass == pytest.approx(found.skipped)
    assert found.silent > 0
    above = filter_effect(head, filter_eps=1 / 512, sort_vocab=False, tile=TILE)
    assert (above.skipped, above.mass, above.hidden_error, above.weight_error, above.silent) == (0, 0, 0, 0, 0)


def test_sorting_skips_more_of_a_zipf_head():
    head = random_head(32, 512, dim=8, peakiness=2.0)
    plain, ordered = (filter_effect(head, filter_eps=2.0**-6, sort_vocab=s, tile=TILE) for s in (False, True))
    assert ordered.skipped > plain.skipped
    assert 0 < ordered.hidden_error < 1
    assert 0 < ordered.weight_error < 1


def test_dropped_mass_of_everything_and_of_nothing():
    head = random_head(16, 40, dim=4)
    for keep, mass in ((False, 1.0), (True, 0.0)):
        kept = torch.full((2, 3), keep)
        assert dropped_mass(head, kept, sort_vocab=True, tile=TILE) == pytest.approx(mass)


def test_targets_follow_the_head():
    head = random_head(2000, 8, dim=1, peakiness=1.0)
    assert isinstance(head, Head)
    found = torch.bincount(head.target, minlength=8) / 2000
    expected = (head.hidden @ head.weight.T + head.bias).softmax(-1).mean(0)
    # Three standard errors of a share of 2000 draws.
    assert (found - expected).abs().max() <= 3 * 0.5 / 2000**0.5


def test_memory_is_that_of_the_results_and_a_chunk():
    found = memory_of_losses(600, 2048, dim=8)
    assert found["stored"] >= 2 * 4 * 600 * 2048
    assert found["gradients"] < found["exact"] < found["stored"]
    assert found["gradients"] < found["filtered"] < found["stored"]


def test_training_learns_and_arms_of_one_seed_are_paired():
    language, options = make_language(64), {"steps": 60, "seed": 3, "tokens": 64, "tile": (8, 8), "rate": 0.03}
    exact = train_bigram(language, Arm(), **options)
    untrained = train_bigram(language, Arm(), **(options | {"steps": 0}))
    assert 0 < exact.excess < untrained.excess
    assert exact.skipped == [0.0] * 60
    harmless = train_bigram(language, Arm(1e-12), **options)
    assert harmless.excess == pytest.approx(exact.excess, rel=1e-3)
    both, hidden, weight = (train_bigram(language, Arm(0.1, *which), **options).excess for which in
                            ((True, True), (False, True), (True, False)))  # fmt: skip
    assert len({both, hidden, weight, exact.excess}) == 4
    assert train_bigram(language, Arm(0.1), **options).skipped[0] > 0
    neither = train_bigram(language, Arm(0.1, filter_weight=False, filter_hidden=False), **options)
    # Sorting changes the order of sums.
    assert neither.excess == pytest.approx(exact.excess, rel=1e-3)


def test_the_rate_is_the_better_one():
    language = make_language(32)
    assert tuned_rate(language, Arm(), [1e-6, 0.03], seeds=[7], steps=30, tokens=64, tile=(8, 8)) == 0.03


def test_a_language_samples_what_it_says():
    language = make_language(5)
    source = torch.Generator().manual_seed(0)
    token, following = language.sample(20000, source)
    found = torch.bincount(token * 5 + following, minlength=25) / 20000
    expected = (language.frequency[:, None] * language.following).flatten()
    # Four standard errors of a share of 20000 draws.
    assert (found - expected).abs().max() <= 4 * 0.5 / 20000**0.5
