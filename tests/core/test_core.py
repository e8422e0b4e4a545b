"""Backend choice, argument checks, seeds and device probes."""

import random
import sys

import numpy as np
import pytest
import torch

from p2k.core import backend, checks, device, seeding
from p2k.core.errors import BackendUnavailable, MissingDependency, P2KError

X = torch.ones(2, 3)


def test_backend_choice_on_a_cpu(monkeypatch):
    assert backend.choose_backend("auto", X, op="f") == "torch"
    assert backend.choose_backend("torch", X, op="f") == "torch"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.choose_backend("triton", X, op="f") == "triton"
    assert backend.choose_backend("triton", X.double(), op="f") == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(BackendUnavailable, match="f: backend='triton' cannot run: the tensor is on cpu"):
        backend.choose_backend("triton", X, op="f")
    monkeypatch.setattr(backend, "TRITON_INSTALLED", False)
    assert "pip install 'p2k" in backend.why_not_triton(X)


def test_backend_dtypes(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for dtype in backend.KERNEL_DTYPES:
        assert backend.why_not_triton(X.to(dtype)) is None
    assert "got torch.int64" in backend.why_not_triton(X.long())


def test_unknown_backend():
    with pytest.raises(ValueError, match="f: backend must be"):
        backend.choose_backend("numpy", X, op="f")


def test_floating_and_device_checks():
    checks.check_floating("f", x=X, y=X)
    checks.check_same_device("f", x=X, y=X)
    with pytest.raises(TypeError, match="f: x must be floating point"):
        checks.check_floating("f", x=X.int())
    with pytest.raises(TypeError, match="f: y must have dtype torch.float32 like x, got torch.float64"):
        checks.check_floating("f", x=X, y=X.double())
    with pytest.raises(ValueError, match="f: y must be on cpu like x, got meta"):
        checks.check_same_device("f", x=X, y=X.to("meta"))


def test_shape_check():
    checks.check_shape("f", "x", X, (3, 2), (2, 3))
    with pytest.raises(ValueError, match=r"f: x must have shape \(3, 2\) or \(\), got \(2, 3\)"):
        checks.check_shape("f", "x", X, (3, 2), ())


@pytest.mark.parametrize("value", [-1.0, 0.0, float("nan"), float("inf")])
def test_positive_check(value):
    with pytest.raises(ValueError, match="f: eps must be > 0 and finite"):
        checks.check_positive("f", eps=value)
    checks.check_positive("f", zero_allowed=True, eps=0.0, other=1.0)


def test_require():
    assert checks.require("json", extra="book", purpose="a test") is sys.modules["json"]
    with pytest.raises(MissingDependency, match=r"drawing needs absent_library, .* pip install 'p2k\[book\]'"):
        checks.require("absent_library.pyplot", extra="book", purpose="drawing")


def test_seeds_repeat():
    draws = []
    for _ in range(2):
        seeding.seed_everything(2**32 + 5)
        draws.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert draws[0] == draws[1]
    first, second, other = (torch.rand(3, generator=seeding.generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_devices():
    assert device.choose_device("cpu") == torch.device("cpu")
    assert device.choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(P2KError, match="device must be auto, cpu, cuda or cuda:N, got 'gpu'"):
        device.choose_device("gpu")
    with pytest.raises(P2KError, match=r"torch .* sees \d+ CUDA devices"):
        device.choose_device("cuda:99")


def test_versions_and_names():
    assert device.version_of("no-such-distribution") is None
    assert device.versions()["torch"] == device.version_of("torch")
    assert device.device_name("cpu").strip()
