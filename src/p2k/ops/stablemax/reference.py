"""StableMax cross-entropy in plain torch, in the paper's order: the specification.

Letters of the paper and of this file: z logits, s the map that takes the exponential's place, p probabilities, y the
label. Shape suffixes: T tokens (any leading shape), V classes.

As in the authors' code, everything is computed in float64 and rounded once.

Source: prieto2025grokking, eq:stablemax-s, eq:stablemax-loss.  Chapter: stablemax
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def s(z: Tensor) -> Tensor:
    """z + 1 from 0 on, 1 / (1 - z) below.

    Each branch sees its own half-line only: the other one would put a pole at z = 1 into the gradient.
    """
    upper = z >= 0
    return torch.where(upper, z + 1, 1 / (1 - torch.where(upper, 0.0, z)))


def symlog(z: Tensor) -> Tensor:
    """``log s(z) = sign(z) log(1 + |z|)``, with the slope 1 at 0 that the formula with signs hides from autograd."""
    upper = z >= 0
    return torch.where(upper, torch.log1p(torch.where(upper, z, 0.0)), -torch.log1p(-torch.where(upper, 0.0, z)))


def stablemax(z_TV: Tensor) -> Tensor:
    """Probabilities s(z) / sum s(z), in the accumulation type."""
    return symlog(z_TV.double()).softmax(-1).to(torch.promote_types(z_TV.dtype, torch.float32))


def cross_entropy(z_TV: Tensor, y_T: Tensor, ignore_index: int) -> Tensor:
    """-log p_y for each token; 0 where y is `ignore_index`."""
    absent_T = y_T == ignore_index
    z = z_TV.masked_fill(absent_T[..., None], 0.0)
    log_p_TV = F.log_softmax(symlog(z.double()), -1)
    loss_T = -log_p_TV.gather(-1, y_T.masked_fill(absent_T, 0)[..., None])[..., 0]
    return loss_T.masked_fill(absent_T, 0.0).to(torch.promote_types(z_TV.dtype, torch.float32))


def cross_entropy_backward(grad_T: Tensor, z_TV: Tensor, y_T: Tensor) -> Tensor:
    """Closed-form gradient ``(p - onehot) / (1 + |z|)`` of `cross_entropy` where no token is absent.

    Source: prieto2025grokking, eq:stablemax-gradient.
    """
    p_TV = symlog(z_TV).softmax(-1)
    return grad_T[..., None] * (p_TV - F.one_hot(y_T, z_TV.shape[-1])) / (1 + z_TV.abs())
