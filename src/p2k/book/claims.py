"""Claims: labelled equations and facts, checked where they are stated and recorded in the notebook."""

import math
import sys
from typing import Any, Literal

import torch

from p2k.core.errors import P2KError
from p2k.experiments.verdict import ResultRow, results_table

__all__ = ["CLAIM_MIME", "ClaimFailed", "ResultRow", "claim", "emit", "no_claim", "results_table"]
Rule = Literal["absolute", "relative"]
CLAIM_MIME = "application/vnd.p2k.claim+json"


class ClaimFailed(P2KError):
    """A claim does not hold; the message carries the numbers."""


def claim(label: str, observed: Any, expected: Any, tol: float = 0, *, rule: Rule = "absolute", note: str = "") -> None:
    """Check that `observed` equals `expected` and print one line that is the same on every machine.

    Args:
        label: the equation (`eq:oqc-inject`) or fact (`kernel:oqc-float64`) that is checked.
        observed: tensor, array, number or bool with at least one value.
        expected: the same shape, or one number that every observed value must equal.
        tol: bound on the largest error. `absolute`: ``max |o - e| <= tol``; `relative`: ``<= tol * max |e|``.
        rule: which of the two.
        note: what the line says besides; must not depend on the machine.

    Raises:
        ClaimFailed: the error exceeds the tolerance or is NaN, or the shapes differ.
        ValueError: `tol` is negative or not finite, or `rule` is unknown.
    """
    if not (0 <= tol < math.inf) or rule not in ("absolute", "relative"):
        raise ValueError(f"claim {label}: tol must be finite and >= 0, rule absolute or relative: {tol}, {rule!r}")
    left, right = _values(observed), _values(expected)
    if left.numel() == 0 or (right.ndim > 0 and right.shape != left.shape):
        raise ClaimFailed(f"{label}: observed has shape {tuple(left.shape)}, expected {tuple(right.shape)}")
    gap = (left - right).abs()
    bound = tol * right.abs().max().item() if rule == "relative" else tol
    if not gap.max().item() <= bound:
        at = int(gap.argmax())
        pair = f"observed {left.flatten()[at].item()}, expected {right.expand_as(left).flatten()[at].item()}"
        raise ClaimFailed(f"{label}: {rule} error {gap.max().item():.3e} exceeds {bound:.3e}: {pair} at index {at}")
    _record(label, "holds", "exactly" if tol == 0 else f"{rule} error <= {tol:g}", note)


def no_claim(label: str, reason: str) -> None:
    """Record why a labelled equation has no claim (it is a definition, say)."""
    if not reason.strip():
        raise ValueError(f"no_claim {label}: give the reason")
    _record(label, "no claim", "", reason)


def emit(plain: str, **bundle: Any) -> None:
    """Display a mime bundle (`text/markdown` and so on) in a kernel, plain text elsewhere."""
    if getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)() is None:
        print(plain)
        return
    from IPython.display import display

    display({"text/plain": plain, **bundle}, raw=True)


def _values(value: Any) -> torch.Tensor:
    tensor = torch.as_tensor(value).detach().cpu()
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _record(label: str, verdict: str, measure: str, note: str) -> None:
    line = f"{label}: {verdict}" + (f", {measure}" if measure else "") + (f" ({note})" if note else "")
    emit(line, **{CLAIM_MIME: {"label": label, "verdict": verdict, "tolerance": measure, "note": note}})
