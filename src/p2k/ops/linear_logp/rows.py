"""The row stage in plain torch: from a chunk's logits to numbers per token, and to the gradient of the logits.

Both functions own the logits they are given and overwrite them. Numbers per token, in this order: log-probability of
the target, largest logit, log of the sum of exp(logit - largest), entropy. The largest logit and the log stay apart:
their sum would round away what tells the logits of a far-off row from each other.
With s = log p, and g, l, e the gradients of log-probability, log-sum-exp and entropy, the gradient of a logit is
g (onehot - p) + l p - e p (s + entropy).

Source: wijmans2025cut.
"""

import torch
from torch import Tensor


def forward(logits: Tensor, bias: Tensor | None, target: Tensor, scale: float, numbers: Tensor) -> None:
    """Write the numbers ``[4, tokens]`` of a chunk ``[tokens, vocab]``; `scale` is one over the temperature."""
    _scaled(logits, bias, scale)
    logp, largest, log_sum, entropy = numbers
    torch.amax(logits, 1, out=largest)
    shifted = logits.sub_(largest[:, None])
    torch.gather(shifted, 1, target[:, None], out=logp[:, None])
    weights = shifted.exp()
    total = weights.sum(1)
    torch.log(total, out=log_sum)
    logp.sub_(log_sum)
    moment = weights.mul_(_finite(shifted)).sum(1)
    torch.sub(log_sum, moment.div_(total), out=entropy)


def backward(
    logits: Tensor, bias: Tensor | None, target: Tensor, numbers: Tensor, grads: Tensor, scale: float, out: Tensor
) -> None:
    """Write the gradient of the unscaled logits into `out`, which may be `logits`; `grads` is ``[3, tokens]``."""
    _, largest, log_sum, entropy = numbers[..., None]
    g, l, e = grads[..., None]  # noqa: E741 - the letters of this file
    s = _finite(_scaled(logits, bias, scale).sub_(largest).sub_(log_sum))
    p = s.exp()
    d = s.add_(entropy).mul_(p).mul_(-e)
    d.addcmul_(p, l)
    hot_less_p = p.neg_().scatter_add_(1, target[:, None], torch.ones_like(largest))
    torch.mul(d.addcmul_(hot_less_p, g), scale, out=out)


def _scaled(logits: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Bias and temperature, in place."""
    if bias is not None:
        logits.add_(bias)
    return logits.mul_(scale)


def _finite(shifted: Tensor) -> Tensor:
    """-inf becomes the least number, in place: its exponential is 0 all the same, and 0 times it is 0."""
    return shifted.clamp_min_(torch.finfo(shifted.dtype).min)
