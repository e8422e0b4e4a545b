"""pyproject.toml, requirements.lock and environment.yml ask for the same packages."""

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import p2k

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Extras of projects that no test here imports: they are not locked.
UNLOCKED = {"peers", "text", "trainers"}
LOCK = [Requirement(line) for line in (ROOT / "requirements.lock").read_text().splitlines() if line.strip()]


def test_lock_pins_every_package_exactly_and_portably() -> None:
    for pin in LOCK:
        assert pin.url is None
        assert re.fullmatch(r"==[^+,*]+", str(pin.specifier)), f"{pin} is not one exact public version"
        assert not pin.name.startswith(("nvidia-", "cuda-")), f"{pin.name} belongs to a build of torch"


def test_lock_satisfies_every_requirement_of_the_project() -> None:
    wanted = [
        *PROJECT["dependencies"],
        *(item for name, extra in PROJECT["optional-dependencies"].items() if name not in UNLOCKED for item in extra),
    ]
    pins: dict[str, list[str]] = {}
    for pin in LOCK:
        pins.setdefault(canonicalize_name(pin.name), []).append(str(pin.specifier).removeprefix("=="))
    for requirement in map(Requirement, wanted):
        versions = pins.get(canonicalize_name(requirement.name), [])
        assert versions, f"{requirement.name} is not in requirements.lock: make lock"
        for version in versions:
            assert requirement.specifier.contains(version, prereleases=True), f"{requirement} excludes {version}"


def test_every_extra_that_a_message_names_exists() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py")) + (ROOT / "README.md").read_text()
    named = {*re.findall(r"""extra=["'](\w+)["']""", sources), *re.findall(r"\[(gpu|book|test)\]", sources)}
    assert {"gpu", "book"} <= named <= set(PROJECT["optional-dependencies"])


def test_conda_environment_installs_the_lock_and_the_package() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert set(environment) == {"name", "channels", "dependencies"}
    python, pip, inner = environment["dependencies"]
    assert pip == "pip"
    assert inner == {"pip": ["-r requirements.lock", "-e ."]}
    version = python.removeprefix("python=")
    assert Requirement(f"x{PROJECT['requires-python']}").specifier.contains(f"{version}.0")


def test_versions_agree() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert PROJECT["version"] == p2k.__version__ == str(citation["version"])
    assert f"## {p2k.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_readme_names_the_two_commands_and_ci_runs_them() -> None:
    readme, ci = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    for command in ("make test", "make book"):
        assert re.search(rf"^{command}\b", readme, flags=re.M)
        assert re.search(rf"\b{command}$", ci, flags=re.M)


def test_readme_links_lead_to_files() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
