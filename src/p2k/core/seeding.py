"""Seeds. Library code takes a torch.Generator; only scripts and notebooks seed the global state."""

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator on `device`, seeded with `seed`."""
    return torch.Generator(device).manual_seed(seed)
