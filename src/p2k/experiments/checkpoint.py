"""Checkpoints that are written whole, read without running code, and refuse another run's settings."""

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import nn

from p2k.core.errors import P2KError
from p2k.core.files import write_atomically


def run_fingerprint(model: nn.Module, settings: dict[str, Any]) -> str:
    """Sha256 of the settings and of the names and shapes of the model's state: what a resumed run must share."""
    state = {name: [str(tensor.dtype), *tensor.shape] for name, tensor in model.state_dict().items()}
    text = json.dumps({"settings": settings, "state": state}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def save_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, fingerprint: str, progress: dict[str, Any]
) -> None:
    """Write model, optimizer and random states with the run's progress.

    Args:
        path: the file; its folder is created.
        model: unwrapped module, so that one and several processes read each other's files.
        optimizer: its state goes along.
        fingerprint: from `run_fingerprint`.
        progress: numbers and tensors of the loop, such as the epoch and the losses so far.
    """
    content = {
        "fingerprint": fingerprint,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "cpu_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "progress": progress,
    }
    write_atomically(path, lambda file: torch.save(content, file))


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *, fingerprint: str
) -> dict[str, Any]:
    """Restore what `save_checkpoint` wrote and return its progress.

    Raises:
        P2KError: the file is damaged, or belongs to a run with other settings or another model.
    """
    advice = "remove it to start over, or choose another folder"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        found = content["fingerprint"]
    except (RuntimeError, OSError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise P2KError(f"{path} is not a readable checkpoint ({type(error).__name__}): {advice}") from error
    if found != fingerprint:
        raise P2KError(f"{path} belongs to a run with other settings, seed or model: {advice}")
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    torch.set_rng_state(content["cpu_rng"])
    if content["cuda_rng"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(content["cuda_rng"])
    return content["progress"]
