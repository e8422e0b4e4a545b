"""What this machine is: the device a run uses and the versions it ran with."""

import importlib.metadata
import platform
from pathlib import Path

import torch

from p2k.core.errors import P2KError


def choose_device(name: str = "auto") -> torch.device:
    """Turn `auto`, `cpu`, `cuda` or `cuda:N` into a device that exists.

    Raises:
        P2KError: the name is unknown, or CUDA was asked for and torch sees none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise P2KError(f"device must be auto, cpu, cuda or cuda:N, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise P2KError(f"device {name!r} was asked for, but torch {torch.__version__} sees {count} CUDA devices")
    return device


def device_name(device: torch.device | str = "cpu") -> str:
    """The marketing name of the GPU, or of the CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def version_of(package: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Versions that can change a number: Python, torch, Triton, NumPy."""
    found = {package: version_of(package) for package in ("torch", "triton", "numpy")}
    return {"python": platform.python_version(), **found}
