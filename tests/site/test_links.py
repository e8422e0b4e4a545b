"""Every link and anchor of the built site, read from the HTML; external pages are not asked."""

from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.site


class _Reader(HTMLParser):
    """Collect what a page defines and what it points to."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.assets: list[str] = []
        self.repeated: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("id"):
            if values["id"] in self.ids:
                self.repeated.append(values["id"])
            self.ids.add(values["id"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        elif tag == "link" and values.get("rel") not in ("canonical", "index", "search", "next", "prev", "author"):
            self.assets.append(values.get("href") or "")
        elif values.get("src"):
            self.assets.append(values["src"])


@cache
def read(path: Path) -> _Reader:
    reader = _Reader()
    reader.feed(path.read_text(encoding="utf8"))
    return reader


def pages(site: Path) -> list[Path]:
    return sorted(path for path in site.rglob("*.html") if "_static" not in path.parts)


def test_internal_links_and_anchors_resolve(site: Path) -> None:
    broken = []
    for page in pages(site):
        for link in [*read(page).links, *read(page).assets]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link == "#":
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if not target.is_file():
                broken.append(f"{page.relative_to(site)}: {link}: no such file")
            elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in read(target).ids:
                broken.append(f"{page.relative_to(site)}: {link}: no such anchor")
    assert not broken, "\n".join(broken)


def test_no_asset_is_loaded_from_elsewhere(site: Path) -> None:
    outside = [
        f"{page.relative_to(site)}: {asset}"
        for page in pages(site)
        for asset in read(page).assets
        if urlsplit(asset).scheme in ("http", "https") or asset.startswith("//")
    ]
    assert not outside, "\n".join(outside)


def test_chapters_and_reference_link_both_ways(site: Path) -> None:
    chapter = read(site / "notebooks" / "oqc.html").links
    reference = read(site / "book" / "api" / "ops.html").links
    assert any(link.endswith("api/ops.html#p2k.ops.oqc.project_and_inject") for link in chapter)
    assert any("notebooks/oqc.html" in link for link in reference)
    assert any("_modules/p2k/ops/oqc" in link for link in reference), "no link to the source"


def test_index_leads_to_the_first_page(site: Path) -> None:
    assert "book/intro.html" in (site / "index.html").read_text()
