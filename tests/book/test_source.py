"""The page shows the package's own lines."""

from p2k.book.source import show_source
from p2k.core.device import choose_device
from p2k.core.errors import BackendUnavailable


def test_a_function_is_shown_without_its_docstring(capsys):
    show_source(choose_device)
    text = capsys.readouterr().out
    assert text.startswith("def choose_device(")
    assert "Raises" not in text


def test_the_docstring_stays_on_request(capsys):
    show_source(BackendUnavailable, docstring=True)
    assert "cannot run on this tensor" in capsys.readouterr().out


def test_a_triton_kernel_is_unwrapped(capsys):
    import triton
    import triton.language as tl

    @triton.jit
    def copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        offsets = tl.arange(0, BLOCK)
        tl.store(y_ptr + offsets, tl.load(x_ptr + offsets, mask=offsets < n), mask=offsets < n)

    show_source(triton.autotune([triton.Config({"BLOCK": 8})], key=[])(copy))
    assert "def copy(x_ptr" in capsys.readouterr().out
