"""Extrapolation on text: the same characters at every length, paired seeds, and records that a page can read."""

import pytest
import torch

from p2k.data.corpus import split_documents
from p2k.experiments import softplus_attention as study
from p2k.experiments import softplus_attention_text as text
from p2k.experiments.records import read_records

CORPUS = split_documents("toy", ["the quick brown fox jumps over the lazy dog. " * 12], 0.3)
SMALL = text.ExtrapolationConfig(length=8, factors=(1, 2, 4), rates=(3e-3, 1e-2), dim=8, batch=2, steps=4)


def test_every_length_scores_the_same_characters():
    blocks = torch.arange(2 * 33).view(2, 33)
    seen = []
    original = text.text_loss
    try:
        text.text_loss = lambda model, windows: seen.append(windows[:, 1:].flatten().sort().values) or 0.0
        text.losses_by_length(None, blocks, (8, 16, 32))
    finally:
        text.text_loss = original
    assert all(torch.equal(found, seen[0]) for found in seen)
    assert len(seen[0]) == 64
    with pytest.raises(ValueError, match="lengths must divide 32"):
        text.losses_by_length(None, blocks, (5,))


def test_arms_are_paired_and_swaps_reuse_the_weights():
    options = {"seeds": (0, 1), "tuning_seeds": (9,)}
    first, *swapped = text.extrapolate("LSSA", CORPUS, SMALL, **options)
    assert [x.arm for x in swapped] == ["LSSA, tested as LSSAR, p = 3", "LSSA, tested as LSSAR, p = 15"]
    assert list(first.loss) == [8, 16, 32]
    assert first.loss[8] != swapped[1].loss[8]
    (again, *_) = text.extrapolate("LSSA", CORPUS, SMALL, **options)
    assert first.loss == again.loss
    (control,) = text.extrapolate("softmax, log N", CORPUS, SMALL, **options)
    assert first.minus(control, 32, metric="loss").n == 2
    with pytest.raises(ValueError, match="arm must be one of"):
        text.extrapolate("none", CORPUS, SMALL, **options)


def test_models_of_one_seed_start_alike_and_no_two_matrices_share_numbers():
    first, second = (study.build_model(SMALL.model(11, name), 3) for name in ("sdpa", "softplus"))
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))
    heads = [p.detach().flatten()[:16] for p in first.parameters() if p.ndim == 2]
    directions = torch.stack([x / x.norm() for x in heads])
    assert (directions @ directions.mT - torch.eye(len(heads))).abs().max() < 0.99


def test_the_program_leaves_one_record_per_arm(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "ARMS", {"softmax": "sdpa"})
    text.main(["--out", str(tmp_path), "--scale", "0", "--seeds", "2"])
    records = {record.experiment: record for record in read_records(tmp_path)}
    assert set(records) == {"text", "recall"}
    assert set(records["text"].config["by_length"]) == {"64", "128", "256", "512", "1024"}
    # The record's own values are those of the longest test.
    assert records["text"].values == pytest.approx(records["text"].config["by_length"]["1024"], rel=1e-4)
    assert records["recall"].metric == "accuracy"
    assert records["text"].seeds == (100, 101)
