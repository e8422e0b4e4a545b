"""The gpu profiles of chapters that train a policy: as large as promised, and their path runs, shrunken, on a CPU."""

from pathlib import Path

import pytest
import torch

from p2k.book.catalogue import read_yaml
from p2k.book.notebook import code_cells, read_notebook
from p2k.data.arithmetic import VOCAB_SIZE, make_arithmetic
from p2k.experiments.records import read_records
from p2k.experiments.rlvr import RLVRConfig
from p2k.experiments.rlvr_arms import ARMS
from p2k.experiments.rlvr_sweep import compare_arms, tune
from p2k.models import gpt

ROOT = Path(__file__).parents[2]
# One arm of each kind of loss: per token, per sequence, per group, and with resampling.
ARM_NAMES = {"adpo": ("adpo", "dpo"), "apo": ("grpo", "apo-guarded-group"), "gopo": ("gspo", "gopo")}
ARM_NAMES["policy-map"] = ("grpo", "dapo")
EVERY_CHAPTER = pytest.mark.parametrize("slug", sorted(ARM_NAMES))


def declared(slug):
    return read_yaml(ROOT / "book" / "profiles.yml")[slug]["gpu"]


@EVERY_CHAPTER
def test_a_gpu_profile_has_ten_million_parameters_and_a_thousand_held_out_problems(slug):
    profile = declared(slug)
    data = make_arithmetic(profile["task"])
    config = gpt.gpt_preset(profile["preset"], vocab_size=VOCAB_SIZE, context=data.context)
    with torch.device("meta"):
        size = sum(tensor.numel() for tensor in gpt.GPT(config).parameters())
    assert 10_000_000 <= size <= 50_000_000
    assert len(data.held_out) >= 1000
    assert profile.get("seeds", profile.get("reported_seeds")) >= 5
    assert len(profile["learning_rates"]) >= 3


@EVERY_CHAPTER
def test_the_path_of_a_gpu_profile_runs_and_leaves_records(slug, monkeypatch, tmp_path):
    profile = declared(slug)
    monkeypatch.setitem(gpt.GPT_PRESETS, profile["preset"], gpt.GPT_PRESETS["cpu-tiny"])
    data = make_arithmetic(profile["task"])
    config = RLVRConfig(preset=profile["preset"], warm_steps=2, rollouts=1, prompts=4, num_generations=4)
    arms, rates = [ARMS[name] for name in ARM_NAMES[slug]], profile["learning_rates"][:1]
    tuning = tune(arms, data, config, learning_rates=rates, seeds=[9], metric="held_out_accuracy")
    found = compare_arms(arms, data, config, seeds=[0, 1], tuning=tuning, tuning_seeds=[9])
    (cell,) = (cell.source for cell in code_cells(read_notebook(ROOT, slug)) if "write_record(" in cell.source)
    names = {"profile": "gpu", "device": "cpu", "output_dir": str(tmp_path), "task": profile["task"]}
    names |= {"found": {1: found} if slug == "gopo" else found, "passes": [1], "measures": ["pass@1"]}
    exec("from p2k.experiments.rlvr_sweep import to_records\n" + cell, names)
    records = {(record.arm, record.metric): record for record in read_records(tmp_path)}
    for arm in ARM_NAMES[slug]:
        assert list(records[arm, "held_out_accuracy"].values) == found.values("held_out_accuracy")[arm]
        assert {record.profile for record in records.values()} == {"gpu"}
