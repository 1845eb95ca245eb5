"""Pruning layer by layer: the greedy order and the least squares of Optimal Brain Compression."""

import torch

from recipes.sparsify.layer_pruning import pruned


def least_squares(x, w, kept):
    """The row that changes ``x @ w`` least of all rows with zeros outside of ``kept``, and the squared change."""
    best = torch.zeros_like(w)
    if kept:
        best[kept] = torch.linalg.lstsq(x[:, kept], (x @ w)[:, None]).solution[:, 0]
    return best, float((x @ (w - best)).square().sum())


def greedy(x, w):
    """The dense solution: the columns of a row, each the one whose loss costs least, and what each costs."""
    kept, order, costs, before = list(range(len(w))), [], [], 0.0
    while kept:
        found = [least_squares(x, w, [j for j in kept if j != p])[1] for p in kept]
        p = kept[min(range(len(kept)), key=found.__getitem__)]
        costs.append(min(found) - before)
        before = min(found)
        order.append(p)
        kept.remove(p)
    return order, costs


def test_weights_are_taken_out_in_the_greedy_order_and_made_good_by_least_squares():
    torch.manual_seed(0)
    x = (torch.randn(60, 6) @ torch.randn(6, 6)).double()
    weight, gram = torch.randn(3, 6).double(), x.T @ x
    rows = [greedy(x, w) for w in weight]
    # Costs of a row never fall here, so the rows share the count as their sorted costs do.
    shared = sorted((max(c[: k + 1]), i) for i, (_, c) in enumerate(rows) for k in range(6))
    for count in (0, 1, 5, 11, 18):
        found, kept = pruned(weight, gram, count, damping=1e-12)
        assert int((~kept).sum()) == count
        for i, w in enumerate(weight):
            share = sum(row == i for _, row in shared[:count])
            lost = rows[i][0][:share]
            assert sorted(torch.where(~kept[i])[0].tolist()) == sorted(lost)
            best, _ = least_squares(x, w, [j for j in range(6) if j not in lost])
            torch.testing.assert_close(found[i], best, rtol=1e-6, atol=1e-8)


def test_inputs_that_say_nothing_of_each_other_leave_magnitudes_times_inputs():
    sizes = torch.tensor([4.0, 1.0, 9.0]).double()
    weight = torch.tensor([[[[1.0, 3.0, 0.5]]], [[[2.0, -1.0, 1.0]]]])
    found, kept = pruned(weight, sizes.diag(), 3, damping=1e-12)
    costs = weight.flatten(1).double().square() * sizes
    assert set(costs[~kept.flatten(1)].tolist()) == set(costs.flatten().sort().values[:3].tolist())
    assert torch.equal(found, weight * kept)
