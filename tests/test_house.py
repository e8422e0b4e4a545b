"""The rules of the house: floors, budgets, light imports, and files that agree."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "p2k"
MODULES = sorted(SOURCE.rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
OPTIONAL = ("triton", "matplotlib", "sklearn", "scipy", "papermill", "IPython")


def lines(folder: str) -> int:
    return sum(len(path.read_text().splitlines()) for path in (SOURCE / folder).rglob("*.py"))


def tracked() -> list[Path]:
    """Files that git tracks or would track; an archive without git is walked whole."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, "the house rules are checked in a git checkout"
    return [path for path in map(ROOT.joinpath, run.stdout.splitlines()) if path.is_file()]


def run_python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_lower_floors_never_import_upper_ones():
    run = subprocess.run([Path(sys.executable).with_name("lint-imports")], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_files_and_functions_are_short(path):
    tree, text = ast.parse(path.read_text()), path.read_text()
    assert len(text.splitlines()) <= (400 if path.name == "kernel.py" else 300)
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    for function in functions:
        assert function.end_lineno - function.lineno + 1 <= 60, function.name


@pytest.mark.parametrize("words", [("check",), ("format", "--check")], ids=lambda words: words[0])
def test_ruff_has_nothing_to_say(words):
    """Among its rules: at most 8 arguments, and no comparison without effect in a test."""
    run = subprocess.run([Path(sys.executable).with_name("ruff"), *words], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_the_machinery_stays_smaller_than_the_methods():
    machinery, methods = lines("book"), sum(map(lines, ("ops", "linalg", "nn", "losses", "optim")))
    assert machinery <= 1500
    assert machinery <= methods


def test_the_package_imports_without_optional_packages():
    names = [".".join(("p2k", *path.relative_to(SOURCE).with_suffix("").parts)) for path in MODULES]
    light = [n for n in names if not n.startswith("p2k.book") and not n.endswith(("__init__", "__main__", ".kernel"))]
    code = (
        f"import importlib, sys\nfor name in {OPTIONAL!r}: sys.modules[name] = None\n"
        f"for name in {light!r}: importlib.import_module(name)"
    )
    run = run_python(code)
    assert run.returncode == 0, run.stderr


def test_importing_the_package_costs_little_beyond_torch():
    code = "import torch, numpy, time; t = time.process_time(); import p2k.core.checks; print(time.process_time() - t)"
    # Processor time, best of three: other jobs on the machine do not count.
    assert min(float(run_python(code).stdout) for _ in range(3)) <= 0.3


def test_conda_pip_and_the_lock_agree():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    python = next(item for item in environment["dependencies"] if str(item).startswith("python"))
    pip = next(item["pip"] for item in environment["dependencies"] if isinstance(item, dict))
    assert "pip" in environment["dependencies"]
    assert pip == ["-r requirements.lock", "-e ."]
    assert re.search(r"\d+\.\d+", python)[0] == re.search(r"\d+\.\d+", project["requires-python"])[0]
    lock = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] not in "# "]
    pins = dict(re.match(r"([\w.-]+)==([\w.+]+)", line).groups() for line in lock)
    wanted = [
        *project["dependencies"],
        # Peers of a benchmark, downloads of the gpu profiles and other trainers are installed by whoever wants them.
        *(
            i
            for name, extra in project["optional-dependencies"].items()
            if name not in ("peers", "text", "trainers")
            for i in extra
        ),
    ]
    names = {re.match(r"[\w.-]+", item)[0].lower().replace("_", "-") for item in wanted}
    assert names <= {name.lower().replace("_", "-") for name in pins}
    constraints = (ROOT / "constraints.txt").read_text()
    for name in ("torch", "triton"):
        assert f"\n{name}=={pins[name]}" in constraints


def test_no_file_is_large_or_names_a_machine():
    machine = re.compile(r"(?<![\w.])/(home|root|Users|work)/\w+/|file" + "://")
    for path in tracked():
        assert path.stat().st_size <= 1_000_000, path
        if path.suffix in (".py", ".md", ".yml", ".toml", ".ipynb", ".json", ".txt", ".cff", "") and path not in TESTS:
            found = machine.search(path.read_text(encoding="utf-8", errors="ignore"))
            assert not found, f"{path.relative_to(ROOT)}: {found}"


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_literal_tolerance_has_a_reason(path):
    text = path.read_text().splitlines()
    for node in ast.walk(ast.parse("\n".join(text))):
        if isinstance(node, ast.keyword) and node.arg in ("atol", "rtol") and isinstance(node.value, ast.Constant):
            # The sentence stands on the line or within the three above, where one comment may serve two comparisons.
            near = text[max(0, node.value.lineno - 4) : node.value.lineno]
            assert node.value.value == 0 or any("#" in line for line in near), f"line {node.value.lineno}: say why"


def test_no_test_is_skipped_or_rerun():
    words = re.compile(r"mark\.(skip|flaky|xfail)|pytest\.skip|importorskip")
    assert [path.name for path in TESTS if path != Path(__file__) and words.search(path.read_text())] == []
