"""Projections and overlaps against definitions in float64, and their defined values on degenerate input."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2k.core.seeding import generator
from p2k.core.tolerance import relative_errors, tolerance
from p2k.linalg.projection import chance_overlap, cosine_overlap, project_off, project_off_subspace, project_onto

SIZES = st.integers(1, 12)


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


@settings(max_examples=30, deadline=None)
@given(tokens=SIZES, width=SIZES, seed=st.integers(0, 99))
def test_parts_add_up_and_are_orthogonal(tokens, width, seed):
    vectors, directions = draw(tokens, width, seed=seed), draw(tokens, width, seed=seed + 1)
    on, off = project_onto(vectors, directions), project_off(vectors, directions)
    torch.testing.assert_close(on + off, vectors)
    # Both factors have entries of order one: the inner product is rounding of that scale.
    bound = 10 * tolerance(torch.float64, width) * vectors.norm(dim=-1) * directions.norm(dim=-1)
    assert ((off * directions).sum(-1).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_agrees_with_float64(dtype):
    vectors, directions = draw(5, 40, dtype=dtype), draw(40, seed=1, dtype=dtype)
    truth = project_off(vectors.double(), directions.double())
    result = project_off(vectors, directions)
    assert result.dtype == dtype
    assert relative_errors(result, truth)[0] <= tolerance(dtype, 40)


def test_zero_direction_removes_nothing_and_has_finite_gradient():
    vectors, directions = draw(3, 4).requires_grad_(), torch.zeros(4, dtype=torch.float64, requires_grad=True)
    off = project_off(vectors, directions)
    off.sum().backward()
    assert torch.equal(off, vectors)
    assert directions.grad.isfinite().all()


def test_projection_gradients():
    arguments = draw(3, 4).requires_grad_(), draw(3, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(project_off, arguments)
    assert torch.autograd.gradcheck(cosine_overlap, arguments)


def test_subspace_with_dependent_and_zero_rows():
    basis = draw(2, 7, seed=1)
    dependent = torch.cat([basis, basis.sum(0, keepdim=True), torch.zeros(1, 7, dtype=torch.float64)])
    vectors = draw(5, 7)
    off = project_off_subspace(vectors, dependent)
    torch.testing.assert_close(off, project_off_subspace(vectors, basis))
    torch.testing.assert_close(off @ basis.mT, torch.zeros(5, 2, dtype=torch.float64))
    assert torch.equal(project_off_subspace(vectors, torch.zeros_like(basis)), vectors)
    torch.testing.assert_close(project_off_subspace(vectors, basis[:1]), project_off(vectors, basis[0]))


def test_overlap_is_the_absolute_cosine_at_any_scale():
    first, second = draw(6, 9), draw(6, 9, seed=1)
    expected = torch.nn.functional.cosine_similarity(first, second).abs()
    torch.testing.assert_close(cosine_overlap(first, second), expected)
    # Squares of these entries leave the range of float32.
    scaled = cosine_overlap((first * 1e-30).float(), (second * 1e30).float())
    torch.testing.assert_close(scaled, expected.float())
    assert torch.equal(cosine_overlap(torch.zeros(2, 3), torch.ones(2, 3)), torch.zeros(2))


def test_chance_overlap_is_the_mean_of_random_pairs():
    for width in (56, 256):
        observed = cosine_overlap(draw(20000, width), draw(20000, width, seed=1)).mean().item()
        # Twenty thousand pairs give the mean to 0.5 %, the large-width limit is off by at most 0.5 % here.
        assert math.isclose(observed, chance_overlap(width), rel_tol=0.02)


def test_bad_input():
    with pytest.raises(TypeError, match="floating point"):
        cosine_overlap(torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3))
    with pytest.raises(TypeError, match="dtype"):
        project_off(torch.ones(2, 3), torch.ones(2, 3).double())
    with pytest.raises(ValueError, match="same last dimension"):
        project_onto(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(ValueError, match="eps"):
        project_onto(torch.ones(2, 3), torch.ones(3), eps=-1.0)
    with pytest.raises(ValueError, match="width"):
        chance_overlap(0)
