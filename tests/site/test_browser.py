"""The site as a reader sees it: headless Chromium, two widths, light and dark, everything but 127.0.0.1 blocked."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page

pytestmark = pytest.mark.site

GENERATED = ["genindex", "py-modindex", "search", "_modules/p2k/ops/oqc"]
# The papers that carry the book; other chapters have an interactive figure where one helps.
CORE = {"oqc", "adpo", "apo", "gopo", "inflection"}
WIDE, NARROW = 1280, 390
# Axe's own names for findings that keep somebody from reading the page.
SERIOUS = {"serious", "critical"}
CONTRAST = {"runOnly": ["color-contrast"]}
# Axe leaves links in text undecided here, because boxes overlap; `HIDDEN_LINKS` judges them.
ALL_BUT_COLOURS = {"rules": {rule: {"enabled": False} for rule in ("color-contrast", "link-in-text-block")}}
# Beside colours, what depends on the width; the other rules read the same HTML in every view.
OF_THE_WIDTH = {"runOnly": ["scrollable-region-focusable"]}
TYPESET = """async () => {
  if (window.MathJax?.startup) await MathJax.startup.promise;
  await document.fonts.ready;
  const article = document.querySelector("article, .bd-article, main");
  const copy = article.cloneNode(true);
  copy.querySelectorAll("pre, code, script, style, mjx-container").forEach((node) => node.remove());
  const math = [...document.querySelectorAll(".math")];
  return {
    raw: copy.textContent.match(/\\$\\$|\\\\[([]|\\\\(frac|inner|norm|begin|mathbb|varepsilon)/g) ?? [],
    unset: math.filter((node) => !node.querySelector("mjx-container")).map((node) => node.textContent),
    wrong: [...document.querySelectorAll("mjx-merror, [data-mjx-error]")].map((node) => node.textContent),
    broken: [...document.images].filter((image) => !image.complete || !image.naturalWidth).map((image) => image.src),
    nameless: [...document.images].filter((image) => !image.alt.trim()).map((image) => image.src),
  };
}"""
SIDEWAYS = """() => document.documentElement.scrollWidth <= innerWidth ? [] :
  [...document.querySelectorAll("body *")].filter((node) => node.getBoundingClientRect().right > innerWidth + 1)
    .slice(0, 5).map((node) => `${node.tagName}.${node.className}: ${node.textContent.trim().slice(0, 60)}`)
    .concat(`page is ${document.documentElement.scrollWidth} wide`)"""
# Punctuation that begins a line after the formula it belongs to.
PARTED = """() => [...document.querySelectorAll("span.math")].filter((node) => {
    const next = node.nextSibling;
    if (next?.nodeType !== Node.TEXT_NODE || !/^[.,;:!?)]/.test(next.data)) return false;
    const range = document.createRange();
    range.setStart(next, 0);
    range.setEnd(next, 1);
    const mark = range.getClientRects()[0];
    return mark && mark.left < node.getBoundingClientRect().left && mark.top > node.getBoundingClientRect().top;
  }).map((node) => node.parentElement.textContent.slice(0, 60))"""
# An equation that is wider than its column scrolls, and on a desktop its number hides what it cuts off.
CUT_OFF = """() => [...document.querySelectorAll("div.math")].filter((node) => {
    const right = [...node.querySelectorAll("mjx-container > *")].map((part) => part.getBoundingClientRect().right);
    const number = node.querySelector(".eqno") ?? node.parentElement;
    const edge = node.contains(number) ? number.getBoundingClientRect().left : number.getBoundingClientRect().right;
    return Math.max(...right) > edge + 1;
  }).map((node) => node.id || node.textContent.trim().slice(0, 60))"""
# Links in running text that only their colour tells from it.
HIDDEN_LINKS = """() => [...document.querySelectorAll(".bd-article :is(p, li, dd, td) a[href]")]
  .filter((link) => !link.matches(".headerlink, .sd-stretched-link, .sd-btn"))
  .filter((link) => !getComputedStyle(link).textDecorationLine.includes("underline"))
  .slice(0, 5).map((link) => link.outerHTML.slice(0, 120))"""
# Axe needs seconds for the parts of formulas and for thousands of equal tokens of code: they become plain text.
FLATTEN = """() => {
  document.querySelectorAll("mjx-container").forEach((node) => node.replaceWith("x"));
  const seen = new Set();
  for (const node of document.querySelectorAll("pre span[class]")) {
    const kind = `${node.closest("[class*=highlight]")?.parentElement.className} ${node.className}`;
    if (seen.has(kind)) node.replaceWith(...node.childNodes);
    seen.add(kind);
  }
}"""
# Contrast is a matter of a text's place in the page: of texts with the same tags and classes above them one is judged.
KEEP_ONE_TEXT_OF_EACH_PLACE = """() => {
  const places = new Map([[document.body, ""]]), seen = new Set(), texts = [];
  const place = (node) => {
    if (!places.has(node)) {
      const own = ["class", "style", "type", "disabled"].map((name) => node.getAttribute(name));
      places.set(node, `${place(node.parentElement)}/${node.tagName} ${own}`);
    }
    return places.get(node);
  };
  document.querySelectorAll("svg").forEach((node) => node.remove());
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) if (walk.currentNode.data.trim()) texts.push(walk.currentNode);
  // Axe does not judge a single character: it may be an icon.
  texts.sort((a, b) => (a.data.trim().length < 2) - (b.data.trim().length < 2));
  for (let node of texts) {
    const where = place(node.parentElement);
    while (seen.has(where) && node !== document.body && !node.hasChildNodes()) {
      const parent = node.parentElement;
      node.remove();
      node = parent;
    }
    seen.add(where);
  }
}"""


@dataclass
class Visit:
    """A page and all that went wrong on it."""

    page: Page
    problems: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def visit(browser: object, address: str) -> Iterator[Visit]:
    """One page for all tests, watched."""
    context = browser.new_context(base_url=address, reduced_motion="reduce")
    page = context.new_page()
    # `show` leaves the mode where it outlives a page; a blank one stores nothing.
    page.add_init_script(
        "if (location.origin !== 'null') ['mode', 'theme'].forEach((key) => localStorage.setItem(key, window.name))"
    )
    seen = Visit(page)

    def guard(request: object) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            seen.problems.append(f"external request: {request.url}")

    page.on("request", guard)
    page.on("console", lambda message: message.type == "error" and seen.problems.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: seen.problems.append(f"script: {error}"))
    page.on("requestfailed", lambda request: seen.problems.append(f"failed: {request.url}"))
    page.on("response", lambda reply: reply.status >= 400 and seen.problems.append(f"{reply.status}: {reply.url}"))
    yield seen
    context.close()


def show(visit: Visit, name: str, width: int = WIDE, mode: str = "light", query: str = "") -> Page:
    """Open a page in one view, as a reader does who has chosen the mode."""
    # What the last page still asks for fails when it is left, which is no problem of the next one.
    visit.page.goto("about:blank")
    visit.problems.clear()
    visit.page.set_viewport_size({"width": width, "height": 900})
    visit.page.evaluate("state => { window.name = state }", mode)
    visit.page.goto(f"{name}.html{query}", wait_until="load")
    assert visit.page.evaluate("document.documentElement.dataset.theme") == mode
    return visit.page


@pytest.mark.parametrize("name", GENERATED)
def test_generated_page_is_whole_on_a_desktop_and_on_a_phone(visit: Visit, name: str) -> None:
    problems = broken(show(visit, name)) + visit.problems
    problems += broken(show(visit, name, NARROW, "dark")) + visit.problems
    assert not problems, "\n".join(problems)


def test_page_is_whole_and_accessible_on_a_desktop(visit: Visit, toc_page: str) -> None:
    page = show(visit, toc_page)
    problems = broken(page)
    problems += [f"equation wider than the text: {item}" for item in page.evaluate(CUT_OFF)]
    problems += axe_findings(page, ALL_BUT_COLOURS) + visit.problems
    assert not problems, "\n".join(problems)


def test_page_is_whole_and_accessible_on_a_phone_in_the_dark(visit: Visit, toc_page: str) -> None:
    page = show(visit, toc_page, NARROW, "dark")
    problems = broken(page) + still_sliders(page, toc_page)
    problems += axe_findings(page, OF_THE_WIDTH) + visit.problems
    assert not problems, "\n".join(problems)


def broken(page: Page) -> list[str]:
    """What is not set or not shown, parted, or wider than the page."""
    found = [f"{what}: {items}" for what, items in page.evaluate(TYPESET).items() if items]
    found += [f"sideways scroll: {item}" for item in page.evaluate(SIDEWAYS)]
    found += [f"punctuation parted from a formula: {item}" for item in page.evaluate(PARTED)]
    found += [f"link without a line: {item}" for item in page.evaluate(HIDDEN_LINKS)]
    return found


def still_sliders(page: Page, name: str) -> list[str]:
    """Interactive figures that do not move without a kernel, and a core chapter that has none."""
    sliders = page.locator("input[type=range]")
    state = """input => { const box = input.closest(".cell_output").cloneNode(true);
                          box.querySelectorAll("input").forEach((node) => node.remove()); return box.innerHTML; }"""
    found = []
    if not sliders.count() and name.removeprefix("notebooks/") in CORE:
        found.append("a core chapter has one interactive figure")
    for index in range(sliders.count()):
        before = sliders.nth(index).evaluate(state)
        sliders.nth(index).press("End")
        if sliders.nth(index).evaluate(state) == before:
            found.append(f"slider {index} changes nothing")
    return found


def axe_findings(page: Page, rules: dict) -> list[str]:
    """What axe calls serious or critical under some of its rules, and in contrast; most texts are gone after it."""
    page.evaluate(FLATTEN)
    found = serious(page, rules)
    if found:
        # The theme gives boxes that scroll a tab stop 300 ms after the last change.
        page.wait_for_timeout(400)
        found = serious(page, rules)
    page.evaluate(KEEP_ONE_TEXT_OF_EACH_PLACE)
    return found + serious(page, CONTRAST)


def serious(page: Page, rules: dict) -> list[str]:
    """Axe's serious and critical findings under some of its rules."""
    if not page.evaluate("'axe' in window"):
        page.evaluate(Axe().axe_script)
    options = {"resultTypes": ["violations"], "preload": False, **rules}
    findings = page.evaluate("async (options) => (await axe.run(options)).violations", options)
    return [
        f"{finding['id']}: {finding['help']}: "
        + str([f"{node['html'][:160]} ({node['any'][:1]})"[:400] for node in finding["nodes"][:3]])
        for finding in findings
        if finding["impact"] in SERIOUS
    ]


@pytest.mark.parametrize("outside", ["https://example.org/x.png", "http://192.0.2.1/x.png"])
def test_what_a_page_asks_of_another_machine_is_seen_and_fails(visit: Visit, outside: str) -> None:
    page = show(visit, "book/contributing")
    load = """url => new Promise((done) => { const image = new Image(); image.src = url;
                                              image.onload = image.onerror = (event) => done(event.type); })"""
    assert page.evaluate(load, outside) == "error"
    assert f"external request: {outside}" in visit.problems
    assert f"failed: {outside}" in visit.problems


@pytest.mark.parametrize(("width", "mode"), [(WIDE, "light"), (NARROW, "dark")])
@pytest.mark.parametrize(
    ("name", "faint"),
    [("book/contributing", ".highlight .c1"), ("book/contributing", "p em"), ("book/build-record", "td")],
)
def test_one_text_of_each_place_is_enough_to_see_faint_ones(visit: Visit, name: str, faint: str, width: int, mode: str):
    page = show(visit, name, width, mode)
    assert not axe_findings(page, OF_THE_WIDTH)
    page = show(visit, name, width, mode)
    page.add_style_tag(content=f"{faint} {{ color: #bbb !important; background: #fff !important }}")
    assert "color-contrast" in str(axe_findings(page, OF_THE_WIDTH))


def test_punctuation_that_is_parted_from_its_formula_is_seen(visit: Visit) -> None:
    page = show(visit, "notebooks/oqc", NARROW)
    page.evaluate(TYPESET)
    assert not page.evaluate(PARTED)
    page.add_style_tag(content=".p2k-together { white-space: normal }")
    assert page.evaluate(PARTED)


@pytest.mark.parametrize("place", ["p", "dd", "td"])
def test_links_that_only_their_colour_shows_are_seen(visit: Visit, place: str) -> None:
    page = show(visit, {"dd": "book/api/core", "td": "book/catalogue"}.get(place, "book/contributing"))
    assert not page.evaluate(HIDDEN_LINKS)
    page.add_style_tag(content=f".bd-article {place} a {{ text-decoration: none !important }}")
    assert page.evaluate(HIDDEN_LINKS)


def test_catalogue_is_a_plain_table_without_scripts(browser: object, address: str) -> None:
    context = browser.new_context(base_url=address, java_script_enabled=False)
    page = context.new_page()
    page.goto("book/catalogue.html")
    assert page.locator("table.p2k-catalogue tbody tr:visible").count() == 194
    assert page.locator("form.p2k-filter").count() == 0
    context.close()


def test_catalogue_filters_by_words_part_kind_and_status(visit: Visit) -> None:
    page = show(visit, "book/catalogue")
    rows = page.locator("table.p2k-catalogue tbody tr:visible")
    assert rows.count() == 194
    page.get_by_label("Words").fill("orthogonal quadratic")
    assert rows.count() == 1
    assert page.locator("form.p2k-filter output").inner_text() == "1 of 194 papers"
    page.get_by_label("Words").fill("")
    page.get_by_label("Part").select_option("Optimizers")
    in_part = rows.count()
    assert 0 < in_part < 194
    page.get_by_label("Kind").select_option("theory")
    assert rows.count() < in_part
    page.get_by_label("Status").select_option(index=1)
    assert set(rows.locator("td:last-child").all_inner_texts()) <= {
        page.get_by_label("Status").evaluate("select => select.value")
    }
    assert not visit.problems


def test_search_finds_a_page_offline(visit: Visit) -> None:
    page = show(visit, "search", query="?q=orthogonal")
    page.locator("#search-results ul.search li").first.wait_for(timeout=10_000)
    assert not visit.problems


def test_missing_chromium_says_how_to_get_it(chromium: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(pytest.fail.Exception, match="apt-get install chromium"):
        chromium()
