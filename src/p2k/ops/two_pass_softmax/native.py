"""The compiled CPU version: C++ built on the first call, three programs that share their arithmetic."""

import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from p2k.core.device import device_name
from p2k.core.errors import BackendUnavailable

PROGRAMS = ("two_pass", "three_pass_recompute", "three_pass_reload")
SOURCE = Path(__file__).with_name("native.cpp")
# Contraction is off because the source says where a fused multiply-add belongs: the argument reduction relies on it.
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]


def why_not_native() -> str | None:
    """Say what is missing to build the extension, or None."""
    if shutil.which("ninja") is None and importlib.util.find_spec("ninja") is not None:
        # An environment that is used without being activated keeps its programs off the path.
        import ninja

        os.environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, os.environ.get("PATH", "")])
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not found: install a C++ compiler and `pip install ninja`" if missing else None


@functools.cache
def _library() -> ctypes.CDLL:
    reason = why_not_native()
    if reason is not None:
        raise BackendUnavailable(f"two_pass_softmax: backend='native' cannot run: {reason}")
    from torch.utils import cpp_extension

    # The name carries all that a build hangs on: an edited source, or a home folder that machines share, builds anew.
    made_from = SOURCE.read_bytes() + " ".join([*FLAGS, device_name("cpu")]).encode()
    name = f"p2k_two_pass_softmax_{hashlib.sha256(made_from).hexdigest()[:12]}"
    try:
        cpp_extension.load(name, [str(SOURCE)], extra_cflags=FLAGS, is_python_module=False)
    except (RuntimeError, OSError) as error:
        raise BackendUnavailable(f"two_pass_softmax: building {SOURCE.name} failed: {error}") from error
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    return ctypes.CDLL(str(folder / f"{name}.so"))


def program(name: str) -> Callable[[Tensor], Tensor]:
    """One of `PROGRAMS` as a function on a contiguous float32 CPU tensor ``[..., columns]``, without gradient."""
    function = getattr(_library(), f"p2k_{name}")
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    function.restype = None

    def run(x: Tensor) -> Tensor:
        y = torch.empty_like(x)
        if x.numel():
            function(x.data_ptr(), y.data_ptr(), x.numel() // x.shape[-1], x.shape[-1])
        return y

    return run


class NativeSoftmax(torch.autograd.Function):
    """Two-pass forward, ordinary backward: dx = y * (g - <g, y>)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """Run the two-pass program."""
        y = program("two_pass")(x.contiguous())
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        """Gradient of softmax from its value."""
        (y,) = ctx.saved_tensors
        return y * (grad - (grad * y).sum(-1, keepdim=True))
