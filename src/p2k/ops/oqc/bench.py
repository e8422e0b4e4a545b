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
# Of these a GPU also runs float32.
WIDE_SIZES = [(65536, 768), (50432, 3072), (65536, 56)]
INJECT_SIZES_CPU = [(256, 512), (1024, 512), (4096, 1024), (8192, 2048)]
RANK_SIZES_CPU = [(4096, 56), (32768, 56), (32768, 256)]


def workloads(device: torch.device, *, quick: bool) -> list[Workload]:
    """Workloads for a device, small ones first; `quick` keeps one size per stage."""
    cuda = device.type == "cuda"
    inject, rank = (INJECT_SIZES, RANK_SIZES) if cuda else (INJECT_SIZES_CPU, RANK_SIZES_CPU)
    if quick:
        inject, rank = inject[2:3] if cuda else inject[:1], rank[:1]
    found = []
    for build, sizes in ((_inject, inject), (_rank, rank)):
        found += [build(*size, torch.bfloat16 if cuda else torch.float32, cuda) for size in sizes]
        found += [build(*size, torch.float32, cuda) for size in sizes if cuda and not quick and size in WIDE_SIZES]
    return found


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
