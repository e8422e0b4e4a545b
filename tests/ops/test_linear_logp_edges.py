"""linear_logp at its edges: far-off and masked logits, absent tokens, bad numbers, and what stays bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from linear_logp_cases import ABSENT, BACKENDS, DEVICE, assert_as_good_as_full, full, head, random, run, upstream

from p2k.core.tolerance import relative_errors, tolerance
from p2k.ops.linear_logp import chunked, kernel, linear_logp

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
both = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 16 columns in groups of 4 rows, and weights widened 5 rows at a time."""
    monkeypatch.setattr(kernel, "LAUNCH", {16: (4, 4)})
    monkeypatch.setattr(chunked, "BLOCK", 5)


@both
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_huge_offset_of_all_logits_changes_nothing_but_their_sum(offset, backend, small_tiles):
    (hidden, weight, _), target = head(6, vocab=35, bias=False)
    # Eighths, so that the logits are exact with and without the offset.
    hidden, weight = (hidden.round(decimals=0), (weight * 2).round(decimals=0) / 8)
    grads = upstream(target)
    bias = torch.zeros(35, device=DEVICE)
    near, far = (run(linear_logp, (hidden, weight, b), target, grads, backend=backend) for b in (bias, bias + offset))
    for index, (x, y) in enumerate(zip(far, near, strict=True)):
        assert torch.equal(x, y) if index != 1 else torch.allclose(x - offset, y, atol=1e-3)  # one unit at 1e4
    assert_as_good_as_full((hidden, weight, bias + offset), target, backend=backend)


@both
def test_tokens_taken_out_of_the_vocabulary(backend, small_tiles):
    """A bias of -inf: as if the token were not there, and -inf for a target that is not."""
    (hidden, weight, bias), target = head(6, vocab=20)
    bias[3] = bias[17] = -torch.inf
    target[:] = torch.tensor([0, 1, 2, 4, 18, 19])
    kept = [index for index in range(20) if index not in (3, 17)]
    smaller = torch.tensor([0, 1, 2, 3, 16, 17], device=DEVICE)
    grads = upstream(target)
    *results, dhidden, dweight, dbias = run(linear_logp, (hidden, weight, bias), target, grads, backend=backend)
    truth = run(full, [x.double() for x in (hidden, weight[kept], bias[kept])], smaller, grads)
    for x, y in zip((*results, dhidden, dweight[kept], dbias[kept]), truth, strict=True):
        assert max(relative_errors(x, y)) <= tolerance(torch.float32, dot=True)
    assert not dweight[[3, 17]].any()
    target[0] = 3
    found = linear_logp(hidden, weight, target, bias=bias, backend=backend)
    assert found.logp[0] == -torch.inf
    assert found.logsumexp.isfinite().all()


@both
def test_absent_tokens(backend):
    """Their results and gradients are 0, and nothing they hold reaches the parameters."""
    inputs, target = head(3, 5, vocab=20)
    there = torch.ones(3, 5, dtype=torch.bool, device=DEVICE)
    there[0, :2] = there[2] = False
    grads = upstream(target)
    expected = run(linear_logp, (inputs[0][there], *inputs[1:]), target[there], [g[there] for g in grads],
                   backend=backend)  # fmt: skip
    for index in (ABSENT, 7, 10**12):
        marked = torch.where(there, target, index)
        dirty = [torch.where(there[..., None], inputs[0], torch.nan), *inputs[1:]]
        bad = [torch.where(there, grad, torch.nan) for grad in grads]
        if index == 7:
            marked[there & (target == 7)] = 8
        *found, dweight, dbias = run(linear_logp, dirty, marked, bad, backend=backend, ignore_index=index, chunk_size=4)
        for x in found:
            assert not x[~there].any()
        if index != 7:
            for x, y in zip((*(x[there] for x in found), dweight, dbias), expected, strict=True):
                assert max(relative_errors(x, y.double())) <= tolerance(torch.float32, dot=True)


@both
def test_all_absent(backend):
    inputs, target = head(5, vocab=20)
    found = run(linear_logp, inputs, torch.full_like(target, ABSENT), upstream(target), backend=backend)
    assert not any(x.any() for x in found)


@both
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_bad_numbers_stay_in_their_token(bad, backend, small_tiles):
    inputs, target = head(9, vocab=35)
    grads = upstream(target)
    dirty = inputs[0].clone()
    dirty[3, 5] = bad
    clean = run(linear_logp, inputs, target, grads, backend=backend, chunk_size=4)
    found = run(linear_logp, (dirty, *inputs[1:]), target, grads, backend=backend, chunk_size=4)
    others = torch.arange(9, device=DEVICE) != 3
    for x, y in zip(found[:4], clean[:4], strict=True):
        assert torch.equal(x[others], y[others])
        assert not x[3].isfinite().all()
    assert not found[4].isfinite().all()


@both
def test_upstream_nan_stays_in_its_token(backend):
    inputs, target = head(9, vocab=20)
    grads = upstream(target)
    clean = run(linear_logp, inputs, target, grads, backend=backend)
    grads[2][3] = torch.nan
    found = run(linear_logp, inputs, target, grads, backend=backend)
    others = torch.arange(9, device=DEVICE) != 3
    assert torch.equal(found[3][others], clean[3][others])
    assert found[3][3].isnan().all()


@both
@pytest.mark.usefixtures("small_tiles")
def test_every_output_element_is_written(backend, monkeypatch):
    empty, new_empty = torch.empty_like, torch.Tensor.new_empty

    def poisoned(fresh):
        return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: poisoned(empty(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: poisoned(new_empty(*a, **k)))
    for vocab in (13, 35):
        inputs, target = head(7, vocab=vocab)
        found = run(linear_logp, inputs, target, upstream(target), backend=backend, chunk_size=3)
        assert all(x.isfinite().all() for x in found)


@both
def test_inputs_stay_as_they_were(backend):
    inputs, target = head(7, vocab=20)
    target[2] = ABSENT
    grads = upstream(target)
    before = [x.clone() for x in (*inputs, target, *grads)]
    run(linear_logp, inputs, target, grads, backend=backend, chunk_size=3)
    assert all(map(torch.equal, before, (*inputs, target, *grads)))


@both
@pytest.mark.usefixtures("small_tiles")
def test_two_runs_agree_bit_for_bit(backend):
    inputs, target = head(23, vocab=35)
    grads = upstream(target)
    first, second = (run(linear_logp, inputs, target, grads, backend=backend, chunk_size=5) for _ in range(2))
    assert all(map(torch.equal, first, second))


@both
def test_half_gradients_are_summed_in_float32(backend):
    """Many small terms, of which none would move a bfloat16 sum of its size."""
    hidden = torch.ones(129, 1, dtype=torch.bfloat16, device=DEVICE)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    target, grad = torch.zeros(129, dtype=torch.int64, device=DEVICE), torch.full((129,), 2.0**-6, device=DEVICE)
    grad[0] = 8
    (found,) = torch.autograd.grad(
        linear_logp(hidden, weight, target, chunk_size=1, backend=backend).logp, weight, grad
    )
    assert found.flatten().tolist() == [5.0, -5.0]  # half of 8 + 128 / 64


def test_agrees_with_cross_entropy():
    (hidden, weight, bias), target = head(9, vocab=20, dtype=torch.float64)
    found = linear_logp(hidden, weight, target, bias=bias)
    expected = F.cross_entropy(F.linear(hidden, weight, bias), target, reduction="none")
    assert torch.allclose(-found.logp, expected, rtol=tolerance(torch.float64))
    distribution = torch.distributions.Categorical(logits=F.linear(hidden, weight, bias))
    assert torch.allclose(found.entropy, distribution.entropy(), rtol=tolerance(torch.float64))


@both
def test_identities_of_the_softmax(backend):
    """The gradient of logp and of entropy sums to zero over the vocabulary, that of log-sum-exp to the upstream's."""
    inputs, target = head(9, vocab=20, dtype=torch.float64)
    temperature = 0.5  # a power of two: the interpreter takes scalars in float32
    for index, expected in enumerate((0.0, 1 / temperature, 0.0)):
        bias = inputs[2].clone().requires_grad_()
        results = linear_logp(*inputs[:2], target, bias=bias, temperature=temperature, backend="torch")
        grad = random(9, dtype=torch.float64)
        (dbias,) = torch.autograd.grad(results[index], bias, grad)
        assert abs(dbias.sum() - expected * grad.sum()) <= 10 * tolerance(torch.float64)
    order = torch.randperm(20, device="cpu").to(DEVICE)
    place = order.argsort()
    inputs, target = head(9, vocab=20)
    grads = upstream(target)
    plain = run(linear_logp, inputs, target, grads, backend=backend)
    permuted = run(linear_logp, (inputs[0], inputs[1][order], inputs[2][order]), place[target], grads, backend=backend)
    for x, y in zip((*permuted[:4], permuted[4][place], permuted[5][place]), plain, strict=True):
        assert max(relative_errors(x, y.double())) <= tolerance(torch.float32, dot=True)
