"""PolyNorm and PolyReLU against closed forms: the mathematics, before any kernel; and what bad input raises."""

import math

import pytest
import torch
import torch.nn.functional as F
from polycom_cases import NAMES, inputs, leaves, random, run

from p2k.core.errors import BackendUnavailable
from p2k.core.tolerance import relative_errors, tolerance
from p2k.ops.polycom import poly_norm, poly_relu, reference

F64 = torch.float64
both = pytest.mark.parametrize("name", NAMES)
THIRDS = torch.full((3,), 1 / 3, dtype=F64)


@pytest.fixture(autouse=True)
def _on_the_cpu():
    """The mathematics needs no GPU, also where the other tests use one."""
    with torch.device("cpu"):
        yield


def close(found, truth, *, scale=None, dtype=F64):
    return max(relative_errors(found, truth.double(), scale=scale)) <= tolerance(dtype)


def literal(x, weight, bias, eps=1e-6):
    """PolyNorm as it is printed: powers first, no scaling of the row."""
    normed = [x**i * (x ** (2 * i)).mean(-1, keepdim=True).add(eps).rsqrt() for i in (1, 2, 3)]
    return bias + sum(a * power for a, power in zip(weight, normed, strict=True))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0, 1e4])
def test_scaling_a_row_first_is_the_same_function(scale):
    x, weight, bias = inputs(7, 33, dtype=F64)
    assert close(poly_norm(scale * x, weight, bias), literal(scale * x, weight, bias))


def test_published_order_and_formula():
    """The authors' code: weight[0] on the cubic, weight[2] on the linear term, 1 / 3 each, bias 0."""
    x = random(5, 20, dtype=F64)
    published = torch.tensor([0.5, 0.3, 0.2], dtype=F64)

    def norm(u):
        return u * torch.rsqrt(u.pow(2).mean(-1, keepdim=True) + 1e-6)

    theirs = published[0] * norm(x**3) + published[1] * norm(x**2) + published[2] * norm(x)
    assert close(poly_norm(x, published.flip(0)), theirs)


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_both_bias_conventions(constant):
    """Public code starts the constant term at 0 or at 1: it shifts every element and no gradient of x."""
    x, weight, _ = leaves(inputs(4, 9, dtype=F64))
    bias = torch.tensor(constant, dtype=F64, requires_grad=True)
    for function in NAMES.values():
        shifted, plain = function(x, weight, bias), function(x, weight)
        assert close(shifted, plain.detach() + constant)
        grads = [torch.autograd.grad(y.square().sum(), x)[0] for y in (shifted - bias.detach(), plain)]
        assert close(grads[0], grads[1])


def test_invariant_to_positive_scaling_up_to_epsilon():
    x, weight, bias = inputs(50, 64, dtype=F64)
    found = poly_norm(5 * x, weight, bias)
    assert close(poly_norm(5 * x, weight, bias, eps=1e-300), poly_norm(x, weight, bias, eps=1e-300))
    # At eps = 1e-6 the invariance is off by the order of eps itself.
    assert 0 < (found - poly_norm(x, weight, bias)).abs().max() < 1e-4


def test_odd_terms_flip_with_the_sign_and_the_even_one_stays():
    x, weight, _ = inputs(6, 21, dtype=F64)
    odd, even = weight * torch.tensor([1.0, 0.0, 1.0]), weight * torch.tensor([0.0, 1.0, 0.0])
    assert torch.equal(poly_norm(-x, odd), -poly_norm(x, odd))
    assert torch.equal(poly_norm(-x, even), poly_norm(x, even))


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e6])
def test_bounds_on_size(scale):
    """RMS of a row at most sum |w| + |b|; an element at most sqrt(width) sum |w| + |b|."""
    x, weight, bias = inputs(40, 30, dtype=F64)
    spike = F.one_hot(torch.arange(30), 30).double()
    for rows in (scale * x, scale * spike):
        y = poly_norm(rows, weight, bias)
        size = weight.abs().sum()
        assert y.square().mean(-1).sqrt().max() <= size + bias.abs() + 1e-12
        assert (y.abs() <= math.sqrt(30) * size + bias.abs() + 1e-12).all()
    # A row with one element attains the second bound when all weights are positive.
    attained = poly_norm(1e3 * spike, THIRDS).max()
    assert close(attained, torch.tensor(math.sqrt(30), dtype=F64)) or abs(attained / math.sqrt(30) - 1) < 1e-6


def test_special_cases_of_polyrelu():
    x = random(200, dtype=F64)
    one, two = torch.tensor([1.0, 0.0, 0.0], dtype=F64), torch.tensor([0.0, 1.0, 0.0], dtype=F64)
    assert torch.equal(poly_relu(x, one), x.relu())
    assert torch.equal(poly_relu(x, two), x.relu().square())


def test_width_one():
    """A row of one number keeps its sign and nothing else; its gradient vanishes like eps."""
    x = torch.tensor([[3.0], [-2.0]], dtype=F64, requires_grad=True)
    y = poly_norm(x, torch.tensor([0.5, 0.3, 0.2], dtype=F64), eps=1e-12)
    assert torch.allclose(y, torch.tensor([[1.0], [-0.4]], dtype=F64), rtol=0, atol=1e-11)  # eps = 1e-12
    assert torch.autograd.grad(y.sum(), x)[0].abs().max() < 1e-11


@both
def test_gradcheck_and_gradgradcheck(name):
    tensors = leaves(inputs(3, 4, dtype=F64))
    for scale in (1.0, 30.0):
        arguments = [(scale * tensors[0]).detach().requires_grad_(), *tensors[1:]]
        assert torch.autograd.gradcheck(lambda *t: NAMES[name](*t, backend="torch"), arguments)
        assert torch.autograd.gradgradcheck(lambda *t: NAMES[name](*t, backend="torch"), arguments)


@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_closed_form_backward(eps):
    x, weight, bias = leaves(inputs(6, 11, dtype=F64))
    grad = random(6, 11, seed=9, dtype=F64)
    cases = [
        (reference.poly_norm(x, weight, bias, eps), reference.poly_norm_backward(grad, x, weight, eps)),
        (reference.poly_relu(x, weight, bias), reference.poly_relu_backward(grad, x, weight)),
    ]
    for out, formulas in cases:
        for found, truth in zip(formulas, torch.autograd.grad(out, (x, weight, bias), grad), strict=True):
            assert close(found.detach(), truth)


def test_the_gradient_of_a_row_is_orthogonal_to_it():
    """Euler: PolyNorm has degree zero, so <dx, x> = 0 up to eps."""
    x, weight, bias = leaves(inputs(6, 40, dtype=F64))
    _, dx, *_ = run("norm", [x, weight, bias], random(6, 40, seed=9, dtype=F64), backend="torch", eps=1e-300)
    assert ((dx * x).sum(-1).abs() <= 1e-12 * dx.norm(dim=-1) * x.norm(dim=-1)).all()


def test_three_scaled_units_make_every_power():
    """PolyReLU shares its coefficients, but sigma(w x) for three w > 0 spans relu, relu^2 and relu^3."""
    x = torch.linspace(-2, 2, 41, dtype=F64)
    scales = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    units = torch.stack([poly_relu(w * x, THIRDS) for w in scales], -1)
    powers = torch.stack([x.relu() ** i for i in (1, 2, 3)], -1)
    mix = torch.linalg.solve(torch.vander(scales, increasing=True) * scales[:, None] / 3, units.mT).mT
    assert close(mix, powers)


def test_tensor_parallel_shards_are_another_function():
    x = random(4, 32, dtype=F64)
    whole = poly_norm(x, THIRDS)
    shards = torch.cat([poly_norm(half, THIRDS) for half in x.chunk(2, -1)], -1)
    assert (whole - shards).abs().max() > 0.05


X, W, B = torch.ones(2, 4), torch.ones(3), torch.ones(())
BAD = [
    ({"x": X.long()}, TypeError, "x must be floating point, got torch.int64"),
    ({"weight": W[:2]}, ValueError, r"weight must have shape \(3,\), got \(2,\)"),
    ({"bias": torch.ones(1)}, ValueError, r"bias must have shape \(\), got \(1,\)"),
    ({"bias": B.half()}, TypeError, "bias must have dtype torch.float32 like weight, got torch.float16"),
    (
        {"weight": W.half(), "bias": B.half()},
        TypeError,
        "weight must have dtype torch.float32 like x, or torch.float32",
    ),
    ({"weight": W.to("meta")}, ValueError, "weight must be on cpu like x, got meta"),
    ({"backend": "cuda"}, ValueError, "backend must be 'auto', 'torch' or 'triton', got 'cuda'"),
]


@both
@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_bad_input(name, change, error, message):
    with pytest.raises(error, match=f"poly_{name}: {message}"):
        NAMES[name](**({"x": X, "weight": W, "bias": B} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(())}, "x must have a last dimension of at least 1"),
        ({"x": X[:, :0]}, "x must have a last dimension of at least 1"),
        ({"eps": 0.0}, "eps must be > 0 and finite"),
        ({"eps": float("nan")}, "eps must be > 0"),
    ],
)
def test_bad_input_of_poly_norm(change, message):
    with pytest.raises(ValueError, match=f"poly_norm: {message}"):
        poly_norm(**({"x": X, "weight": W} | change))


@both
def test_function_transforms_use_the_reference_and_refuse_the_kernel(name):
    x, weight, bias = inputs(2, 5, 6)
    looped = torch.stack([NAMES[name](row, weight, bias) for row in x])
    assert torch.equal(torch.vmap(lambda row: NAMES[name](row, weight, bias))(x), looped)
    with pytest.raises(BackendUnavailable, match=r"a torch\.func transform is active"):
        torch.vmap(lambda row: NAMES[name](row, weight, bias, backend="triton"))(x)
