"""The page of benchmarks, built from small checkouts with records of a CPU, of a GPU, and without any."""

import json
import zipfile

import p2k_benchmarks as page
import p2k_charts as charts
import pytest

from p2k.core.errors import P2KError
from p2k.experiments.benchmark_records import COST_FILE, read_file, write_json

BUDGET = {
    "versions": {"triton": "3.7", "ptxas": "12.8"},
    "kernels": {
        f"row bf16 64 forward_program sm_{arch}": {
            "registers": arch,
            "spilled_bytes": 0,
            "shared_bytes": 64,
            "wide_loads": 2,
            "tensor_core": 0,
        }
        for arch in (80, 90)
    },
}


@pytest.fixture(autouse=True)
def present_code(monkeypatch):
    """The records of these tests belong to the present code."""
    monkeypatch.setattr(page, "code_digest", lambda op: "0" * 16)


def quantiles(middle):
    return {"p20": 0.9 * middle, "p50": middle, "p80": 1.1 * middle}


def record(tokens, pass_name, implementation, speedup, *, gpu):
    roofline = {"bytes_per_second": 4e12, "flops_per_second": 8e14, "milliseconds": 0.5, "percent": 50.0}
    return {
        "op": "square.row",
        "shape": {"tokens": tokens},
        "dtype": "bfloat16",
        "cached": False,
        "pass": pass_name,
        "implementation": implementation,
        "milliseconds": {**quantiles(1.0), "n": 20},
        "bytes": tokens * 1024,
        "flops": tokens,
        "roofline": roofline if gpu else None,
        "speedup": {name: quantiles(value) for name, value in speedup.items()},
        "memory_bytes": 3 * 2**20 if gpu else None,
        "error": {"forward": 1e-3, "backward": 1e-3},
        "first_call_seconds": 1.0,
        "problem": None,
    }


def file_of(tokens, *, gpu):
    """One benchmark file; the subject overtakes eager torch between 1024 and 4096 tokens."""
    own, ratio = "kernel" if gpu else "compile", 0.8 if tokens < 4096 else 3.0
    records = []
    for pass_name in ("forward", "backward"):
        records.append(record(tokens, pass_name, own, {"eager": ratio}, gpu=gpu))
        records.append(record(tokens, pass_name, "eager", {own: 1 / ratio}, gpu=gpu))
    names = ("cuda", "python", "torch", "triton", "numpy")
    environment = {
        "device": "NVIDIA H200" if gpu else "Some CPU",
        "device_type": "cuda" if gpu else "cpu",
        "threads": "1",
        "date": "2026-11-22T00:00:00+00:00",
        **dict.fromkeys(names, "1.0"),
    }
    absent = {} if gpu else {"liger-kernel": "ImportError: no GPU"}
    content = {"schema": 1, "environment": environment, "effort": "full", "code": "0" * 16, "absent": absent}
    return content | {"records": records}


@pytest.fixture
def checkout(tmp_path):
    """An op with a kernel and its budget, and one without any."""
    for name in ("square", "plain"):
        (tmp_path / "src" / "p2k" / "ops" / name).mkdir(parents=True)
        (tmp_path / "src" / "p2k" / "ops" / name / "__init__.py").touch()
    (tmp_path / "src" / "p2k" / "ops" / "square" / "kernel.py").touch()
    (tmp_path / "src" / "p2k" / "ops" / "square" / "budget.json").write_text(json.dumps(BUDGET))
    return tmp_path


def store(root, *, gpu):
    folder = root / "book" / "results" / "benchmarks" / ("cuda" if gpu else "cpu")
    for tokens in (16384, 1024, 4096):
        write_json(folder / f"square.row-tokens{tokens}.json", file_of(tokens, gpu=gpu))
        read_file(folder / f"square.row-tokens{tokens}.json")
    return folder


def test_without_records_the_page_says_so_and_shows_the_compiler(checkout):
    text = page.benchmark_page(checkout)
    assert "No GPU has run these benchmarks yet" in text
    assert "No GPU has measured this operation" in text
    assert "| row bf16 64 | `forward_program` | 80 · 90 | 80 · 90 | 0 · 0 | 64 · 64 | 2 · 2 | 0 · 0 |" in text
    assert "## plain" in text
    assert "This operation has no code for a GPU." in text
    assert text.count("There is no measurement of it yet.") == 2
    assert "{figure}" not in text
    assert "{download}" not in text


def test_cpu_records_are_ratios_only(checkout):
    store(checkout, gpu=False)
    text = page.benchmark_page(checkout)
    assert "Measured on Some CPU with 1 thread, torch 1.0, 2026-11-22." in text
    assert "Not measured: liger-kernel (ImportError: no GPU)." in text
    assert text.count("{figure}") == 1
    assert "speed-up of torch.compile over each baseline. At least as fast as eager torch from 4 MiB on." in text
    rows = [line for line in text.splitlines() if line.startswith("| tokens")]
    assert [row.split(" | ")[0] for row in rows[::2]] == [
        "| tokens 1\u202f024",
        "| tokens 4\u202f096",
        "| tokens 16\u202f384",
    ]
    assert rows[0].endswith("| forward | 0.80 (0.72 to 0.88) |")
    assert "Milliseconds" not in text
    assert "No GPU has measured this operation" in text


def test_records_of_earlier_code_are_called_so(checkout, monkeypatch):
    store(checkout, gpu=False)
    note = "The operation's code or the method has changed since."
    assert note not in page.benchmark_page(checkout)
    monkeypatch.setattr(page, "code_digest", lambda op: "1" * 16)
    assert f"2026-11-22. {note} Not measured" in page.benchmark_page(checkout)


def test_gpu_records_have_time_roofline_memory_and_all_numbers(checkout):
    store(checkout, gpu=True)
    text = page.benchmark_page(checkout)
    assert "No GPU has" not in text
    assert "sm_80" not in text
    names = [line.split()[1] for line in text.splitlines() if line.startswith(":name:")]
    assert [name.rpartition("-")[2] for name in names] == ["speedup", "time", "roofline", "memory"]
    assert "speed-up of the fused code over each baseline" in text
    assert "| forward | eager torch | 1 (0.9 to 1.1) | 50 | 3 MiB |" in text
    alts = [line for line in text.splitlines() if line.startswith(":alt:")]
    assert len(alts) == len(names)
    assert "forward: eager torch 0.8 at 1 MiB and 3 at 16 MiB" in alts[0]


def test_charts_are_files_that_a_second_build_leaves_alone(checkout):
    store(checkout, gpu=True)
    page.benchmark_page(checkout)
    folder = checkout / "book" / "_generated" / "benchmarks"
    made = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.svg")}
    assert len(made) == 4
    assert all(content.startswith(b"<?xml") and len(content) < 200_000 for _, content in made.values())
    page.benchmark_page(checkout)
    assert {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.svg")} == made


def test_both_kinds_of_device_stand_on_one_page_and_the_archive_holds_every_file(checkout):
    cpu, gpu = store(checkout, gpu=False), store(checkout, gpu=True)
    text = page.benchmark_page(checkout)
    assert text.index("Measured on NVIDIA H200") < text.index("Measured on Some CPU")
    assert "All 6 files" in text
    target = checkout / "book" / "_generated" / "benchmarks" / "benchmark-records.zip"
    first = target.read_bytes()
    with zipfile.ZipFile(target) as archive:
        assert len(archive.namelist()) == 6
        name = f"benchmarks/cuda/{next(gpu.glob('*1024.json')).name}"
        assert archive.read(name) == next(gpu.glob("*1024.json")).read_bytes()
    next(cpu.glob("*.json")).touch()
    page.benchmark_page(checkout)
    assert target.read_bytes() == first


def test_costs_of_chapters(checkout):
    chapter = {"slug": "tiny", "profile": "cpu", "notebook_seconds": 12.34, "test_seconds": None, "test_files": []}
    cost = {"schema": 1, "chapters": [chapter], "shared_test_seconds": 60.0}
    environment = file_of(1024, gpu=False)["environment"]
    write_json(checkout / "book" / "results" / "benchmarks" / "cpu" / COST_FILE, cost | {"environment": environment})
    text = page.benchmark_page(checkout)
    assert "| [tiny](/notebooks/tiny.ipynb) | 12.3 | – |" in text
    assert "| tests that serve all chapters | – | 60.0 |" in text


def test_a_broken_record_stops_the_build(checkout):
    folder = store(checkout, gpu=False)
    (folder / "broken.json").write_text("{}")
    with pytest.raises(P2KError, match=r"broken.json: top level: .* is a required property"):
        page.benchmark_page(checkout)


def test_one_size_is_a_table_without_a_chart(checkout):
    folder = store(checkout, gpu=False)
    for path in sorted(folder.glob("*.json"))[1:]:
        path.unlink()
    text = page.benchmark_page(checkout)
    assert "{figure}" not in text
    assert "| Size | Pass | eager torch |" in text


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([2, 3], "at every size"),
        ([0.5, 3], "from 2 MiB on"),
        ([2, 0.5], "not at the largest size"),
        ([0.5, 0.6], "not at the largest size"),
    ],
)
def test_crossover(values, words):
    line = charts.Line("eager", [(size * 2**20, v, v, v) for size, v in zip((1, 2), values, strict=True)])
    assert charts.crossover(line) == words


def test_the_directive_line_is_replaced_and_the_page_follows_the_records(checkout):
    class App:
        srcdir = str(checkout)
        env = type("Env", (), {})()

    source, other = ["# Title\n\n% p2k-benchmarks\n"], ["# Other\n"]
    page.write_benchmarks(App, "book/benchmarks", source)
    page.write_benchmarks(App, "book/other", other)
    assert source[0].startswith("# Title\n\n:::{note}")
    assert other == ["# Other\n"]
    assert App.env.p2k_live == {"book/benchmarks"}
