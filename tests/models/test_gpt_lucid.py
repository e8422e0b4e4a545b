"""LUCID attention inside the GPT: cached decoding, padding and no gap to plain attention in parameters."""

import pytest
import torch

from p2k.core.seeding import generator
from p2k.core.tolerance import tolerance
from p2k.models.gpt import GPT, GPTConfig, KVCache

VOCAB, BOUND = 11, 10 * tolerance(torch.float64, dot=True)


def build(attention="lucid", **options):
    torch.manual_seed(0)
    return GPT(GPTConfig(VOCAB, 80, dim=16, depth=2, heads=2, attention=attention, **options)).double()


def tokens(*shape):
    return torch.randint(VOCAB, shape, generator=generator(1))


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("pieces", [1, 5, [70, 1, 1]], ids=str)
@torch.no_grad()
def test_cached_decoding_is_the_full_forward(positions, pieces):
    model, ids = build(positions=positions), tokens(2, 72)
    if pieces == 1:
        ids = ids[:, :9]
    cache = KVCache.allocate(model, 2, 72)
    found = torch.cat([model(piece, cache=cache) for piece in ids.split(pieces, 1)], 1)
    torch.testing.assert_close(found, model(ids), rtol=BOUND, atol=BOUND)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_no_logit_with_or_without_a_cache(side):
    model, ids = build(positions="rotary"), tokens(1, 6)
    padded, valid = torch.nn.functional.pad(ids, (3, 0), value=7), torch.arange(9)[None] >= 3
    here = slice(3, None)
    if side == "right":
        padded, valid, here = torch.nn.functional.pad(ids, (0, 3), value=7), torch.arange(9)[None] < 6, slice(6)
    expected = model(ids)
    torch.testing.assert_close(model(padded, valid=valid)[:, here], expected, rtol=BOUND, atol=BOUND)
    cache = KVCache.allocate(model, 1, 9)
    pieces, start = [], 0
    for count in (4, 1, 2, 1, 1):
        piece = padded[:, start : start + count]
        start += count
        pieces.append(model(piece, valid=valid[:, :start], cache=cache))
    torch.testing.assert_close(torch.cat(pieces, 1)[:, here], expected, rtol=BOUND, atol=BOUND)


def test_it_has_the_parameters_of_plain_attention_and_another_function():
    plain, ours = build("sdpa"), build()
    assert plain.state_dict().keys() == ours.state_dict().keys()
    ours.load_state_dict(plain.state_dict())
    assert (plain(tokens(1, 9)) - ours(tokens(1, 9))).abs().max() > 1e-6
