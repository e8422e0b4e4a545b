import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

from p2k.core.interpreter import quick_calls


@triton.jit
def _centred(x, mean):
    return tl.where(x > mean, tl.exp(-x), tl.math.sqrt(tl.abs(x)))


@triton.jit
def _mean(x, N: tl.constexpr):
    return tl.sum(x, 0) / N


@triton.jit
def program(x_ptr, out_ptr, CALLS: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, N)
    x = tl.load(x_ptr + at)
    for _ in range(CALLS):
        x = _centred(x, _mean(x, N))
    tl.store(out_ptr + at, tl.cumsum(x.to(tl.float32), 0))


def launched(calls=3):
    x = torch.randn(64, generator=torch.Generator().manual_seed(0))
    out = torch.empty_like(x)
    program[(2,)](x, out, CALLS=calls, N=64)
    return out


@pytest.fixture
def patches(monkeypatch):
    """The arguments of every search through a part of the language."""
    seen, search = [], interpreter._patch_builtin
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *args: (seen.append(args), search(*args)))
    return seen


def test_results_are_those_of_the_plain_interpreter(monkeypatch):
    quick = launched()
    monkeypatch.setattr(interpreter, "_patch_lang", interpreter._patch_lang.__wrapped__)
    plain = launched()
    assert torch.equal(quick, plain)
    assert quick.isfinite().all()


def test_helpers_cost_no_search(monkeypatch, patches):
    launched()
    patches.clear()
    launched(calls=1)
    once = len(patches)
    launched(calls=9)
    assert len(patches) == 2 * once
    patches.clear()
    monkeypatch.setattr(interpreter, "_patch_lang", interpreter._patch_lang.__wrapped__)
    launched(calls=9)
    assert len(patches) > 10 * once


@pytest.mark.parametrize("calls", [2, None])
def test_the_language_is_itself_again_after_a_launch_and_after_a_failure(calls):
    if calls is None:
        with pytest.raises(Exception, match="NoneType"):
            launched(calls)
    else:
        launched(calls)
    assert tl.core.is_builtin(tl.load)


def test_the_interpreter_is_itself_again():
    before = interpreter._patch_lang
    with quick_calls():
        assert interpreter._patch_lang is not before
    assert interpreter._patch_lang is before
    with pytest.raises(ValueError, match="body"), quick_calls():
        raise ValueError("body")
    assert interpreter._patch_lang is before
