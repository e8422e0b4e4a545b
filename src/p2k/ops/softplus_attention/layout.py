"""Tiles of the programs, and what their launchers read off the tensors: sizes, strides, counts of visible keys.

Chapter: softplus-attention
"""

from torch import Tensor

# Program -> (element bytes, padded head width) -> (tile of queries, tile of keys, warps, stages): tiles whose registers
# do not spill on sm_80 and sm_90. Programs called sharp re-weight.
LAUNCH = {
    "forward": {(2, 64): (128, 64, 8, 3), (2, 128): (128, 64, 8, 2), (4, 64): (32, 32, 4, 1)},
    "query_gradient": {(2, 64): (64, 32, 4, 2), (2, 128): (64, 64, 8, 2), (4, 64): (32, 32, 8, 1)},
    "key_gradient": {(2, 64): (64, 32, 4, 2), (2, 128): (32, 64, 8, 2), (4, 64): (32, 32, 4, 2)},
    "sharp forward": {(2, 64): (128, 64, 8, 3), (2, 128): (64, 64, 8, 2), (4, 64): (32, 32, 4, 1)},
    "sharp query_gradient": {(2, 64): (32, 32, 4, 2), (2, 128): (32, 64, 8, 2), (4, 64): (16, 32, 4, 1)},
    "sharp key_gradient": {(2, 64): (64, 32, 4, 2), (2, 128): (32, 32, 8, 2), (4, 64): (32, 32, 8, 2)},
}


def sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """heads, group, queries, keys, width, value_width."""
    return q.shape[1], q.shape[1] // max(k.shape[1], 1), q.shape[2], k.shape[2], q.shape[3], v.shape[3]


def unit_stride(x: Tensor) -> Tensor:
    """The tensor itself where its last dimension has unit stride, else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """Strides of all dimensions but the last."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def numbers(q: Tensor, k: Tensor, v: Tensor, *grad: Tensor, mask: Tensor | None) -> tuple[int, ...]:
    """Strides of the operands, of the mask broadcast to [batch, heads, queries, keys], then the sizes."""
    seen = (0, 0, 0, 0) if mask is None else mask.expand(*q.shape[:3], k.shape[2]).stride()
    return *strides(q, k, v, *grad), *seen, *sizes(q, k, v)


def visible_counts(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor | None:
    """How many keys each query sees under a mask, int64 [B, H, T]; None without one."""
    return None if mask is None else mask.expand(*q.shape[:3], k.shape[2]).sum(-1).contiguous()


def programs(x: Tensor, block: int) -> int:
    """One program per tile of `block` rows of every matrix in `x`."""
    return x.shape[0] * x.shape[1] * -(-x.shape[2] // block)
