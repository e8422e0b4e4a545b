"""Directives that show the catalogue and the provenance of the stored notebooks as they are at build time."""

import functools
from pathlib import Path

from docutils import nodes
from p2k_api import chapter_objects
from p2k_live import mark_live
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from p2k.book.catalogue import Paper, chapter_status, load_catalogue
from p2k.book.provenance import Provenance, chapter_digest, read_provenance

# Asked again and again within one build.
computed_status, computed_digest = functools.cache(chapter_status), functools.cache(chapter_digest)

STALE = "The code behind this page has changed since the page was executed: its numbers are those of the older code."
MISSING = "This page has not been executed yet: it shows no numbers of its own."


class LiveDirective(SphinxDirective):
    """A directive whose page is read again when its inputs change, since what it shows changes outside the page."""

    @property
    def root(self) -> Path:
        """The repository's root."""
        return Path(self.env.srcdir)

    def run(self) -> list[nodes.Node]:
        """Remember the page, then render."""
        mark_live(self.env, self.env.docname)
        return self.render()

    def page(self, text: str, docname: str) -> nodes.Node:
        """Return a link to another page of the book."""
        options = {"refdomain": "std", "reftype": "doc", "reftarget": f"/{docname}", "refexplicit": True}
        return addnodes.pending_xref("", nodes.inline(text, text), refdoc=self.env.docname, refwarn=True, **options)

    def is_built(self, slug: str) -> bool:
        """Say whether the book has a page for this paper."""
        return f"notebooks/{slug}" in self.env.found_docs

    def built(self) -> list[Paper]:
        """Return the papers and maps that have a page, in the catalogue's order."""
        return [entry for entry in load_catalogue(self.root).entries if self.is_built(entry.slug)]

    def title(self, paper: Paper) -> nodes.Node:
        """Return the paper's title, linked to its chapter where there is one."""
        if self.is_built(paper.slug):
            return self.page(paper.title, f"notebooks/{paper.slug}")
        return nodes.Text(paper.title)

    def status(self, slug: str) -> nodes.Node:
        """Return the computed status as a badge."""
        return badge(computed_status(self.root, slug))

    def freshness(self, slug: str, record: Provenance | None) -> str:
        """Compare the digest that the notebook carries with the one its code has now."""
        if record is None:
            return "not executed"
        return "fresh" if record.digest == computed_digest(self.root, slug, record.profile) else "stale"


def badge(word: str) -> nodes.Node:
    """Return a word with a colour; the word alone carries the meaning."""
    return nodes.inline(word, word, classes=["p2k-badge", f"p2k-{word.replace(' ', '-')}"])


def link(text: str, url: str) -> nodes.Node:
    """Return a link to a page outside the book."""
    return nodes.reference("", text, refuri=url)


def join(items: list[nodes.Node], separator: str = ", ") -> list[nodes.Node]:
    """Put a separator between nodes."""
    return [node for index, item in enumerate(items) for node in ([nodes.Text(separator)] if index else []) + [item]]


def links(paper: Paper) -> list[nodes.Node]:
    """Return the paper's arXiv page and public code, as far as the catalogue knows them."""
    found = [link(f"arXiv:{paper.arxiv}", f"https://arxiv.org/abs/{paper.arxiv}")] if paper.arxiv else []
    return found + ([link("code", paper.code)] if paper.code else [])


def table(title: str, headings: list[str], rows: list[list[list[nodes.Node]]], name: str) -> nodes.Node:
    """Return a captioned table; the theme puts it into a container that scrolls on narrow screens."""

    def row(cells: list[list[nodes.Node]]) -> nodes.Node:
        return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", *cell)) for cell in cells))

    group = nodes.tgroup("", *(nodes.colspec(colwidth=1) for _ in headings), cols=len(headings))
    group += nodes.thead("", row([[nodes.Text(heading)] for heading in headings]))
    group += nodes.tbody("", *(row(cells) for cells in rows))
    return nodes.table("", nodes.title(title, title), group, classes=[name])


class Cards(LiveDirective):
    """`{p2k-cards}`: one card per chapter of the book."""

    def render(self) -> list[nodes.Node]:
        """Title, what kind of paper it is, and how far its chapter has come."""
        parts = load_catalogue(self.root).parts
        cards = []
        for paper in self.built():
            about = " · ".join(filter(None, [parts[paper.part], paper.kind, (paper.date or "")[:4]])) + " "
            head = nodes.paragraph("", "", self.title(paper), classes=["p2k-card-title"])
            foot = nodes.paragraph("", about, self.status(paper.slug))
            cards.append(nodes.container("", head, foot, classes=["p2k-card"]))
        return [nodes.container("", *cards, classes=["p2k-cards"])]


class Catalogue(LiveDirective):
    """`{p2k-catalogue}`: every paper of the book; the script beside this file adds the filter."""

    def render(self) -> list[nodes.Node]:
        """A plain table, complete without scripts."""
        catalogue = load_catalogue(self.root)
        rows = [
            [
                [self.title(paper)],
                [nodes.Text(catalogue.parts[paper.part])],
                [nodes.Text(paper.kind)],
                [nodes.Text(str(paper.date))],
                join(links(paper)),
                [self.status(paper.slug)],
            ]
            for paper in catalogue.papers.values()
        ]
        headings = ["Paper", "Part", "Kind", "Date", "Links", "Status"]
        script = (Path(__file__).parent / "catalogue.js").read_text(encoding="utf8")
        view = table(f"The {len(rows)} papers of the book", headings, rows, "p2k-catalogue")
        return [view, nodes.raw("", f"<script>{script}</script>", format="html")]


class BuildRecord(LiveDirective):
    """`{p2k-build-record}`: how and when each stored notebook was executed."""

    def render(self) -> list[nodes.Node]:
        """One row per chapter, from the provenance in its notebook."""
        rows = []
        for paper in self.built():
            record = read_provenance(self.root, paper.slug)
            state = badge(self.freshness(paper.slug, record))
            cells = ["–"] * 5
            if record:
                versions = ", ".join(f"{name} {version}" for name, version in record.versions.items() if version)
                device = f"{record.device}: {record.device_name}"
                cells = [record.profile, f"{record.seconds:.1f}", record.date, device, versions]
            rows.append([[self.title(paper)], [state], *([nodes.Text(cell)] for cell in cells)])
        headings = ["Chapter", "Digest", "Profile", "Seconds", "Date", "Device", "Versions"]
        return [table("Executions behind the stored pages", headings, rows, "p2k-record")]


class ChapterCard(LiveDirective):
    """`{p2k-chapter-card} <slug>`: the head of a chapter. Its content, one line of MyST, says what to read first."""

    required_arguments = 1
    has_content = True

    def render(self) -> list[nodes.Node]:
        """Fields of the catalogue and the provenance; a banner where the page is older than its code."""
        slug = self.arguments[0]
        paper, record = load_catalogue(self.root)[slug], read_provenance(self.root, slug)
        fields = nodes.field_list()
        about_papers = paper.kind == "map"
        self.add(fields, "Map" if about_papers else "Paper", [nodes.emphasis(paper.title, paper.title)])
        if paper.authors:
            self.add(fields, "Authors", [nodes.Text(", ".join(paper.authors))])
        self.add(fields, "Date", [] if about_papers else [nodes.Text(str(paper.date))])
        self.add(fields, "Links", join(links(paper)))
        if self.content:
            self.add(fields, "You need", self.parse_inline(" ".join(self.content))[0])
        if record:
            about = f"{record.seconds:.0f} s in the {record.profile} profile on {record.device_name}, {record.date}"
            self.add(fields, "Runtime", [nodes.Text(about)])
        names = chapter_objects(self.root, slug)
        own = [name for name in names if about_papers or paper.stem in name.split(".")]
        floors = dict.fromkeys(name.split(".")[1] for name in names if name not in own)
        self.add(fields, "In the package", join([self.reference(name) for name in own]))
        self.add(fields, "It also uses", join([self.page(f"p2k.{floor}", f"book/api/{floor}") for floor in floors]))
        self.add(fields, "Status", [self.status(slug)])
        card = nodes.container("", fields, classes=["p2k-chapter-card"])
        message = {"stale": STALE, "not executed": MISSING}.get(self.freshness(slug, record))
        return [card, nodes.warning("", nodes.paragraph(message, message))] if message else [card]

    def add(self, fields: nodes.field_list, name: str, content: list[nodes.Node]) -> None:
        """Append one field unless it would be empty."""
        if content:
            body = nodes.field_body("", nodes.paragraph("", "", *content))
            fields += nodes.field("", nodes.field_name(name, name), body)

    def reference(self, name: str) -> nodes.Node:
        """Return a link to an object's place in the package reference."""
        short = name.removeprefix("p2k.")
        options = {"refdomain": "py", "reftype": "obj", "reftarget": name, "refexplicit": True}
        return addnodes.pending_xref("", nodes.literal(short, short), refdoc=self.env.docname, refwarn=True, **options)


def forget(app: Sphinx) -> None:
    """Ask again what the last build was told: the inputs may have changed in between."""
    computed_status.cache_clear()
    computed_digest.cache_clear()


def mend_roles(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: object) -> None:
    """Drop docutils' list role from bibliographies: their entries are no list items, which screen readers trip over."""
    context["body"] = context.get("body", "").replace('<div role="list" class="citation-list">', "<div>")


def setup(app: Sphinx) -> dict:
    """Register the directives."""
    for name, directive in {
        "p2k-cards": Cards,
        "p2k-catalogue": Catalogue,
        "p2k-build-record": BuildRecord,
        "p2k-chapter-card": ChapterCard,
    }.items():
        app.add_directive(name, directive)
    app.connect("builder-inited", forget)
    app.connect("html-page-context", mend_roles)
    return {"version": "1", "parallel_read_safe": False}
