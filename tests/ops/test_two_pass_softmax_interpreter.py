"""What only the interpreter can show of the row programs: float64, bytes counted element by element."""

import pytest
import torch

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
