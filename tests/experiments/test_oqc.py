"""The chapter's comparisons in miniature, their pairing and records, and the command line."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy import toy_data

from p2k.data.digits import load_digits
from p2k.experiments import oqc
from p2k.experiments.comparison import Sweep, build_paired, compare_arms
from p2k.experiments.loop import TrainConfig
from p2k.experiments.oqc import compare_on_digits, main, paper_protocol, squares_comparison
from p2k.experiments.records import read_records, write_record
from p2k.models.vit import ViTConfig, match_vit

TINY = ViTConfig(4, 1, 2, 3, dim=16, depth=2, heads=2, hidden=64, rank=4)
CONFIG = TrainConfig(epochs=2, batch_size=16, learning_rate=3e-3)


def test_digits_arms_are_matched_paired_and_recorded(tmp_path: Path) -> None:
    arms = ("glu", "glu+oqc")
    results = compare_on_digits(arms, seeds=(0, 1), epochs=2, rates=(1e-3, 3e-3), progress=False)
    assert [result.arm for result in results] == list(arms)
    host, projected = results
    assert abs(projected.match.parameters / host.match.parameters - 1) < 0.005
    assert host.config.learning_rate in (1e-3, 3e-3)
    difference = projected.minus(host)
    assert difference.mean == pytest.approx(sum(projected.test_accuracy) / 2 - sum(host.test_accuracy) / 2)
    assert projected.test_correct.shape == (2, 600)
    record = projected.record("digits", profile="cpu", model=oqc.DIGITS_MODEL, data=load_digits())
    write_record(tmp_path, record)
    assert read_records(tmp_path) == [record]
    assert record.values == projected.test_accuracy
    assert record.config["training"]["learning_rate"] == projected.config.learning_rate


def test_squares_cost_one_scalar_per_layer_and_start_alike() -> None:
    results = squares_comparison(seeds=(0, 1), epochs=2, train_images=256, progress=False)
    sizes = [result.match.parameters for result in results]
    assert [size - sizes[0] for size in sizes] == [0, *[oqc.QUAD_MODEL.depth] * 3]
    plain = build_paired(oqc.QUAD_MODEL, "gelu", hidden=32, seed=3).state_dict()
    squares = build_paired(oqc.QUAD_MODEL, "gelu+squares-oqc", hidden=32, seed=3).state_dict()
    assert all(
        torch.equal(tensor, squares[name.replace("feed_forward.", "feed_forward.host.")])
        for name, tensor in plain.items()
        if ".feed_forward." in name
    )


def test_a_seed_fixes_the_shared_weights_of_all_arms() -> None:
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = build_paired(TINY, "glu", hidden=32, seed=0).state_dict()
    second = build_paired(TINY, "afbo+oqc-lr", hidden=64, seed=0).state_dict()
    other = build_paired(TINY, "glu", hidden=32, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    shared = [name for name in first if ".feed_forward." not in name]
    assert len(shared) > 10
    assert all(torch.equal(first[name], second[name]) for name in shared)
    assert not torch.equal(first["embed.weight"], other["embed.weight"])


def test_the_sweep_chooses_by_validation_and_never_by_test() -> None:
    data = toy_data()
    spoiled = replace(data, test_labels=torch.zeros_like(data.test_labels), checksum="")
    sweep = Sweep((1e-5, 1e-2), (50,))
    arguments = {"model": TINY, "config": replace(CONFIG, epochs=6), "seeds": (0,), "sweep": sweep, "progress": False}
    matches = match_vit(TINY, ["gelu"], budget_of="gelu")
    chosen = [compare_arms(matches, d, **arguments)[0].config.learning_rate for d in (data, spoiled)]
    assert chosen == [1e-2, 1e-2]


@pytest.mark.parametrize(
    ("seeds", "sweep"), [((0, 1), Sweep((1e-3,), (1,))), ((), Sweep((1e-3,), (1,))), ((0,), Sweep((), (1,)))]
)
def test_a_sweep_on_reported_seeds_is_refused(seeds: tuple, sweep: Sweep) -> None:
    with pytest.raises(ValueError, match="seeds of their own"):
        compare_arms({}, toy_data(), model=TINY, config=CONFIG, seeds=seeds, sweep=sweep)


def test_arms_with_other_seeds_cannot_be_paired() -> None:
    results = squares_comparison(("gelu",), seeds=(0, 1), epochs=2, train_images=128, progress=False)
    with pytest.raises(ValueError, match="seeds must agree"):
        results[0].minus(replace(results[0], seeds=(0, 2)))


def test_the_protocol_resumes_and_leaves_records(tmp_path: Path, monkeypatch) -> None:
    # Wide, so that a hidden width divisible by eight meets the budget.
    wide = replace(TINY, hidden=1024, depth=1)
    arguments = {"model": wide, "config": CONFIG, "arms": ("afbo", "afbo+oqc-lr"), "seeds": (0, 1), "device": "cpu"}
    monkeypatch.setattr(oqc, "GPU_RATES", (1e-3, 3e-3))
    first = paper_protocol(toy_data(), tmp_path, **arguments)
    records = read_records(tmp_path)
    assert {record.arm for record in records} == {"afbo", "afbo+oqc-lr"}
    assert all(result.match.hidden % 8 == 0 for result in first)
    assert len({result.config.learning_rate for result in first}) == 1
    again = paper_protocol(toy_data(), tmp_path, **arguments)
    assert [result.test_accuracy for result in again] == [result.test_accuracy for result in first]
    assert all(
        torch.equal(a.losses, b.losses)
        for x, y in zip(first, again, strict=True)
        for a, b in zip(x.runs, y.runs, strict=True)
    )


def test_the_command_runs_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "tiny.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch; torch.set_num_threads(1)\n"
        "from toy import toy_data\nfrom test_oqc import TINY\nfrom p2k.experiments import oqc\n"
        "oqc.load_gpu_data = lambda name, root: (toy_data(), TINY)\n"
        "oqc.GPU_ARMS, oqc.GPU_RATES = ('glu',), (1e-3, 3e-3)\n"
        "oqc.paper_protocol.__kwdefaults__['arms'] = oqc.GPU_ARMS\n"
        "from dataclasses import replace\noqc.GPU_CONFIG = replace(oqc.GPU_CONFIG, epochs=2, warmup_epochs=1)\n"
        "sys.exit(oqc.main())\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    options = ["--profile", "gpu", "--device", "cpu", "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    options += ["--epochs", "2", "--batch-size", "16", "--seeds", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(read_records(tmp_path / "out")) == 1
    # Only the main process prints.
    assert done.stdout.count("glu") == 1


def test_a_missing_data_set_is_one_sentence_and_status_one(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("no route")))
    status = main(["--profile", "gpu", "--device", "cpu", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert status == 1
    assert "cifar-100-python.tar.gz" in captured.err
    assert "Traceback" not in captured.err
    assert not (tmp_path / "out").exists()


def test_an_unknown_profile_is_refused(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--profile", "huge", "--data", "x", "--out", "y"])
    assert caught.value.code == 2
    assert "huge" in capsys.readouterr().err
