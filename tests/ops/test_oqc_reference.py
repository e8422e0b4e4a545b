"""The OQC reference against closed forms: the mathematics, before any kernel."""

import math

import pytest
import torch
from oqc_cases import STAGES, inject, inject_inputs, leaves, random, rank

from p2k.core.tolerance import tolerance
from p2k.ops import oqc
from p2k.ops.oqc import reference

F64 = torch.float64


def dot(x, y):
    return (x * y).sum(-1, keepdim=True)


def cosine(x, y):
    return (dot(x, y) / (x.norm(dim=-1, keepdim=True) * y.norm(dim=-1, keepdim=True))).abs()


def close(x, y, *, scale=None, dtype=F64):
    """Equal up to the table's tolerance, relative to the largest entry of `scale`."""
    largest = (y if scale is None else scale).abs().max()
    return bool((x - y).abs().max() <= tolerance(dtype) * largest)


@pytest.fixture
def pair():
    """A main and an auxiliary vector per token, in float64."""
    return random(9, 40, dtype=F64), random(9, 40, seed=1, dtype=F64)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 1e-2])
@pytest.mark.parametrize("gate", ["none", "scalar", "token"])
def test_closed_form_backward(gate, eps):
    h, z, g, _ = leaves(inject_inputs(6, 11, gate=gate, pre_gate=False, dtype=F64))
    grad = random(6, 11, seed=9, dtype=F64)
    present = [x for x in (h, z, g) if x is not None]
    expected = torch.autograd.grad(reference.project_and_inject(h, z, g, None, eps), present, grad)
    dh, dz, dg = reference.project_and_inject_backward(grad, h, z, 1.0 if g is None else g, eps)
    dg = dg.sum() if gate == "scalar" else dg
    for x, y in zip((dh, dz, dg), expected, strict=False):
        assert close(x, y)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("gate", ["none", "scalar", "token"])
def test_gradcheck_and_gradgradcheck(name, gate):
    stage, inputs = STAGES[name]
    arguments = leaves(inputs(2, 3, gate=gate, dtype=F64))
    assert torch.autograd.gradcheck(lambda *x: stage(*x, backend="torch"), arguments)
    assert torch.autograd.gradgradcheck(lambda *x: stage(*x, backend="torch"), arguments)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.3])
def test_what_epsilon_leaves_parallel(pair, eps):
    h, z = pair
    p, n = reference.project_out(z, h, eps), dot(h, h)
    assert close(dot(p, h), dot(z, h) * eps / (n + eps), scale=n)


def test_nothing_parallel_is_left_even_of_nearly_parallel_vectors():
    h, noise = random(200, 256), random(200, 256, seed=1)
    for alignment in (0.0, 0.9, 0.99):
        z = alignment * h + math.sqrt(1 - alignment**2) * noise
        # Unit round-off times the cotangent of the angle: at 0.99, seven times 6e-8, and the tail of 200 tokens.
        assert cosine(reference.project_out(z, h, 1e-6), h).max() < 5e-6


def test_bfloat16_needs_float32_reductions():
    h, noise = random(200, 256), random(200, 256, seed=1)
    h, z = h.bfloat16(), (0.9 * h + math.sqrt(1 - 0.9**2) * noise).bfloat16()
    # As for float32 while p stays in float32, a bfloat16 rounding of p more, and a lost invariant with 16-bit sums.
    p = reference.project_out(z.float(), h.float(), 1e-6)
    assert cosine(p, h.float()).max() < 5e-6
    assert cosine(p.bfloat16().float(), h.float()).max() < 2e-3
    n = (h * h).sum(-1, keepdim=True, dtype=torch.bfloat16)
    eager = z - (z * h).sum(-1, keepdim=True, dtype=torch.bfloat16) / n * h
    assert cosine(eager.float(), h.float()).max() > 5e-3


def test_projecting_twice(pair):
    h, z = pair
    for eps in (0.0, 0.3):
        once = reference.project_out(z, h, eps)
        correction = eps / (dot(h, h) + eps) ** 2 * dot(z, h) * h
        assert close(reference.project_out(once, h, eps), once - correction, scale=z)


def test_projection_is_self_adjoint(pair):
    h, z = pair
    other = random(9, 40, seed=2, dtype=F64)
    left = dot(reference.project_out(z, h, 0.1), other)
    assert close(left, dot(z, reference.project_out(other, h, 0.1)), scale=z.norm(dim=-1) * other.norm(dim=-1))


@pytest.mark.parametrize("factor", [-1.0, 0.01, 250.0])
def test_only_the_direction_of_main_matters(pair, factor):
    h, z = pair
    assert close(reference.project_out(z, factor * h, 0.0), reference.project_out(z, h, 0.0), scale=z)


def test_linear_in_the_auxiliary_vector(pair):
    h, z = pair
    other = random(9, 40, seed=2, dtype=F64)
    combined = reference.project_out(3 * z + other, h, 0.1)
    assert close(combined, 3 * reference.project_out(z, h, 0.1) + reference.project_out(other, h, 0.1))


def test_pythagoras(pair):
    h, z = pair
    gate = random(9, 1, seed=2, dtype=F64)
    out, p = oqc.project_and_inject(h, z, gate, eps=0.0), reference.project_out(z, h, 0.0)
    assert close(dot(out, out), dot(h, h) + gate**2 * dot(p, p))
    assert close(dot(out, h), dot(h, h))


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_projection_never_lengthens(pair, eps):
    h, z = pair
    assert (reference.project_out(z, h, eps).norm(dim=-1) <= z.norm(dim=-1) * (1 + tolerance(F64))).all()


def test_gradients_know_the_projection(pair):
    """The auxiliary gradient is orthogonal to main; main's own projection gradient is too (Euler: degree 0)."""
    h, z = (x.requires_grad_() for x in pair)
    grad = random(9, 40, seed=2, dtype=F64)
    dh, dz = torch.autograd.grad(oqc.project_and_inject(h, z, eps=0.0), (h, z), grad)
    scale = grad.norm(dim=-1) * h.norm(dim=-1)
    assert close(dot(dz, h), torch.zeros(9, 1, dtype=F64), scale=scale)
    assert close(dot(dh - grad, h), torch.zeros(9, 1, dtype=F64), scale=scale)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_closed_gate_leaves_the_host_alone(backend):
    h, z = random(5, 20).requires_grad_(), random(5, 20, seed=1).requires_grad_()
    gate, grad = torch.zeros((), requires_grad=True), random(5, 20, seed=2)
    out = oqc.project_and_inject(h, z, gate, backend=backend)
    dh, dz, dgate = torch.autograd.grad(out, (h, z, gate), grad)
    assert torch.equal(out, h)
    assert torch.equal(dh, grad)
    assert torch.equal(dz, torch.zeros_like(z))
    assert dgate != 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_an_empty_auxiliary_branch_still_learns(backend):
    h, lift = random(5, 20), torch.zeros(3, 20, requires_grad=True)
    out = oqc.project_and_inject(h, random(5, 3, seed=1) @ lift, backend=backend)
    assert torch.equal(out, h)
    (gradient,) = torch.autograd.grad(out, lift, random(5, 20, seed=2))
    assert gradient.abs().min() > 0


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_parallel_vectors_add_nothing(backend):
    h = random(5, 20)
    assert close(oqc.project_and_inject(h, -3 * h, backend=backend), h, dtype=torch.float32, scale=3 * h)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_short_main_vectors(backend):
    """Gradients stay finite, and bounded by |z| / sqrt(eps), as the main vector vanishes."""
    z, direction = random(1, 20, seed=1), torch.nn.functional.normalize(random(1, 20), dim=-1)
    for length in (1.0, 1e-2, 1e-3, 1e-4, 1e-8, 0.0):
        h = (length * direction).requires_grad_()
        out = oqc.project_and_inject(h, z, eps=1e-6, backend=backend)
        (gradient,) = torch.autograd.grad(out, h, torch.ones_like(out))
        assert out.isfinite().all()
        assert gradient.norm() <= 2 * z.norm() * 20**0.5 / 1e-6**0.5
    assert torch.equal(out, z)


def test_rank_stage_is_orthogonal_and_its_lift_only_when_tied():
    tokens, width, r = 50, 64, 8
    host, lift = random(tokens, width, dtype=F64), random(width, r, seed=1, dtype=F64)
    left, right, weight = (random(*shape, seed=2 + i, dtype=F64) for i, shape in enumerate(((50, r), (50, r), (r,))))
    for tied in (True, False):
        down = lift.T if tied else random(r, width, seed=7, dtype=F64)
        u = host @ down.T
        q = oqc.rank_project(left, right, u, weight, eps=0.0)
        assert close(dot(q, u), torch.zeros(tokens, 1, dtype=F64), scale=u.norm(dim=-1) * q.norm(dim=-1))
        overlap = cosine(q @ lift.T, host)
        assert overlap.max() < 1e-12 if tied else overlap.mean() > 0.05


def test_orthogonal_is_not_independent():
    """A skew map of main is orthogonal to main in every token, though linear in it: projection changes nothing."""
    h, square = random(9, 40, dtype=F64), random(40, 40, seed=1, dtype=F64)
    z = h @ (square - square.T)
    assert close(reference.project_out(z, h, 0.0), z)


def test_homogeneity_of_the_quadratic_features():
    left, right, host, weight = (random(*shape, seed=i, dtype=F64) for i, shape in enumerate(((9, 8),) * 3 + ((8,),)))
    for factor in (0.5, 3.0):
        # Degree 2 before the norm, degree 0 after it, up to norm_eps.
        scaled = oqc.rank_project(factor * left, factor * right, host, weight, norm_eps=1e-18)
        assert close(scaled, oqc.rank_project(left, right, host, weight, norm_eps=1e-18))


@pytest.mark.parametrize("stage", [inject, rank])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_tokens_do_not_see_each_other(stage, backend):
    inputs = STAGES[stage.__name__][1](9, 20)
    order = torch.tensor([4, 1, 8, 0, 2, 7, 3, 6, 5])
    permuted = [x[order] if x.ndim == 2 else x for x in inputs]
    out = stage(*inputs, backend=backend)
    assert torch.equal(stage(*permuted, backend=backend), out[order])
    alone = [x[3:4] if x.ndim == 2 else x for x in inputs]
    assert torch.equal(stage(*alone, backend=backend), out[3:4])
