"""SST-2 and Rotten Tomatoes through `datasets`, tokenised, with the target's test sentences removed from the source."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2k.core.checks import require
from p2k.core.errors import DatasetMissing


@dataclass(frozen=True, eq=False)
class Sentences:
    """Token ids, their mask and the labels of one part of a data set, padded to one length."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: Tensor, device: torch.device) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """((ids, mask), labels) of some rows, cut to the longest of them."""
        width = int(self.mask[rows].sum(1).max())
        ids, mask = self.ids[rows, :width], self.mask[rows, :width]
        return (ids.to(device), mask.to(device)), self.labels[rows].to(device)


def without_leaks(texts: Sequence[str], labels: Sequence[int], held_out: Sequence[str]) -> tuple[list[str], list[int]]:
    """The examples whose text, up to case, spacing and punctuation, is no part and no whole of a held-out sentence."""
    forbidden = " | ".join(map(_plain, held_out))
    kept = [(text, label) for text, label in zip(texts, labels, strict=True) if _plain(text) not in forbidden]
    return [text for text, _ in kept], [label for _, label in kept]


def load_sentiment(model: str, *, length: int = 128) -> tuple[Sentences, Sentences, Sentences, Sentences]:
    """Source training part, then target training, validation and test parts, tokenised.

    Source sentences that the target's test part holds are left out: SST was annotated on Rotten Tomatoes.

    Args:
        model: name or folder whose tokeniser to use.
        length: tokens at which a sentence is cut.

    Raises:
        MissingDependency: datasets or transformers is not installed.
        DatasetMissing: neither a network nor a local copy.
    """
    datasets = require("datasets", extra="text", purpose="SST-2 and Rotten Tomatoes")
    transformers = require("transformers", extra="text", purpose="BERT's tokeniser")
    try:
        source = datasets.load_dataset("stanfordnlp/sst2", split="train")
        target = datasets.load_dataset("cornell-movie-review-data/rotten_tomatoes")
        tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    except Exception as error:
        raise DatasetMissing(
            f"SST-2, Rotten Tomatoes or the tokeniser of {model} could not be loaded ({type(error).__name__}). "
            "Run once with a network, or copy the Hugging Face cache of a machine that has them and set HF_HOME to it"
        ) from error
    clean = without_leaks(source["sentence"], source["label"], target["test"]["text"])
    parts = [clean, *((target[name]["text"], target[name]["label"]) for name in ("train", "validation", "test"))]
    return tuple(_tokenise(tokenizer, list(texts), list(labels), length) for texts, labels in parts)


def _tokenise(tokenizer, texts: list[str], labels: list[int], length: int) -> Sentences:
    found = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    return Sentences(found["input_ids"], found["attention_mask"], torch.tensor(labels))


def _plain(text: str) -> str:
    """Letters and digits in lower case, words separated by one space."""
    return " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
