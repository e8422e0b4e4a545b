"""Stacked replicas are independent networks, and records hold what was measured."""

import pytest
import torch

from p2k.experiments.records import read_records
from p2k.experiments.stablemax import LOSSES, Arm, Replicas, Task, main, train_arm

TASK = Task(modulus=7, train_fraction=0.5, hidden=(8, 6), steps=6, every=3)


@pytest.mark.parametrize(
    "arm", [Arm(), Arm("stablemax", rate=0.03), Arm(orthogonal=True), Arm("rest", weight_decay=1.0)]
)
def test_a_seed_trains_alike_alone_and_in_company(arm):
    together = train_arm(arm, TASK, seeds=(0, 5), progress=False)
    alone = train_arm(arm, TASK, seeds=(5,), progress=False)
    assert together.steps.tolist() == [0, 3, 6]
    # Products of another batch size may round in another order.
    torch.testing.assert_close(together.norm[1:], alone.norm, rtol=1e-4, atol=0)
    torch.testing.assert_close(together.alignment[1:], alone.alignment, rtol=0, atol=1e-3)  # as above
    assert together.test.shape == (2, 3)


def test_replicas_are_bias_free_relu_networks():
    nets = Replicas(TASK, (3,))
    x, _ = nets.parts["train"]
    first, second, third = nets.weights
    expected = (x[0] @ first).relu() @ second
    torch.testing.assert_close(nets.logits("train")[0], expected.relu() @ third)
    assert nets.accuracy("test").shape == (1,)


def test_the_half_precision_loss_collapses_and_says_so():
    logits, labels = torch.tensor([[[9.0, 0.0, 0.0]]]), torch.tensor([[0]])
    zero = {name: (loss(logits, labels) == 0).item() for name, loss in LOSSES.items()}
    assert zero == {"softmax16": True, "softmax32": False, "softmax64": False, "rest": False, "stablemax": False}


def test_records_of_a_tiny_run(tmp_path):
    main(["--out", str(tmp_path), "--steps", "2", "--seeds", "2"])
    records = {record.arm: record for record in read_records(tmp_path)}
    assert set(records) == {"softmax-float32", "softmax-float64", "softmax-rest", "stablemax"}
    found = records["stablemax"]
    assert (found.slug, found.profile, found.seeds, found.parameters) == ("stablemax", "cpu", (0, 1), 28288)
    assert len(found.config["curves"]["test"]) == 2
    assert found.config["steps"] == [0, 2]
