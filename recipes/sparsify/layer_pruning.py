r"""Pruning the weights of one layer by least squares on the layer's inputs.

This is Optimal Brain Compression (Frantar and Alistarh, 2022). The change of a layer's output is quadratic in the
change of its weight, with the Hessian :math:`H = X X^\top` (``recipes.common.layer_inputs``), the same for every row.
Of a row, the weight whose loss changes the output least is taken out, the weights that are left make it good, and so
on: each costs :math:`w_p^2 / (H^{-1})_{pp}`. A sixteenth of the weights that are left goes at a time. Everything is in
float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from recipes.common.layer_inputs import damped

_NUMBERS = 2**25  # of the inverse Hessians that are in memory at a time, one for each row
_SHARE = (
    16  # 1 / _SHARE of the weights that are left of a row is taken out at a time, and at least one
)


@torch.no_grad()
def pruned(weight: Tensor, gram: Tensor, count: int, *, damping: float) -> tuple[Tensor, Tensor]:
    """The weight of a layer with ``count`` zeros, the others chosen by least squares.

    Args:
        weight: The weight, channels first.
        gram: The sum over the layer's inputs, float64 ``(columns, columns)``.
        count: How many weights are taken out of the layer, from whichever rows it costs least.
        damping: Added to the diagonal of the gram, as a share of its mean.

    Returns:
        A new weight, and a mask that is False for its ``count`` zeros, both of the shape of ``weight``.
    """
    W = weight.detach().flatten(1).double()
    inverse = torch.linalg.inv(damped(gram, damping))
    rows = max(1, _NUMBERS // inverse.numel())
    parts = [_order(part, inverse) for part in W.split(rows)]
    order, costs = (torch.cat(of_one) for of_one in zip(*parts, strict=True))
    # Of a row a weight goes after those before it only, so it costs no less than they do.
    dear = costs.cummax(dim=1).values.flatten().argsort(stable=True)[:count]
    lost = torch.zeros_like(costs, dtype=torch.bool).flatten().index_fill_(0, dear, True)
    mask = torch.zeros_like(lost.view_as(costs)).scatter_(1, order, lost.view_as(costs))
    made_good = torch.stack([_made_good(w, p, inverse) for w, p in zip(W, mask, strict=True)])
    return made_good.to(weight).view(weight.shape), ~mask.view(weight.shape)


def _order(W: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """The columns of each row in the order in which they are taken out, and what each costs: both of W's shape."""
    W = W.clone()
    left = inverse.expand(len(W), *inverse.shape).clone()  # the inverses of the rows' Hessians
    gone = torch.zeros_like(W, dtype=torch.bool)
    order = torch.empty_like(W, dtype=torch.long)
    costs = torch.empty_like(W)
    done, columns = 0, W.shape[1]
    while done < columns:
        together = max(1, (columns - done) // _SHARE)
        sizes = left.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(W.dtype).tiny)
        cost, p = (W.square() / sizes).masked_fill(gone, torch.inf).topk(together, largest=False)
        costs[:, done : done + together], order[:, done : done + together] = cost, p
        across = left.gather(2, p[:, None, :].expand(-1, columns, -1))
        among = across.gather(1, p[:, :, None].expand(-1, -1, together))
        given = torch.cat([W.gather(1, p)[:, :, None], across.mT], dim=2)
        shares = torch.linalg.solve(among, given)
        W -= (across @ shares[:, :, :1])[:, :, 0]
        left.baddbmm_(across, shares[:, :, 1:], alpha=-1)
        gone.scatter_(1, p, True)
        done += together
    return order, costs


def _made_good(w: Tensor, lost: Tensor, inverse: Tensor) -> Tensor:
    """The row ``(columns,)`` without the weights ``lost``, the others being those that change the output least."""
    if not bool(lost.any()):
        return w
    shares = torch.linalg.solve(inverse[lost][:, lost], w[lost])
    left: Tensor = w - inverse[:, lost] @ shares
    return left.masked_fill(lost, 0.0)
