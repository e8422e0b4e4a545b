"""Verifiable arithmetic: short prompts over a 16-token vocabulary whose completions a program can judge.

A prompt is an expression ending in ``=``. The single-answer tasks (sum, difference, product) accept one completion;
the multi-answer ones (split a number into two summands, factorise it) accept several. Numbers in prompts have a fixed
width with leading zeros, so prompts need no padding; numbers in completions have none, so lengths vary.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from p2k.core.seeding import generator

SYMBOLS = "0123456789+-*="
PAD, EOS, VOCAB_SIZE = 14, 15, 16
_NUMBER = "(?:0|[1-9][0-9]*)"
_MOST_DIGITS = {"sum": 2, "difference": 2, "product": 2, "split": 2, "factor": 4}
TASKS = tuple(f"{name}-{digits}" for name, most in _MOST_DIGITS.items() for digits in range(1, most + 1))


def encode(text: str) -> list[int]:
    """Token ids of a text; a symbol outside the vocabulary raises ValueError."""
    unknown = sorted(set(text) - set(SYMBOLS))
    if unknown:
        raise ValueError(f"encode: text must use only {SYMBOLS!r}, got {unknown}")
    return [SYMBOLS.index(symbol) for symbol in text]


def decode(tokens: Int[Tensor, " length"] | list[int]) -> str | None:
    """Text before the end token; None where the row was cut before it or holds padding inside."""
    ids = [int(token) for token in tokens]
    if EOS not in ids:
        return None
    ids = ids[: ids.index(EOS)]
    return None if PAD in ids else "".join(SYMBOLS[token] for token in ids)


def reward(prompt: str, completion: str | None) -> float:
    """1 if `completion` answers `prompt`, else 0.

    ``12+30=`` wants the sum, ``12-30=`` the difference (``-18``), ``03*04=`` the product. A single number asks for a
    pair: ``+12=`` for any ``a+b`` with that sum, ``*12=`` for any ``a*b`` with that product and both factors above 1.
    Leading zeros, ``-0``, spaces and anything after the answer are wrong, so that an answer has one spelling.

    Args:
        prompt: as produced by `make_arithmetic`, decoded.
        completion: text before the end token, or None if there was no end token (see `decode`): worth 0.

    Raises:
        ValueError: the prompt has none of these forms.
    """
    pair = re.fullmatch(r"([+*])([0-9]+)=", prompt)
    single = re.fullmatch(r"([0-9]+)([-+*])([0-9]+)=", prompt)
    if not pair and not single:
        raise ValueError(f"reward: prompt must look like '3+4=', '+12=' or '*12=', got {prompt!r}")
    if completion is None:
        return 0.0
    if single:
        correct = re.fullmatch(f"{_NUMBER}|-[1-9][0-9]*", completion) is not None
        return float(correct and int(completion) == _apply(single[2], int(single[1]), int(single[3])))
    parts = re.fullmatch(rf"({_NUMBER})\{pair[1]}({_NUMBER})", completion)
    if parts is None:
        return 0.0
    a, b = int(parts[1]), int(parts[2])
    proper = pair[1] == "+" or min(a, b) > 1
    return float(proper and _apply(pair[1], a, b) == int(pair[2]))


@dataclass(frozen=True, eq=False)
class ArithmeticData:
    """The problems of one task as tensors, and their split.

    Args:
        name: of the task.
        prompts: ids of every problem.
        answers: accepted completions with their end token, padded; rows beyond a problem's count are padding only.
        counts: number of accepted completions per problem, at least 1.
        train, held_out: disjoint problem numbers; a problem and its mirror (``3+4`` and ``4+3``) are on one side.
    """

    name: str
    prompts: Int[Tensor, "problems prompt"]
    answers: UInt8[Tensor, "problems accepted length"]
    counts: Int[Tensor, " problems"]
    train: Int[Tensor, " train"]
    held_out: Int[Tensor, " held_out"]

    @property
    def completion_length(self) -> int:
        """Tokens of the longest accepted completion, end token included."""
        return self.answers.shape[-1]

    @property
    def context(self) -> int:
        """Tokens of a prompt and its longest completion."""
        return self.prompts.shape[-1] + self.completion_length

    def text(self, problem: int) -> str:
        """The prompt of one problem as text."""
        return "".join(SYMBOLS[token] for token in self.prompts[problem])

    def rewards(
        self, problems: Int[Tensor, "*batch"], completions: Int[Tensor, "*batch length"]
    ) -> Float[Tensor, "*batch"]:
        """`reward` of many completions at once, by comparison with the accepted ones; padding follows the end token."""
        accepted = self.answers[problems]
        correct = (completions[..., None, :] == accepted).all(-1) & (accepted[..., 0] != PAD)
        return correct.any(-1).float()

    def sample_answers(self, problems: Int[Tensor, " batch"], random: torch.Generator) -> Int[Tensor, "batch length"]:
        """One accepted completion per problem, uniformly at random: the targets of a supervised start."""
        counts = self.counts[problems]
        uniform = torch.rand(counts.shape, generator=random, device=counts.device)
        return self.answers[problems, (uniform * counts).long()].long()

    def to(self, device: torch.device | str) -> "ArithmeticData":
        """The same data on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return ArithmeticData(name=self.name, **moved)


def make_arithmetic(task: str, *, seed: int = 0, held_out: float = 0.2) -> ArithmeticData:
    """Enumerate a task's problems and split them into training and held-out ones.

    Args:
        task: ``<operation>-<digits>``, one of `TASKS`; more digits are harder.
        seed: of the split.
        held_out: share of the problems kept for testing, between 0 and 1; both sides get at least one.

    Raises:
        ValueError: an unknown task, or a share out of range.
    """
    if task not in TASKS:
        raise ValueError(f"make_arithmetic: task must be one of {TASKS}, got {task!r}")
    if not 0 < held_out < 1:
        raise ValueError(f"make_arithmetic: held_out must lie between 0 and 1, got {held_out}")
    operation, digits = task.split("-")
    problems = list(_enumerate(operation, int(digits)))
    keys = sorted({key for key, _, _ in problems})
    order = torch.randperm(len(keys), generator=generator(seed)).tolist()
    count = min(max(1, round(held_out * len(keys))), len(keys) - 1)
    kept = {keys[place] for place in order[:count]}
    side = torch.tensor([key in kept for key, _, _ in problems])
    most = max(len(accepted) for _, _, accepted in problems)
    length = 1 + max(len(text) for _, _, accepted in problems for text in accepted)
    answers = torch.full((len(problems), most, length), PAD, dtype=torch.uint8)
    for row, (_, _, accepted) in enumerate(problems):
        rows = [encode(text) + [EOS] + [PAD] * (length - len(text) - 1) for text in accepted]
        answers[row, : len(rows)] = torch.tensor(rows, dtype=torch.uint8)
    return ArithmeticData(
        name=task,
        prompts=torch.tensor([encode(prompt) for _, prompt, _ in problems]),
        answers=answers,
        counts=torch.tensor([len(accepted) for _, _, accepted in problems]),
        train=(~side).nonzero().flatten(),
        held_out=side.nonzero().flatten(),
    )


def _enumerate(operation: str, digits: int) -> Iterator[tuple[tuple[int, ...], str, list[str]]]:
    """Yield (key shared by mirrored problems, prompt, accepted completions)."""
    end = 10**digits
    if operation == "split":
        for total in range(end):
            yield (total,), f"+{total:0{digits}}=", [f"{a}+{total - a}" for a in range(total + 1)]
    elif operation == "factor":
        for total in range(4, end):
            small = [a for a in range(2, int(total**0.5) + 1) if total % a == 0]
            factors = sorted({*small, *(total // a for a in small)})
            if factors:
                yield (total,), f"*{total:0{digits}}=", [f"{a}*{total // a}" for a in factors]
    else:
        symbol = {"sum": "+", "difference": "-", "product": "*"}[operation]
        for a in range(end):
            for b in range(end):
                prompt = f"{a:0{digits}}{symbol}{b:0{digits}}="
                yield (min(a, b), max(a, b)), prompt, [str(_apply(symbol, a, b))]


def _apply(symbol: str, a: int, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b}[symbol]
