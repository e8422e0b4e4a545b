"""Rank measures and class separation on spectra that are known, and on degenerate clouds."""

import pytest
import torch

from p2k.core.seeding import generator
from p2k.linalg.spectrum import class_separation, effective_rank, participation_ratio

MEASURES = [effective_rank, participation_ratio]


def cloud(eigenvalues):
    """Vectors whose mean is zero and whose covariance has exactly these eigenvalues, up to one factor."""
    basis = torch.diag(torch.tensor(eigenvalues, dtype=torch.float64).sqrt())
    rotation = torch.linalg.qr(torch.randn(basis.shape, generator=generator(3), dtype=torch.float64)).Q
    return torch.cat([basis, -basis]) @ rotation


@pytest.mark.parametrize("measure", MEASURES)
def test_equal_eigenvalues_count_directions(measure):
    assert measure(cloud([1.0, 1.0, 1.0, 0.0, 0.0])).item() == pytest.approx(3.0)
    assert measure(cloud([5.0, 0.0, 0.0])).item() == pytest.approx(1.0)


def test_unequal_eigenvalues():
    shares = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    vectors = cloud(shares.tolist())
    assert effective_rank(vectors).item() == pytest.approx(torch.special.entr(shares).sum().exp().item())
    assert participation_ratio(vectors).item() == pytest.approx(1 / shares.square().sum().item())
    assert participation_ratio(vectors) < effective_rank(vectors)


@pytest.mark.parametrize("measure", MEASURES)
def test_mean_scale_and_leading_shape_do_not_matter(measure):
    vectors = torch.randn(4, 6, 5, generator=generator(0))
    expected = measure(vectors.double())
    # Shifting by 3 costs a float32 mean about one digit.
    torch.testing.assert_close(measure(vectors.flatten(0, 1) * 1e-20 + 0).double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(measure(vectors * 7 + 3).double(), expected, rtol=1e-5, atol=0)
    few = measure(vectors[0, :3])
    assert 1 <= few <= 2


@pytest.mark.parametrize("measure", MEASURES)
def test_nothing_varies(measure):
    assert measure(torch.randn(1, 8, generator=generator(0))) == 0
    assert measure(torch.full((5, 8), 0.1)) == 0
    assert measure(torch.zeros(5, 8)) == 0


@pytest.mark.parametrize("measure", MEASURES)
def test_gradients(measure):
    vectors = torch.randn(6, 3, generator=generator(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(measure, (vectors,))
    flat = cloud([1.0, 0.5, 0.0]).requires_grad_()
    measure(flat).backward()
    assert flat.grad.isfinite().all()


@pytest.mark.parametrize("measure", MEASURES)
def test_bad_clouds(measure):
    with pytest.raises(ValueError, match="at least one vector"):
        measure(torch.zeros(0, 4))
    with pytest.raises(ValueError, match="NaN or inf"):
        measure(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]))
    with pytest.raises(TypeError, match="floating point"):
        measure(torch.ones(3, 3, dtype=torch.int64))


def test_separation_by_hand():
    features = torch.tensor([[0.0, 0.0], [2.0, 0.0], [10.0, 0.0], [10.0, 4.0]])
    labels = torch.tensor([7, 7, -1, -1])
    # Means (1, 0) and (10, 2) about (5.5, 1): between 2 (4.5^2 + 1) * 2, within 2 + 8.
    assert class_separation(features, labels).item() == pytest.approx(4 * (4.5**2 + 1) / 10)


def test_separation_of_degenerate_clouds():
    labels = torch.tensor([0, 0, 1, 1])
    assert class_separation(torch.tensor([[0.0], [0.0], [1.0], [1.0]]), labels) == torch.inf
    assert class_separation(torch.zeros(4, 3), labels) == 0
    with pytest.raises(ValueError, match="two classes"):
        class_separation(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(TypeError, match="integers"):
        class_separation(torch.zeros(4, 3), torch.zeros(4))
    with pytest.raises(ValueError, match="count"):
        class_separation(torch.zeros(4, 3), labels[:2])
