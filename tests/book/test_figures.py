"""Figures are deterministic; the slider is self-contained, labelled and small."""

import re

import matplotlib.pyplot as plt
import pytest

from p2k.book.figures import slider, use_house_style

PNG = b"\x89PNG\r\n\x1a\n"


def draw(slope):
    figure, axes = plt.subplots(figsize=(2, 1))
    axes.plot([0, 1], [0, slope])
    return figure


def test_the_slider_is_self_contained_deterministic_and_accessible():
    use_house_style()
    markup = [slider([draw(1), draw(2)], [0.5, 1], label="slope <1/s>", alt="A line").data for _ in range(2)]
    assert markup[0] == markup[1]
    assert plt.get_fignums() == []
    assert not re.search(r"https?:|src=\"(?!data:)|@\w+@", markup[0])
    ids = re.findall(r'id="([^"]+)"', markup[0])
    assert len(ids) == len(set(ids)) == 2
    assert f'for="{ids[1]}"' in markup[0]
    assert markup[0].count(" hidden>") == 1
    assert 'alt="A line (slope &lt;1/s&gt;: 0.5)"' in markup[0]


def test_two_sliders_have_different_ids():
    first, second = (slider([PNG, PNG], [1, 2], label=label, alt="a").data for label in ("one", "two"))
    assert not set(re.findall(r'id="([^"]+)"', first)) & set(re.findall(r'id="([^"]+)"', second))


@pytest.mark.parametrize(
    ("frames", "values", "label"), [([PNG], [1], "x"), ([PNG, PNG], [1], "x"), ([PNG, PNG], [1, 2], " ")]
)
def test_bad_arguments_are_refused(frames, values, label):
    with pytest.raises(ValueError, match="slider: expected"):
        slider(frames, values, label=label, alt="a")


def test_a_slider_that_is_too_large_is_refused():
    with pytest.raises(ValueError, match="exceed 400000"):
        slider([PNG * 30_000] * 2, [1, 2], label="x", alt="a")
