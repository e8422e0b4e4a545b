"""Collect the comparisons with TRL and verl where these are installed; the package does not need them."""

import importlib.util

NEEDS = {"test_trl.py": "trl", "test_trl_trainer.py": "trl", "test_verl.py": "verl"}
collect_ignore = [name for name, module in NEEDS.items() if importlib.util.find_spec(module) is None]
