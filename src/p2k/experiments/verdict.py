"""Paper against here: a results table whose verdicts follow from the numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class IntervalLike(Protocol):
    """What a row needs of an interval; `p2k.experiments.statistics.Interval` has it."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class ResultRow:
    """One line of a results table.

    `null` is the value that means "no effect" (0 for a paired difference), None for a quantity without one.
    `same_protocol` says whether `here` ran what the paper ran; only then can a value be reproduced.
    """

    quantity: str
    paper: float | None
    here: IntervalLike
    null: float | None = 0.0
    same_protocol: bool = False

    @property
    def verdict(self) -> str:
        """One of reproduced, same direction, not reproduced, not comparable."""
        here, paper, null = self.here, self.paper, self.null
        if paper is None or here.n < 2 or (null is None and not self.same_protocol):
            return "not comparable"
        separated = null is None or paper == null or not here.low <= null <= here.high
        if self.same_protocol and separated and here.low <= paper <= here.high:
            return "reproduced"
        if null is None or paper == null:
            return "not reproduced"
        return "same direction" if (here.low > null if paper > null else here.high < null) else "not reproduced"


class Table(str):
    """Markdown that a notebook renders."""

    def _repr_markdown_(self) -> str:
        return str(self)


def results_table(rows: Sequence[ResultRow], *, digits: int = 2) -> Table:
    """Markdown table paper · here · gap · verdict, with means, 95 % intervals and n."""
    lines = ["| quantity | paper | here: mean [95 % interval], n | gap | verdict |", "|---|---|---|---|---|"]
    for row in rows:
        # No-break spaces keep an interval, and a count with its letter, on one line.
        interval = f"[{row.here.low:.{digits}f},\N{NO-BREAK SPACE}{row.here.high:.{digits}f}]"
        here = f"{row.here.mean:.{digits}f} {interval}, n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}{row.here.n}"
        paper = "–" if row.paper is None else f"{row.paper:.{digits}f}"
        gap = "–" if row.paper is None else f"{row.here.mean - row.paper:+.{digits}f}"
        lines.append(f"| {row.quantity} | {paper} | {here} | {gap} | {row.verdict} |")
    return Table("\n".join(lines))
