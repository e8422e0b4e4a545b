"""Show the package's own source beside the equation it implements."""

import inspect
import textwrap
from pathlib import Path
from typing import Any

from p2k.book.claims import emit
from p2k.core.syntax import without_docstrings


def show_source(obj: Any, *, docstring: bool = False) -> None:
    """Display the source of a function, class, module or Triton kernel as a highlighted block with its path."""
    while not inspect.isroutine(obj) and not inspect.isclass(obj) and hasattr(obj, "fn"):
        obj = obj.fn  # autotuned, compiled or interpreted kernel -> its Python function
    obj = inspect.unwrap(obj)
    source = textwrap.dedent(inspect.getsource(obj)).rstrip()
    source = source if docstring else without_docstrings(source)
    where = "/".join(Path(inspect.getsourcefile(obj)).parts).rpartition("/src/p2k/")
    path = f"src/p2k/{where[2]}" if where[1] else Path(where[2]).name
    emit(source, **{"text/markdown": f"`{path}`\n\n```python\n{source}\n```"})
