"""Two gloo processes give the loss curve and the weights of one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import ToyNet, toy_data

from p2k.core.errors import P2KError
from p2k.experiments.distributed import World, current_world, process_group
from p2k.experiments.loop import TrainConfig, train

CONFIG = TrainConfig(epochs=2, batch_size=16, learning_rate=1e-2, crop_padding=1, flip=True)
WORKER = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {here!r})
from toy import ToyNet, toy_data
from test_distributed import CONFIG
from p2k.experiments.distributed import process_group
from p2k.experiments.loop import train
torch.set_num_threads(1)
out = Path({out!r})
with process_group(torch.device("cpu")) as (world, device):
    model = ToyNet().double()
    result = train(model, toy_data(), CONFIG, device=device, seed=2, out_dir=out, progress=True)
    torch.save([result.losses, model.state_dict(), result.test_correct], out / f"rank{{world.rank}}.pt")
"""


def launch(out: Path) -> str:
    """Run the worker under torchrun with two processes and return what it printed."""
    script = out / "worker.py"
    script.write_text(WORKER.format(here=str(Path(__file__).parent), out=str(out)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_two_processes_give_the_losses_and_weights_of_one(tmp_path: Path) -> None:
    noise = launch(tmp_path)
    model = ToyNet().double()
    alone = train(model, toy_data(), CONFIG, seed=2, progress=False)
    for rank in range(2):
        losses, weights, correct = torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)
        # Float64: two means of 8 against one of 16 differ by rounding, which Adam amplifies for small gradients.
        torch.testing.assert_close(losses, alone.losses, rtol=1e-10, atol=0)
        for name, p in model.state_dict().items():
            torch.testing.assert_close(weights[name], p, rtol=0, atol=1e-9)
        assert torch.equal(correct, alone.test_correct)
    assert noise.count("2/2") <= 1
    # Both processes find the one checkpoint and have nothing left to train.
    assert train(ToyNet().double(), toy_data(), CONFIG, seed=2, out_dir=tmp_path, progress=False).losses.shape == (12,)


def test_shards_deal_out_the_whole_batch() -> None:
    batch = torch.arange(12)
    shards = [World(rank, 3).shard(batch) for rank in range(3)]
    assert torch.cat(shards).sort().values.tolist() == batch.tolist()
    assert {len(shard) for shard in shards} == {4}
    with pytest.raises(ValueError, match="12 does not divide among 5"):
        World(0, 5).shard(batch)


def test_without_torchrun_there_is_one_process(monkeypatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with process_group(torch.device("cpu")) as (world, device):
        assert world == World() == current_world()
        assert device == torch.device("cpu")
        assert world.is_main


def test_more_processes_than_gpus_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(P2KError, match="nproc-per-node"), process_group(torch.device("cuda")):
        raise AssertionError("unreachable")
