"""Settings every test process needs before torch and Triton are imported, and what each test file costs."""

import collections
import gc
import json
import os
from pathlib import Path

# One thread is deterministic, and faster when test processes share two cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["SOURCE_DATE_EPOCH"] = "0"

import pytest
import torch

# Triton fixes interpreter mode at its first import in a process. Compile-only checks run in processes without it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)
# Looking through all of torch's and Triton's objects after every few hundred new ones takes a tenth of a run.
gc.set_threshold(100_000, 20, 100)


class Seconds:
    """Add up the seconds of every test file, and keep them in `_build/test-seconds.json` after a whole run.

    With several processes only the one that collects the reports has this; `p2k bench` joins them per chapter.
    """

    def __init__(self) -> None:
        self.files = collections.defaultdict(float)

    def pytest_runtest_logreport(self, report) -> None:
        self.files[report.nodeid.partition("::")[0]] += report.duration

    def pytest_sessionfinish(self, session) -> None:
        target = Path(session.config.rootpath) / "_build" / "test-seconds.json"
        target.parent.mkdir(exist_ok=True)
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        rounded = {name: round(seconds, 3) for name, seconds in sorted(self.files.items())}
        part.write_text(json.dumps(rounded, indent=1))
        os.replace(part, target)


def pytest_configure(config) -> None:
    whole = config.args_source.name == "TESTPATHS" and not any(config.getoption(name) for name in ("-k", "-m", "lf"))
    if whole and not hasattr(config, "workerinput") and not config.getoption("collectonly"):
        config.pluginmanager.register(Seconds())


def pytest_collection_modifyitems(items) -> None:
    """Long work first: what needs the built site, then the notebooks."""
    first = {"site": 0, "notebooks": 1}
    items.sort(key=lambda item: first.get(item.path.parent.name, 2))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keep a file on one process, for what its tests share, and the tests of the site together.

    Two processes that both need the site would wait for one build. Notebooks share nothing and go one by one.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = Path(nodeid.partition("::")[0])
            alone = file.parent.name == "notebooks" and "[" in nodeid
            return nodeid if alone else "site" if file.parent.name == "site" else str(file)

    return ByFile(config, log)
