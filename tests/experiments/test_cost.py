import json

import pytest

from p2k.core.errors import P2KError
from p2k.experiments.cost import chapter_costs


@pytest.fixture
def checkout(tmp_path):
    """Two chapters, one of them executed, and the seconds of three test files."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "_build").mkdir()
    stored = {"metadata": {"p2k": {"profile": "cpu", "seconds": 50.5}}}
    (tmp_path / "notebooks" / "oqc.ipynb").write_text(json.dumps(stored))
    (tmp_path / "notebooks" / "two-pass-softmax.ipynb").write_text(json.dumps({"metadata": {}}))
    seconds = {"tests/ops/test_oqc_kernel.py": 3.0, "tests/nn/test_oqc.py": 2.0, "tests/ops/test_oqclike.py": 7.0}
    (tmp_path / "_build" / "test-seconds.json").write_text(json.dumps(seconds))
    return tmp_path


def test_seconds_are_joined_by_stem(checkout):
    cost = chapter_costs(checkout, {"device": "x"})
    assert cost["environment"] == {"device": "x"}
    assert cost["shared_test_seconds"] == 7.0
    first, second = cost["chapters"]
    assert (first["slug"], first["notebook_seconds"], first["test_seconds"]) == ("oqc", 50.5, 5.0)
    assert first["test_files"] == ["tests/nn/test_oqc.py", "tests/ops/test_oqc_kernel.py"]
    assert (second["slug"], second["notebook_seconds"], second["test_seconds"]) == ("two-pass-softmax", None, None)


def test_hyphens_of_a_slug_are_underscores_of_a_test(checkout):
    path = checkout / "_build" / "test-seconds.json"
    path.write_text(json.dumps({"tests/ops/test_two_pass_softmax.py": 1.5}))
    assert chapter_costs(checkout, {})["chapters"][1]["test_seconds"] == 1.5


def test_without_a_run_of_the_suite_there_are_no_seconds(checkout):
    (checkout / "_build" / "test-seconds.json").unlink()
    cost = chapter_costs(checkout, {})
    assert cost["shared_test_seconds"] is None
    assert cost["chapters"][0]["test_seconds"] is None


@pytest.mark.parametrize("content", ["[1]", "{", '{"a": "b"}'])
def test_a_broken_file_of_seconds_says_what_to_do(checkout, content):
    (checkout / "_build" / "test-seconds.json").write_text(content)
    with pytest.raises(P2KError, match="run `make test` again"):
        chapter_costs(checkout, {})
