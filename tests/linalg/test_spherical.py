import pytest
import torch

from p2k.core.mutation import Mutant, survivors
from p2k.core.seeding import generator
from p2k.core.tolerance import tolerance
from p2k.linalg import spherical
from p2k.linalg.spherical import spherical_statistics

EXACT = tolerance(torch.float64)


def outputs(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def by_hand(o, c):
    mean = o.mean(-1)
    return mean, (o - mean[..., None]).square().sum(-1), o.gather(-1, c[..., None])[..., 0] - mean


def test_the_statistics_are_the_textbook_ones():
    o, c = outputs(3, 5, 11), torch.randint(11, (3, 5), generator=generator(1))
    found = spherical_statistics(o, c)
    for got, want in zip(found[1:4], by_hand(o, c), strict=True):
        torch.testing.assert_close(got, want, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(found.sum_of_squares, o.square().sum(-1), rtol=EXACT, atol=0)
    assert found.classes == 11
    assert found.counted.all()


def test_gradients_of_each_statistic():
    o, c = outputs(2, 4).requires_grad_(), torch.tensor([3, -100])
    assert torch.autograd.gradcheck(lambda x: spherical_statistics(x, c)[1:4], (o,))


@pytest.mark.parametrize("value", [0.1, -3e7, 1e300])
def test_equal_outputs_have_exactly_no_spread(value):
    found = spherical_statistics(torch.full((1, 7), value, dtype=torch.float64), torch.tensor([2]))
    assert found.scatter.item() == 0
    assert found.deviation.item() == 0
    assert found.mean.item() == value


def test_a_common_offset_that_fits_the_format_changes_no_bit():
    # Multiples of 1/16 below 8 next to an offset of 2**40: every sum and difference here is exact in float64.
    o = torch.randint(-128, 128, (4, 8), generator=generator(0)).double() / 16
    c = torch.tensor([0, 3, 7, 5])
    near, far = spherical_statistics(o, c), spherical_statistics(o + 2.0**40, c)
    assert torch.equal(near.scatter, far.scatter)
    assert torch.equal(near.deviation, far.deviation)
    assert torch.equal(near.mean + 2.0**40, far.mean)


def test_ignored_rows_may_hold_anything_and_send_no_gradient():
    o = outputs(3, 4)
    o[1] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0])
    o.requires_grad_()
    found = spherical_statistics(o, torch.tensor([0, -1, 2]), ignore_index=-1)
    assert found.counted.tolist() == [True, False, True]
    assert all(value[1] == 0 for value in found[1:4])
    (grad,) = torch.autograd.grad(sum(value.sum() for value in found[1:4]), o)
    assert torch.equal(grad[1], torch.zeros(4, dtype=torch.float64))
    assert grad.isfinite().all()


def test_half_precision_is_summed_in_single():
    o, c = outputs(2, 300).half(), torch.tensor([1, 2])
    found = spherical_statistics(o, c)
    assert found.scatter.dtype == torch.float32
    torch.testing.assert_close(found.scatter.double(), by_hand(o.double(), c)[1], rtol=tolerance(torch.float32), atol=0)


def test_shapes_without_items_and_with_one_class():
    assert spherical_statistics(torch.zeros(0, 3), torch.zeros(0, dtype=torch.long)).mean.shape == (0,)
    one = spherical_statistics(torch.tensor([[4.0]]), torch.tensor([0]))
    assert (one.mean.item(), one.scatter.item(), one.deviation.item()) == (4, 0, 0)
    assert spherical_statistics(torch.zeros(3), torch.tensor(1)).mean.shape == ()


@pytest.mark.parametrize(
    ("logits", "target", "error", "words"),
    [
        (torch.zeros(2, 3).long(), torch.zeros(2).long(), TypeError, "logits must be floating point"),
        (torch.zeros(2, 3), torch.zeros(2), TypeError, "target must hold integers"),
        (torch.zeros(2, 3), torch.zeros(3).long(), ValueError, "target must have shape"),
        (torch.zeros(2, 0), torch.zeros(2).long(), ValueError, "a class or more"),
        (torch.tensor(1.0), torch.tensor(0), ValueError, "a class or more"),
        (torch.zeros(2, 3), torch.zeros(2, device="meta").long(), ValueError, "must be on"),
    ],
)
def test_bad_input_is_refused(logits, target, error, words):
    with pytest.raises(error, match=words):
        spherical_statistics(logits, target)


MUTANTS = [
    Mutant("shifted = o - pivot", "shifted = o", "no pivot"),
    Mutant("(mean + pivot)[..., 0]", "mean[..., 0]", "pivot not given back"),
    Mutant("shifted = o - pivot", "shifted = o + pivot", "sign of the pivot"),
    Mutant("centred.square().sum(-1)", "centred.square().mean(-1)", "variance for scatter"),
    Mutant("centred.square().sum(-1)", "shifted.square().sum(-1)", "scatter about the pivot"),
    Mutant("centred.gather(-1, index)", "shifted.gather(-1, index)", "deviation from the pivot"),
    Mutant("o = torch.where(counted[..., None], ", "o = torch.where(counted[..., None] | True, ", "ignored rows read"),
    Mutant("self.classes * self.mean.square()", "self.mean.square()", "classes forgotten in the sum of squares"),
]


def wrong(module) -> bool:
    o, c = outputs(4, 9) + 3, torch.tensor([0, 8, 3, -100])
    o[3] = torch.nan
    found = module.spherical_statistics(o, c)
    truth = by_hand(o[:3], c[:3])
    bad = [not (got[:3] - want).abs().max() < 1e-9 for got, want in zip(found[1:4], truth, strict=True)]
    bad += [not bool(value[3] == 0) for value in found[1:4]]
    bad.append(not (found.sum_of_squares[:3] - o[:3].square().sum(-1)).abs().max() < 1e-9)
    equal = module.spherical_statistics(torch.full((1, 7), 0.1, dtype=torch.float64), torch.tensor([2]))
    return any(bad) or bool(equal.scatter != 0)


def test_every_planted_bug_is_caught():
    assert not [mutant.why for mutant in survivors(spherical, MUTANTS, wrong)]
