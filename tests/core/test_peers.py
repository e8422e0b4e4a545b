import sys
from types import SimpleNamespace

import pytest

from p2k.core import peers


def test_an_installed_peer_is_one_callable_by_its_distribution(monkeypatch):
    monkeypatch.setattr(peers, "version_of", {"liger-kernel": "0.9"}.get)
    monkeypatch.setitem(sys.modules, "liger_fake", SimpleNamespace(softmax=abs))
    assert peers.peer("liger-kernel", "liger_fake:softmax") == {"liger-kernel": abs}
    assert peers.peer_versions()["liger-kernel"] == "0.9"
    assert peers.peer_versions()["fast-hadamard-transform"] is None


def test_a_missing_peer_is_no_entry_and_is_not_imported(monkeypatch):
    monkeypatch.setattr(peers, "version_of", {}.get)
    assert peers.peer("liger-kernel", "module_that_does_not_exist:f") == {}


def test_a_peer_whose_version_no_record_shows_is_refused():
    with pytest.raises(ValueError, match="distribution must be one of liger-kernel, .*got 'mystery'"):
        peers.peer("mystery", "math:sqrt")
