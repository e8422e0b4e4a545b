import sys
from types import SimpleNamespace

import pytest

from p2k.core import peers


def test_an_installed_peer_is_one_callable_by_its_distribution(monkeypatch):
    monkeypatch.setattr(peers, "version_of", {"liger-kernel": "0.9"}.get)
    monkeypatch.setitem(sys.modules, "liger_fake", SimpleNamespace(softmax=abs, Function=SimpleNamespace(apply=str)))
    assert peers.peer("liger-kernel", "liger_fake:Function.apply")["liger-kernel"](2) == "2"
    assert peers.peer("liger-kernel", "liger_fake:softmax")["liger-kernel"](-2) == 2
    assert peers.peer_versions()["liger-kernel"] == "0.9"
    assert peers.peer_versions()["fast-hadamard-transform"] is None


def test_a_missing_peer_says_so_when_it_is_called(monkeypatch):
    monkeypatch.setattr(peers, "version_of", {}.get)
    (found,) = peers.peer("liger-kernel", "module_that_does_not_exist:f").values()
    with pytest.raises(ImportError, match="liger-kernel is not installed"):
        found()


def test_a_peer_whose_version_no_record_shows_is_refused():
    with pytest.raises(ValueError, match="distribution must be one of liger-kernel, .*got 'mystery'"):
        peers.peer("mystery", "math:sqrt")
