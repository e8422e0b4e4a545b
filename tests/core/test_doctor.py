"""The machine report names what is missing and what to do."""

import importlib.util
import shutil

from p2k.core import doctor


def test_every_finding_that_is_missing_has_advice():
    findings = doctor.examine()
    assert {"Python", "torch", "Triton", "C++ compiler", "chromium"} <= {finding.name for finding in findings}
    assert all(finding.advice for finding in findings if finding.found in ("missing", "incomplete"))


def test_an_absent_package_is_named(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "papermill" else found(name))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    findings = {finding.name: finding for finding in doctor.examine()}
    assert findings["extra 'book'"].advice == "pip install 'p2k[book]' for papermill"
    assert findings["chromium"].found == "missing"
