"""Inputs and comparisons that the polycom tests share."""

import torch

from p2k.core.seeding import generator
from p2k.core.tolerance import assert_as_good_as
from p2k.ops.polycom import poly_norm, poly_relu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = {"norm": poly_norm, "relu": poly_relu}
FORWARD, BACKWARD = 2, 3


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed, DEVICE), dtype=torch.float64, device=DEVICE).to(dtype)


def inputs(*shape, dtype=torch.float32, bias=True, seed=0):
    """(x, weight, bias)."""
    constant = random(seed=seed + 2, dtype=dtype) if bias else None
    return [random(*shape, seed=seed, dtype=dtype), random(3, seed=seed + 1, dtype=dtype), constant]


def leaves(tensors, wide=False):
    """Leaves that require grad, with the strides of the tensors, or in float64 with `wide`."""
    return [None if x is None else (x.double() if wide else x.detach()).requires_grad_() for x in tensors]


def run(name, tensors, grad, *, backend="triton", **keywords):
    """Output and gradients of every input that is there."""
    out = NAMES[name](*tensors, backend=backend, **keywords)
    present = [x for x in tensors if x is not None]
    return out.detach(), *torch.autograd.grad(out, present, grad.to(out.dtype))


def terms(name, tensors, grad, eps):
    """Magnitude of the terms that each result adds and subtracts, in float64.

    A gradient through a norm cancels, to almost nothing in a row of length 1: an error is small or large against
    these terms, not against what is left of them.
    """
    x, weight, bias = (torch.zeros((), device=DEVICE) if t is None else t for t in tensors)
    x, weight, bias, grad = (t.double().abs() for t in (x, weight, bias, grad))
    out, dx, dweight = bias.expand_as(x).clone(), torch.zeros_like(x), []
    for i in (1, 2, 3):
        power = x**i
        rho = (power.square().mean(-1, keepdim=True) + eps).rsqrt() if name == "norm" else 1.0
        inner = rho * rho * (grad * power).mean(-1, keepdim=True) * power if name == "norm" else 0.0
        out += weight[i - 1] * power * rho
        dx += i * weight[i - 1] * rho * x ** (i - 1) * (grad + inner)
        dweight.append((grad * power * rho).sum())
    return out, dx, torch.stack(dweight), grad.sum()


def assert_kernel_as_good_as_eager(name, tensors, *, seed=9, grad=None, **keywords):
    """Forward within twice, gradients within three times the error of torch in the same dtype."""
    x = tensors[0]
    grad = random(*x.shape, seed=seed, dtype=x.dtype) if grad is None else grad
    truth = run(name, leaves(tensors, wide=True), grad.double(), backend="torch", **keywords)
    eager = run(name, leaves(tensors), grad, backend="torch", **keywords)
    actual = run(name, leaves(tensors), grad, **keywords)
    scales = terms(name, tensors, grad, keywords.get("eps", 1e-6))
    names = ["out", "x", "weight", "bias"][: len(truth)]
    for label, found, exact, base, scale in zip(names, actual, truth, eager, scales, strict=False):
        factor = FORWARD if label == "out" else BACKWARD
        # Coefficient gradients sum over all elements.
        length = x.numel() if label in ("weight", "bias") else x.shape[-1] if x.ndim else 1
        assert_as_good_as(found, exact, base, factor=factor, length=max(length, 1), scale=scale, name=label)
