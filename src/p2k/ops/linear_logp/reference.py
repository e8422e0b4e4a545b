"""Log-probabilities of a linear head in plain torch, with every logit in memory: the specification.

Letters: h hidden state, W and b weight and bias of the head, tau temperature, z = (W h + b) / tau logits, y target,
p = softmax(z).
Shape suffixes: T tokens (any leading shape), D hidden width, V vocabulary.

Half-precision inputs are widened to float32, as the results are; float64 stays float64.

Source: wijmans2025cut.
"""

import torch
from torch import Tensor


def linear_logp(
    h_TD: Tensor, W_VD: Tensor, y_T: Tensor, b_V: Tensor | None, tau: float, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor]:
    """log p_y, logsumexp z and the entropy of p for each token; 0 where y is `ignore_index`.

    Absent tokens are zeroed before and after, so that neither pass sees what they hold.
    """
    wide = torch.promote_types(h_TD.dtype, torch.float32)
    absent_T = y_T == ignore_index
    h = h_TD.to(wide).masked_fill(absent_T[..., None], 0.0)
    z_TV = h @ W_VD.to(wide).T
    if b_V is not None:
        z_TV = z_TV + b_V.to(wide)
    z_TV = z_TV / tau
    log_p_TV = torch.log_softmax(z_TV, -1)
    logp_T = log_p_TV.gather(-1, y_T.masked_fill(absent_T, 0)[..., None])[..., 0]
    # p log p is 0 where p is, and so is its gradient.
    entropy_T = -(log_p_TV.exp() * log_p_TV.masked_fill(log_p_TV == -torch.inf, 0.0)).sum(-1)
    found = (logp_T, torch.logsumexp(z_TV, -1), entropy_T)
    return tuple(number.masked_fill(absent_T, 0.0) for number in found)
