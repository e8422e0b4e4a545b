"""Bugs to plant in the row stage and in the loop over chunks, and the probes that must catch every one of them.

A probe calls a module's `forward` and `backward` on adversarial cases and compares with the reference in float64. The
kernel needs Triton's interpreter or a GPU. The unedited modules must pass their probe.
"""

from collections.abc import Iterator
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from p2k.core.mutation import Mutant
from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors, tolerance
from p2k.ops.linear_logp import reference

KERNEL_MUTANTS = [
    Mutant("shrink * (moment + fall * total)", "shrink * moment", "entropy: the new maximum does not move the moment"),
    Mutant("total = shrink * total + _sum(e)", "total = total + _sum(e)", "sum: not rescaled when the maximum rises"),
    Mutant('_sum(e * tl.where(s == float("-inf"), 0.0, s))', "_sum(e * s)", "entropy: 0 times -inf"),
    Mutant('z * scale, float("-inf"))', "z * scale, 0.0)", "columns behind the vocabulary count as logits of 0"),
    Mutant("[None, :], z * scale, fl", "[None, :], z, fl", "the temperature is lost"),
    Mutant("z += tl.load(bias_ptr", "z -= tl.load(bias_ptr", "the bias has the wrong sign"),
    Mutant("tl.full((ROWS, 1), LOWEST, ACC)", "tl.zeros((ROWS, 1), ACC)", "the maximum starts at 0"),
    Mutant("rows, tokens, picked - largest - log_sum", "rows, tokens, picked - log_sum", "logp: forgets the maximum"),
    Mutant("log_sum - moment / total", "log_sum - moment", "entropy: the moment is not normalised"),
    Mutant("at[None, :] == target, z, 0.0", "at[None, :] == target + 1, z, 0.0", "logp of the next token"),
    Mutant("picked += ", "picked = ", "logp: tiles after the target's overwrite it"),
    Mutant("(rows * stride)[:, None]", "(rows * width)[:, None]", "rows are taken to lie side by side", 2),
    Mutant("mask=inside)", "mask=inside & (at < BLOCK)[None, :])", "backward: tiles after the first are not written"),
    Mutant('s = tl.where(s == float("-inf"), LOWEST, s)', "s = s", "backward: 0 times -inf"),
    Mutant("s -= _number(", "s -= 0.0 * _number(", "backward: probabilities are not normalised"),
    Mutant("surprise = p * (s + ", "surprise = p * (s + 0.0 * ", "entropy's gradient does not sum to zero"),
    Mutant("g * (hot - p)", "g * hot", "logp's gradient lacks the softmax"),
    Mutant("+ l * p", "- l * p", "log-sum-exp's gradient has the wrong sign"),
    Mutant("- e * surprise", "+ e * surprise", "entropy's gradient has the wrong sign"),
    Mutant("d = scale * (", "d = (", "backward: the temperature is lost"),
]  # fmt: skip

ROWS_MUTANTS = [
    Mutant("weights.mul_(_finite(shifted))", "weights.mul_(shifted)", "entropy: 0 times -inf"),
    Mutant("logp.sub_(log_sum)", "logp", "logp: not normalised"),
    Mutant(".sub_(largest).sub_(log_sum)", ".sub_(largest)", "backward: probabilities are not normalised"),
    Mutant("s.add_(entropy).mul_(p)", "s.mul_(p)", "entropy's gradient does not sum to zero"),
    Mutant("p.neg_().scatter_add_", "p.scatter_add_", "logp's gradient has the softmax's sign wrong"),
    Mutant("torch.mul(d.addcmul_(hot_less_p, g), scale, out=out)", "torch.mul(d.addcmul_(hot_less_p, g), 1, out=out)",
           "backward: the temperature is lost"),
]  # fmt: skip

CHUNK_MUTANTS = [
    Mutant(".masked_fill(self.absent[chunk, None], 0.0)", "", "NaN of an absent token reaches the weight"),
    Mutant("reshape(3, -1).masked_fill(chunks.absent, 0.0)", "reshape(3, -1).clone()",
           "absent tokens move the bias"),
    Mutant("number.masked_fill(chunks.absent, 0.0)", "number", "absent tokens have a log-probability"),
    Mutant("grads[0].masked_fill_(chunks.unknown, torch.nan)", "grads[0]", "a wrong target has a plausible gradient"),
    Mutant("logp.masked_fill(chunks.unknown, torch.nan)", "logp", "a wrong target has a plausible log-probability"),
    Mutant("range(0, len(self.target), max", "range(0, len(self.target) - self.size + 1, max",
           "the last, smaller chunk is left out"),
    Mutant("_product(dweight, dlogits.T, tokens, add=True)", "_product(dweight, dlogits.T, tokens, add=False)",
           "dweight: the last chunk overwrites the others"),
    Mutant("dlogits[:, block], weight, add=True)", "dlogits[:, block], weight, add=False)",
           "dhidden: the last block of the vocabulary overwrites the others"),
    Mutant("dbias += dlogits", "dbias = dlogits", "dbias: the last chunk overwrites the others"),
    Mutant("largest + log_sum, entropy", "log_sum, entropy", "log-sum-exp forgets the maximum"),
    Mutant("grads[:, chunk], 1 / temperature", "grads[:, chunk], temperature",
           "backward multiplies by the temperature"),
    Mutant("numbers[:, chunk], grads[:, chunk]", "numbers[:, : len(tokens)], grads[:, chunk]",
           "backward reads the numbers of the first chunk"),
]  # fmt: skip


def probe_rows(module: ModuleType) -> bool:
    """True when a row stage (`kernel` or `rows`) disagrees with the float64 reference on any adversarial case."""
    # Small tiles bring tails and tile loops to sizes an interpreter can afford.
    with mock.patch.object(module, "LAUNCH", {16: (4, 4)}, create=True):
        return any(_wrong(actual, truth) for actual, truth in _row_cases(module))


def probe_chunks(module: ModuleType) -> bool:
    """True when the loop over chunks disagrees with the float64 reference on any adversarial case."""
    with mock.patch.object(module, "BLOCK", 5):
        return any(_wrong(actual, truth) for actual, truth in _chunk_cases(module))


def _wrong(actual: Tensor, truth: Tensor) -> bool:
    if not torch.equal(actual.isnan(), truth.isnan()):
        return True
    # Not `error > bound`: inf is wrong too.
    actual, truth = actual.nan_to_num(nan=0.0, posinf=torch.inf), truth.nan_to_num(nan=0.0, posinf=torch.inf)
    return not max(relative_errors(actual, truth)) <= 4 * tolerance(actual.dtype, dot=True)


def _row_cases(stage: ModuleType) -> Iterator[tuple[Tensor, Tensor]]:
    """(row stage, float64 reference) pairs; the reference's head is the identity, so that its hidden state is z."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = generator(0, device)
    for tokens, vocab, offset in ((9, 13, 0.0), (6, 35, -300.0)):
        plain = torch.randn(tokens, vocab, generator=source, device=device) * 2
        plain = plain.sort().values + offset  # in a row of several tiles the maximum rises with each
        plain[:, -1] -= 3
        bias, grads = (torch.randn(*n, generator=source, device=device) for n in ((vocab,), (3, tokens)))
        bias[1] = -torch.inf
        target = torch.randint(2, vocab, (tokens,), generator=source, device=device)
        wide = plain.double().requires_grad_()
        truth = reference.linear_logp(wide, torch.eye(vocab).to(wide), target, bias.double(), 0.5, -100)
        (dplain,) = torch.autograd.grad(truth, wide, list(grads.double()))
        # Behind the vocabulary lies what would win, were it read.
        padded = torch.full((tokens, vocab + 3), 1e4, device=device)
        padded[:, :vocab] = plain
        numbers, out = plain.new_empty(4, tokens), torch.empty_like(padded)[:, :vocab]
        stage.forward(padded.clone()[:, :vocab], bias, target, 2.0, numbers)
        stage.backward(padded[:, :vocab], bias, target, numbers, grads, 2.0, out)
        logp, largest, log_sum, entropy = numbers
        yield from zip((logp, largest + log_sum, entropy, out), (*_detached(truth), dplain), strict=True)


def _chunk_cases(module: ModuleType) -> Iterator[tuple[Tensor, Tensor]]:
    """(loop, float64 reference) pairs: a short last chunk, absent tokens full of NaN, a target out of range."""
    source = generator(1)
    for dtype in (torch.float32, torch.float16):
        hidden, weight, bias = (torch.randn(*n, generator=source).to(dtype) for n in ((7, 4), (12, 4), (12,)))
        target, grads = torch.randint(0, 12, (7,), generator=source), torch.randn(3, 7, generator=source)
        target[[1, 5]] = -1
        wide = [tensor.double().requires_grad_() for tensor in (hidden, weight, bias)]
        truth = reference.linear_logp(wide[0], wide[1], target, wide[2], 0.5, -1)
        gradients = torch.autograd.grad(truth, wide, list(grads.double()))
        hidden[1], grads[:, 5] = torch.nan, torch.nan
        options = (0.5, -1, 3, "torch")
        *results, numbers = module.forward(hidden, weight, target, bias, *options)
        found = module.backward(grads, hidden, weight, target, bias, numbers, *options, [True] * 3)
        yield from zip((*results, *found), (*_detached(truth), *gradients), strict=True)
    target[0] = 12
    logp, _, _, numbers = module.forward(hidden, weight, target, bias, *options)
    found = module.backward(grads, hidden, weight, target, bias, numbers, *options, [True] * 3)
    yield logp[:1], torch.full((1,), torch.nan, dtype=torch.float64)
    yield found[0][:1], torch.full((1, 4), torch.nan, dtype=torch.float64)


def _detached(truth: tuple[Tensor, ...]) -> list[Tensor]:
    return [number.detach() for number in truth]
