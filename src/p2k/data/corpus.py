"""Characters of a text: the English that ships with scikit-learn, offline, or a file of the reader's own."""

import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from p2k.core.checks import check_positive, require
from p2k.core.errors import DatasetMissing


@dataclass(frozen=True, eq=False)
class Corpus:
    """A text as character ids: `train` ``[N]`` and `val` ``[M]`` int64, and the characters that the ids name."""

    name: str
    train: Tensor
    val: Tensor
    characters: str

    @property
    def vocab_size(self) -> int:
        """Number of different characters."""
        return len(self.characters)

    def decode(self, ids: Int[Tensor, " length"]) -> str:
        """The text behind character ids."""
        return "".join(self.characters[i] for i in ids.tolist())


def load_corpus(path: str | Path | None = None, *, val_share: float = 0.1) -> Corpus:
    """A text split into training and validation characters.

    Args:
        path: a UTF-8 text file; None means the descriptions of scikit-learn's data sets, 43,000 characters of English.
        val_share: share of each document's end kept for validation, in (0, 1).

    Raises:
        ValueError: `val_share` is out of range, or the text is too short to split.
        DatasetMissing: there is no file at `path`.
        MissingDependency: scikit-learn is not installed.
    """
    if not 0 < val_share < 1:
        raise ValueError(f"load_corpus: val_share must lie in (0, 1), got {val_share}")
    if path is None:
        require("sklearn", extra="book", purpose="the bundled corpus")
        files = importlib.resources.files("sklearn.datasets").joinpath("descr").iterdir()
        chosen = sorted((file for file in files if file.name.endswith(".rst")), key=lambda file: file.name)
        return split_documents("sklearn-descriptions", [file.read_text(encoding="utf-8") for file in chosen], val_share)
    if not Path(path).is_file():
        raise DatasetMissing(f"load_corpus: there is no text file {path}; give the path of a UTF-8 file")
    return split_documents(Path(path).name, [Path(path).read_text(encoding="utf-8")], val_share)


def split_documents(name: str, documents: Sequence[str], val_share: float) -> Corpus:
    """Cut each document in two and number the characters of all in their order in Unicode; see `load_corpus`."""
    characters = "".join(sorted(set().union(*documents)))
    number = {character: i for i, character in enumerate(characters)}
    cuts = [int(len(document) * (1 - val_share)) for document in documents]
    heads = "".join(document[:cut] for document, cut in zip(documents, cuts, strict=True))
    tails = "".join(document[cut:] for document, cut in zip(documents, cuts, strict=True))
    if not heads or not tails:
        raise ValueError(f"load_corpus: {name} is too short to split, got {len(heads)} and {len(tails)} characters")
    train, val = (torch.tensor([number[character] for character in part]) for part in (heads, tails))
    return Corpus(name, train, val, characters)


def sample_windows(
    ids: Int[Tensor, " length"], *, count: int, length: int, source: torch.Generator
) -> Int[Tensor, "count length+1"]:
    """Windows of ``length + 1`` characters at uniformly random places: inputs and, one further, their targets.

    Args:
        ids: a part of a corpus.
        count: number of windows.
        length: characters that a model reads, less than the length of `ids`.
        source: generator on the CPU.

    Raises:
        ValueError: a size is not positive, or the text is shorter than a window.
    """
    check_positive("sample_windows", count=count, length=length)
    if len(ids) <= length:
        raise ValueError(f"sample_windows: ids must be longer than length = {length}, got {len(ids)}")
    starts = torch.randint(len(ids) - length, (count, 1), generator=source)
    return ids[(starts + torch.arange(length + 1)).to(ids.device)]
