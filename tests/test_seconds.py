"""The hook in conftest.py that notes what each test file costs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# What conftest.py asks of torch.
TORCH = """
class cuda:
    is_available = staticmethod(lambda: False)
def set_num_threads(number):
    pass
"""


@pytest.fixture
def suite(tmp_path):
    """A small suite with this one's conftest, in one process or with a second one; its options and its result.

    Without torch, whose import would take most of the time, and without the plugins of the environment.
    """
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")
    (tmp_path / "tests" / "conftest.py").write_text(Path(__file__).with_name("conftest.py").read_text())
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "tests" / "test_slow.py").write_text("import time\ndef test_it():\n    time.sleep(0.3)\n")
    (tmp_path / "tests" / "test_fast.py").write_text("def test_it():\n    pass\n")

    def run(*options):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "xdist.plugin", *options]
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(tmp_path)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return tmp_path / "_build" / "test-seconds.json"

    return run


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["one process", "xdist"])
def test_a_whole_run_notes_the_seconds_of_each_file(suite, options):
    path = suite(*options)
    seconds = json.loads(path.read_text())
    assert list(seconds) == ["tests/test_fast.py", "tests/test_slow.py"]
    assert 0.3 <= seconds["tests/test_slow.py"] < 3
    assert [found.name for found in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("options", [("tests/test_fast.py",), ("-k", "fast")])
def test_part_of_a_run_notes_nothing(suite, options):
    assert not suite(*options).exists()
