"""linear_cross_entropy against torch's own cross_entropy, and its filter."""

import pytest
import torch
import torch.nn.functional as F

from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors, tolerance
from p2k.losses import LinearCrossEntropyLoss, linear_cross_entropy
from p2k.losses import cut_cross_entropy as module

OPTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.1},
    {"label_smoothing": 1.0, "reduction": "sum"},
    {"ignore_index": 3},
]
# The chunked way, and the tiles with a filter too low to drop anything.
WAYS = [{}, {"filter_eps": 1e-300, "sort_vocab": True}]


def batch(tokens=9, vocab=13, dim=5, dtype=torch.float64, seed=0):
    source = generator(seed)
    hidden, weight, bias = (
        torch.randn(*shape, generator=source, dtype=torch.float64).to(dtype)
        for shape in ((tokens, dim), (vocab, dim), (vocab,))
    )
    return [x.requires_grad_() for x in (hidden, weight, bias)], torch.randint(0, vocab, (tokens,), generator=source)


def gradients(loss, inputs):
    upstream = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    return torch.autograd.grad(loss, inputs, upstream)


@pytest.mark.parametrize("way", WAYS, ids=["exact", "tiles"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equal_to_torch_s_cross_entropy(options, way):
    inputs, target = batch()
    target[2] = options.get("ignore_index", -100)
    found = linear_cross_entropy(*inputs[:2], target, inputs[2], **options, **way)
    expected = F.cross_entropy(F.linear(*inputs), target, **options)
    for x, y in zip((found, *gradients(found, inputs)), (expected, *gradients(expected, inputs)), strict=True):
        assert max(relative_errors(x.detach(), y.detach())) <= tolerance(torch.float64, dot=True)


@pytest.mark.parametrize("way", WAYS, ids=["exact", "tiles"])
def test_z_loss_and_softcap(way):
    inputs, target = batch()
    z = F.linear(*inputs)
    found = linear_cross_entropy(*inputs[:2], target, inputs[2], z_loss_weight=0.3, **way)
    expected = F.cross_entropy(z, target) + 0.3 * z.logsumexp(-1).square().mean()
    capped = linear_cross_entropy(*inputs[:2], target, inputs[2], softcap=2.0, **way)
    truth = F.cross_entropy(2 * torch.tanh(F.linear(*inputs) / 2), target)
    for x, y in ((found, expected), (capped, truth)):
        for a, b in zip((x, *gradients(x, inputs)), (y, *gradients(y, inputs)), strict=True):
            assert max(relative_errors(a.detach(), b.detach())) <= tolerance(torch.float64, dot=True)


def test_leading_dimensions():
    inputs, target = batch(tokens=6)
    flat = linear_cross_entropy(*inputs[:2], target, inputs[2], reduction="none")
    shaped = linear_cross_entropy(inputs[0].view(2, 3, 5), inputs[1], target.view(2, 3), inputs[2], reduction="none")
    assert torch.equal(shaped.flatten(), flat)


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"z_loss_weight": 0.1}, {"filter_eps": 0.1}], ids=str
)
def test_nothing_to_learn_is_zero_with_a_zero_gradient(options):
    """Where torch's mean over no token is NaN."""
    inputs, target = batch()
    inputs[0] = torch.full_like(inputs[0], torch.nan).requires_grad_()
    loss = linear_cross_entropy(*inputs[:2], torch.full_like(target, -100), inputs[2], **options)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"filter_eps": 0.1}], ids=str)
def test_a_vocabulary_of_one_is_free(options):
    inputs, target = batch(vocab=1)
    loss = linear_cross_entropy(*inputs[:2], target, inputs[2], **options)
    assert abs(loss) <= 1e-14
    assert all(g.abs().max() <= 1e-14 for g in gradients(loss, inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_have_a_float32_loss(dtype):
    inputs, target = batch(dtype=dtype)
    loss = linear_cross_entropy(*inputs[:2], target, inputs[2], label_smoothing=0.1)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    truth = F.cross_entropy(F.linear(*wide), target, label_smoothing=0.1)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - truth.item()) <= 1e-5 * truth.item()
    for x, y in zip(gradients(loss, inputs), gradients(truth, wide), strict=True):
        assert x.dtype == dtype
        assert max(relative_errors(x, y)) <= tolerance(dtype)


def test_gradcheck():
    inputs, target = batch(tokens=4, vocab=6, dim=3)
    target[1] = -100
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_cross_entropy(h, w, target, b, label_smoothing=0.2, z_loss_weight=0.1), inputs
    )


def test_the_filter_changes_gradients_and_never_the_loss():
    inputs, target = batch(tokens=200, vocab=600, dim=16, dtype=torch.float32)
    # A flat softmax and targets in the first tile: the others are skipped.
    inputs[0], target = (0.1 * inputs[0].detach()).requires_grad_(), target % 40
    exact = linear_cross_entropy(*inputs[:2], target)
    filtered = linear_cross_entropy(*inputs[:2], target, filter_eps=0.02, sort_vocab=True)
    whole = linear_cross_entropy(*inputs[:2], target, filter_eps=0.02, sort_vocab=True, filter_weight=False)
    assert max(relative_errors(filtered.detach(), exact.detach().double())) <= 1e-6
    truth, found, half = (torch.autograd.grad(loss, inputs[:2]) for loss in (exact, filtered, whole))
    assert all(relative_errors(x, y.double())[0] > 1e-3 for x, y in zip(found, truth, strict=True))
    assert torch.equal(half[0], found[0])
    assert relative_errors(half[1], truth[1].double())[0] <= tolerance(torch.float32, dot=True)


def test_auto_is_the_paper_s_threshold():
    inputs, target = batch(tokens=70, vocab=200, dim=16, dtype=torch.float32)
    found, same = (
        torch.autograd.grad(linear_cross_entropy(*inputs[:2], target, filter_eps=eps), inputs[:2])
        for eps in ("auto", 2.0**-28)
    )
    assert all(map(torch.equal, found, same))


def test_auto_under_autocast_is_the_threshold_of_the_operands():
    # Every entry of the gradient lies between the two thresholds.
    target = torch.arange(70)
    inputs = [torch.eye(128)[:70].requires_grad_(), (15 * torch.eye(128)).requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        found, same, low = (
            torch.autograd.grad(linear_cross_entropy(*inputs[:2], target, filter_eps=eps), inputs[:2])
            for eps in ("auto", 2.0**-12, 2.0**-28)
        )
    assert all(map(torch.equal, found, same))
    assert not found[1].any()
    assert low[1].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "avg"}, "reduction must be one of none, mean, sum, got 'avg'"),
        ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
        ({"label_smoothing": 0.1, "softcap": 3.0}, "label_smoothing needs the mean logit"),
        ({"z_loss_weight": -1.0}, "z_loss_weight must be >= 0 and finite, got -1.0"),
        ({"sort_vocab": True}, "sort_vocab and filter_weight belong to a filter: pass filter_eps too"),
        ({"filter_weight": False}, "belong to a filter"),
        ({"filter_eps": 0.0}, r"filter_eps must be None, 'auto' or in \(0, 1\), got 0.0"),
        ({"filter_eps": "high"}, "got 'high'"),
    ],
)
def test_bad_options(options, message):
    inputs, target = batch()
    with pytest.raises(ValueError, match=f"linear_cross_entropy: .*{message}"):
        linear_cross_entropy(*inputs[:2], target, **options)
    with pytest.raises(ValueError, match=f"LinearCrossEntropyLoss: .*{message}"):
        LinearCrossEntropyLoss(**options)


def test_the_module_is_the_function():
    inputs, target = batch()
    options = {"reduction": "sum", "label_smoothing": 0.1, "z_loss_weight": 0.2, "filter_eps": 0.1, "sort_vocab": True}
    loss = LinearCrossEntropyLoss(**options)
    assert torch.equal(
        loss(*inputs[:2], target, inputs[2]), linear_cross_entropy(*inputs[:2], target, inputs[2], **options)
    )
    assert "label_smoothing=0.1" in repr(loss)
    assert list(loss.parameters()) == []


def test_compiled_whole():
    torch._dynamo.reset()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    inputs, target = batch(dtype=torch.float32)
    options = {"label_smoothing": 0.1, "z_loss_weight": 0.1, "filter_eps": 0.05, "sort_vocab": True}
    pair = [run(*inputs[:2], target, inputs[2], **options) for run in (compiled, linear_cross_entropy)]
    for x, y in zip(*(gradients(loss, inputs) for loss in pair), strict=True):
        assert max(relative_errors(x, y.double())) <= tolerance(torch.float32, dot=True)


def test_exact_is_the_shared_chunked_op(monkeypatch):
    """No second implementation of the exact loss: without filter and cap the tiles are not asked."""
    monkeypatch.setattr(module, "cut_cross_entropy", None)
    inputs, target = batch()
    assert linear_cross_entropy(*inputs[:2], target).isfinite()
