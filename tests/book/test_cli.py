"""The command's exit codes; what a user can mend is one line without a traceback."""

import subprocess
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from p2k.book import cli
from p2k.core.benchmark import Cost, Workload
from p2k.experiments import benchmark_records

README = "# Book\n\n<!-- chapters -->\nold\n<!-- /chapters -->\n\nEnd.\n"


@pytest.fixture
def call(root, monkeypatch):
    """Function that runs the command inside the small checkout."""
    monkeypatch.delenv("P2K_ROOT", raising=False)
    monkeypatch.chdir(root)
    return lambda *words: CliRunner().invoke(cli.app, list(words), env={"COLUMNS": "200"})


@pytest.fixture
def built(monkeypatch):
    """The commands that would have been run, each with exit code 0."""
    commands = []
    monkeypatch.setattr(
        cli.subprocess, "run", lambda words, **_: commands.append(words) or SimpleNamespace(returncode=0)
    )
    return commands


def test_list_shows_begun_chapters_and_on_request_all(call):
    short, full = call("list"), call("list", "--all")
    assert (short.exit_code, full.exit_code) == (0, 0)
    assert "tiny" in short.output
    assert "later-one" not in short.output
    assert "later-one" in full.output
    assert "chart" in full.output


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["run", "nope"], 1, "unknown chapter 'nope'"),
        (["run", "tiny", "--profile", "huge"], 1, "profile must be"),
        (["run", "tiny", "--profile", "gpu", "--device", "cpu"], 1, "needs a CUDA GPU"),
        (["new", "Bad"], 1, "slug must be"),
        (["check", "nope"], 1, "unknown chapter"),
        (["bench", "nonsense", "--device", "cpu"], 1, "no such op: nonsense"),
        (["bench", "--device", "tpu"], 1, "device must be auto, cpu, cuda"),
        (["bench", "--device", "cpu", "--compare", "nowhere"], 1, "no benchmark files in nowhere"),
        (["serve"], 1, "the site is not built: p2k build"),
        (["frobnicate"], 2, "No such command"),
        (["run"], 2, "Missing argument"),
        (["run", "tiny", "--bogus"], 2, "No such option"),
    ],
)
def test_user_errors_have_a_code_and_no_traceback(call, words, code, message):
    result = call(*words)
    assert result.exit_code == code
    assert message in result.output
    assert "Traceback" not in result.output
    if code == 1:
        assert len(result.output.strip().splitlines()) == 1


def test_outside_a_checkout_the_error_says_where_to_run(call, monkeypatch, tmp_path_factory):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    result = call("list")
    assert result.exit_code == 1
    assert "inside a checkout" in result.output


def test_a_programming_error_is_not_hidden(call, monkeypatch):
    monkeypatch.setattr(cli, "load_catalogue", lambda root: 1 / 0)
    assert isinstance(call("list").exception, ZeroDivisionError)


def test_new_then_check_lists_the_gaps(call):
    assert call("new", "demo", "--floors", "nn").exit_code == 0
    result = call("check", "demo")
    assert result.exit_code == 1
    assert "tests/nn/test_demo.py: fill in" in result.output
    assert "book: nothing missing" in call("check").output


def test_doctor_reports_the_checkout(call, root):
    result = call("doctor")
    assert result.exit_code == 0
    assert str(root) in result.output.replace("\n", "")


def test_build_runs_what_is_stale_once_and_renews_the_readme(call, root, built, stamped, monkeypatch):
    ran = []
    monkeypatch.setattr(
        cli.runner, "run_chapter", lambda root, slug, **_: ran.append(slug) or stamped(["eq:tiny-double"])
    )
    (root / "README.md").write_text(README)
    first, second = call("build"), call("build")
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert ran == ["tiny"]
    assert "index.html" in second.output.replace("\n", "")
    assert [words[1:] for words in built] == [["build", ".", "-W", "--keep-going"]] * 2
    text = (root / "README.md").read_text()
    assert "| [tiny](notebooks/tiny.ipynb) | A tiny paper | derived |" in text
    assert text.endswith("<!-- /chapters -->\n\nEnd.\n")


def test_build_can_leave_out_execution_and_strictness(call, built):
    assert call("build", "--no-execute", "--no-strict").exit_code == 0
    assert built[0][1:] == ["build", "."]


def test_a_failed_build_exits_with_one(call, monkeypatch):
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(cli.subprocess, "run", lambda words, **_: failed)
    result = call("build", "--no-execute")
    assert result.exit_code == 1
    assert "the site was not built" in result.output


@pytest.fixture
def square(monkeypatch):
    """One workload without compilation; the function sets the code that is measured against eager torch."""

    def use(kernel):
        workload = Workload(
            op="square",
            shape={"n": 4096},
            dtype=torch.float32,
            make_inputs=lambda source, device, dtype: (torch.randn(4096, generator=source),),
            kernel=kernel,
            reference=lambda x: x * x,
            forward=Cost(bytes=32768, flops=4096),
            backward=Cost(bytes=49152, flops=8192),
        )
        monkeypatch.setattr(cli.benchmark, "declared_workloads", lambda ops, device, *, quick: [workload])
        candidates = {"eager": workload.reference, "kernel": kernel}
        monkeypatch.setattr(cli.benchmark, "implementations", lambda workload: candidates)

    return use


def times(x, count):
    for _ in range(count):
        result = x * x
    return result


def test_bench_writes_records_and_costs(call, root, square):
    square(lambda x: x * x)
    result = call("bench", "--quick", "--device", "cpu")
    assert result.exit_code == 0, result.output
    folder = root / "runs" / "bench" / "cpu-quick"
    assert f"1 files in {folder}" in result.output.replace("\n", "")
    (file,) = benchmark_records.read_folder(folder)
    assert file["effort"] == "quick"
    assert len(file["records"]) == 6
    assert "kernel" in result.output
    assert (folder / benchmark_records.COST_FILE).is_file()
    assert call("bench", "square", "--device", "cpu", "--out", "elsewhere").exit_code == 0
    assert [path.name for path in (root / "elsewhere").iterdir()] == ["square-n4096-float32.json"]


def test_bench_exits_with_one_on_a_wrong_result(call, square):
    square(lambda x: x * x * 1.1)
    result = call("bench", "--quick", "--device", "cpu")
    assert result.exit_code == 1
    assert "square n=4096 float32 forward kernel: forward error" in result.output


def test_bench_exits_with_one_on_a_planted_slowdown(call, square):
    square(lambda x: x * x)
    assert call("bench", "--quick", "--device", "cpu", "--out", "before").exit_code == 0
    square(lambda x: times(x, 20))
    result = call("bench", "--quick", "--device", "cpu", "--no-resume", "--out", "after", "--compare", "before")
    assert result.exit_code == 1
    assert "square float32 forward kernel {'n': 4096}: 0." in result.output
    assert "x eager, was " in result.output
