"""Numbers of cut_cross_entropy: exact without the filter, and with it exactly what the definition says."""

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

from p2k.core.tolerance import relative_errors, tolerance
from p2k.ops.cut_cross_entropy import cut_cross_entropy, default_filter_eps, filtered_gradients, mutants, tiles

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
both = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _tiles(monkeypatch):
    small_tiles(monkeypatch)


@pytest.mark.parametrize(
    ("tokens", "vocab", "dim", "softcap", "bias"),
    [(1, 1, 1, None, False), (9, 26, 11, None, True), (4, 8, 16, 3.0, False), (5, 17, 3, 2.0, True)],
)
@both
def test_exact_without_a_filter(tokens, vocab, dim, softcap, bias, backend):
    inputs, target = head(tokens, vocab=vocab, dim=dim, bias=bias)
    as_good_as_full(inputs, target, backend=backend, softcap=softcap)


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(dtype, backend):
    inputs, target = peaky(6, 18, 9, dtype=dtype, bias=True)
    as_good_as_full(inputs, target, backend=backend)


@pytest.mark.parametrize(("tokens", "vocab", "dim"), [(256, 512, 128), (252, 507, 128), (252, 507, 123)])
def test_peaky_rows_at_the_sizes_of_a_head(tokens, vocab, dim, monkeypatch):
    monkeypatch.setattr(tiles, "TILE", {4: (128, 64)})
    inputs, target = peaky(tokens, vocab, dim)
    as_good_as_full(inputs, target, backend="torch")


@both
def test_leading_dimensions_strides_and_absent_tokens(backend):
    (hidden, weight, bias), target = head(3, 5, vocab=12, dim=6)
    hidden = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    weight = weight.repeat_interleave(2, 0)[::2].T.contiguous().T
    target[0, 1], target[2, 2] = ABSENT, ABSENT
    as_good_as_full((hidden, weight, bias), target, backend=backend)
    loss = cut_cross_entropy(hidden, weight, target, bias=bias, backend=backend).loss
    assert loss[0, 1] == 0
    assert loss[2, 2] == 0


@both
def test_absent_tokens_may_hold_anything(backend):
    inputs, target = head(7, vocab=12, dim=4)
    target[[1, 6]] = ABSENT
    grads = [random(7, seed=9), random(7, seed=10)]
    clean = run(cut_cross_entropy, inputs, target, grads, backend=backend, filter_eps=0.05, sort_vocab=True)
    inputs[0][[1, 6]], grads[0][1] = torch.nan, torch.nan
    found = run(cut_cross_entropy, inputs, target, grads, backend=backend, filter_eps=0.05, sort_vocab=True)
    assert all(map(torch.equal, found, clean))
    assert not found[2][[1, 6]].any()


@both
def test_only_absent_tokens_and_no_tokens(backend):
    for tokens in (0, 3):
        inputs, target = head(tokens, vocab=5, dim=4)
        target.fill_(ABSENT)
        grads = [random(tokens), random(tokens)]
        found = run(cut_cross_entropy, inputs, target, grads, backend=backend)
        assert all(not x.any() for x in found)


@both
@pytest.mark.parametrize("offset", [1e4, -3e4, 1e30])
def test_a_huge_common_offset_changes_nothing(offset, backend):
    inputs, target = head(5, vocab=12, dim=4, bias=False)
    grads = [random(5), torch.zeros(5, device=DEVICE)]
    found, _, *dfound = run(cut_cross_entropy, (*inputs[:2], torch.full((12,), offset)), target, grads, backend=backend)
    truth, _, *dtruth = run(full, [x.double() for x in (*inputs[:2], torch.zeros(12))], target, grads)
    # A logit keeps a share of 2**-24 of the offset; at 1e30 nothing else is left of it, and all are alike.
    noise = min(abs(offset) * 2**-23, 10.0)
    assert (found.double() - truth).abs().max() <= 4 * noise + 1e-5
    assert found.isfinite().all()
    assert (dfound[0].double() - dtruth[0]).abs().max() <= 8 * noise * inputs[1].abs().max() + 1e-5


@both
def test_rows_with_large_logits(backend):
    inputs, target = head(6, vocab=18, dim=5)
    as_good_as_full((300 * inputs[0], *inputs[1:]), target, backend=backend)
    with_inf = inputs[2].clone()
    with_inf[3] = -torch.inf
    target = torch.where(target == 3, 4, target)
    grads = [random(6), random(6)]
    found = run(cut_cross_entropy, (*inputs[:2], with_inf), target, grads, backend=backend)
    assert all(x.isfinite().all() for x in found)
    assert found[4][3] == 0


def filtered_pair(backend, softcap, sort, dtype=torch.float64):
    """What the op finds, and the definition applied to the whole matrix."""
    inputs, target = peaky(11, 30, 6, dtype=dtype, bias=True)
    target[2], eps = ABSENT, 2.0**-4
    grads = torch.stack((torch.ones(11), torch.zeros(11))).double()
    order = tiles.vocabulary_order(inputs[0], inputs[1], inputs[2], target != ABSENT) if sort else torch.arange(30)
    truth = mutants.filtered_truth(inputs, target, grads, softcap, eps, order, TILE, ignore_index=ABSENT)
    options = {"bias": inputs[2], "softcap": softcap, "filter_eps": eps, "sort_vocab": sort, "backend": backend}
    return filtered_gradients(*inputs[:2], target, **options), truth


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("softcap", [None, 8.0])
@both
def test_the_filter_is_its_definition(sort, softcap, backend):
    found, truth = filtered_pair(backend, softcap, sort, torch.float32)
    assert torch.equal(found.kept, truth[3])
    assert 0 < found.kept.double().mean() < 1
    for x, y in zip(found[:3], truth[:3], strict=True):
        assert max(relative_errors(x, y)) <= 4 * tolerance(torch.float32, dot=True)


def test_filtered_gradients_through_autograd_are_those_of_the_function():
    inputs, target = peaky(11, 30, 6, bias=True)
    options = {"filter_eps": 2.0**-4, "sort_vocab": True, "backend": "torch"}
    grads = [torch.ones(11), torch.zeros(11)]
    *_, hidden, weight, bias = run(cut_cross_entropy, inputs, target, grads, **options)
    found = filtered_gradients(*inputs[:2], target, bias=inputs[2], **options)
    assert all(map(torch.equal, (hidden, weight, bias), found[:3]))
    *_, same, whole, _ = run(cut_cross_entropy, inputs, target, grads, filter_weight=False, **options)
    exact = run(cut_cross_entropy, inputs, target, grads, backend="torch")
    assert torch.equal(same, hidden)
    assert max(relative_errors(whole, exact[3].double())) <= tolerance(torch.float32, dot=True)
    assert relative_errors(weight, exact[3].double())[0] > 1e-3


def test_the_loss_never_sees_the_filter():
    inputs, target = head(11, vocab=30, dim=6)
    options = {"bias": inputs[2], "backend": "torch"}
    exact = cut_cross_entropy(*inputs[:2], target, **options)
    filtered = cut_cross_entropy(*inputs[:2], target, filter_eps=0.5, sort_vocab=True, **options)
    assert all(map(torch.equal, exact, filtered))


def test_the_upstream_gradient_does_not_decide():
    """The test for a tile comes before the upstream gradient: scaling the loss scales the gradients."""
    inputs, target = peaky(11, 30, 6)
    grads = [torch.full((11,), 2.0**-20), torch.zeros(11)]
    options = {"filter_eps": 2.0**-4, "backend": "torch"}
    small = run(cut_cross_entropy, inputs, target, grads, **options)
    large = run(cut_cross_entropy, inputs, target, [2.0**20 * g for g in grads], **options)
    assert torch.equal(2.0**20 * small[2], large[2])


def test_rows_of_gradient_sum_to_zero_and_a_common_shift_of_the_weight_is_invisible():
    inputs, target = head(9, vocab=26, dim=5, dtype=torch.float64)
    grads = [random(9, dtype=torch.float64), torch.zeros(9)]
    loss, _, dhidden, _, dbias = run(cut_cross_entropy, inputs, target, grads, backend="torch")
    assert abs(dbias.sum()) <= 1e-13 * dbias.abs().sum()
    shifted = (inputs[0], inputs[1] + random(5, dtype=torch.float64), inputs[2])
    again = run(cut_cross_entropy, shifted, target, grads, backend="torch")
    assert max(relative_errors(again[0], loss)) <= tolerance(torch.float64, dot=True)
    assert max(relative_errors(again[2], dhidden)) <= tolerance(torch.float64, dot=True)


@pytest.mark.parametrize("eps", [0.0, 2.0**-4])
def test_a_renamed_vocabulary_has_a_renamed_gradient(eps):
    """With sorting also the filtered gradient: its tiles do not depend on the names of the entries."""
    inputs, target = peaky(11, 30, 6, dtype=torch.float64, bias=True)
    grads = [torch.ones(11), torch.zeros(11)]
    names = torch.randperm(30, generator=torch.Generator(DEVICE).manual_seed(0))
    renamed = (inputs[0], inputs[1][names], inputs[2][names])
    options = {"filter_eps": eps, "sort_vocab": True, "backend": "torch"}
    first = run(cut_cross_entropy, inputs, target, grads, **options)
    second = run(cut_cross_entropy, renamed, names.argsort()[target], grads, **options)
    for x, y in zip((first[0], first[2], first[3][names], first[4][names]), (second[0], *second[2:]), strict=True):
        assert max(relative_errors(y, x)) <= tolerance(torch.float64, dot=True)


def test_a_tile_with_a_target_is_kept_until_the_target_is_certain():
    inputs, target = head(8, vocab=24, dim=4, bias=False)
    tile = {"tile": (4, 8), "filter_eps": 2.0**-3, "backend": "torch"}
    kept = filtered_gradients(0 * inputs[0], inputs[1], target, **tile).kept
    # A flat softmax over 24 entries lies below 2**-3, so a tile is kept exactly for its targets.
    expected = torch.zeros_like(kept)
    expected[torch.arange(8, device=DEVICE) // 4, target // 8] = True
    assert torch.equal(kept, expected)
    weight = torch.eye(24, device=DEVICE)
    certain = filtered_gradients(40 * weight[target], weight, target, **tile)
    assert not certain.kept.any()
    assert not certain.weight.any()


def test_the_dropped_mass_is_bounded_by_the_threshold():
    inputs, target = peaky(11, 30, 6, dtype=torch.float64)
    eps = 2.0**-4
    found = filtered_gradients(*inputs[:2], target, filter_eps=eps)
    exact = filtered_gradients(*inputs[:2], target)
    skipped = ~found.kept.repeat_interleave(TILE[0], 0)[:11].repeat_interleave(TILE[1], 1)[:, :30]
    d = (inputs[0] @ inputs[1].T).softmax(-1) - torch.nn.functional.one_hot(target, 30)
    dropped = (d.abs() * skipped).sum(1)
    assert (dropped <= eps * skipped.sum(1)).all()
    error = (found.hidden - exact.hidden).norm(dim=1)
    assert (error <= dropped * inputs[1].norm(dim=1).max() + 1e-13).all()


def test_the_order_is_that_of_the_mean_logits():
    inputs, target = head(9, vocab=20, dim=5, dtype=torch.float64)
    present = torch.arange(9) != 4
    order = tiles.vocabulary_order(*inputs, present)
    mean = (inputs[0] @ inputs[1].T + inputs[2])[present].mean(0)
    assert torch.equal(order, mean.argsort())


def test_the_paper_s_threshold():
    assert default_filter_eps(torch.bfloat16) == 2**-12
    assert default_filter_eps(torch.float16) == 2**-15
    assert default_filter_eps(torch.float32) == 2**-28


@both
def test_two_runs_agree_and_leave_their_inputs_alone(backend):
    inputs, target = peaky(9, 26, 6, bias=True)
    before, grads = [x.clone() for x in inputs], [random(9), random(9)]
    options = {"filter_eps": 0.02, "sort_vocab": True, "backend": backend}
    first, second = (run(cut_cross_entropy, inputs, target, grads, **options) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, inputs, before))


@both
def test_every_subset_of_gradients(backend):
    inputs, target = head(5, vocab=10, dim=4)
    options = {"filter_eps": 0.05, "backend": backend}
    every = run(cut_cross_entropy, inputs, target, [torch.ones(5), torch.zeros(5)], **options)[2:]
    for wanted in range(1, 8):
        leaves = [x.detach().requires_grad_(bool(wanted >> i & 1)) for i, x in enumerate(inputs)]
        cut_cross_entropy(*leaves[:2], target, bias=leaves[2], **options).loss.sum().backward()
        for i, (leaf, expected) in enumerate(zip(leaves, every, strict=True)):
            assert torch.equal(leaf.grad, expected) if wanted >> i & 1 else leaf.grad is None
