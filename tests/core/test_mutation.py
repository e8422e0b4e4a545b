import types

import pytest

from p2k.core.mutation import Mutant, mutated, mutated_source, survivors


@pytest.fixture
def module(tmp_path):
    path = tmp_path / "double.py"
    path.write_text("def double(x):\n    return x + x\n\n\ndef name():\n    return 'x'\n")
    made = types.ModuleType("double")
    made.__file__ = str(path)
    exec(path.read_text(), made.__dict__)
    return made


def probe(module):
    return module.double(3) != 6


def test_survivors_are_the_bugs_the_probe_misses(module):
    caught = Mutant("x + x", "x - x", "wrong sign")
    missed = Mutant("'x'", "'y'", "wrong name")
    assert survivors(module, [caught, missed], probe) == [missed]
    assert module.double(3) == 6


def test_an_edit_must_apply_as_often_as_it_says():
    assert mutated_source("a b a", Mutant("a", "c", "", 2)) == "c b c"
    with pytest.raises(ValueError, match="'lost': expected 1 x 'z', found 0"):
        mutated_source("a b a", Mutant("z", "c", "lost"))
    with pytest.raises(ValueError, match="expected 1 x 'a', found 2"):
        mutated_source("a b a", Mutant("a", "c", ""))
    with pytest.raises(ValueError, match="the edit changes nothing"):
        mutated_source("a b", Mutant("a", "a", ""))


def test_a_probe_that_rejects_the_original_judges_nothing(module):
    with pytest.raises(ValueError, match="rejects double itself"):
        survivors(module, [], lambda module: True)


def test_a_mutant_leaves_no_trace(module):
    import sys

    before = set(sys.modules)
    with mutated(module, Mutant("x + x", "x - x", "wrong sign")) as broken:
        assert broken.double(3) == 0
        assert broken.__name__ in sys.modules
    assert set(sys.modules) == before
