"""The AFBO host against loops written from its definition."""

import math

import pytest
import torch

from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors, tolerance
from p2k.nn.afbo import AFBOFeedForward, GroupedCross, OverlappedCycle


def slow_hidden(module, x):
    """Hidden vectors of ``x`` [tokens, dim] with one loop per index."""
    dim, hidden, (rows, columns) = module.dim, module.hidden_features, module.grid
    cycle_groups, cross_groups = module.cycle.groups, module.cross.groups
    own, rows_per_map = dim // cycle_groups, hidden // cycle_groups
    left, right = torch.zeros(len(x), hidden, dtype=x.dtype), torch.zeros(len(x), hidden, dtype=x.dtype)
    for token in range(len(x)):
        for group in range(cycle_groups):
            following = (group + 1) % cycle_groups
            inputs = [x[token, group * own + i] for i in range(own)] + [
                x[token, following * own + i] for i in range(own)
            ]
            for row in range(rows_per_map):
                left[token, group * rows_per_map + row] = sum(
                    weight * value for weight, value in zip(module.cycle.weight[group, row], inputs, strict=True)
                )
        part = dim // cross_groups
        for group in range(cross_groups):
            for row in range(hidden // cross_groups):
                right[token, row * cross_groups + group] = sum(
                    module.cross.maps.weight[row, i] * x[token, group * part + i] for i in range(part)
                )

    def convolve(values, convolution):
        result = torch.zeros_like(values)
        for row in range(rows):
            for column in range(columns):
                for channel in range(hidden):
                    total = convolution.bias[channel]
                    for i in range(3):
                        for j in range(3):
                            r, c = row + i - 1, column + j - 1
                            if 0 <= r < rows and 0 <= c < columns:
                                kernel = convolution.weight[channel, 0, i, j]
                                total = total + kernel * values[r * columns + c, channel]
                    result[row * columns + column, channel] = total
        return result

    left, right = convolve(left, module.cycle_conv), convolve(right, module.cross_conv)
    return left / (1 + (-left).exp()) * right


def test_against_loops():
    torch.manual_seed(0)
    module = AFBOFeedForward(12, 9 * 3, grid=(2, 3), cycle_groups=3, cross_groups=3, dtype=torch.float64)
    x = torch.randn(6, 12, generator=generator(0), dtype=torch.float64)
    with torch.no_grad():
        truth = slow_hidden(module, x)
        assert relative_errors(module.hidden(x), truth)[1] <= tolerance(torch.float64)
        assert relative_errors(module.float().hidden(x.float()), truth)[0] <= tolerance(torch.float32)


def test_leading_shapes():
    module = AFBOFeedForward(8, 8, grid=(2, 2))
    x = torch.randn(2, 3, 4, 8, generator=generator(0))
    together = module(x)
    # Convolutions may sum in another order for another batch.
    torch.testing.assert_close(module(x[1, 2]), together[1, 2])
    assert module(x[:0]).shape == (0, 3, 4, 8)


def test_every_map_reads_what_the_figure_shows():
    cycle = OverlappedCycle(8, 8, 4)
    jacobian = torch.func.jacrev(cycle)(torch.zeros(8)).abs().unflatten(0, (4, 2)).unflatten(2, (4, 2)).sum((1, 3))
    reads = torch.eye(4, dtype=torch.bool) | torch.eye(4, dtype=torch.bool).roll(1, dims=1)
    assert torch.equal(jacobian > 0, reads)
    cross = GroupedCross(8, 8, 2)
    jacobian = torch.func.jacrev(cross)(torch.zeros(8)).abs().unflatten(1, (2, 4)).sum(-1)
    assert torch.equal(jacobian > 0, torch.eye(2, dtype=torch.bool).repeat(4, 1))


def test_starts_like_linear_layers():
    weight = OverlappedCycle(64, 256, 4).weight
    bound = 1 / math.sqrt(32)
    assert 0.95 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((10, 8), {"grid": (2, 2)}, "dim must be a positive multiple of 4"),
        ((8, 10), {"grid": (2, 2)}, "hidden must be a positive multiple of 4"),
        ((8, 12), {"grid": (2, 2), "cycle_groups": 4, "cross_groups": 4}, "hidden must be a positive multiple of 16"),
        ((8, 8), {"grid": (2, 2), "cycle_groups": 1}, "groups must be at least 2"),
        ((8, 8), {"grid": (0, 2)}, "rows must be > 0"),
    ],
)
def test_bad_sizes(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        AFBOFeedForward(*arguments, **options)


def test_bad_tokens():
    with pytest.raises(ValueError, match="4 tokens for a 2 x 2 grid, got 5"):
        AFBOFeedForward(8, 8, grid=(2, 2))(torch.zeros(1, 5, 8))
