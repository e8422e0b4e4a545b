"""Orthogonal quadratic complements in plain torch: the specification of both row stages.

Letters of the paper and of this file: h main (host) hidden vector, z auxiliary vector, g gate, w gate on the
channels of z before the projection, s = (Ax)*(Bx) product of the two factor maps, gamma RMS-norm weight, u = Ph host
in rank space, n = <h, h> + eps, c = <z, h> / n.
Shape suffixes: T tokens (any leading shape), M hidden width, R rank.

Half-precision inputs are computed in float32 and rounded once; float64 stays float64.

Source: wang2026oqc, eq:oqc-project, eq:oqc-inject, eq:oqc-rank.  Chapter: oqc
"""

import torch
from torch import Tensor


def _wide(tensor: Tensor | None) -> Tensor | None:
    """Float32 for the half types, unchanged otherwise: the two reductions must not run in 16 bits."""
    return None if tensor is None else tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def coefficient(z_TM: Tensor, h_TM: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return c = <z, h> / n and 1 / n, each [T, 1].

    Where n has no finite inverse (a zero row with eps = 0, or one too small to square) there is no direction:
    c = 0 and 1 / n = 0.
    """
    n_T1 = h_TM.square().sum(-1, keepdim=True) + eps
    undirected = n_T1 < torch.finfo(n_T1.dtype).tiny
    inverse_T1 = ~undirected / torch.where(undirected, 1.0, n_T1)
    return (z_TM * h_TM).sum(-1, keepdim=True) * inverse_T1, inverse_T1


def project_out(z_TM: Tensor, h_TM: Tensor, eps: float) -> Tensor:
    """The part of z orthogonal to h, token by token: z - c h."""
    c_T1, _ = coefficient(z_TM, h_TM, eps)
    return z_TM - c_T1 * h_TM


def project_and_inject(h_TM: Tensor, z_TM: Tensor, g: Tensor | None, w_M: Tensor | None, eps: float) -> Tensor:
    """h + g * project_out(w * z, h): scalar or [T, 1] gate g after the projection, channel gate w before it."""
    h, z, g, w = _wide(h_TM), _wide(z_TM), _wide(g), _wide(w_M)
    p = project_out(z if w is None else w * z, h, eps)
    return (h + (p if g is None else g * p)).to(h_TM.dtype)


def rank_project(
    a_TR: Tensor, b_TR: Tensor, u_TR: Tensor, gamma_R: Tensor, g: Tensor | None, eps: float, norm_eps: float
) -> Tensor:
    """g * project_out(gamma * s / rms(s), u) with s = a * b: product, RMS norm, projection and gate in rank space."""
    a, b, u, gamma, g = _wide(a_TR), _wide(b_TR), _wide(u_TR), _wide(gamma_R), _wide(g)
    s = a * b
    normed = gamma * s * (s.square().mean(-1, keepdim=True) + norm_eps).rsqrt()
    q = project_out(normed, u, eps)
    return (q if g is None else g * q).to(a_TR.dtype)


def project_and_inject_backward(
    grad_TM: Tensor, h_TM: Tensor, z_TM: Tensor, g: Tensor | float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Closed-form gradients (dh, dz, dg) of `project_and_inject` without channel gate; dg is [T, 1].

    With v = g G and tau = <v, h> / n:  dz = v - tau h,  dh = G - c v - tau (z - 2 c h),  dg = <G, z - c h>.

    Source: wang2026oqc, eq:oqc-backward.  Chapter: oqc
    """
    c, inverse_n = coefficient(z_TM, h_TM, eps)
    v = g * grad_TM
    tau = (v * h_TM).sum(-1, keepdim=True) * inverse_n
    dz = v - tau * h_TM
    dh = grad_TM - c * v - tau * (z_TM - 2 * c * h_TM)
    dg = (grad_TM * (z_TM - c * h_TM)).sum(-1, keepdim=True)
    return dh, dz, dg
