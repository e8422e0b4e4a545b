"""Inline formulas keep the punctuation that touches them: a full stop never begins a line alone."""

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

# What may follow or precede a formula without a space, and must not be parted from it.
AFTER = re.compile(r"[.,;:!?)\]%’”]+")
BEFORE = re.compile(r"[(\[“]+$")


class KeepPunctuation(SphinxPostTransform):
    """Wrap a formula and its punctuation into one box that does not break."""

    default_priority = 800
    formats = ("html",)

    def run(self, **_: object) -> None:
        for formula in list(self.document.findall(nodes.math)):
            parent, at = formula.parent, formula.parent.index(formula)
            before = parent[at - 1] if at else None
            after = parent[at + 1] if at + 1 < len(parent) else None
            opening = BEFORE.search(before) if isinstance(before, nodes.Text) else None
            closing = AFTER.match(after) if isinstance(after, nodes.Text) else None
            if not (opening or closing):
                continue
            box = nodes.inline(classes=["p2k-together"])
            parent[at] = box
            box += [nodes.Text(opening[0])] if opening else []
            box += formula
            box += [nodes.Text(closing[0])] if closing else []
            if closing:
                parent[at + 1] = nodes.Text(after[closing.end() :])
            if opening:
                parent[at - 1] = nodes.Text(before[: opening.start()])


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the transform."""
    app.add_post_transform(KeepPunctuation)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
