"""Modular arithmetic: all pairs of residues with the result of an operation on them, split at random."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from p2k.core.seeding import generator

OPERATIONS = {
    "add": lambda x, y, p: (x + y) % p,
    "subtract": lambda x, y, p: (x - y) % p,
    "multiply": lambda x, y, p: (x * y) % p,
}


@dataclass(frozen=True, eq=False)
class ModularData:
    """A split table of a binary operation on residues.

    Args:
        modulus: number of residues p.
        train_pairs, test_pairs: two residues per example.
        train_labels, test_labels: the result of each.
    """

    modulus: int
    train_pairs: Int[Tensor, "train 2"]
    train_labels: Int[Tensor, " train"]
    test_pairs: Int[Tensor, "test 2"]
    test_labels: Int[Tensor, " test"]

    def one_hot(self, pairs: Int[Tensor, "examples 2"]) -> Float[Tensor, "examples features"]:
        """Both residues of each pair as one-hot vectors side by side, ``[examples, 2 modulus]``."""
        return torch.nn.functional.one_hot(pairs, self.modulus).flatten(-2).float()


def make_modular(
    modulus: int = 113, *, operation: str = "add", train_fraction: float = 0.4, seed: int = 0
) -> ModularData:
    """All ``modulus ** 2`` pairs with the result of an operation modulo `modulus`, a random share for training.

    Args:
        modulus: number of residues, ``>= 2``.
        operation: `add`, `subtract` or `multiply`.
        train_fraction: share of the pairs for training, rounded down, with at least one pair on either side.
        seed: of the split.

    Raises:
        ValueError: an argument is out of range.
    """
    op = "make_modular"
    if operation not in OPERATIONS:
        raise ValueError(f"{op}: operation must be one of {', '.join(OPERATIONS)}, got {operation!r}")
    if modulus < 2:
        raise ValueError(f"{op}: modulus must be at least 2, got {modulus}")
    count = int(train_fraction * modulus**2)
    if not 0 < count < modulus**2:
        raise ValueError(f"{op}: train_fraction must leave pairs on either side, got {train_fraction}")
    pairs = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus))
    pairs = pairs[torch.randperm(len(pairs), generator=generator(seed))]
    labels = OPERATIONS[operation](pairs[:, 0], pairs[:, 1], modulus)
    return ModularData(modulus, pairs[:count], labels[:count], pairs[count:], labels[count:])
