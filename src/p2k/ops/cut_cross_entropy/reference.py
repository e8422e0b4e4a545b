"""Cut cross-entropy in plain torch: a differentiable specification, and the filtered backward pass tile by tile.

Letters: h hidden state (the paper's E), W and b weight and bias of the head (its C), a = W h + b, c softcap,
z = c tanh(a / c) or a, y target, S = softmax(z), d = S - onehot(y), G gradient of a, epsilon the filter's threshold.
Shape suffixes: T tokens, D hidden width, V vocabulary, t and v tokens and entries of a tile.

Half-precision inputs are widened to float32, as the results are; float64 stays float64.

Source: wijmans2025cut, eq:cut-cross-entropy-loss, eq:cut-cross-entropy-gradients, eq:cut-cross-entropy-filter.
Chapter: cut-cross-entropy
"""

import torch
from torch import Tensor

from p2k.ops.cut_cross_entropy.tiles import ABSENT, UNKNOWN, vocabulary_order

# Tokens whose logits the forward pass holds at once; its result does not depend on them.
ROWS = 128


def logits(h_TD: Tensor, W_VD: Tensor, b_V: Tensor | None, c: float | None) -> Tensor:
    """z, with every entry in memory."""
    a_TV = h_TD @ W_VD.T
    if b_V is not None:
        a_TV = a_TV + b_V
    return a_TV if c is None else c * torch.tanh(a_TV / c)


def cut_cross_entropy(
    h_TD: Tensor, W_VD: Tensor, y_T: Tensor, b_V: Tensor | None, c: float | None, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of each token by way of all logits, differentiable twice; 0 for absent tokens."""
    h, W, b = (None if x is None else _wide(x) for x in (h_TD, W_VD, b_V))
    absent = y_T == ignore_index
    z = logits(h.masked_fill(absent[..., None], 0.0), W, b, c)
    picked = torch.log_softmax(z, -1).gather(-1, y_T.masked_fill(absent, 0)[..., None])[..., 0]
    return tuple(x.masked_fill(absent, 0.0) for x in (-picked, torch.logsumexp(z, -1)))


def forward(h_TD: Tensor, W_VD: Tensor, y_T: Tensor, b_V: Tensor | None, c: float | None) -> Tensor:
    """The numbers ``[3, T]`` of each token: target's logit, largest logit, log of the sum above it.

    `y_T` holds codes. The logits of `ROWS` tokens exist at once.
    """
    h, W, b = (None if x is None else _wide(x) for x in (h_TD, W_VD, b_V))
    numbers = h.new_zeros(3, len(h))
    for start in range(0, len(h), ROWS):
        rows = slice(start, start + ROWS)
        y = y_T[rows]
        z = logits(h[rows].masked_fill((y == ABSENT)[:, None], 0.0), W, b, c)
        numbers[0, rows] = z.gather(1, y.clamp_min(0)[:, None])[:, 0].masked_fill(y == UNKNOWN, torch.nan)
        numbers[1, rows] = z.amax(1)
        numbers[2, rows] = (z - z.amax(1, keepdim=True)).exp().sum(1).log()
    return numbers.masked_fill(y_T == ABSENT, 0.0)


def backward(  # noqa: PLR0913 - the ops' own arguments
    grads: Tensor, h_TD: Tensor, W_VD: Tensor, y_T: Tensor, b_V: Tensor | None, numbers: Tensor, c: float | None,
    epsilon: float, sort: bool, filter_weight: bool, needs: list[bool], tile: tuple[int, int],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of (h, W, b) and the tiles that were kept, ``[tiles of T, tiles of V]``.

    `grads` is ``[2, T]``: of the loss and of log-sum-exp. A tile is skipped where all ``|d| < epsilon``, before any
    upstream gradient is multiplied in. A token whose log-sum-exp has a gradient needs ``S < epsilon`` too: a certain
    target has d near 0 and S near 1.
    """
    order = vocabulary_order(h_TD, W_VD, b_V, y_T != ABSENT) if sort else torch.arange(len(W_VD), device=W_VD.device)
    h, W, b = (None if x is None else _wide(x) for x in (h_TD, W_VD, b_V))
    W, b = W[order], None if b is None else b[order]
    dh, dW, db = h.new_zeros(h.shape), W.new_zeros(W.shape), W.new_zeros(len(W))
    kept = []
    for start in range(0, len(h), tile[0]):
        rows = slice(start, start + tile[0])
        there = (y_T[rows] != ABSENT)[:, None]
        h_tD = h[rows].masked_fill(~there, 0.0)
        z = logits(h_tD, W, b, c)
        S = (z - numbers[1, rows, None] - numbers[2, rows, None]).exp()
        hot = (order == y_T[rows, None]).to(S)
        d = (S - hot).masked_fill(~there, 0.0)
        g, l = (grad[rows, None].masked_fill(~there, 0.0) for grad in grads)  # noqa: E741 - as in the docstring
        keep = _keep(torch.where(l == 0, d.abs(), torch.maximum(d.abs(), S)), epsilon, tile[1])
        G = g * d + l * S
        if c is not None:
            G = G * (1 - (z / c).square())
        wide = keep.repeat_interleave(tile[1])[: len(W)]
        G_filtered = torch.where(wide, G, 0.0)
        dh[rows] = G_filtered @ W
        G = G_filtered if filter_weight else G
        dW += G.T @ h_tD
        db += G.sum(0)
        kept.append(keep)
    place = order.argsort()
    found = (dh, dW[place], db[place])
    kept = torch.stack(kept) if kept else torch.zeros(0, -(-len(W) // tile[1]), dtype=torch.bool, device=W.device)
    return *(x.to(h_TD.dtype) if need else None for x, need in zip(found, needs, strict=True)), kept


def _keep(size_tV: Tensor, epsilon: float, width: int) -> Tensor:
    """Which tiles of the vocabulary hold an entry that is not below epsilon; NaN is not."""
    large = ~(size_tV < epsilon)
    missing = -size_tV.shape[1] % width
    return torch.nn.functional.pad(large.any(0), (0, missing)).view(-1, width).any(1)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
