"""What the reference and the kernel agree on: tile sizes, targets as codes, and the order of the vocabulary.

The filter looks at whole tiles, so which entries it drops depends on the tile. One table serves both backends.

Source: wijmans2025cut, eq:cut-cross-entropy-order.
Chapter: cut-cross-entropy
"""

import torch
from torch import Tensor

# Element bytes -> (tokens, vocabulary entries) of a tile: the largest whose registers do not spill.
TILE = {2: (128, 64), 4: (64, 64), 8: (64, 64)}
# Stand-ins for targets that name no entry of the vocabulary.
ABSENT, UNKNOWN = -1, -2


def tile_of(dtype: torch.dtype) -> tuple[int, int]:
    """Tokens and vocabulary entries of a tile for operands of this dtype."""
    return TILE[dtype.itemsize]


def codes(target: Tensor, vocab: int, ignore_index: int) -> Tensor:
    """Targets in one row, `ABSENT` where a token does not count and `UNKNOWN` where no entry is meant."""
    target = target.reshape(-1)
    absent = target == ignore_index
    unknown = ((target < 0) | (target >= vocab)) & ~absent
    return target.masked_fill(absent, ABSENT).masked_fill(unknown, UNKNOWN)


def vocabulary_order(hidden: Tensor, weight: Tensor, bias: Tensor | None, present: Tensor) -> Tensor:
    """Entries of the vocabulary by their mean logit over the present tokens, smallest first, ``[vocab]`` int64.

    A mean over tokens commutes with a linear head, so it costs one product of the weight with a vector.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = hidden.masked_fill(~present[:, None], 0.0).sum(0, dtype=wide)
    mean = total / present.sum().clamp(min=1)
    logits = weight @ mean.to(weight.dtype)
    if bias is not None:
        logits = logits + bias
    return logits.argsort(stable=True)
