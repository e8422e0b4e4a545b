import pytest
import torch

from p2k.core.errors import DatasetMissing
from p2k.core.seeding import generator
from p2k.data.corpus import load_corpus, sample_windows


def test_bundled_text_is_english_and_its_parts_do_not_overlap():
    corpus = load_corpus()
    text = corpus.decode(corpus.train) + corpus.decode(corpus.val)
    assert len(text) > 40_000
    assert text.count(" the ") > 100
    assert 0.09 < len(corpus.val) / len(text) < 0.11
    assert corpus.vocab_size == len(set(text)) == int(max(corpus.train.max(), corpus.val.max())) + 1


def test_a_file_of_ones_own_comes_back(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("abcabcabcé", encoding="utf-8")
    corpus = load_corpus(path, val_share=0.3)
    assert (corpus.decode(corpus.train), corpus.decode(corpus.val), corpus.characters) == ("abcabca", "bcé", "abcé")


def test_windows_are_consecutive_reach_both_ends_and_repeat_with_their_seed():
    ids = torch.arange(12)
    windows = sample_windows(ids, count=400, length=4, source=generator(0))
    assert windows.shape == (400, 5)
    assert (windows.diff() == 1).all()
    assert (windows.min(), windows.max()) == (0, 11)
    assert torch.equal(windows, sample_windows(ids, count=400, length=4, source=generator(0)))


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"val_share must lie in \(0, 1\), got 1"):
        load_corpus(val_share=1)
    with pytest.raises(DatasetMissing, match="there is no text file"):
        load_corpus(tmp_path / "none.txt")
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(ValueError, match=r"short.txt is too short to split, got 0 and 1"):
        load_corpus(tmp_path / "short.txt")
    with pytest.raises(ValueError, match="longer than length = 4, got 4"):
        sample_windows(torch.arange(4), count=1, length=4, source=generator(0))
    with pytest.raises(ValueError, match="count must be > 0"):
        sample_windows(torch.arange(9), count=0, length=4, source=generator(0))
