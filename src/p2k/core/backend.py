"""Which implementation of an op runs: the torch reference or the Triton kernel."""

import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

from p2k.core.errors import BackendUnavailable

Backend = Literal["auto", "torch", "triton"]
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreting() -> bool:
    """True when Triton kernels of this process run in its CPU interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not_triton(x: Tensor) -> str | None:
    """Say why the Triton kernel cannot take `x`, or None when it can."""
    if not TRITON_INSTALLED:
        return "triton is not installed: pip install 'p2k[gpu]'"
    if not x.is_cuda and not interpreting():
        return (
            f"the tensor is on {x.device.type}: move it to a CUDA device, "
            "or set TRITON_INTERPRET=1 before the first import of triton to run the interpreter"
        )
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return "kernels see plain tensors only, and a torch.func transform is active"
    # The interpreter computes in NumPy and is exact in float64; compiled kernels accumulate in float32.
    if x.dtype not in KERNEL_DTYPES and not (interpreting() and x.dtype == torch.float64):
        return f"kernels take float32, float16 and bfloat16, got {x.dtype}"
    return None


def choose_backend(backend: Backend, x: Tensor, *, op: str) -> Literal["torch", "triton"]:
    """Resolve `backend` for a tensor.

    `auto` picks the kernel on a CUDA tensor it supports and the torch reference everywhere else, so that
    nothing depends on an environment variable. `triton` is a demand.

    Raises:
        ValueError: an unknown backend name.
        BackendUnavailable: `triton` was asked for and cannot run; the message says what is missing.
    """
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"{op}: backend must be 'auto', 'torch' or 'triton', got {backend!r}")
    if backend == "torch":
        return "torch"
    reason = why_not_triton(x)
    if backend == "auto":
        return "triton" if x.is_cuda and reason is None else "torch"
    if reason is not None:
        raise BackendUnavailable(f"{op}: backend='triton' cannot run: {reason}")
    return "triton"
