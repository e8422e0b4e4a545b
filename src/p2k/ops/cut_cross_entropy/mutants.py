"""Bugs to plant in the kernel and in the reference's backward pass, and the probe that must catch every one of them.

The probe compares with autograd through the float64 specification where nothing is filtered, and with the filter
applied to the whole matrix of probabilities, by its definition, where something is. The kernel needs Triton's
interpreter or a GPU. The unedited modules must pass.
"""

from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from p2k.core.mutation import Mutant
from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors, tolerance
from p2k.ops.cut_cross_entropy import reference
from p2k.ops.cut_cross_entropy.tiles import codes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# A GPU's tensor cores take no smaller tile.
TILE = (16, 16) if DEVICE == "cuda" else (4, 8)
IGNORED = -7
MUTANTS = [
    Mutant("total = total * tl.exp(largest - top) + ", "total = total + ", "sum: not rescaled when the maximum rises"),
    Mutant("picked += tl.sum", "picked = tl.sum", "the tiles after the target's overwrite its logit"),
    Mutant("largest = top", "largest = largest", "the maximum is not carried on"),
    Mutant("tl.full([BLOCK_T], LOWEST, ACC)", "tl.zeros([BLOCK_T], ACC)", "the maximum starts at 0"),
    Mutant("range(part * tiles_per_part, last)", "range(part * tiles_per_part, last - 1)", "a part lacks a tile"),
    Mutant("total * (largest - peak).exp()", "total", "parts are merged without rescaling"),
    Mutant(".exp()).sum(0).log()", ".exp())[0].log()", "the sum of the first part stands for all"),
    Mutant("z += tl.load(bias_ptr", "z -= tl.load(bias_ptr", "the bias has the wrong sign"),
    Mutant('[None, :], z, float("-inf"))', "[None, :], z, 0.0)", "columns behind the vocabulary count as logits of 0"),
    Mutant("z = softcap * _tanh(z / softcap)", "z = _tanh(z / softcap)", "the cap is lost"),
    Mutant("found *= 1.0 - share * share", "found *= 1.0 - share", "slope of the softcap"),
    Mutant("q * (1.0 / 3.0", "q * (1.0 / 2.0", "a wrong coefficient of the series"),
    Mutant("- largest[:, None] - log_sum[:, None]), 0.0)", "- largest[:, None]), 0.0)", "p is not normalised"),
    Mutant("tl.where(present[:, None], p - hot, 0.0)", "tl.where(present[:, None], p, 0.0)", "no pull"),
    Mutant("found = g * d + l * p", "found = g * d + l * d", "log-sum-exp's gradient pulls the target"),
    Mutant("tl.abs(d) < epsilon", "d < epsilon", "the filter forgets that d is negative at the target"),
    Mutant("tl.abs(d) < epsilon", "tl.abs(d) < 0.1 * epsilon", "the filter keeps too much"),
    Mutant("((p < epsilon) | unused)", "(p < 2.0)", "the filter forgets log-sum-exp's gradient at a certain target"),
    Mutant("((p < epsilon) | unused)", "(p < epsilon)", "the filter keeps certain targets that nobody needs"),
    Mutant("if large > 0:", "if large >= 0:", "hidden: skipped tiles enter all the same"),
    Mutant("if keep != 0:", "if keep >= 0:", "weight: skipped tiles enter all the same"),
    Mutant("mask = kept if filtering and filter_weight else None", "mask = kept if filtering else None",
           "the weight is filtered against the caller's wish"),
    Mutant("if filtering and filter_weight else None", "if False else None", "the weight is never filtered"),
    Mutant("kept_ptr + row_tile * tl.cdiv(vocab, BLOCK_V) + tile)", "kept_ptr + row_tile + tile)",
           "the map of tiles is read at the wrong place"),
    Mutant("tl.store(at, sofar + _dot(g.to", "tl.store(at, _dot(g.to", "hidden: the last tile overwrites the others"),
    Mutant("tl.store(at, sofar + _dot(tl.trans", "tl.store(at, _dot(tl.trans", "weight: the last tile overwrites"),
    Mutant("dbias += tl.sum(g, 0)", "dbias = tl.sum(g, 0)", "bias: the last tile overwrites the others"),
    Mutant("dweight_ptr + columns[:, None] * dim",
           "dweight_ptr + (tile * BLOCK_V + tl.arange(0, BLOCK_V))[:, None] * dim",
           "the weight's gradient stays in sorted order"),
    Mutant("if sort else None", "if False else None", "the vocabulary is not sorted"),
    Mutant("mask = there[:, None] & (channels < dim)[None, :]", "mask = there[:, None] & (channels < 8)[None, :]",
           "channels after the first step are left out"),
]  # fmt: skip

REFERENCE_MUTANTS = [
    Mutant("(S - hot).masked_fill(~there, 0.0)", "(S - hot)", "absent tokens move the filter and the weight"),
    Mutant("G = g * d + l * S", "G = g * d + l * d", "log-sum-exp's gradient pulls the target"),
    Mutant("1 - (z / c).square()", "1 - (z / c)", "slope of the softcap"),
    Mutant("torch.where(l == 0, d.abs(), torch.maximum(d.abs(), S))", "torch.where(l == 0, d, torch.maximum(d, S))",
           "the filter forgets that d is negative at the target"),
    Mutant("torch.maximum(d.abs(), S))", "d.abs())", "the filter forgets log-sum-exp's gradient at a certain target"),
    Mutant("torch.where(l == 0, d.abs(), torch.maximum(d.abs(), S))", "torch.maximum(d.abs(), S)",
           "the filter keeps certain targets that nobody needs"),
    Mutant("~(size_tV < epsilon)", "size_tV > 10 * epsilon", "the filter drops too much"),
    Mutant("large.any(0)", "large.all(0)", "a tile is skipped although one token needs it"),
    Mutant(".view(-1, width).any(1)", ".view(-1, width)[:, 0]", "only the first entry of a tile is looked at"),
    Mutant("G = G_filtered if filter_weight else G", "G = G_filtered", "the weight is filtered against the wish"),
    Mutant("place = order.argsort()", "place = order", "the weight's gradient is put back the wrong way"),
    Mutant("dW += G.T @ h_tD", "dW = G.T @ h_tD", "weight: the last tile overwrites the others"),
    Mutant("hot = (order == ", "hot = (torch.arange(len(W)) == ", "the target is looked up in the unsorted vocabulary"),
]  # fmt: skip


def probe(module: ModuleType) -> bool:
    """True when `module` (`kernel` or `reference`) disagrees with float64 on any adversarial case."""
    # Small tiles bring tails and tile loops to sizes an interpreter can afford.
    small = dict.fromkeys((2, 4), (*TILE, TILE[1], 4, 1))
    with (
        mock.patch.object(module, "FORWARD", small, create=True),
        mock.patch.object(module, "BACKWARD", dict.fromkeys((2, 4), (TILE[1], 4, 1)), create=True),
        mock.patch.object(module, "PROGRAMS", 4, create=True),
        mock.patch.object(module, "ROWS", 4, create=True),
    ):
        return any(_wrong(actual, truth) for actual, truth in _cases(module))


def _wrong(actual: Tensor, truth: Tensor) -> bool:
    # Not `error > bound`: NaN is wrong too.
    return not max(relative_errors(actual, truth)) <= 4 * tolerance(actual.dtype, dot=True)


def filtered_truth(
    inputs: tuple[Tensor, Tensor, Tensor], target: Tensor, grads: Tensor, softcap: float | None, epsilon: float,
    order: Tensor, tile: tuple[int, int], *, ignore_index: int = IGNORED,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients by the definition, entry by entry on the whole matrix in float64, and the kept tiles.

    `order` is the vocabulary's; the fourth result has the shape of the grid of tiles. Where log-sum-exp has a gradient,
    a probability keeps its tile as a difference does.
    """
    h, w, b = (x.double() for x in inputs)
    here = (target != ignore_index)[:, None]
    h = torch.where(here, h, 0.0)
    a = h @ w.T + b
    z = a if softcap is None else softcap * torch.tanh(a / softcap)
    p = z.softmax(-1)
    hot = torch.nn.functional.one_hot(target.clamp_min(0), len(w))
    d = torch.where(here, p - hot, 0.0)
    slope = 1.0 if softcap is None else 1 - torch.tanh(a / softcap).square()
    gradient = torch.where(here, (grads[0, :, None] * d + grads[1, :, None] * p) * slope, 0.0)
    rows, columns = (torch.arange(n, device=h.device) // size for n, size in zip(d.shape, tile, strict=True))
    kept = torch.zeros(int(rows[-1]) + 1, int(columns[-1]) + 1, dtype=torch.bool, device=h.device)
    size = torch.where(grads[1, :, None] == 0, d.abs(), torch.where(here, torch.maximum(d.abs(), p), 0.0))
    for i, j in (size[:, order] >= epsilon).nonzero().tolist():
        kept[rows[i], columns[j]] = True
    gradient *= kept[rows[:, None], columns[order.argsort()][None, :]]
    return gradient @ w, gradient.T @ h, gradient.sum(0), kept


def _cases(module: ModuleType) -> Iterator[tuple[Tensor, Tensor]]:
    """(module, truth) pairs: exact and far from 0; capped, filtered and sorted; with a whole weight; certain."""
    source = generator(0, DEVICE)
    tokens, vocab, dim = 2 * TILE[0] - 1, 3 * TILE[1] + 2, TILE[1] + 3

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, device=DEVICE)

    target = torch.randint(0, vocab, (tokens,), generator=source, device=DEVICE)
    target[1] = IGNORED
    for softcap, shift, epsilon, sort, filter_weight, certain in (
        (None, -300.0, 0.0, False, True, False),
        (4.0, 0.0, 2.0**-3, True, True, False),
        (None, 0.0, 2.0**-2, False, False, False),
        (None, 0.0, 2.0**-3, False, True, True),
    ):
        hidden, weight, bias = 2 * random(tokens, dim) / dim**0.5, 2 * random(vocab, dim), random(vocab)
        bias, grads = bias.sort().values + shift, random(2, tokens)
        if certain:
            # Every d is near 0. Log-sum-exp has a gradient in the first tile of tokens, which must stay for it.
            hidden, grads[1, TILE[0] :] = weight[target.clamp_min(0)], 0.0
        hidden[1], grads[:, 1] = 3.0, 0.0
        code = codes(target, vocab, IGNORED)
        numbers = module.forward(hidden, weight, code, bias, softcap)
        picked, peak, log_sum = numbers
        wide = (hidden.double(), weight.double(), bias.double())
        truth = reference.cut_cross_entropy(wide[0], wide[1], target, wide[2], softcap, IGNORED)
        yield from zip((peak - picked + log_sum, peak + log_sum), truth, strict=True)
        mean = wide[0][target != IGNORED].mean(0)
        order = torch.arange(vocab, device=DEVICE)
        order = (wide[1] @ mean + wide[2]).argsort() if sort else order
        *exact, kept = filtered_truth((hidden, weight, bias), target, grads.double(), softcap, epsilon, order, TILE)
        if not filter_weight:
            _, *exact[1:], _ = filtered_truth((hidden, weight, bias), target, grads.double(), softcap, 0, order, TILE)
        *found, map_of_tiles = module.backward(
            grads, hidden, weight, code, bias, numbers, softcap, epsilon, sort, filter_weight, [True] * 3, TILE
        )
        if epsilon:
            yield map_of_tiles.float(), kept.double()
        yield from zip(found, exact, strict=True)
