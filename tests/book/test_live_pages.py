"""Pages that show what stands outside them are read again when it changes, and only then."""

from types import SimpleNamespace

import p2k_api
import p2k_live
import pytest


@pytest.fixture
def app(tmp_path):
    (tmp_path / "src" / "p2k" / "core").mkdir(parents=True)
    env = SimpleNamespace(found_docs={"book/api/core", "book/intro"})
    return SimpleNamespace(srcdir=str(tmp_path), env=env)


def outdated(app):
    return p2k_live.live_pages(app, app.env, set(), set(), set())


def test_a_marked_page_is_read_again_when_an_input_changes(app, tmp_path):
    p2k_live.mark_live(app.env, "book/intro")
    assert outdated(app) == ["book/intro"]
    assert outdated(app) == []
    module = tmp_path / "src" / "p2k" / "core" / "new.py"
    module.write_text('"""A module."""\n')
    assert outdated(app) == ["book/intro"]
    module.with_suffix(".pyc").write_bytes(b"compiled")
    assert outdated(app) == []
    module.write_text('"""A changed module."""\n')
    assert outdated(app) == ["book/intro"]


def test_a_page_that_is_gone_is_not_asked_for(app):
    p2k_live.mark_live(app.env, "book/dropped")
    assert outdated(app) == []


def test_a_page_of_the_reference_is_marked_and_other_pages_are_not(app):
    source = ["% p2k-api: core\n"]
    p2k_api.write_reference(app, "book/api/core", source)
    p2k_api.write_reference(app, "book/intro", ["No reference here.\n"])
    assert source == ["Nothing stands on this floor yet.\n"]
    assert app.env.p2k_live == {"book/api/core"}
