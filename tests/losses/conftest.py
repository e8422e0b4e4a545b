"""Collect the comparison with TRL where TRL is installed; the package does not need it."""

import importlib.util

collect_ignore = [] if importlib.util.find_spec("trl") else ["test_trl.py", "test_trl_trainer.py"]
