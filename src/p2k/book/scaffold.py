"""`p2k new`: write every file of a chapter and its entries, all or nothing."""

import re
from importlib.resources import files
from pathlib import Path

from nbformat import v4, writes

from p2k.book.catalogue import FLOORS, load_catalogue
from p2k.book.check import floor_files
from p2k.core.errors import P2KError
from p2k.core.files import write_atomic

_UNKNOWN = "FILL: the paper's title"


def new_chapter(root: Path, slug: str, *, floors: tuple[str, ...] = ("ops", "nn"), part: str = "A") -> list[Path]:
    """Write the skeleton of a chapter and return the files that were written or extended. A map gets no floor.

    Raises:
        P2KError: the slug or a floor is malformed, the chapter is begun, or a file exists; nothing is written then.
    """
    catalogue = load_catalogue(root)
    known = (catalogue.papers | catalogue.maps).get(slug)
    about_papers = known is not None and known.kind == "map"
    floors = () if about_papers else floors
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", slug):
        raise P2KError(f"slug must be lower-case words joined by hyphens and start with a letter, got {slug!r}")
    if not {*floors} <= {*FLOORS[:-1]} or part not in catalogue.parts:
        raise P2KError(f"expected floors among {', '.join(FLOORS[:-1])} and a part of {', '.join(catalogue.parts)}")
    if known and known.floors:
        raise P2KError(f"chapter {slug!r} is begun already: p2k check {slug}")
    title, part, arxiv = (known.title, known.part, known.arxiv) if known else (_UNKNOWN, part, None)
    arxiv = arxiv or ("those of its papers" if about_papers else "FILL: arXiv id")
    words = {"slug": slug, "stem": slug.replace("-", "_"), "title": title, "arxiv": arxiv}
    texts = _new_files(root, floors, words)
    if existing := [path.relative_to(root).as_posix() for path in texts if path.exists()]:
        raise P2KError(f"these files exist and are not overwritten: {', '.join(existing)}")
    entries = [root / "book" / "catalogue.yml", root / "book" / "profiles.yml", root / "_toc.yml"]
    old = {path: path.read_text(encoding="utf-8") for path in entries}
    texts[entries[0]] = _catalogue(old[entries[0]], slug, part, floors)
    texts[entries[1]] = old[entries[1]] + _fill("profile.yml", words)
    order = [entry.slug for entry in catalogue.entries if entry.part == part]
    # A new paper stands behind the last one of its part; the maps of the part follow it.
    behind = order[order.index(slug) + 1 :] if known else [name for name in order if name in catalogue.maps]
    texts[entries[2]] = _toc(old[entries[2]], slug, part, catalogue.parts, behind)
    try:
        for path, text in texts.items():
            write_atomic(path, text)
    except BaseException:
        for path in texts:
            write_atomic(path, old[path]) if path in old else path.unlink(missing_ok=True)
        raise
    return list(texts)


def _new_files(root: Path, floors: tuple[str, ...], words: dict[str, str]) -> dict[Path, str]:
    texts = {root / "notebooks" / f"{words['slug']}.ipynb": _notebook(words, "ops" in floors)}
    for floor in floors:
        sources, test = floor_files(root, words["stem"], floor)
        for path in sources:
            texts[path] = _fill(f"ops{path.name}" if floor == "ops" else "module.py", {**words, "floor": floor})
        texts[test] = _fill("test.py", {**words, "floor": floor})
    return texts


def _fill(name: str, words: dict[str, str]) -> str:
    text = (files("p2k.book") / "templates" / f"{name}.txt").read_text(encoding="utf-8")
    return re.sub(r"@(\w+)@", lambda match: words[match[1]], text)


def _notebook(words: dict[str, str], kernel: bool) -> str:
    """The chapter template: a cell starts with `%% markdown` or `%% code`, then its tags."""
    cells = []
    for number, block in enumerate(re.split(r"^%% ", _fill("chapter.md", words), flags=re.M)[1:]):
        kind, *tags = block.partition("\n")[0].split()
        make = v4.new_markdown_cell if kind == "markdown" else v4.new_code_cell
        if kernel or "kernel" not in tags:
            metadata = {"tags": tags} if tags == ["parameters"] else {}
            cells.append(make(block.partition("\n")[2].strip(), id=f"{words['slug']}-{number:02d}", metadata=metadata))
    kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return writes(v4.new_notebook(cells=cells, metadata={"kernelspec": kernelspec})) + "\n"


def _catalogue(text: str, slug: str, part: str, floors: tuple[str, ...]) -> str:
    """Add the floors to the paper's entry, or a new entry at the end of the file, which ends with the papers."""
    line = f"    floors: [{', '.join((*floors, 'notebook'))}]\n"
    entry = re.search(rf"^  {slug}:\n(?:    .*\n)+", text, re.M)
    if entry is None:
        return f'{text.rstrip()}\n  {slug}:\n    title: "{_UNKNOWN}"\n    part: {part}\n    kind: method\n{line}'
    return text[: entry.end()] + line + text[entry.end() :]


def _toc(text: str, slug: str, part: str, parts: dict[str, str], behind: list[str]) -> str:
    """Add the page to its part before those that stand behind it in the catalogue, and a new part in the same way."""
    blocks = re.split(r"^(?=  - caption: )", text.rstrip() + "\n", flags=re.M)
    captions = [block.partition("caption: ")[2].partition("\n")[0] for block in blocks]
    earlier = [parts[key] for key in list(parts)[: list(parts).index(part)]]
    if parts[part] not in captions:
        at = max((number + 1 for number, caption in enumerate(captions) if caption in earlier), default=1)
        blocks.insert(at, f"  - caption: {parts[part]}\n    chapters:\n")
        captions.insert(at, parts[part])
    at = captions.index(parts[part])
    pages = [f"      - file: notebooks/{name}\n" for name in (slug, *behind)]
    here = min((blocks[at].find(page) for page in pages if page in blocks[at]), default=len(blocks[at]))
    blocks[at] = blocks[at][:here] + pages[0] + blocks[at][here:]
    return "".join(blocks)
