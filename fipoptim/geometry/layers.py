"""Which weights of a network are no matrices by custom, whatever their shape."""

from __future__ import annotations

from torch import Tensor, nn

from fipoptim.flat import matrix_shape
from fipoptim.geometry.muon import LONGEST_SIDE, is_matrix


def other_than_matrices(model: nn.Module) -> set[Tensor]:
    """The weights that Muon's geometry measures one by one, although they have two sides.

    A row of a table is a vector that is looked up, and most rows have no gradient in a step. A head whose weight is the
    table is one of them. Muon's authors leave both to Adam (Jordan et al., 2024), and so do users of
    :class:`torch.optim.Muon`, who choose the weights that it is given.

    Args:
        model: The network.

    Returns:
        The tables of embeddings, and the weight of a head whose shorter side is beyond 256. The head is the last linear
        layer, in the order of ``model.modules()``, if no other layer has a side as long as its outputs.
    """
    modules = list(model.modules())
    tables: set[Tensor] = {
        p for m in modules if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for p in m.parameters()
    }
    linears = [m for m in modules if isinstance(m, nn.Linear)]
    if not linears or min(linears[-1].in_features, linears[-1].out_features) <= LONGEST_SIDE:
        return tables
    head: set[Tensor] = {p for p in linears[-1].parameters() if is_matrix(p)}
    others = (p for p in model.parameters() if is_matrix(p) and p not in tables | head)
    if any(linears[-1].out_features in matrix_shape(p.shape) for p in others):
        return tables
    return tables | head
