"""Complex zeros of partition functions and other analytic ones: located by Newton, counted by the argument principle.

A zero is reported only when the winding number of the function along the border says that none is missing.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Complex, Float
from torch import Tensor

from p2k.core.checks import check_floating
from p2k.core.errors import P2KError

__all__ = ["nearest_zeros", "partition", "winding_number", "zeros_in_box"]

# Maps complex128 points [n] to values and derivatives [n], both up to one common positive factor per point.
Function = Callable[[Tensor], tuple[Tensor, Tensor]]
_SLACK = 1e-3
_ROUNDS = 40


def partition(logits: Float[Tensor, " classes"], slopes: Float[Tensor, " classes"]) -> Function:
    """The function ``F(t) = sum_k exp(z_k + a_k t)`` and its derivative, both divided by the largest term's modulus.

    Args:
        logits: z, at the origin.
        slopes: a, per unit of the step.

    Source: sao2026ghosts, eq:ghosts-of-softmax-partition.
    Chapter: ghosts-of-softmax
    """
    return lambda points: _scaled(logits[None], slopes[None], points[None])[0].unbind(-1)


def winding_number(function: Function, border: Complex[Tensor, " points"]) -> int:
    """How often the value turns around the origin along a closed polygon: the zeros inside, if it is analytic.

    Sampling is refined until no phase increment exceeds a quarter turn.

    Args:
        function: values and derivatives at complex points.
        border: corners of the polygon, anticlockwise, the last one joined to the first.

    Raises:
        P2KError: the phase does not settle, because a zero lies on the border or next to it.

    Source: sao2026ghosts, eq:ghosts-of-softmax-argument.
    Chapter: ghosts-of-softmax
    """
    points = torch.cat([border, border[:1]])
    for _ in range(16):
        value = function(points)[0]
        turn = (value[1:] * value[:-1].conj()).angle()
        coarse = turn.abs() > math.pi / 2
        if not coarse.any():
            return round(turn.sum().item() / (2 * math.pi))
        # Twice as many points where the phase moves fast, and on both sides of there.
        coarse = coarse | coarse.roll(1) | coarse.roll(-1)
        middle = (points[1:] + points[:-1])[coarse] / 2
        place = torch.arange(len(points), dtype=torch.float64, device=points.device)
        order = torch.cat([place, place[:-1][coarse] + 0.5]).argsort()
        points = torch.cat([points, middle])[order]
    raise P2KError("winding_number: a zero lies on the border or next to it: move the border")


def zeros_in_box(function: Function, box: tuple[complex, complex], *, spacing: float) -> Complex[Tensor, " zeros"]:
    """All zeros of an analytic function in a rectangle, by modulus; every one simple.

    Newton's method starts from a grid, made finer until as many zeros are found as the argument principle counts.

    Args:
        function: values and derivatives at complex points, analytic in the box.
        box: lower left and upper right corner.
        spacing: of the first grid, ``> 0``; about half the distance between zeros.

    Raises:
        P2KError: the counts still disagree after four refinements, or a zero lies on the border.

    Source: sao2026ghosts, eq:ghosts-of-softmax-argument.
    Chapter: ghosts-of-softmax
    """
    low, high = box
    corners = [low, complex(high.real, low.imag), high, complex(low.real, high.imag)]
    sides = zip(corners, corners[1:] + corners[:1], strict=True)
    share = torch.arange(64, dtype=torch.float64) / 64
    expected = winding_number(function, torch.cat([start + (end - start) * share for start, end in sides]))
    found = torch.zeros(0, dtype=torch.complex128)
    for _ in range(5):
        across = _ticks(low.real, high.real, spacing)
        starts = torch.complex(*torch.meshgrid(across, _ticks(low.imag, high.imag, spacing), indexing="ij")).flatten()
        ends, settled = _newton(function, starts, longest=2 * spacing)
        inside = (ends.real > low.real) & (ends.real < high.real) & (ends.imag > low.imag) & (ends.imag < high.imag)
        found = _distinct(ends[settled & inside])
        if len(found) == expected:
            return found
        spacing /= 2
    raise P2KError(f"zeros_in_box: found {len(found)} zeros where the argument principle counts {expected}")


def nearest_zeros(
    logits: Float[Tensor, "batch classes"], slopes: Float[Tensor, "batch classes"]
) -> Complex[Tensor, " batch"]:
    """The zero of each example's partition function that is nearest to the origin, in the upper half-plane.

    Its modulus is the exact Taylor radius of the cross-entropy along a line of logits. Newton's method starts where
    two classes alone would cancel. That no other zero has a modulus below 0.999 of the one returned is checked by the
    argument principle on a circle; a grid and at last an exhaustive search serve the rows that fail.

    Args:
        logits: at the origin; computed in float64.
        slopes: change of each logit per unit of the step.

    Returns:
        complex128 ``[batch]``; infinite where all slopes agree and there is no zero.

    Raises:
        TypeError: not floating point.
        ValueError: the shapes differ or are not ``[batch, classes]``.
        P2KError: the check fails for an example.

    Source: sao2026ghosts, eq:ghosts-of-softmax-radius.
    Chapter: ghosts-of-softmax
    """
    check_floating("nearest_zeros", logits=logits, slopes=slopes)
    if logits.ndim != 2 or logits.shape != slopes.shape or logits.shape[1] == 0:
        raise ValueError(
            f"nearest_zeros: logits and slopes must be [batch, classes], "
            f"got {tuple(logits.shape)} and {tuple(slopes.shape)}"
        )
    z, a = logits.double(), slopes.double()
    spread = a.amax(1) - a.amin(1)
    moves = spread > 0
    # In units of 1 / spread every zero is at least pi away from the real axis.
    a = (a - a.amin(1, keepdim=True)) / torch.where(moves, spread, 1.0)[:, None]
    result = torch.full_like(spread, math.inf, dtype=torch.complex128)
    if moves.any():
        result[moves] = _nearest(z[moves], a[moves]) / spread[moves]
    return result


def _nearest(z: Tensor, a: Tensor) -> Tensor:
    """Nearest zeros ``[batch]`` for slopes scaled to the unit interval."""
    first, second = torch.triu_indices(z.shape[1], z.shape[1], 1)
    gap = a[:, second] - a[:, first]
    apart = gap.abs() > 1e-3
    safe = torch.where(apart, gap, 1.0)
    lead = z[:, first] - z[:, second]
    starts = torch.complex(lead / safe, math.pi / safe.abs())
    best = _settle(z, a, torch.where(apart, starts, complex(0, math.pi)))
    rows = (~_certified(z, a, best)).nonzero()[:, 0]
    if len(rows):
        # Where several classes cancel together no pair is near; a coarse grid finds most of these.
        grid = torch.complex(*torch.meshgrid(_ticks(-9, 9, 1.5), _ticks(3, 12, 1.5), indexing="ij")).flatten()
        best[rows] = _settle(z[rows], a[rows], grid.to(z.device).expand(len(rows), -1))
        for row in rows[~_certified(z[rows], a[rows], best[rows])].tolist():
            best[row] = _search(z[row], a[row])
    return best


def _settle(z: Tensor, a: Tensor, starts: Tensor) -> Tensor:
    """The nearest zero that Newton reaches from each row's starts, infinite where it reaches none."""
    ends, settled = _newton(lambda points: _scaled(z, a, points).unbind(-1), starts, longest=2.0)
    size = torch.where(settled & (ends.imag > 1), ends.abs(), math.inf)
    best = ends.gather(1, size.argmin(1, keepdim=True))[:, 0]
    return torch.where(size.amin(1) < math.inf, best, complex(math.inf, 0))


def _certified(z: Tensor, a: Tensor, zeros: Tensor) -> Tensor:
    """Whether no zero of row i is nearer than 0.999 of zeros[i]: the phase turns zero times along that circle.

    The known zero and its conjugate are divided out, so that a coarse sampling suffices next to them.
    """
    radius = torch.where(zeros.abs().isfinite(), zeros.abs(), 1.0) * (1 - _SLACK)
    count = 64 + 16 * math.ceil(radius.max().item())
    circle = torch.exp(2j * math.pi * torch.arange(count + 1, dtype=torch.float64, device=z.device) / count)
    points = radius[:, None] * circle
    value = _scaled(z, a, points)[..., 0] / ((points - zeros[:, None]) * (points - zeros[:, None].conj()))
    turn = (value[:, 1:] * value[:, :-1].conj()).angle()
    turns = turn.sum(1) / (2 * math.pi)
    return zeros.abs().isfinite() & (turn.abs().amax(1) < math.pi / 2) & (turns.abs() < 0.5)


def _search(z: Tensor, a: Tensor) -> Tensor:
    """Nearest zero of one example by exhausting growing boxes; slow, for the rows that Newton alone cannot settle."""
    radius = 1.01 * math.pi
    while radius < 1e4:
        box = complex(-radius, 0.99 * math.pi), complex(radius, radius)
        inside = zeros_in_box(partition(z, a), box, spacing=0.7)
        if len(inside) and inside[0].abs() <= radius:
            return inside[0]
        radius *= 1.37
    raise P2KError("nearest_zeros: no zero within ten thousand units of the spread: are the logits finite?")


def _scaled(z: Tensor, a: Tensor, points: Tensor) -> Tensor:
    """F and F' at ``points[batch, n]`` over the modulus of the largest term, ``[batch, n, 2]``."""
    size = z[:, None] + a[:, None] * points.real[..., None]
    terms = torch.polar((size - size.amax(-1, keepdim=True)).exp(), a[:, None] * points.imag[..., None])
    return torch.stack([terms.sum(-1), (terms * a[:, None]).sum(-1)], -1)


def _newton(function: Function, points: Tensor, *, longest: float) -> tuple[Tensor, Tensor]:
    """Where Newton's method ends, and whether its last step was at rounding level; no step exceeds `longest`."""
    step = torch.full_like(points, math.inf)
    for _ in range(_ROUNDS):
        value, slope = function(points)
        step = value / torch.where(slope == 0, 1.0, slope)
        points = points - step * (longest / step.abs().clamp_min(1e-300)).clamp(max=1.0)
    return points, step.abs() < 1e-9 * (1 + points.abs())


def _distinct(points: Tensor) -> Tensor:
    """One of each cluster of points, by modulus."""
    kept: list[Tensor] = []
    for point in points[points.abs().argsort()]:
        if all((point - other).abs() > 1e-6 * (1 + point.abs()) for other in kept):
            kept.append(point)
    return torch.stack(kept) if kept else points[:0]


def _ticks(low: float, high: float, spacing: float) -> Tensor:
    """Grid points between two ends, half a spacing away from them."""
    count = max(1, math.ceil((high - low) / spacing))
    return low + (high - low) * (torch.arange(count, dtype=torch.float64) + 0.5) / count
