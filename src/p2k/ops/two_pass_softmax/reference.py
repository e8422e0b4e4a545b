"""Softmax in two passes: every exponential is a pair (mantissa, exponent) that cannot overflow.

Letters: n integer-valued exponent, t reduced argument, p mantissa in [2^-1/2, 2^1/2], m and v mantissa and exponent of
the running sum, so that e^x = p 2^n and the sum is m 2^v.

Source: dukhan2020twopass.  Chapter: two-pass-softmax
"""

import math

import torch
from torch import Tensor

# Powers of two below this exponent are zero in every dtype that a result is rounded to.
LOWEST_EXPONENT = -1100.0
# Arguments below this count as -inf: e**x is zero beside anything else, and the reduction would run out of digits.
LOWEST = -1e9
# An exponent for e**-inf = 0 that stays finite in differences.
ZERO_EXPONENT = -1e30
# ln 2 in two parts. The first has 24 bits, so that its product with an exponent of up to 29 bits is exact in float64.
LN2_HIGH = torch.tensor(math.log(2), dtype=torch.float32).item()
LN2_LOW = math.log(2) - LN2_HIGH


def exponential_pair(x: Tensor) -> tuple[Tensor, Tensor]:
    """(p, n) in float64 with p * 2**n = e**x and p in [2^-1/2, 2^1/2]; -inf gives p = 0, NaN stays NaN."""
    x = x.double()
    zero = x < LOWEST
    x = torch.where(zero, 0.0, x)
    n = torch.round(x / math.log(2))
    p = torch.exp((x - n * LN2_HIGH) - n * LN2_LOW)
    return torch.where(zero, 0.0, p), torch.where(zero, ZERO_EXPONENT, n)


def power_of_two(exponent: Tensor) -> Tensor:
    """2 ** exponent for an integer-valued exponent <= 0; far below the smallest number it is exactly 0."""
    return torch.exp2(exponent.clamp_min(LOWEST_EXPONENT))


def add_pairs(m_left: Tensor, v_left: Tensor, m_right: Tensor, v_right: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of two pairs. Only the addition of the mantissas rounds: the scalings are by powers of two."""
    v = torch.maximum(v_left, v_right)
    return m_left * power_of_two(v_left - v) + m_right * power_of_two(v_right - v), v


def sum_exponentials(x: Tensor) -> tuple[Tensor, Tensor]:
    """(m, v) with m * 2**v = sum(e**x) over the last dimension, by pairwise addition of pairs."""
    m, v = exponential_pair(x)
    while m.shape[-1] > 1:
        half = m.shape[-1] // 2
        merged = add_pairs(m[..., :half], v[..., :half], m[..., half : 2 * half], v[..., half : 2 * half])
        m, v = (torch.cat([new, old[..., 2 * half :]], dim=-1) for new, old in zip(merged, (m, v), strict=True))
    return m[..., 0], v[..., 0]


def two_pass_softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension: one pass sums the pairs, one writes p / m * 2**(n - v); rounded once."""
    m, v = sum_exponentials(x)
    p, n = exponential_pair(x)
    return (p / m[..., None] * power_of_two(n - v[..., None])).to(x.dtype)
