import torch

from p2k.core.traffic import Traffic, count_traffic, peak_memory


def test_counts_operands_results_and_launches():
    a, b = torch.randn(100), torch.randn(100)
    assert count_traffic(lambda: a * b + a) == Traffic(read=4 * 400, written=2 * 400, launches=2)


def test_views_move_nothing_and_broadcasts_count_once():
    a, row = torch.randn(10, 20), torch.randn(20)
    assert count_traffic(lambda: a.t().reshape(2, 100).t()[3:]).launches <= 1
    assert count_traffic(lambda: a.view(200)[:50].unsqueeze(0)) == Traffic(0, 0, 0)
    assert count_traffic(lambda: row.expand(10, 20) * a).read == 4 * (20 + 200)


def test_backward_is_counted_when_run_inside():
    x = torch.randn(50, requires_grad=True)
    forward = count_traffic(lambda: x.square().sum())
    both = count_traffic(lambda: x.square().sum().backward())
    assert both.launches > forward.launches
    assert both.total > forward.total


def test_peak_memory_counts_what_lives_at_once():
    x = torch.randn(1000)
    assert peak_memory(lambda: x + 1) == 4000
    assert peak_memory(lambda: ((x + 1) * 2) + 3) == 8000
    assert peak_memory(lambda: [x + i for i in range(5)]) == 20000
    assert peak_memory(lambda: x.view(10, 100)[3:]) == 0


def test_peak_memory_sees_what_autograd_saves():
    x = torch.randn(1000, requires_grad=True)
    saved = peak_memory(lambda: x.exp().exp().exp().sum().backward())
    assert saved >= 3 * 4000
