"""Every chapter runs in its smoke profile, and is complete as stored."""

from pathlib import Path

import pytest
import yaml

from p2k.book.catalogue import load_catalogue
from p2k.book.check import check_book, check_chapter
from p2k.book.runner import run_chapter
from p2k.ops.oqc.mutants import MUTANTS

ROOT = Path(__file__).parents[2]
CATALOGUE = load_catalogue(ROOT)
CHAPTERS = [paper.slug for paper in CATALOGUE.chapters]


def test_the_catalogue_and_the_folder_hold_the_same_chapters():
    stored = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert stored == {*CHAPTERS}


@pytest.mark.parametrize("slug", CHAPTERS)
def test_smoke(slug, tmp_path):
    assert run_chapter(ROOT, slug, "smoke", out=tmp_path).is_file()


@pytest.mark.parametrize("slug", CHAPTERS)
def test_the_stored_chapter_is_complete_and_fresh(slug):
    assert check_chapter(ROOT, slug) == []


def test_the_stored_chapter_of_oqc_plants_every_bug():
    profiles = yaml.safe_load((ROOT / "book" / "profiles.yml").read_text(encoding="utf-8"))
    assert profiles["oqc"]["cpu"]["planted"] == len(MUTANTS)


def test_nothing_in_the_book_is_without_an_owner():
    assert check_book(ROOT) == []
