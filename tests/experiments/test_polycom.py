"""The language-model comparison: equal budgets, paired seeds, and stacked training that trains each model alone."""

import pytest
import torch

from p2k.data.corpus import split_documents
from p2k.experiments import polycom
from p2k.experiments.polycom import TextConfig, build_paired, compare_activations, match_arms, text_loss, train_text
from p2k.nn.polycom import FEED_FORWARDS

CORPUS = split_documents("toy", ["the quick brown fox jumps over the lazy dog. " * 12], 0.3)
SMALL = TextConfig(dim=8, depth=1, heads=2, context=6, batch=3, steps=4)


def models(arm, seeds, hidden=10):
    return [build_paired(SMALL, CORPUS.vocab_size, arm, hidden=hidden, seed=seed) for seed in seeds]


def test_all_arms_have_the_same_parameters():
    matches = match_arms(TextConfig(), 92, list(FEED_FORWARDS))
    assert all(abs(match.gap) <= 0.005 for match in matches.values())
    assert matches["gelu"].hidden == 128
    assert matches["swiglu"].hidden == 85


def test_arms_of_one_seed_share_all_but_the_feed_forward():
    first, second = models("polynorm", [3])[0], models("swiglu", [3])[0]
    other = dict(second.named_parameters())
    for name, p in first.named_parameters():
        if ".feed_forward." not in name:
            assert torch.equal(p, other[name])


def test_preactivations_start_at_unit_size():
    model = polycom.whole_model(TextConfig(), 92, "polyrelu", 128)
    x = torch.nn.functional.layer_norm(torch.randn(200, 32), (32,))
    assert 0.8 < model.blocks[0].feed_forward.up(x).std() < 1.2


@pytest.mark.parametrize("arm", ["polynorm", "polyrelu"])
def test_stacked_training_is_training_alone(arm):
    together, alone = models(arm, (0, 1)), models(arm, (0, 1))
    curves = train_text(together, CORPUS.train, SMALL, seeds=(0, 1), rates=(1e-2, 1e-3), progress=False)
    for i, (model, rate) in enumerate(zip(alone, (1e-2, 1e-3), strict=True)):
        curve = train_text([model], CORPUS.train, SMALL, seeds=[i], rates=[rate], progress=False)
        assert torch.allclose(curve[0], curves[i], atol=1e-4)  # float32 sums in another order, through four steps
        for p, q in zip(model.parameters(), together[i].parameters(), strict=True):
            # AdamW turns a rounding difference of a tiny gradient into one of the size of a step.
            assert torch.allclose(p, q, atol=2e-3)


def test_held_out_windows_do_not_overlap_in_targets():
    choices, report = polycom.held_out_windows(torch.arange(100), 6)
    targets = [set(part[:, 1:].flatten().tolist()) for part in (choices, report)]
    assert not targets[0] & targets[1]
    assert report.shape[1] == 7


def test_rates_warm_up_and_fall_to_zero():
    config = TextConfig(steps=100)
    factors = [config.rate_factor(step) for step in range(100)]
    assert factors[9] == factors[10] == 1.0
    assert factors[0] == 0.1
    assert factors[-1] < 1e-3


def test_comparison_is_paired_and_repeatable():
    options = {"arms": ["gelu", "polynorm"], "seeds": (0, 1), "rates": (1e-3, 1e-2), "tuning_seeds": (100,)}
    first, second = (compare_activations(CORPUS, SMALL, progress=False, **options) for _ in range(2))
    assert first["polynorm"].losses == second["polynorm"].losses
    difference = first["polynorm"].minus(first["gelu"])
    assert difference.n == 2
    assert first["gelu"].config.learning_rate in options["rates"]
    _, report = polycom.held_out_windows(CORPUS.val, SMALL.context)
    assert text_loss(first["gelu"].models[0], report) == pytest.approx(first["gelu"].losses[0])
    with pytest.raises(ValueError, match="seeds must agree"):
        first["gelu"].minus(polycom.TextResult("x", None, SMALL, (5, 6), (1.0, 2.0), None, ()))


def test_bad_input():
    with pytest.raises(ValueError, match="one seed and one rate per model"):
        train_text(models("gelu", [0]), CORPUS.train, SMALL, seeds=[0, 1])
    options = {"arms": ["gelu"], "rates": (1e-3,), "progress": False}
    with pytest.raises(ValueError, match="other tuning seeds"):
        compare_activations(CORPUS, SMALL, seeds=(0,), tuning_seeds=(0,), **options)
    with pytest.raises(polycom.P2KError, match="lower learning_rate"):
        train_text(models("relu2", [0]), CORPUS.train, SMALL, seeds=[0], rates=[1e30], progress=False)
