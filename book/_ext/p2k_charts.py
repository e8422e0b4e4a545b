"""Charts of benchmark records against size, in the book's style: one line per implementation, one panel per pass."""

import io
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

PASSES = ("forward", "backward", "both")
WORDS = {"kernel": "the fused code", "eager": "eager torch", "compile": "torch.compile"}
MARKERS = "osD^vPX"
MIB = 2**20


@dataclass(frozen=True)
class Line:
    """Points of one implementation in one panel: bytes moved by the pass, value, and the value's low and high end."""

    name: str
    points: list[tuple[int, float, float, float]]


@dataclass(frozen=True)
class Quantity:
    """What a chart shows: its axis label, whether the axis is logarithmic, and (low, middle, high) of a record."""

    key: str
    label: str
    logarithmic: bool
    value: Callable[[dict], tuple[float, float, float] | None]


def _milliseconds(record: dict) -> tuple[float, float, float]:
    return tuple(record["milliseconds"][name] for name in ("p20", "p50", "p80"))


def _percent(record: dict) -> tuple[float, float, float] | None:
    bound = record["roofline"] and record["roofline"]["milliseconds"]
    return tuple(100 * bound / time for time in reversed(_milliseconds(record))) if bound else None


def _memory(record: dict) -> tuple[float, float, float] | None:
    return None if record["memory_bytes"] is None else (record["memory_bytes"] / MIB,) * 3


QUANTITIES = (
    Quantity("time", "milliseconds", True, _milliseconds),
    Quantity("roofline", "% of the roofline", False, _percent),
    Quantity("memory", "MiB above the inputs", True, _memory),
)


def words(name: str) -> str:
    """An implementation as the page calls it."""
    return WORDS.get(name, name)


def subject(records: list[dict]) -> str:
    """Whose speed-up is shown: the fused code, or torch.compile where no fused code can run."""
    return "kernel" if any(record["implementation"] == "kernel" for record in records) else "compile"


def lines_of(records: list[dict], quantity: Quantity) -> dict[str, list[Line]]:
    """By pass, one line per implementation of one op in one dtype."""
    panels: dict[str, list[Line]] = {}
    for pass_name in PASSES:
        for name in dict.fromkeys(record["implementation"] for record in records):
            chosen = [r for r in records if (r["pass"], r["implementation"]) == (pass_name, name)]
            points = [(r["bytes"], *quantity.value(r)) for r in chosen if quantity.value(r)]
            if points:
                panels.setdefault(pass_name, []).append(Line(name, sorted(points)))
    return panels


def speedup_lines(records: list[dict]) -> dict[str, list[Line]]:
    """By pass, one line per baseline: how many times faster than it the subject is."""
    own = [record for record in records if record["implementation"] == subject(records)]
    panels: dict[str, list[Line]] = {}
    for pass_name in PASSES:
        chosen = [record for record in own if record["pass"] == pass_name]
        for name in dict.fromkeys(baseline for record in chosen for baseline in record["speedup"]):
            points = [
                (record["bytes"], *(record["speedup"][name][end] for end in ("p20", "p50", "p80")))
                for record in chosen
                if name in record["speedup"]
            ]
            panels.setdefault(pass_name, []).append(Line(name, sorted(points)))
    return panels


def crossover(line: Line) -> str:
    """From which size on the subject is at least as fast, by the medians."""
    sizes = [size for size, _, middle, _ in line.points if middle >= 1]
    slower = [size for size, _, middle, _ in line.points if middle < 1]
    if not slower:
        return "at every size"
    above = [size for size in sizes if size > max(slower)]
    return f"from {mebibytes(min(above))} on" if above else "not at the largest size"


def mebibytes(size: int) -> str:
    """A number of bytes in MiB, three digits."""
    return f"{size / MIB:.3g} MiB"


def draw(panels: dict[str, list[Line]], label: str, *, logarithmic: bool, unit_line: bool = False) -> str:
    """The chart as SVG, panels one above the other so that it stays legible on a narrow screen."""
    with matplotlib.style.context(files("p2k.book") / "templates" / "house.mplstyle"):
        others = sorted({line.name for lines in panels.values() for line in lines} - WORDS.keys())
        figure = Figure(figsize=(6.4, 0.9 + 2.1 * len(panels)))
        axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
        for axis, (pass_name, lines) in zip(axes, panels.items(), strict=True):
            _panel(axis, lines, others)
            axis.set(title=pass_name, ylabel=label, xscale="log", yscale="log" if logarithmic else "linear")
            if unit_line:
                axis.axhline(1, color="black", linewidth=0.8, linestyle="--")
            if not logarithmic:
                axis.set_ylim(bottom=0)
        axes[-1].set_xlabel("MiB that the pass has to move")
        # Within a decade or two the powers of ten alone would say too little.
        low, high = axes[-1].get_xlim()
        axes[-1].xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
        axes[-1].xaxis.set_major_formatter("{x:g}")
        axes[-1].xaxis.set_minor_formatter(NullFormatter())
        names, handles = zip(*{text: handle for axis in axes for handle, text in _legend(axis)}.items(), strict=True)
        figure.legend(handles, names, loc="outside upper center", ncols=3)
        figure.savefig(buffer := io.StringIO(), format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _panel(axis: Axes, lines: list[Line], others: list[str]) -> None:
    """Draw the lines; an implementation has the same colour and marker in every chart of an op."""
    order = [*WORDS, *others]
    for line in lines:
        number = order.index(line.name)
        sizes, lows, middles, highs = zip(*line.points, strict=True)
        sizes = [size / MIB for size in sizes]
        look = {"color": f"C{number}", "marker": MARKERS[number % len(MARKERS)], "markersize": 5}
        axis.plot(sizes, middles, label=words(line.name), **look)
        axis.fill_between(sizes, lows, highs, color=look["color"], alpha=0.2, linewidth=0)


def _legend(axis: Axes) -> list[tuple]:
    return list(zip(*axis.get_legend_handles_labels(), strict=True))


def describe(panels: dict[str, list[Line]], label: str) -> str:
    """Alternative text: what each line shows at its two ends."""
    parts = []
    for pass_name, lines in panels.items():
        ends = [
            f"{words(line.name)} {line.points[0][2]:.3g} at {mebibytes(line.points[0][0])} and "
            f"{line.points[-1][2]:.3g} at {mebibytes(line.points[-1][0])}"
            for line in lines
        ]
        parts.append(f"{pass_name}: {', '.join(ends)}")
    return f"Line chart against the bytes moved: {label}. {'; '.join(parts)}."


def store(path: Path, text: str) -> None:
    """Write a generated file unless it is already so, which would make the next build copy it again."""
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
