"""The training loop: schedule, decay groups, pairing by seed, resume, failure, evaluation."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy import ToyNet, toy_data

from p2k.core.errors import P2KError
from p2k.experiments import loop
from p2k.experiments.loop import TrainConfig, make_optimizer, train

CONFIG = TrainConfig(epochs=3, batch_size=16, learning_rate=1e-2, label_smoothing=0.1, crop_padding=1, flip=True)


def run(model: torch.nn.Module, config: TrainConfig = CONFIG, *, seed: int = 0, **arguments) -> loop.TrainResult:
    return train(model, toy_data(), config, seed=seed, progress=False, **arguments)


def test_training_learns_and_reports_what_it_got_right() -> None:
    model = ToyNet()
    result = run(model, TrainConfig(epochs=40, batch_size=16, learning_rate=1e-2))
    assert result.losses.shape == (240,)
    assert result.losses[-6:].mean() < 0.3 * result.losses[:6].mean()
    assert result.test_accuracy > 0.8
    assert result.test_accuracy == result.test_correct.double().mean()
    data = toy_data()
    mean, std = data.channel_statistics()
    logits = model((data.test_images - mean.view(-1, 1, 1)) / std.view(-1, 1, 1))
    assert torch.equal(logits.argmax(1) == data.test_labels, result.test_correct)


def test_two_steps_equal_hand_written_adamw() -> None:
    """Decoupled decay on matrices only, warm-up, normalised data, in the order of the seed."""
    config = TrainConfig(epochs=1, batch_size=48, learning_rate=1e-2, weight_decay=0.1, warmup_epochs=0.5)
    model, expected = ToyNet().double(), ToyNet().double()
    result = run(model, config, seed=3)
    data, losses = toy_data(), []
    mean, std = data.channel_statistics()
    order = torch.randperm(96, generator=torch.Generator().manual_seed(3 * 1_000_003))
    first = {name: torch.zeros_like(p) for name, p in expected.named_parameters()}
    second = {name: torch.zeros_like(p) for name, p in expected.named_parameters()}
    for step, rate in enumerate([0.5e-2, 1e-2]):
        index = order[48 * step : 48 * step + 48]
        images = (data.train_images[index] - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        loss = torch.nn.functional.cross_entropy(expected(images), data.train_labels[index])
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, list(expected.parameters()))
        with torch.no_grad():
            for (name, p), g in zip(expected.named_parameters(), grads, strict=True):
                if p.ndim == 2:
                    p.mul_(1 - rate * 0.1)
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g * g
                m, v = first[name] / (1 - 0.9 ** (step + 1)), second[name] / (1 - 0.999 ** (step + 1))
                p.sub_(rate * m / (v.sqrt() + 1e-8))
    # Float64 throughout; Adam divides small gradients by their own size, which amplifies rounding.
    torch.testing.assert_close(result.losses, torch.tensor(losses, dtype=torch.float64), rtol=1e-12, atol=0)
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)


def test_schedule_warms_up_and_ends_near_zero() -> None:
    config = TrainConfig(epochs=10, warmup_epochs=2)
    factors = [config.rate_factor(step, 5) for step in range(50)]
    assert factors[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert factors[10] == 1
    assert factors[30] == pytest.approx(0.5)
    assert factors[49] < 0.01
    assert sorted(factors[10:], reverse=True) == factors[10:]


def test_only_matrices_decay() -> None:
    model = ToyNet()
    decayed, kept = make_optimizer(model, CONFIG).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {"embed.weight", "position", "mix.weight", "head.weight"}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_batches_depend_on_the_seed_and_not_on_the_model() -> None:
    seen: dict[str, list] = {"a": [], "b": [], "c": []}
    for key, width, seed in (("a", 0.0, 0), ("b", 0.5, 0), ("c", 0.0, 1)):
        model = ToyNet(dropout=width)
        model.register_forward_pre_hook(lambda _, args, key=key: seen[key].append(args[0].clone()))
        run(model, seed=seed)
    assert all(torch.equal(x, y) for x, y in zip(seen["a"], seen["b"], strict=True))
    assert not torch.equal(seen["a"][0], seen["c"][0])
    assert not torch.equal(seen["a"][0], seen["a"][6])


def test_dropout_is_seeded_and_the_callers_random_state_kept() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = run(ToyNet(dropout=0.5))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.losses, run(ToyNet(dropout=0.5)).losses)


@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path: Path, monkeypatch, stop: int) -> None:
    whole_model, model = ToyNet(dropout=0.3), ToyNet(dropout=0.3)
    whole = run(whole_model)
    epochs = []
    original = loop._train_epoch

    def interrupted(*args, epoch: int, **kwargs):
        epochs.append(epoch)
        if epoch == stop:
            raise KeyboardInterrupt
        return original(*args, epoch=epoch, **kwargs)

    monkeypatch.setattr(loop, "_train_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, out_dir=tmp_path)
    monkeypatch.setattr(loop, "_train_epoch", original)
    fresh = ToyNet(seed=9, dropout=0.3)
    resumed = run(fresh, out_dir=tmp_path)
    assert epochs == list(range(stop + 1))
    assert torch.equal(resumed.losses, whole.losses)
    assert torch.equal(resumed.test_correct, whole.test_correct)
    assert all(torch.equal(p, q) for p, q in zip(fresh.parameters(), whole_model.parameters(), strict=True))
    finished = run(ToyNet(seed=9, dropout=0.3), out_dir=tmp_path)
    assert torch.equal(finished.losses, whole.losses)
    assert torch.equal(finished.test_correct, whole.test_correct)


def test_resume_false_starts_over(tmp_path: Path) -> None:
    whole = run(ToyNet(), out_dir=tmp_path)
    again = run(ToyNet(), replace(CONFIG, learning_rate=1e-3), out_dir=tmp_path, resume=False)
    assert not torch.equal(whole.losses, again.losses)


@pytest.mark.parametrize("damage", ["cut", "text", "code", "settings", "seed"])
def test_a_checkpoint_that_does_not_belong_is_refused(tmp_path: Path, damage: str) -> None:
    run(ToyNet(), out_dir=tmp_path)
    path = tmp_path / "checkpoint.pt"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    if damage == "text":
        path.write_text("not a checkpoint")
    if damage == "code":
        torch.save({"fingerprint": Path}, path)
    config = replace(CONFIG, learning_rate=2e-2) if damage == "settings" else CONFIG
    with pytest.raises(
        P2KError, match="other settings" if damage in ("settings", "seed") else "not a readable"
    ) as caught:
        run(ToyNet(), config, seed=int(damage == "seed"), out_dir=tmp_path)
    assert "remove it" in str(caught.value)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path: Path) -> None:
    model = ToyNet()
    with torch.no_grad():
        model.gain.fill_(float("nan"))
    with pytest.raises(P2KError, match="became nan at step 0: lower learning_rate"):
        run(model, out_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"weight_decay": -1.0},
        {"warmup_epochs": 3},
        {"label_smoothing": 1.0},
        {"crop_padding": -1},
    ],
)
def test_settings_out_of_range_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(CONFIG, **change)


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match="at most the 96 images"):
        run(ToyNet(), replace(CONFIG, batch_size=97))


def test_the_progress_bar_leaves_nothing_behind(capfd) -> None:
    train(ToyNet(), toy_data(), CONFIG, seed=0, progress=True)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.split("\r")[-1].strip() == ""
