"""Sizes at which the OQC row stages are measured, with what the fused form moves and computes.

Bytes are those of the fused kernels: forward reads main and aux and writes the result, backward reads the gradient,
main and aux and writes two gradients; each keeps two float32 numbers per token.
"""

import torch
from torch import Tensor

from p2k.core.benchmark import Cost, Workload
from p2k.ops.oqc import project_and_inject, rank_project

# (tokens, hidden width): launch-bound to bandwidth-bound; ViT-Tiny to ViT-L hidden widths and one wide row.
INJECT_SIZES = [(1024, 512), (8192, 512), (65536, 768), (50432, 3072), (16384, 8192), (8192, 16384)]
RANK_SIZES = [(8192, 56), (65536, 56), (65536, 256)]
INJECT_SIZES_CPU = [(1024, 512), (4096, 1024)]
RANK_SIZES_CPU = [(4096, 56)]


def workloads(device: torch.device, *, quick: bool) -> list[Workload]:
    """Workloads for a device, small ones first; `quick` keeps one size per stage."""
    cuda = device.type == "cuda"
    dtypes = [torch.bfloat16, torch.float32] if cuda and not quick else [torch.bfloat16 if cuda else torch.float32]
    inject, rank = (INJECT_SIZES, RANK_SIZES) if cuda else (INJECT_SIZES_CPU, RANK_SIZES_CPU)
    if quick:
        inject, rank = inject[-3:-2] if cuda else inject[:1], rank[:1]
    found = [_inject(tokens, width, dtype, cuda) for dtype in dtypes for tokens, width in inject]
    return found + [_rank(tokens, width, dtype, cuda) for dtype in dtypes for tokens, width in rank]


def _inject(tokens: int, width: int, dtype: torch.dtype, fused: bool) -> Workload:
    elements, size = tokens * width, dtype.itemsize

    def make_inputs(source, device, dtype) -> tuple[Tensor, ...]:
        shapes = [(tokens, width), (tokens, width), (tokens, 1)]
        return tuple(torch.randn(shape, generator=source, device=device, dtype=dtype) for shape in shapes)

    return Workload(
        op="oqc.project_and_inject",
        shape={"tokens": tokens, "width": width},
        dtype=dtype,
        make_inputs=make_inputs,
        kernel=(lambda *inputs: project_and_inject(*inputs, backend="triton")) if fused else None,
        reference=lambda *inputs: project_and_inject(*inputs, backend="torch"),
        forward=Cost(bytes=3 * elements * size + tokens * (size + 8), flops=7 * elements),
        backward=Cost(bytes=5 * elements * size + tokens * (2 * size + 8), flops=13 * elements),
    )


def _rank(tokens: int, rank: int, dtype: torch.dtype, fused: bool) -> Workload:
    elements, size = tokens * rank, dtype.itemsize

    def make_inputs(source, device, dtype) -> tuple[Tensor, ...]:
        shapes = [(tokens, rank)] * 3 + [(rank,), (tokens, 1)]
        return tuple(torch.randn(shape, generator=source, device=device, dtype=dtype) for shape in shapes)

    return Workload(
        op="oqc.rank_project",
        shape={"tokens": tokens, "rank": rank},
        dtype=dtype,
        make_inputs=make_inputs,
        kernel=(lambda *inputs: rank_project(*inputs, backend="triton")) if fused else None,
        reference=lambda *inputs: rank_project(*inputs, backend="torch"),
        forward=Cost(bytes=4 * elements * size + tokens * (size + 12), flops=11 * elements),
        backward=Cost(bytes=7 * elements * size + tokens * (2 * size + 12), flops=27 * elements),
    )
