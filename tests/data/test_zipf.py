import pytest
import torch

from p2k.core.seeding import generator
from p2k.core.tolerance import tolerance
from p2k.data.zipf import make_zipf_language


def test_probabilities_sum_to_one_and_repeat_with_the_seed():
    language, again = (make_zipf_language(3, words=60, classes=7) for _ in range(2))
    contexts = torch.randint(60, (5, 4, 2), generator=generator(0))
    p = language.probabilities(contexts)
    assert p.shape == (5, 4, 60)
    torch.testing.assert_close(p.sum(-1), torch.ones(5, 4, dtype=torch.float64), rtol=tolerance(torch.float64), atol=0)
    assert torch.equal(p, again.probabilities(contexts))
    assert not torch.equal(p, make_zipf_language(4, words=60, classes=7).probabilities(contexts))


def test_both_words_count_with_the_stated_weight():
    u, v = torch.tensor([5, 9])
    parts = [make_zipf_language(0, words=60, classes=7, mix=mix).probabilities(torch.stack([u, v])) for mix in (0, 1)]
    mixed = make_zipf_language(0, words=60, classes=7, mix=0.3).probabilities(torch.stack([u, v]))
    torch.testing.assert_close(mixed, 0.7 * parts[0] + 0.3 * parts[1], rtol=tolerance(torch.float64), atol=0)
    assert not torch.equal(*parts)


def test_shares_in_a_class_follow_the_power_law():
    language = make_zipf_language(0, words=50, classes=5, exponent=1.5)
    for number in range(5):
        members = (language.word_class == number).nonzero()[:, 0]
        share = language.emission[members]
        torch.testing.assert_close(share.sum().item(), 1.0, rtol=tolerance(torch.float64), atol=0)
        ratio = ((members + 1) / (members[0] + 1)) ** -1.5
        torch.testing.assert_close(share / share[0], ratio.double(), rtol=tolerance(torch.float32), atol=0)


def test_samples_follow_the_probabilities():
    language = make_zipf_language(1, words=12, classes=3, spread=0.5)
    texts = language.sample(200_000, 3, generator(0))
    chosen = texts[(texts[:, 0] == 4) & (texts[:, 1] == 7), 2]
    expected = language.probabilities(torch.tensor([4, 7])) * len(chosen)
    counted = torch.bincount(chosen, minlength=12)
    # Pearson's statistic of 12 cells: above 31 once in a thousand seeds.
    assert ((counted - expected).square() / expected.clamp(min=1e-9)).sum() < 31
    assert len(chosen) > 1000


def test_one_class_is_a_unigram_and_short_texts_are_cut():
    language = make_zipf_language(0, words=4, classes=1)
    torch.testing.assert_close(language.probabilities(torch.tensor([0, 3])), language.emission)
    assert language.sample(3, 1, generator(0)).shape == (3, 1)
    assert language.words == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"words": 3, "classes": 4}, "words must be >="),
        ({"classes": 0}, "classes must be > 0"),
        ({"exponent": 0.0}, "exponent must be > 0"),
        ({"spread": -1.0}, "spread must be > 0"),
        ({"mix": 1.5}, "mix must lie"),
    ],
)
def test_bad_sizes_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        make_zipf_language(**options)
