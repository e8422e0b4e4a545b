"""Edges of cut_cross_entropy: any shape, buffers full of NaN, rows of infinities, and the gradient of log-sum-exp."""

import pytest
import torch
from cut_cross_entropy_cases import (
    ABSENT,
    BACKENDS,
    DEVICE,
    TILE,
    as_good_as_full,
    full,
    head,
    peaky,
    random,
    run,
    small_tiles,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2k.core.tolerance import relative_errors, tolerance
from p2k.ops.cut_cross_entropy import cut_cross_entropy, mutants

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
both = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _tiles(monkeypatch):
    small_tiles(monkeypatch)


@both
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    leading=st.lists(st.integers(0, 5), max_size=2),
    vocab=st.integers(1, 20),
    dim=st.integers(1, 12),
    softcap=st.sampled_from([None, 3.0]),
    absent=st.booleans(),
)
def test_any_shape(backend, leading, vocab, dim, softcap, absent):
    inputs, target = head(*leading, vocab=vocab, dim=dim)
    if absent:
        target.view(-1)[:1] = ABSENT
    as_good_as_full(inputs, target, backend=backend, softcap=softcap)


@both
@pytest.mark.parametrize("eps", [0.0, 0.05])
def test_every_element_of_a_new_buffer_is_written(backend, eps, monkeypatch):
    new_empty = torch.Tensor.new_empty

    def poisoned(*arguments, **options):
        made = new_empty(*arguments, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    inputs, target = head(9, vocab=26, dim=6)
    target[4] = ABSENT
    options = {"filter_eps": eps, "sort_vocab": True, "backend": backend}
    results = run(cut_cross_entropy, inputs, target, [random(9), random(9, seed=1)], **options)
    assert all(result.isfinite().all() for result in results)


@both
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_broken_token_breaks_itself_only(value, backend):
    inputs, target = head(7, vocab=18, dim=5)
    grads = [random(7), random(7, seed=1)]
    clean = run(cut_cross_entropy, inputs, target, grads, backend=backend)
    inputs[0][2] = value
    found = run(cut_cross_entropy, inputs, target, grads, backend=backend)
    others = torch.arange(7, device=DEVICE) != 2
    for x, y in zip(found[:3], clean[:3], strict=True):
        assert torch.equal(x[others], y[others])
    assert not found[0][2].isfinite()
    assert found[2][2].isnan().all()


@both
def test_infinite_logits_as_in_torch(backend):
    inputs, target = head(4, vocab=11, dim=3)
    zero = [torch.zeros(4, device=DEVICE)] * 2
    for places, value in (([3], torch.inf), (range(11), -torch.inf), (target[:1].tolist(), -torch.inf)):
        bias = inputs[2].clone()
        bias[list(places)] = value
        case = (*inputs[:2], bias)
        found = run(cut_cross_entropy, case, target, zero, backend=backend)[:2]
        for x, y in zip(found, run(full, case, target, zero)[:2], strict=True):
            assert torch.equal(x.isfinite(), y.isfinite())
    # Only a target outside the vocabulary that is left has an infinite loss.
    assert found[0][0] == torch.inf


def certain(eps, *, lse):
    """A head that is sure of every target, its filtered results and the definition applied to the whole matrix."""
    inputs, target = head(8, vocab=24, dim=24)
    weight = torch.eye(24, device=DEVICE)
    inputs = (40 * weight[target], weight, 0 * inputs[2])
    grads = torch.stack((torch.ones(8), torch.full((8,), lse))).to(DEVICE).double()
    truth = mutants.filtered_truth(inputs, target, grads, None, eps, torch.arange(24), TILE, ignore_index=ABSENT)
    return inputs, target, grads, truth


@both
def test_the_gradient_of_log_sum_exp_survives_a_certain_target(backend):
    """There d is 0 and the softmax 1: what a penalty on log-sum-exp needs must not be skipped with the loss's."""
    for lse in (0.0, 0.5):
        inputs, target, grads, truth = certain(2.0**-4, lse=lse)
        found = run(cut_cross_entropy, inputs, target, list(grads.float()), backend=backend, filter_eps=2.0**-4)
        assert bool(found[2].any()) == (lse > 0)
        for x, y in zip(found[2:], truth[:3], strict=True):
            assert max(relative_errors(x, y)) <= tolerance(torch.float32, dot=True)


@both
def test_filtered_gradients_of_both_results_are_the_definition(backend):
    inputs, target = peaky(11, 30, 6, bias=True)
    grads = torch.stack((random(11, seed=3), random(11, seed=4)))
    grads[1, ::2] = 0.0
    truth = mutants.filtered_truth(
        inputs, target, grads.double(), None, 2.0**-4, torch.arange(30), TILE, ignore_index=ABSENT
    )
    found = run(cut_cross_entropy, inputs, target, list(grads), backend=backend, filter_eps=2.0**-4)
    for x, y in zip(found[2:], truth[:3], strict=True):
        assert max(relative_errors(x, y)) <= 4 * tolerance(torch.float32, dot=True)
