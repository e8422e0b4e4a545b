"""The loop over chunks of tokens: products with the head in torch, the row stage in torch or Triton.

One buffer holds the logits of a chunk. The forward pass keeps four numbers per token; the backward pass recomputes
the chunk's logits, turns them into their gradient in place and multiplies it out. Chunks follow each other in order
and nothing is added atomically, so two runs agree bit for bit.

Source: wijmans2025cut.
"""

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from p2k.ops.linear_logp import rows

# Tokens whose logits exist at once: on a GPU enough for a full product, on a CPU enough to read the weight seldom.
CHUNK = {"cpu": 256, "cuda": 1024}
# Rows of a half-precision weight that a CPU widens at once.
BLOCK = 4096
# A row of logits starts at a multiple of this many elements, whatever the vocabulary, so that it loads in wide words.
ALIGNMENT = 16


class _Chunks:
    """Tokens of one call in chunks, with the buffers they share.

    Products read `operand` and write `wide`: a GPU multiplies half types into float32, a CPU widens them first.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int, size: int):
        self.hidden, self.weight = hidden.reshape(-1, hidden.shape[-1]), weight
        target = target.reshape(-1)
        self.absent = target == ignore_index
        self.unknown = ((target < 0) | (target >= len(weight))) & ~self.absent
        self.target = target.masked_fill(self.absent | self.unknown, 0)
        self.wide = torch.promote_types(weight.dtype, torch.float32)
        self.operand = weight.dtype if weight.is_cuda else self.wide
        self.size = min(size, len(target))
        self.logits = self._buffer(self.wide)
        self.gradient = self.logits if self.operand == self.wide else self._buffer(self.operand)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        """Positions of each chunk and its hidden states; those of absent tokens are zero, lest 0 times NaN be NaN."""
        for start in range(0, len(self.target), max(self.size, 1)):
            chunk = slice(start, start + self.size)
            yield chunk, self.hidden[chunk].masked_fill(self.absent[chunk, None], 0.0).to(self.operand)

    def write_logits(self, hidden: Tensor) -> Tensor:
        """The chunk's logits, before bias and temperature."""
        logits = self.logits[: len(hidden)]
        for block, weight in self._blocks():
            _product(logits[:, block], hidden, weight.T, add=False)
        return logits

    def to_hidden(self, dlogits: Tensor) -> Tensor:
        """Gradient of the chunk's hidden states, unrounded."""
        found = self.hidden.new_zeros(len(dlogits), self.hidden.shape[1], dtype=self.wide)
        for block, weight in self._blocks():
            _product(found, dlogits[:, block], weight, add=True)
        return found

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The weight as an operand: whole where its dtype is one already, else widened block by block."""
        vocab = len(self.weight)
        size = vocab if self.weight.dtype == self.operand else BLOCK
        for start in range(0, vocab, size):
            block = slice(start, start + size)
            yield block, self.weight[block].to(self.operand)

    def _buffer(self, dtype: torch.dtype) -> Tensor:
        vocab = len(self.weight)
        return self.weight.new_empty(self.size, -(-vocab // ALIGNMENT) * ALIGNMENT, dtype=dtype)[:, :vocab]


def forward(
    hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, temperature: float, ignore_index: int,
    size: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Log-probability, log-sum-exp, entropy and, ``[4, tokens]``, the numbers that the backward pass reads."""
    chunks, stage = _Chunks(hidden, weight, target, ignore_index, size), _row_stage(backend)
    numbers = weight.new_empty(4, len(chunks.target), dtype=chunks.wide)
    for chunk, tokens in chunks:
        logits = chunks.write_logits(tokens)
        stage.forward(logits, bias, chunks.target[chunk], 1 / temperature, numbers[:, chunk])
    logp, largest, log_sum, entropy = numbers
    results = logp.masked_fill(chunks.unknown, torch.nan), largest + log_sum, entropy
    return *(number.masked_fill(chunks.absent, 0.0).view(target.shape) for number in results), numbers


def backward(  # noqa: PLR0913 - the ops' own arguments
    grads: Tensor, hidden: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, numbers: Tensor,
    temperature: float, ignore_index: int, size: int, backend: str, needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of (hidden, weight, bias), None where `needs` says no; `grads` is ``[3, *tokens]``."""
    chunks, stage = _Chunks(hidden, weight, target, ignore_index, size), _row_stage(backend)
    grads = grads.reshape(3, -1).masked_fill(chunks.absent, 0.0)
    grads[0].masked_fill_(chunks.unknown, torch.nan)
    dhidden = torch.empty_like(chunks.hidden, memory_format=torch.contiguous_format) if needs[0] else None
    dweight = weight.new_zeros(weight.shape, dtype=chunks.wide) if needs[1] else None
    dbias = weight.new_zeros(len(weight), dtype=chunks.wide) if needs[2] else None
    for chunk, tokens in chunks:
        dlogits = chunks.gradient[: len(tokens)]
        logits = chunks.write_logits(tokens)
        stage.backward(logits, bias, chunks.target[chunk], numbers[:, chunk], grads[:, chunk], 1 / temperature, dlogits)
        if dhidden is not None:
            dhidden[chunk] = chunks.to_hidden(dlogits)
        if dweight is not None:
            _product(dweight, dlogits.T, tokens, add=True)
        if dbias is not None:
            dbias += dlogits.sum(0, dtype=chunks.wide)
    return (
        None if dhidden is None else dhidden.view(hidden.shape),
        *(None if gradient is None else gradient.to(weight.dtype) for gradient in (dweight, dbias)),
    )


def _product(out: Tensor, left: Tensor, right: Tensor, *, add: bool) -> None:
    """``out = left @ right``, or ``out += left @ right``, accumulated and kept in the type of `out`."""
    widening = {} if left.dtype == out.dtype else {"out_dtype": out.dtype}
    torch.addmm(out, left, right, beta=int(add), out=out, **widening)


def _row_stage(backend: str) -> ModuleType:
    """The module whose `forward` and `backward` run on a chunk."""
    if backend == "torch":
        return rows
    from p2k.ops.linear_logp import kernel

    return kernel
