"""The paper's own task on an untrained two-layer BERT and invented sentences, without a network."""

import pytest
import torch
import transformers

from p2k.core import checks
from p2k.core.errors import DatasetMissing, MissingDependency
from p2k.core.seeding import generator
from p2k.data.sentiment import Sentences, load_sentiment, without_leaks
from p2k.experiments import inflection_text as text
from p2k.experiments.records import read_records

CPU = torch.device("cpu")
CONFIG = text.TextConfig(under=1, over=2, target_epochs=1, batch_size=8, rank=2)


def tiny(config):
    settings = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
    bert = transformers.BertConfig(**settings, intermediate_size=16, num_labels=2)
    return transformers.BertForSequenceClassification._from_config(bert, attn_implementation="sdpa")


def sentences(count, seed=0):
    ids = torch.randint(1, 20, (count, 7), generator=generator(seed))
    mask = (torch.arange(7) < torch.randint(3, 8, (count, 1), generator=generator(seed + 1))).long()
    return Sentences(ids * mask, mask, (ids[:, 0] > 10).long())


@pytest.fixture(scope="module")
def runs():
    parts = [sentences(n, seed) for seed, n in enumerate((24, 16, 16, 16))]
    return text.run_regime(1, parts, config=CONFIG, seeds=range(2), device=CPU, load=tiny)


def test_every_arm_reports_every_seed_and_its_parameters(runs):
    assert list(runs) == list(text.ARMS)
    for run in runs.values():
        assert len(run.values) == 2
        assert run.rate in text.RATES
    head = runs["head only"].parameters
    adapters = {arm: runs[arm].parameters - head for arm in text.ARMS[1:4]}
    # Rank 2 on three square maps of width 16.
    assert adapters["LoRA, all"] == 4 * 3 * 2 * 32
    layer = sum(p.numel() for p in tiny(CONFIG).bert.encoder.layer[0].parameters())
    assert runs["top two layers"].parameters == head + 2 * layer
    assert runs["full"].parameters == sum(p.numel() for p in tiny(CONFIG).parameters())
    assert adapters["LoRA, inflection"] == adapters["LoRA, random"] < adapters["LoRA, all"]


def test_training_lowers_the_loss_and_cuts_padding():
    torch.manual_seed(0)
    model, data = tiny(CONFIG), sentences(32)
    (ids, mask), _ = data.take(torch.arange(4), CPU)
    assert ids.shape[1] == data.mask[:4].sum(1).max()
    before = torch.nn.functional.cross_entropy(text._logits(model.eval(), (data.ids, data.mask)), data.labels).item()
    text.fit(model, data, epochs=20, rate=3e-3, config=CONFIG, seed=0, device=CPU)
    after = torch.nn.functional.cross_entropy(text._logits(model.eval(), (data.ids, data.mask)), data.labels).item()
    assert after < 0.5 * before
    assert text.accuracy(model, data, config=CONFIG, device=CPU) > 90


def test_target_test_sentences_leave_the_source():
    source = ["A fine film .", "fine film", "Dull.", "a fine filmic thing"]
    kept, labels = without_leaks(source, [1, 1, 0, 1], ["a fine film", "other words"])
    assert kept == ["Dull.", "a fine filmic thing"]
    assert labels == [0, 1]


def test_missing_packages_and_data_say_what_to_do(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(DatasetMissing, match="pass --model FOLDER"):
        text.load_model(text.TextConfig(model=str(tmp_path / "absent")))

    def absent(module):
        raise ImportError(module)

    monkeypatch.setattr(checks.importlib, "import_module", absent)
    with pytest.raises(MissingDependency, match=r"pip install 'p2k\[text\]'"):
        load_sentiment("absent")
    assert text.main(["--out", str(tmp_path), "--device", "cpu"]) == 1
    assert "p2k[text]" in capsys.readouterr().err


def test_the_command_leaves_records(monkeypatch, tmp_path):
    run = text.ArmRun([90.0, 91.0], 1e-4, 123)
    monkeypatch.setattr(text, "load_sentiment", lambda model, length: ())
    monkeypatch.setattr(text, "run_regime", lambda *args, **kwargs: dict.fromkeys(text.ARMS, run))
    assert text.main(["--out", str(tmp_path), "--device", "cpu", "--seeds", "2"]) == 0
    records = read_records(tmp_path)
    assert len(records) == 2 * len(text.ARMS)
    assert {record.experiment for record in records} == {"text-under", "text-over"}
    assert all(record.values == (90.0, 91.0) and record.parameters == 123 for record in records)
