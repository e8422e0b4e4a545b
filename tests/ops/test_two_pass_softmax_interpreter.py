"""What only the interpreter can show of the row programs: float64, bytes counted element by element."""

import math

import pytest
import torch
import triton
import triton.language as tl

from p2k.ops.two_pass_softmax import kernel, mutants, registration
from p2k.ops.two_pass_softmax.traffic import count_elements

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
each = pytest.mark.parametrize("program", kernel.PROGRAMS)


@each
@pytest.mark.parametrize("columns", [9, 20])
def test_gradcheck_through_the_interpreter(program, columns):
    with mutants.small_tiles(kernel):
        x = torch.randn(2, columns, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: registration.softmax(x, program), x, fast_mode=True)


@each
def test_bfloat16_loads(program):
    """The interpreter truncates bfloat16 stores instead of rounding them: the results differ by that at most."""
    x = torch.randn(5, 33).bfloat16()
    found, same = kernel.forward(x, program), kernel.forward(x.float(), program)
    assert (found.float() <= same).all()
    assert (same - found.float() <= 2**-7 * same).all()


# Elements read and written per element of a row, in registers and in tiles.
PASSES = {"pair": ((1, 1), (2, 1)), "online": ((1, 1), (2, 1)), "three_pass": ((1, 1), (3, 1))}


@each
def test_every_element_is_moved_as_often_as_the_passes_say(program):
    with mutants.small_tiles(kernel):
        for columns, expected in zip((13, 35), PASSES[program], strict=True):
            x = torch.randn(6, columns)
            read, written = count_elements(lambda x=x: kernel.forward(x, program))
            assert (read, written) == (expected[0] * x.numel(), expected[1] * x.numel())


def test_traffic_of_the_backward_pass():
    with mutants.small_tiles(kernel):
        for columns, reads in ((13, 2), (35, 4)):
            y = torch.randn(6, columns).softmax(-1)
            assert count_elements(lambda y=y: kernel.backward(y, y)) == (reads * y.numel(), y.numel())


@triton.jit
def pairs_of(x_ptr, p_ptr, n_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    p, k = kernel._pair(tl.load(x_ptr + at), 0.0, False)
    tl.store(p_ptr + at, p)
    tl.store(n_ptr + at, k)


@pytest.mark.parametrize(("span", "bound"), [(100.0, 2e-7), (1e4, 2.4e-7), (1e5, 2.5e-7), (1e6, 1.6e-6)])
def test_error_of_a_pair_over_its_documented_range(span, bound):
    """A tenth of a millionth while the reduction has its bits; ten times as much at 1e6, where they run out."""
    x = (torch.rand(2**15, dtype=torch.float64) * 2 - 1).mul(span).float()
    p, n = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    pairs_of[(1,)](x, p, n, SIZE=len(x))
    error = (p.double() * (n.double() * math.log(2) - x.double()).exp() - 1).abs().max()
    assert torch.equal(n, n.round())
    assert error <= bound
    # Rounding x / ln 2 moves a tie past the edge by twice its own rounding.
    edge = 2**0.5 * (1 + 3 * 2**-24 * span)
    assert (p <= edge).all()
    assert (p >= 1 / edge).all()
    if span == 1e6:
        assert error > 4e-7


@pytest.mark.parametrize("tile", [8, 32])
def test_the_size_of_a_tile_changes_rounding_only(tile, monkeypatch):
    with mutants.small_tiles(kernel):
        x = 10 * torch.randn(3, 70)
        usual = registration.softmax(x)
        monkeypatch.setattr(kernel, "TILE", tile)
        assert ((registration.softmax(x) - usual).abs() / usual).max() <= 1e-6
