"""The built site, served on 127.0.0.1, and one headless Chromium that may ask for nothing else."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

ROOT = Path(__file__).parents[2]
HTML = ROOT / "_build" / "html"
INPUTS = ["_config.yml", "_toc.yml", "book", "notebooks", "src"]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
# Whatever is not on this machine is asked of a proxy that is not there. Refusing requests one by one in a test would
# switch the browser's cache off.
FLAGS += ["--proxy-server=http://127.0.0.1:9"]
NO_CHROMIUM = (
    "The site tests need Chromium, and none is on the PATH. Debian and Ubuntu: `sudo apt-get install chromium`; "
    "macOS: `brew install --cask chromium`; anywhere: `.venv/bin/playwright install chromium` and put its folder on "
    "the PATH."
)


def toc_pages() -> list[str]:
    """Every page of the table of contents, the root first."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    return [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`toc_page` runs over every page."""
    if "toc_page" in metafunc.fixturenames:
        metafunc.parametrize("toc_page", toc_pages())


def find_chromium() -> str:
    """The browser's path; a sentence that says how to get one where there is none."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.fail(NO_CHROMIUM, pytrace=False)
    return path


def _is_current() -> bool:
    """True when no input of the site is younger than the last build."""
    built = HTML / "objects.inv"
    if not built.exists():
        return False
    files = [path for name in INPUTS for path in [ROOT / name, *(ROOT / name).rglob("*")] if path.is_file()]
    files = [path for path in files if "__pycache__" not in path.parts]
    return max(path.stat().st_mtime for path in files) < built.stat().st_mtime


@pytest.fixture(scope="session")
def site() -> Path:
    """Build the site strictly unless it is current; test processes take turns."""
    (ROOT / "_build").mkdir(exist_ok=True)
    with FileLock(ROOT / "_build" / ".lock"):
        if not _is_current():
            command = [Path(sys.executable).with_name("jupyter-book"), "build", str(ROOT), "-W", "--keep-going"]
            # As `make book` builds it: Triton is not interpreted, and the copyright year is not that of the epoch.
            environment = {
                key: os.environ[key] for key in os.environ.keys() - {"TRITON_INTERPRET", "SOURCE_DATE_EPOCH"}
            }
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            if done.returncode:
                warnings = [line for line in done.stderr.splitlines() if "WARNING" in line or "ERROR" in line]
                pytest.fail("The strict build failed:\n" + "\n".join(warnings or [done.stderr[-3000:]]), pytrace=False)
            # Sphinx leaves files alone whose content is unchanged.
            (HTML / "objects.inv").touch()
    return HTML


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Print nothing per request."""


@pytest.fixture(scope="session")
def address(site: Path) -> Iterator[str]:
    """Serve the site; the value ends in a slash."""
    handler = functools.partial(_QuietHandler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="session")
def chromium() -> Callable[[], str]:
    """The function that finds the browser."""
    return find_chromium


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    """One Chromium for all tests."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        yield launched
        launched.close()
