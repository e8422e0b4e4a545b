"""What this machine can do, and what to install for the rest."""

import importlib.util
import platform
import shutil
import sys
from dataclasses import dataclass

import torch

from p2k.core.backend import interpreting
from p2k.core.device import device_name, version_of


@dataclass(frozen=True)
class Finding:
    """One line of the report. `advice` is empty where nothing is missing."""

    name: str
    found: str
    advice: str = ""


def examine() -> list[Finding]:
    """Look at Python, torch, Triton, the GPU, the compiler, the browser and the optional packages."""
    cuda = torch.cuda.is_available()
    python = Finding("Python", platform.python_version(), "" if sys.version_info >= (3, 11) else "install Python 3.11")
    gpu = f"{device_name('cuda')}, {torch.cuda.device_count()} of them" if cuda else ""
    kernels = "compiled" if cuda else "interpreted" if interpreting() else ""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    return [
        python,
        Finding("torch", torch.__version__),
        _needed("Triton", version_of("triton"), "pip install 'p2k[gpu]' (Linux)"),
        _needed("CUDA GPU", gpu, "none is seen; every chapter's cpu profile runs without one"),
        _needed("kernels", kernels, "set TRITON_INTERPRET=1 to run them in the CPU interpreter"),
        _needed("C++ compiler", shutil.which("g++"), "torch.compile on a CPU needs one: apt install g++"),
        _needed("chromium", chromium, "the site tests need it: apt install chromium, or playwright install chromium"),
        _extra("book", "jupyter_book", "papermill", "matplotlib", "sklearn"),
        _extra("test", "pytest", "hypothesis", "nbval", "playwright"),
    ]


def _needed(name: str, found: str | None, advice: str) -> Finding:
    return Finding(name, found) if found else Finding(name, "missing", advice)


def _extra(name: str, *modules: str) -> Finding:
    """Whether the packages of an extra are installed."""
    absent = [module for module in modules if importlib.util.find_spec(module) is None]
    advice = f"pip install 'p2k[{name}]' for {', '.join(absent)}" if absent else ""
    return Finding(f"extra '{name}'", "incomplete" if absent else "installed", advice)
