"""Inputs and comparisons that the OQC tests share."""

import torch

from p2k.core.seeding import generator
from p2k.core.tolerance import assert_as_good_as
from p2k.ops import oqc

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORWARD, BACKWARD = 2, 3


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed, DEVICE), dtype=torch.float64, device=DEVICE).to(dtype)


def inject_inputs(*shape, gate="token", pre_gate=True, dtype=torch.float32, seed=0):
    """(main, aux, gate, pre_gate); the gate is "none", "scalar" or "token"."""
    gates = {"none": None, "scalar": (), "token": (*shape[:-1], 1)}[gate]
    return [
        random(*shape, seed=seed, dtype=dtype),
        random(*shape, seed=seed + 1, dtype=dtype),
        None if gates is None else random(*gates, seed=seed + 2, dtype=dtype),
        random(shape[-1], seed=seed + 3, dtype=dtype) if pre_gate else None,
    ]


def rank_inputs(*shape, gate="token", dtype=torch.float32, seed=0):
    """(left, right, host, weight, gate)."""
    left, right, gate, weight = inject_inputs(*shape, gate=gate, dtype=dtype, seed=seed)
    return [left, right, random(*shape, seed=seed + 4, dtype=dtype), weight, gate]


def inject(main, aux, gate, pre_gate, *, eps=1e-3, backend="triton"):
    return oqc.project_and_inject(main, aux, gate, pre_gate=pre_gate, eps=eps, backend=backend)


def rank(*inputs, eps=1e-3, norm_eps=1e-3, backend="triton"):
    return oqc.rank_project(*inputs, eps=eps, norm_eps=norm_eps, backend=backend)


STAGES = {"inject": (inject, inject_inputs), "rank": (rank, rank_inputs)}


def leaves(inputs, wide=False):
    """Leaves that require grad, with the strides of the inputs, or in float64 with `wide`."""
    return [None if x is None else (x.double() if wide else x.detach()).requires_grad_() for x in inputs]


def run(stage, inputs, grad, **keywords):
    """Output and gradients of every input that is there."""
    out = stage(*inputs, **keywords)
    present = [x for x in inputs if x is not None]
    return out.detach(), *torch.autograd.grad(out, present, grad.to(out.dtype))


def _size(x):
    """Magnitudes in float64; an absent gate is 1."""
    return torch.ones((), dtype=torch.float64) if x is None else x.double().abs()


def _sum(x):
    return x.sum(-1, keepdim=True)


def inject_terms(inputs, grad, eps):
    """Magnitude of the terms that each result of the inject stage adds and subtracts, in closed form.

    Projections cancel, down to nothing at width 1: an error is small or large against these terms, not against what
    is left of them.
    """
    main, aux, gate, pre_gate = map(_size, inputs)
    c, tau, a, v = _terms(main, pre_gate * aux, gate * _size(grad), eps)
    out = main + gate * (a + c * main)
    dmain = _size(grad) + c * v + tau * (a + 2 * c * main)
    da = v + tau * main
    return out, dmain, pre_gate * da, _size(grad) * (a + c * main), aux * da


def rank_terms(inputs, grad, eps, norm_eps):
    """The same for the rank stage."""
    left, right, host, weight, gate = map(_size, inputs)
    s = left * right
    rho = (s.square().mean(-1, keepdim=True) + norm_eps).rsqrt()
    c, tau, f, v = _terms(host, weight * s * rho, gate * _size(grad), eps)
    df = v + tau * host
    ds = rho * (weight * df + s * rho**2 * (weight * s * df).mean(-1, keepdim=True))
    dhost = c * v + tau * (f + 2 * c * host)
    return gate * (f + c * host), ds * right, ds * left, dhost, df * s * rho, _size(grad) * (f + c * host)


def _terms(main, a, v, eps):
    n = _sum(main.square()) + eps
    return _sum(a * main) / n, _sum(v * main) / n, a, v


TERMS = {inject: inject_terms, rank: rank_terms}


def assert_kernel_as_good_as_eager(stage, inputs, *, seed=9, **epsilons):
    """Forward within twice, gradients within three times the error of torch in the same dtype."""
    shape, dtype = inputs[0].shape, inputs[0].dtype
    grad = random(*shape, seed=seed, dtype=dtype)
    truth = run(stage, leaves(inputs, wide=True), grad.double(), backend="torch", **epsilons)
    eager = run(stage, leaves(inputs), grad, backend="torch", **epsilons)
    actual = run(stage, leaves(inputs), grad, backend="triton", **epsilons)
    defaults = {"eps": 1e-3} if stage is inject else {"eps": 1e-3, "norm_eps": 1e-3}
    terms = TERMS[stage](inputs, grad, **(defaults | epsilons))
    terms = [terms[0], *(term for term, x in zip(terms[1:], inputs, strict=True) if x is not None)]
    names = ["out"] + [f"grad {index}" for index, x in enumerate(inputs) if x is not None]
    for name, found, exact, base, term in zip(names, actual, truth, eager, terms, strict=True):
        assert found.dtype == dtype
        # A gradient that sums over tokens or channels sums their terms.
        scale = term.sum_to_size(exact.shape) if exact.numel() else exact
        factor = FORWARD if name == "out" else BACKWARD
        assert_as_good_as(found, exact, base, factor=factor, length=shape[-1], scale=scale, name=name)
