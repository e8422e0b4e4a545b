"""One style for all figures, and a slider that works in a static page."""

import base64
import hashlib
import html
import io
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from p2k.core.checks import require

SLIDER_LIMIT = 400_000


def use_house_style() -> None:
    """Set matplotlib's defaults (`templates/house.mplstyle`), and dateless SVG as the notebook's format."""
    style = require("matplotlib.style", extra="book", purpose="drawing a figure")
    inline = require("matplotlib_inline.backend_inline", extra="book", purpose="drawing a figure")
    style.use(files("p2k.book") / "templates" / "house.mplstyle")
    inline.set_matplotlib_formats("svg", metadata={"Date": None})


def slider(frames: Sequence[Any], values: Sequence[Any], *, label: str, alt: str) -> Any:
    """Figures on a slider: one self-contained piece of HTML that needs neither a kernel nor the network.

    Args:
        frames: matplotlib figures (stored as SVG, and closed) or the bytes of PNG images, one per value.
        values: what the slider shows for each frame.
        label: name of the slider's quantity, with its unit.
        alt: what a reader should see; the current value is appended.

    Raises:
        ValueError: lengths disagree, a text is empty, or the result exceeds 400 kB.
    """
    if len(frames) != len(values) or len(frames) < 2 or not label.strip() or not alt.strip():
        raise ValueError(f"slider: expected label, alt, >= 2 frames, as many values: {len(frames)}, {len(values)}")
    images = "".join(
        f'<img src="{_data_uri(frame)}" data-value="{html.escape(str(value))}" '
        f'alt="{html.escape(f"{alt} ({label}: {value})")}"{" hidden" if number else ""}>'
        for number, (frame, value) in enumerate(zip(frames, values, strict=True))
    )
    words = {"key": "slider-" + hashlib.sha256((label + images).encode()).hexdigest()[:10], "images": images}
    words |= {"label": html.escape(label), "first": html.escape(str(values[0])), "last": str(len(frames) - 1)}
    markup = (files("p2k.book") / "templates" / "slider.html").read_text(encoding="utf-8")
    for name, word in words.items():
        markup = markup.replace(f"@{name}@", word)
    if len(markup) > SLIDER_LIMIT:
        raise ValueError(f"slider: {len(markup)} bytes exceed {SLIDER_LIMIT}: use fewer frames or points")
    return require("IPython.display", extra="book", purpose="showing a slider").HTML(markup)


def _data_uri(frame: Any) -> str:
    """A frame as a data URI: ids inside one SVG then never meet those of another."""
    if isinstance(frame, bytes):
        return f"data:image/png;base64,{base64.b64encode(frame).decode()}"
    frame.savefig(buffer := io.BytesIO(), format="svg", metadata={"Date": None})
    require("matplotlib.pyplot", extra="book", purpose="drawing a figure").close(frame)
    return f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}"
