"""The page of benchmarks, written at build time from the records in `book/results/benchmarks` and the budgets."""

import json
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

from p2k_charts import (
    PASSES,
    QUANTITIES,
    crossover,
    describe,
    draw,
    lines_of,
    mebibytes,
    speedup_lines,
    store,
    subject,
    words,
)
from p2k_live import mark_live
from sphinx.application import Sphinx

from p2k.core.files import write_atomically
from p2k.experiments.benchmark import code_digest
from p2k.experiments.benchmark_records import COST_FILE, read_folder

GENERATED = "book/_generated/benchmarks"
NO_GPU = """:::{note}
No GPU has run these benchmarks yet, so this page holds no time of a fused GPU kernel. It shows what can be known
without one: what the compiler makes of each kernel, and ratios measured on a CPU. On a machine with a GPU, `make gpu`
runs the whole test suite and then the benchmarks; the records it writes appear here at the next build.
:::
"""
FIELDS = {
    "registers": "Registers",
    "spilled_bytes": "Spilled bytes",
    "shared_bytes": "Shared bytes",
    "wide_loads": "Wide loads",
    "tensor_core": "Tensor-core instructions",
}


def write_benchmarks(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace the line `% p2k-benchmarks` of a page by what the records and budgets say now."""
    if re.search(r"^% p2k-benchmarks$", source[0], re.M):
        mark_live(app.env, docname)
        text = benchmark_page(Path(app.srcdir))
        source[0] = re.sub(r"^% p2k-benchmarks$", lambda _: text, source[0], flags=re.M)


def benchmark_page(root: Path) -> str:
    """MyST of all ops, of what the chapters cost, and of the download; charts go to `book/_generated`."""
    folder = root / "book" / "results" / "benchmarks"
    files = [file for device in sorted(folder.glob("*/")) for file in read_folder(device)]
    ops = sorted(path.parent.name for path in (root / "src" / "p2k" / "ops").glob("*/__init__.py"))
    parts = [] if any(file["environment"]["device_type"] == "cuda" for file in files) else [NO_GPU]
    for op in ops:
        own = [file for file in files if file["records"][0]["op"].partition(".")[0] == op]
        parts += [f"## {op}\n", *op_section(root, op, own)]
    parts += costs(sorted(folder.glob(f"*/{COST_FILE}")))
    return "\n".join(parts + download(root, sorted(folder.rglob("*.json"))))


def op_section(root: Path, op: str, files: list[dict]) -> Iterator[str]:
    """Measured charts and tables by device, then the compiler's figures where no GPU has measured."""
    devices = dict.fromkeys((file["environment"]["device_type"], file["environment"]["device"]) for file in files)
    for kind, device in sorted(devices, reverse=True):
        own = [file for file in files if file["environment"]["device"] == device]
        yield about(own, gpu=kind == "cuda")
        records = sorted((record for file in own for record in file["records"]), key=place)
        for key in dict.fromkeys((record["op"], record["dtype"]) for record in records):
            chosen = [record for record in records if (record["op"], record["dtype"]) == key]
            yield from charts(root, chosen, f"{'-'.join(key)}-{device}", gpu=kind == "cuda")
            yield ratios(chosen)
            if kind == "cuda":
                yield everything(chosen)
    budget = root / "src" / "p2k" / "ops" / op / "budget.json"
    if not any(kind == "cuda" for kind, _ in devices):
        if budget.is_file():
            yield "No GPU has measured this operation. What the compiler makes of its kernels is known without one:\n"
            yield compiled(op, json.loads(budget.read_text(encoding="utf-8")))
        elif not (budget.parent / "kernel.py").is_file():
            yield "This operation has no code for a GPU.\n"
        if not files:
            yield "There is no measurement of it yet.\n"


def place(record: dict) -> tuple:
    """Order of records on the page: by op, then from small to large, then by pass."""
    return record["op"], math.prod(record["shape"].values()), PASSES.index(record["pass"])


def about(files: list[dict], *, gpu: bool) -> str:
    """A sentence on the machine, and on what could not be measured there."""
    environment = files[0]["environment"]
    dates = sorted({file["environment"]["date"][:10] for file in files})
    text = f"Measured on {environment['device']}"
    threads = int(environment["threads"])
    text += "" if gpu else f" with {threads} thread{'s' if threads > 1 else ''}"
    text += f", torch {environment['torch']}, {' and '.join(dict.fromkeys((dates[0], dates[-1])))}."
    if files[0]["effort"] == "quick":
        text += " These are quick runs with rough medians."
    if any(file["code"] != code_digest(file["records"][0]["op"]) for file in files):
        text += " The operation's code or the method has changed since."
    missing = {f"{words(name)} ({reason})" for file in files for name, reason in file["absent"].items()}
    return text + (f" Not measured: {'; '.join(sorted(missing))}.\n" if missing else "\n")


def charts(root: Path, records: list[dict], name: str, *, gpu: bool) -> Iterator[str]:
    """One figure per quantity, for an op that was measured at two sizes or more."""
    if len({record["bytes"] for record in records if record["pass"] == "forward"}) < 2:
        return
    op = f"`{records[0]['op']}`, {records[0]['dtype']}"
    speedups = speedup_lines(records)
    caption = f"{op}: speed-up of {words(subject(records))} over each baseline. {'; '.join(crossovers(speedups))}."
    yield figure(root, f"{name}-speedup", speedups, "times faster than", caption, unit_line=True)
    for quantity in QUANTITIES if gpu else ():
        panels = lines_of(records, quantity)
        if panels:
            caption = f"{op}: {quantity.label}. Lines are medians, bands reach from the 20th to the 80th percentile."
            yield figure(
                root, f"{name}-{quantity.key}", panels, quantity.label, caption, logarithmic=quantity.logarithmic
            )


def crossovers(panels: dict) -> list[str]:
    """From which size on each baseline is met or beaten, passes that agree named together."""
    found: dict[tuple[str, str], list[str]] = {}
    for pass_name, lines in panels.items():
        for line in lines:
            found.setdefault((words(line.name), crossover(line)), []).append(pass_name)
    phrases = []
    for (baseline, where), passes in found.items():
        which = "" if len(passes) == len(panels) else f" ({', '.join(passes)})"
        phrases.append(f"at least as fast as {baseline}{which} {where}")
    return [phrases[0][0].upper() + phrases[0][1:], *phrases[1:]]


def figure(root: Path, name: str, panels: dict, label: str, caption: str, **options: bool) -> str:
    """Draw a chart and return the directive that shows it."""
    stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path = f"{GENERATED}/{stem}.svg"
    store(root / path, draw(panels, label, **{"logarithmic": False, **options}))
    return f":::{{figure}} /{path}\n:name: fig:bench-{stem}\n:alt: {describe(panels, label)}\n\n{caption}\n:::\n"


def table(caption: str, headings: list[str], rows: list[list[str]], *, texts: int) -> str:
    """A captioned table whose first `texts` columns are words, the others numbers."""
    lines = [headings, ["---"] * texts + ["---:"] * (len(headings) - texts), *rows]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f":::{{table}} {caption}\n:class: p2k-benchmarks\n\n{body}\n:::\n"


def size(record: dict) -> str:
    """Sizes by axis, and where the inputs are found."""
    axes = " · ".join(f"{axis} {number:,}".replace(",", "\u202f") for axis, number in record["shape"].items())
    return axes + (" (in cache)" if record["cached"] else "")


def ratios(records: list[dict]) -> str:
    """Speed-up over each baseline, with its interval."""
    own = [record for record in records if record["implementation"] == subject(records)]
    names = list(dict.fromkeys(name for record in own for name in record["speedup"]))
    rows = [
        [size(record), record["pass"], *(interval(record["speedup"].get(name)) for name in names)] for record in own
    ]
    caption = f"`{records[0]['op']}`, {records[0]['dtype']}: speed-up of {words(subject(records))} over each baseline"
    return table(caption, ["Size", "Pass", *map(words, names)], rows, texts=2)


def interval(ratio: dict | None) -> str:
    """Median with the 20th and 80th percentile."""
    return f"{ratio['p50']:.2f} ({ratio['p20']:.2f} to {ratio['p80']:.2f})" if ratio else "–"


def everything(records: list[dict]) -> str:
    """All numbers of a GPU, folded away."""
    rows = [
        [
            size(record),
            record["pass"],
            words(record["implementation"]),
            "{p50:.3g} ({p20:.3g} to {p80:.3g})".format(**record["milliseconds"]),
            f"{record['roofline']['percent']:.0f}" if record["roofline"] else "–",
            "–" if record["memory_bytes"] is None else mebibytes(record["memory_bytes"]),
        ]
        for record in records
    ]
    headings = ["Size", "Pass", "Code", "Milliseconds", "% of the roofline", "Memory above the inputs"]
    inner = table(f"`{records[0]['op']}`, {records[0]['dtype']}: every record", headings, rows, texts=3)
    return f"::::{{dropdown}} All numbers\n{inner}::::\n"


def compiled(op: str, budget: dict) -> str:
    """What the compiler says about every Triton program of an op, one row per program and case."""
    programs: dict[str, dict[str, dict]] = {}
    for key, used in budget["kernels"].items():
        case, _, arch = key.rpartition(" ")
        programs.setdefault(case, {})[arch.removeprefix("sm_")] = used
    rows = []
    for case, by_arch in programs.items():
        figures = [" · ".join(str(used.get(name, "–")) for used in by_arch.values()) for name in FIELDS]
        case, _, program = case.rpartition(" ")
        rows.append([case, f"`{program}`", " · ".join(by_arch), *figures])
    versions = "Triton {triton}, ptxas {ptxas}".format(**budget["versions"])
    caption = f"`{op}` as {versions} compile it, figures in the order of the compute capabilities"
    return table(caption, ["Case", "Program", "Compute capability", *FIELDS.values()], rows, texts=3)


def costs(paths: list[Path]) -> list[str]:
    """Seconds of notebooks and tests, from the latest record."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if not found:
        return []
    latest = max(found, key=lambda cost: cost["environment"]["date"])

    def seconds(value: float | None) -> str:
        return "–" if value is None else f"{value:.1f}"

    rows = [
        [
            f"[{chapter['slug']}](/notebooks/{chapter['slug']}.ipynb)",
            seconds(chapter["notebook_seconds"]),
            seconds(chapter["test_seconds"]),
        ]
        for chapter in latest["chapters"]
    ]
    rows.append(["tests that serve all chapters", "–", seconds(latest["shared_test_seconds"])])
    caption = f"Seconds of each stored notebook and of the chapter's own tests, {latest['environment']['device']}"
    return ["## What the chapters cost\n", table(caption, ["Chapter", "Notebook", "Tests"], rows, texts=1)]


def download(root: Path, paths: list[Path]) -> list[str]:
    """Pack all records, always into the same bytes, and return the link."""
    if not paths:
        return []
    target = root / GENERATED / "benchmark-records.zip"

    def pack(file: object) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for path in paths:
                name = path.relative_to(root / "book" / "results").as_posix()
                archive.writestr(zipfile.ZipInfo(name), path.read_bytes(), zipfile.ZIP_DEFLATED)

    write_atomically(target, pack)
    text = f"All {len(paths)} files behind this page: {{download}}`benchmark-records.zip </{GENERATED}/{target.name}>`."
    return ["## The records\n", text + " Their fields are those of `p2k/experiments/benchmark.schema.json`.\n"]


def setup(app: Sphinx) -> dict:
    """Write the page before it is parsed."""
    app.connect("source-read", write_benchmarks)
    return {"version": "1", "parallel_read_safe": False}
