"""Serve MathJax from the site itself and drop the one script of the theme that would call out."""

import shutil
from importlib.metadata import files
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

PACKAGE = "sphinx-mathjax-offline"
SCRIPT = "mathjax/tex-chtml-full.js"
FONTS = "mathjax/output/chtml/fonts/woff-v2"


def use_local_mathjax(app: Sphinx, config: Config) -> None:
    """Point every page at the copy that `copy_mathjax` makes."""
    config.mathjax_path = SCRIPT


def copy_mathjax(app: Sphinx, error: Exception | None) -> None:
    """Copy the combined script and the fonts, 2 MB of the package's 24."""
    if error or app.builder.format != "html":
        return
    entry = next(path for path in files(PACKAGE) if str(path).endswith(SCRIPT))
    source = Path(entry.locate()).parents[1]
    target = Path(app.outdir) / "_static"
    (target / SCRIPT).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source / SCRIPT, target / SCRIPT)
    shutil.copytree(source / FONTS, target / FONTS, dirs_exist_ok=True)


def drop_thebe(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: object) -> None:
    """Remove thebe, which loads from a CDN and declares one constant twice on every page."""
    for key in ("script_files", "css_files"):
        context[key] = [item for item in context.get(key, []) if "thebe" not in _content(item).lower()]
    body = context.get("body", "")
    start = body.find('<script type="text/x-thebe-config">')
    if start >= 0:
        end = body.index("</script>", start) + len("</script>")
        context["body"] = body[:start] + body[end:]


def _content(item: object) -> str:
    """File name and inline body of one of Sphinx's scripts or style sheets."""
    return f"{getattr(item, 'filename', item)} {getattr(item, 'attributes', {}).get('body', '')}"


def setup(app: Sphinx) -> dict:
    """Register the hooks; thebe adds its scripts at the default priority 500, so they go after it."""
    app.connect("config-inited", use_local_mathjax)
    app.connect("html-page-context", drop_thebe, priority=900)
    app.connect("build-finished", copy_mathjax)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
