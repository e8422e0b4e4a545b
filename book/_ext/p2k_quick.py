"""What makes the build quick and changes nothing in it."""

import gc

from sphinx.application import Sphinx


def begin(app: Sphinx) -> None:
    """Start with no contents of an earlier build, and without the search for garbage.

    A build makes millions of nodes that live to its end; going through them again and again takes a seventh of it.
    """
    app.p2k_contents = {}
    gc.disable()


def end(app: Sphinx, exception: Exception | None) -> None:
    """Collect garbage again, for a process that goes on."""
    gc.enable()


def share_navigation(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: object) -> None:
    """Resolve the contents beside source code, which is no part of them, once per depth of folder."""
    if pagename.startswith("_modules/"):
        depth, resolve = pagename.count("/"), context["toctree"]

        def resolved(**options: object) -> str:
            key = depth, *sorted(options.items())
            if key not in app.p2k_contents:
                app.p2k_contents[key] = resolve(**options)
            return app.p2k_contents[key]

        context["toctree"] = resolved


def setup(app: Sphinx) -> dict:
    """Register the hooks."""
    app.connect("builder-inited", begin)
    app.connect("build-finished", end)
    # Before the theme, which draws its templates once to see which are empty.
    app.connect("html-page-context", share_navigation, priority=400)
    return {"version": "1", "parallel_read_safe": False}
