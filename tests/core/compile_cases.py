"""Kernels for the compile check's own tests: one that must not compile, one that must spill, and so on."""

import torch
import triton
import triton.language as tl


@triton.jit
def thin_dot(x_ptr, out_ptr, K: tl.constexpr):
    row, k = tl.arange(0, 16), tl.arange(0, K)
    x = tl.load(x_ptr + row[:, None] * K + k[None, :])
    tl.store(out_ptr + row[:, None] * 16 + row[None, :], tl.dot(x, tl.trans(x)))


@triton.jit
def fat_dot(x_ptr, out_ptr, K: tl.constexpr):
    row = tl.arange(0, K)
    x = tl.load(x_ptr + row[:, None] * K + row[None, :])
    tl.store(out_ptr + row[:, None] * K + row[None, :], tl.dot(x, tl.trans(x)))


@triton.jit
def copy(x_ptr, out_ptr, stride, scale, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at * stride) * scale)


@triton.jit
def hoard(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Keeps a tile in registers across a scan of another."""
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    y = tl.load(x_ptr + BLOCK + at)
    tl.store(out_ptr + at, x * tl.sum(x * y, 0) + y * tl.max(x - y, 0))


def _vectors(count):
    return torch.empty(count, device="meta"), torch.empty(count, device="meta")


def _fat_dot():
    x = torch.empty(64 * 64, device="meta", dtype=torch.bfloat16)
    fat_dot[(1,)](x, torch.empty(64 * 64, device="meta"), K=64)


def _thin_dot():
    thin_dot[(1,)](*_vectors(256), K=8)


def cases():
    yield "contiguous", (90,), lambda: copy[(1,)](*_vectors(1024), 1, 2.0, BLOCK=1024)
    yield "again", (90,), lambda: copy[(1,)](*_vectors(1024), 1, 2.0, BLOCK=1024)
    yield "strided", (90,), lambda: copy[(1,)](*_vectors(1024), 3, 2.0, BLOCK=1024)
    yield "product", (80, 90, 100), _fat_dot
    yield "hoard", (90,), lambda: hoard[(1,)](*_vectors(1 << 15), BLOCK=1 << 14, num_warps=1)


class Rejected:
    """A second set of cases: as many names as a module needs."""

    @staticmethod
    def cases():
        yield "thin", (90,), _thin_dot
