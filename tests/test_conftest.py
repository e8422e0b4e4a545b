"""The hooks in conftest.py: what each test file costs, and which process runs it."""

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


def test_a_file_stays_on_one_process_and_notebooks_are_spread(suite, tmp_path):
    many = "import pytest\n@pytest.mark.parametrize('slug', range(8))\ndef test_it(slug, worker_id):\n"
    many += "    with open('workers', 'a') as file:\n        print(__name__, worker_id, file=file)\n"
    (tmp_path / "tests" / "notebooks").mkdir()
    for name in ("test_many.py", "test_more.py", "notebooks/test_each.py"):
        (tmp_path / "tests" / name).write_text(many)
    suite("-n", "2", "--dist", "loadscope", "--no-loadscope-reorder")
    found = [line.split() for line in (tmp_path / "workers").read_text().splitlines()]
    workers = {file: {worker for name, worker in found if name == file} for file, _ in found}
    assert len(found) == 24
    assert {file: len(names) for file, names in workers.items()} == {"test_many": 1, "test_more": 1, "test_each": 2}
