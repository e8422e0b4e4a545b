"""What only the interpreter can show of cut_cross_entropy's kernel: float64."""

import pytest
import torch
from cut_cross_entropy_cases import head, small_tiles

from p2k.ops.cut_cross_entropy import cut_cross_entropy


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
def test_gradcheck_through_the_interpreter(monkeypatch):
    small_tiles(monkeypatch)
    inputs, target = head(3, vocab=9, dim=2, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w, b: cut_cross_entropy(h, w, target, bias=b, backend="triton"),
        [x.requires_grad_() for x in inputs],
        fast_mode=True,
    )
