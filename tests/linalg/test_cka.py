import pytest
import torch

from p2k.core.seeding import generator
from p2k.linalg.cka import delta_cka, linear_cka, shared_basis


def random(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def rotation(width, seed=3):
    return torch.linalg.qr(random(width, width, seed=seed))[0]


def test_invariances_and_range():
    x, y = random(200, 12), random(200, 7, seed=1)
    for other in (x, 3.7 * x + 2, x @ rotation(12), torch.cat([x, torch.zeros(200, 2, dtype=x.dtype)], 1)):
        # Twelve-term float64 products.
        assert abs(linear_cka(x, other).item() - 1) < 1e-12
    assert 0 <= linear_cka(x, y) <= 1
    assert abs(linear_cka(x, y) - linear_cka(y, x)) < 1e-14
    assert linear_cka(x, torch.ones(200, 3, dtype=x.dtype)) == 0


def test_closed_form():
    # Two centred orthonormal columns against one of them plus noise-free mixing: |X'Y|^2 / (|X'X| |Y'Y|) by hand.
    x = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    assert abs(linear_cka(x, x[:, :1]).item() - 1 / 2**0.5) < 1e-14
    assert linear_cka(x[:, :1], x[:, 1:]) == 0


def test_wide_features_take_the_gram_form():
    x, y = random(20, 50), random(20, 30, seed=1)
    a, b = x - x.mean(0), y - y.mean(0)
    expected = (a.mT @ b).square().sum() / ((a.mT @ a).norm() * (b.mT @ b).norm())
    assert abs(linear_cka(x, y) - expected) < 1e-13


def test_truncation_sees_rotations_and_full_rank_does_not():
    x = random(512, 32)
    turned = x @ rotation(32)
    assert abs(delta_cka(x, turned, components=32)[0]) < 1e-10
    assert delta_cka(x, turned, components=8)[0] > 0.01
    assert (
        abs(delta_cka(x, random(512, 32, seed=5), components=32)[0] - (1 - linear_cka(x, random(512, 32, seed=5))))
        < 1e-12
    )
    assert delta_cka(x, x, components=4)[0] < 1e-12


def test_shared_basis_is_orthonormal_and_explains():
    x, y = random(100, 10), random(100, 10, seed=1)
    basis, explained = shared_basis(x, y, 4)
    assert (basis.mT @ basis - torch.eye(4, dtype=x.dtype)).abs().max() < 1e-13
    assert 0.4 < explained < 1
    assert abs(shared_basis(x, y, 10)[1] - 1) < 1e-13


def test_float32_input_is_computed_in_float64():
    x = random(1024, 256).float()
    assert abs(linear_cka(x, x).item() - 1) < 1e-12


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: linear_cka(random(5, 2), random(4, 2)), ValueError, "one count"),
        (lambda: linear_cka(random(1, 2), random(1, 2)), ValueError, "count >= 2"),
        (lambda: linear_cka(random(5, 2).long(), random(5, 2)), TypeError, "floating"),
        (lambda: shared_basis(random(5, 2), random(5, 3), 1), ValueError, "one shape"),
        (lambda: delta_cka(random(5, 2), random(5, 2), components=0), ValueError, "components >= 1"),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
