"""Sampling completions from a GPT with a key/value cache, and log-probabilities of given completions."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from p2k.models.gpt import GPT, KVCache


@dataclass(frozen=True)
class Completions:
    """Sampled completions: ids (padding after the end token), mask of real tokens, their log-probabilities."""

    tokens: Int[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"]
    logps: Float[Tensor, "batch length"]


def scaled_log_softmax(logits: Float[Tensor, "*batch vocab"], temperature: float) -> Float[Tensor, "*batch vocab"]:
    """Log-probabilities of the sampling distribution in at least float32; temperature 0 (greedy) reports those of 1."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (wide if temperature in (0, 1) else wide / temperature).log_softmax(-1)


def choose_tokens(log_probs: Float[Tensor, "*batch vocab"], uniform: Float[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
    """Invert the cumulative distribution at `uniform` in [0, 1): exact sampling from one number per row."""
    cumulative = log_probs.exp().cumsum(-1)
    level = uniform.to(cumulative.dtype)[..., None] * cumulative[..., -1:]
    # The first entry that exceeds the level has positive probability; the clamp covers a level rounded up to the end.
    return torch.searchsorted(cumulative, level, right=True).squeeze(-1).clamp_max(log_probs.shape[-1] - 1)


@torch.no_grad()
def generate(
    model: GPT,
    prompts: Int[Tensor, "batch prompt"],
    length: int,
    *,
    eos: int,
    pad: int,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    valid: Bool[Tensor, "batch prompt"] | None = None,
) -> Completions:
    """Sample up to `length` tokens after each prompt, ending a row at `eos`.

    Args:
        model: the policy.
        prompts: ids, padded on the left to one length where they differ.
        length: most tokens to sample, ``>= 1``; a row without `eos` within them is cut there and has a full mask.
        eos: id that ends a row; it counts as sampled (its mask is True).
        pad: id written after the end.
        generator: source of randomness on the model's device; needed unless `temperature` is 0.
        temperature: divides the logits, ``>= 0``; 0 takes the most likely token.
        valid: False at the prompts' padding; None means no padding.

    Raises:
        ValueError: `length` below 1, a negative temperature, or sampling without a generator.
    """
    if length < 1 or temperature < 0:
        raise ValueError(f"generate: length >= 1 and temperature >= 0 are needed, got {length} and {temperature}")
    if temperature > 0 and generator is None:
        raise ValueError("generate: sampling needs a generator; pass generator=... or temperature=0")
    batch, prompt = prompts.shape
    cache = KVCache.allocate(model, batch, prompt + length)
    tokens, masks, logps = [], [], []
    alive = torch.ones(batch, dtype=torch.bool, device=prompts.device)
    incoming = prompts
    for _ in range(length):
        log_probs = scaled_log_softmax(model(incoming, valid=valid, cache=cache)[:, -1], temperature)
        if temperature > 0:
            drawn = choose_tokens(log_probs, torch.rand(batch, generator=generator, device=prompts.device))
        else:
            drawn = log_probs.argmax(-1)
        tokens.append(torch.where(alive, drawn, pad))
        masks.append(alive)
        logps.append(torch.where(alive, log_probs.gather(-1, drawn[:, None]).squeeze(-1), 0.0))
        if valid is not None:
            valid = torch.cat((valid, alive[:, None]), -1)
        incoming = tokens[-1][:, None]
        alive = alive & (drawn != eos)
    return Completions(torch.stack(tokens, -1), torch.stack(masks, -1), torch.stack(logps, -1))


def completion_logps(
    model: GPT,
    prompts: Int[Tensor, "batch prompt"],
    completions: Int[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
    *,
    temperature: float = 1.0,
    valid: Bool[Tensor, "batch prompt"] | None = None,
) -> tuple[Float[Tensor, "batch length"], Float[Tensor, "batch length"]]:
    """Log-probability of each completion token in one pass, and the entropy of its distribution (detached).

    Both are 0 where `mask` is False. Shapes and meaning of the arguments are those of `generate`.
    """
    tokens = torch.cat((prompts, completions[:, :-1]), -1)
    if valid is not None:
        valid = torch.cat((valid, mask[:, :-1]), -1)
    logits = model(tokens, valid=valid)[:, prompts.shape[-1] - 1 :]
    log_probs = scaled_log_softmax(logits, temperature)
    chosen = log_probs.gather(-1, completions[..., None]).squeeze(-1)
    detached = log_probs.detach()
    entropy = -(detached.exp() * detached).sum(-1)
    return torch.where(mask, chosen, 0.0), torch.where(mask, entropy, 0.0)
