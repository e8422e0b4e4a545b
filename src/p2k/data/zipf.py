"""A generated language with a Zipf vocabulary whose next-word probabilities, and so the best ranking, are known.

Letters: D words, K word classes; ``p(w | u, v) = E_w (mix T1[class v] + (1 - mix) T2[class u])[class w]`` after the
words u, v, with E the share of a word in its class.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from p2k.core.checks import check_positive
from p2k.core.seeding import generator


@dataclass(frozen=True, eq=False)
class ZipfLanguage:
    """The source: words belong to classes, and the classes of the last two words decide the class of the next.

    Args:
        word_class: class of each word.
        emission: share of each word in its class; sums to 1 in every class.
        latest, earlier: transition probabilities from the class of the last word and of the word before it.
        mix: weight of `latest`, between 0 and 1.
    """

    word_class: Int[Tensor, " words"]
    emission: Float[Tensor, " words"]
    latest: Float[Tensor, "classes classes"]
    earlier: Float[Tensor, "classes classes"]
    mix: float

    @property
    def words(self) -> int:
        """Size of the vocabulary."""
        return len(self.word_class)

    def _class_probabilities(self, contexts: Int[Tensor, "*items 2"]) -> Float[Tensor, "*items classes"]:
        before, last = self.word_class[contexts].unbind(-1)
        return self.mix * self.latest[last] + (1 - self.mix) * self.earlier[before]

    def probabilities(self, contexts: Int[Tensor, "*items 2"]) -> Float[Tensor, "*items words"]:
        """Distribution of the word that follows two given words, in float64."""
        return self._class_probabilities(contexts)[..., self.word_class] * self.emission

    def sample(self, texts: int, length: int, random: torch.Generator) -> Int[Tensor, "texts length"]:
        """Independent texts; the first two words of each are drawn uniformly, as a start without history."""
        order = self.word_class.argsort(stable=True)
        # All classes on one line, each of length 1: a uniform number in its class's interval picks a word.
        line = self.emission[order].cumsum(0)
        text = [torch.randint(self.words, (texts,), generator=random) for _ in range(2)]
        for _ in range(length - 2):
            next_class = torch.multinomial(self._class_probabilities(torch.stack(text[-2:], -1)), 1, generator=random)
            point = next_class[:, 0] + torch.rand(texts, generator=random, dtype=torch.float64)
            found = torch.searchsorted(line, point).clamp(max=self.words - 1)
            text.append(order[found])
        return torch.stack(text, 1)[:, :length]


def make_zipf_language(
    seed: int = 0,
    *,
    words: int = 1000,
    classes: int = 40,
    exponent: float = 1.0,
    spread: float = 0.05,
    mix: float = 0.7,
) -> ZipfLanguage:
    """Draw a language.

    Args:
        seed: of the classes and their transitions.
        words: vocabulary size, ``>= classes``.
        classes: number of word classes, ``>= 1``; every class has a word.
        exponent: word r of the vocabulary has weight ``(r + 1) ** -exponent`` in its class, ``> 0``.
        spread: concentration of the Dirichlet rows of the transitions, ``> 0``; small rows have few successors.
        mix: weight of the last word's class against the one before it, between 0 and 1.

    Raises:
        ValueError: a number is out of range.

    Chapter: z-loss
    """
    op = "make_zipf_language"
    check_positive(op, classes=classes, exponent=exponent, spread=spread)
    if words < classes:
        raise ValueError(f"{op}: words must be >= classes = {classes}, got {words}")
    if not 0 <= mix <= 1:
        raise ValueError(f"{op}: mix must lie between 0 and 1, got {mix}")
    rng = generator(seed)
    word_class = torch.cat(
        [torch.randperm(classes, generator=rng), torch.randint(classes, (words - classes,), generator=rng)]
    )
    weight = torch.arange(1, words + 1, dtype=torch.float64) ** -exponent
    mass = torch.zeros(classes, dtype=torch.float64).index_add_(0, word_class, weight)
    # A Dirichlet row is a normalised row of gamma variables; the floor keeps every class reachable.
    gammas = torch._standard_gamma(torch.full((2, classes, classes), spread, dtype=torch.float64), generator=rng)
    rows = (gammas + 1e-12) / (gammas + 1e-12).sum(-1, keepdim=True)
    return ZipfLanguage(word_class, weight / mass[word_class], rows[0], rows[1], mix)
