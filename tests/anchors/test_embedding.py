"""Lookups: right products with padding rows, max_norm and bags; a padding row never moves and no table is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fipoptim import AnchorBatch, AnchorMetric, FIPOptimizer
from fipoptim.anchors.embedding import PureLookups

# Only the ninth anchor holds padding.
TOKENS = torch.tensor([[1, 2]] * 3 + [[2, 1]] * 3 + [[2, 2], [1, 1], [0, 1], [2, 1], [1, 2]])


class Model(nn.Module):
    """A table with a padding row, read in one of several ways, and a head."""

    def __init__(self, kind: str, rows: int = 3, columns: int = 2) -> None:
        super().__init__()
        self.kind = kind
        options: dict[str, Any] = {"max_norm": 0.5} if "max_norm" in kind else {}
        if "frequency" in kind:
            options["scale_grad_by_freq"] = True
        if "sparse" in kind:
            options["sparse"] = True
        padding = None if kind in ("max_norm", "frequency", "sparse") else 0
        if kind.startswith("bag"):
            mode = kind.split("-")[1]
            self.table: Any = nn.EmbeddingBag(
                rows, columns, padding_idx=padding, mode=mode, **options
            )
        else:
            self.table = nn.Embedding(rows, columns, padding_idx=padding, **options)
        self.head = nn.Linear(columns, rows)
        if kind == "tied":
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "functional":
            rows = F.embedding(x, self.table.weight, padding_idx=0)
        elif self.kind == "aten":
            rows = torch.embedding(self.table.weight, x, 0)
        elif self.kind == "checkpoint":
            rows = checkpoint(self.table, x, use_reentrant=False)
        else:
            rows = self.table(x)
        if rows.dim() == 3:
            rows = rows.sum(dim=1)
        return self.head(torch.tanh(rows))


def model_of(kind: str, dtype: torch.dtype = torch.float64, **sizes: int) -> Model:
    torch.manual_seed(3)
    model = Model(kind, **sizes).to(dtype)
    with torch.no_grad():
        model.table.weight.normal_()  # the padding row gets values too, and keeps them
    return model


KINDS = (
    "padding",
    "functional",
    "aten",
    "tied",
    "checkpoint",
    "frequency",
    "sparse",
    "max_norm",
    "padding-max_norm",
    "bag-sum",
    "bag-mean",
    "bag-max",
    "bag-mean-max_norm",
)


def jacobian(model: Model, x: Tensor) -> np.ndarray:
    """The Jacobian in reverse mode, with each lookup written as indexing, as torch documents it."""
    padded = model.table.padding_idx is not None
    mode = model.table.mode if isinstance(model.table, nn.EmbeddingBag) else "sum"
    limit, names = model.table.max_norm, [name for name, _ in model.named_parameters()]

    def outputs(*values: Tensor) -> Tensor:
        w = dict(zip(names, values, strict=True))
        table, bags = w["table.weight"], []
        for tokens in x.tolist():
            rows = []
            for token in tokens:
                row = table[token]
                if limit is not None and row.norm() > limit:
                    row = row * limit / (row.norm() + 1e-7)
                if padded and token == 0:
                    if isinstance(model.table, nn.EmbeddingBag):
                        continue
                    row = row.detach()
                rows.append(row)
            stacked = torch.stack(rows)
            reduce = {"sum": stacked.sum, "mean": stacked.mean, "max": stacked.amax}[mode]
            bags.append(reduce(dim=0))
        head = w.get("head.weight", table)
        return torch.tanh(torch.stack(bags)) @ head.T + w["head.bias"]

    jacobians = torch.autograd.functional.jacobian(
        outputs, tuple(p.detach() for p in model.parameters())
    )
    return torch.cat([j.reshape(*j.shape[:2], -1) for j in jacobians], dim=2).numpy()


@pytest.mark.filterwarnings("ignore:fipoptim. forward-mode products")  # the checkpointed case
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dense_jacobian(kind: str) -> None:
    model = model_of(kind)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    anchors = AnchorBatch(model, TOKENS)
    jac = jacobian(model, TOKENS)
    v = torch.randn(jac.shape[2], dtype=torch.float64)
    u = torch.randn(jac.shape[:2], dtype=torch.float64)
    for options in ({}, {"trace": False}, {"form": "double-vjp"}):
        metric = AnchorMetric(anchors, **options)
        np.testing.assert_allclose(metric.jvp(v).numpy(), jac @ v.numpy(), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(
            metric.vjp(u).numpy(), np.einsum("ikn,ik->n", jac, u.numpy()), rtol=1e-9, atol=1e-12
        )
        g = torch.stack([metric.matvec(e) for e in torch.eye(metric.size, dtype=torch.float64)])
        torch.testing.assert_close(g, g.T, rtol=1e-12, atol=1e-12)
        assert float(torch.linalg.eigvalsh(g).min()) > -1e-12
        np.testing.assert_allclose(g.numpy(), oracle.metric(jac), rtol=1e-9, atol=1e-12)
    assert anchors.drift() == 0.0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    model.eval()
    # The anchors' outputs come from the model itself, which may write to its table.
    torch.testing.assert_close(model(TOKENS).detach(), anchors.reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("precondition", [None, "adam", "muon"])
@pytest.mark.parametrize("sizes", [{"rows": 3, "columns": 2}, {"rows": 3, "columns": 7}])
@pytest.mark.parametrize("kind", ["padding", "padding-max_norm", "bag-mean", "functional"])
def test_a_padding_row_never_moves(
    kind: str, sizes: dict[str, int], precondition: str | None
) -> None:
    for loss in (False, True):
        model = model_of(kind, torch.float32, **sizes)
        model(TOKENS)  # with max_norm the model rescales the rows
        row = model.table.weight[0].detach().clone()
        others = model.table.weight[1:].detach().clone()
        anchors = AnchorBatch(model, TOKENS)
        opt = FIPOptimizer(model.parameters(), anchors, eps=0.05, precondition=precondition)
        for _ in range(3):
            opt.zero_grad()
            if loss:
                model(TOKENS.flip(1)).square().sum().backward()
            opt.step()
        assert torch.equal(model.table.weight[0], row)
        assert not torch.equal(model.table.weight[1:], others)


def test_a_tied_padding_row_moves_by_its_other_use() -> None:
    model = model_of("tied")
    jac = jacobian(model, TOKENS)
    assert np.abs(jac[:, :, :2]).max() > 0
    row = model.table.weight[0].detach().clone()
    opt = FIPOptimizer(model.parameters(), AnchorBatch(model, TOKENS))
    model(TOKENS).square().sum().backward()
    opt.step()
    assert not torch.equal(model.table.weight[0], row)


class Tables(nn.Module):
    """Reads tables of every kind. Some of their padding rows are among the anchors."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.first = nn.Embedding(3, 2), nn.Embedding(3, 2, padding_idx=0)
        self.last = nn.EmbeddingBag(3, 2, padding_idx=-1)
        self.one, self.other = nn.Embedding(3, 2, padding_idx=1), nn.Embedding(3, 2, padding_idx=1)
        self.other.weight = self.one.weight
        self.own = nn.Parameter(torch.randn(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.plain(x) + self.first(x) + self.one(x) * self.other(x)
        return rows.sum(1) + self.last(x) + F.embedding(x[:, 0], self.own, padding_idx=2)


def test_padding_rows_are_listed_by_parameter_name() -> None:
    anchors = AnchorBatch(Tables(), TOKENS)
    assert anchors.padding_rows() == {
        "first.weight": [0],
        "last.weight": [2],
        "one.weight": [1],
        "own": [2],
    }
    AnchorMetric(anchors)  # the probe accepts the products


@pytest.mark.parametrize("offsets", [None, [0, 3, 3], [0, 3, 3, 9]])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 0, -2])
def test_embedding_bags_equal_those_of_torch(
    padding: int | None, mode: str, offsets: list[int] | None
) -> None:
    table = torch.randn(4, 5, dtype=torch.float64)
    x = torch.tensor([[0, 1, 1], [2, 0, 3], [0, 0, 0]])
    options: dict[str, Any] = {"padding_idx": padding, "mode": mode}
    if mode == "sum":
        options["per_sample_weights"] = torch.randn(x.shape, dtype=torch.float64)
    if offsets is not None:
        x, options["offsets"] = x.flatten(), torch.tensor(offsets)
        options["include_last_offset"] = len(offsets) == 4
        if mode == "sum":
            options["per_sample_weights"] = options["per_sample_weights"].flatten()

    def bags(w: Tensor) -> Tensor:
        return F.embedding_bag(x, w, **options)

    expected = torch.autograd.functional.jacobian(bags, table)
    with PureLookups():
        torch.testing.assert_close(torch.func.jacfwd(bags)(table), expected)
        torch.testing.assert_close(torch.func.jacrev(bags)(table), expected)
        found = bags(table)
    torch.testing.assert_close(found, bags(table))


def test_bad_embedding_bags_raise_the_error_of_torch() -> None:
    with PureLookups(), pytest.raises(ValueError, match="offsets has to be a 1D Tensor"):
        F.embedding_bag(torch.tensor([0, 1]), torch.randn(3, 2))


@pytest.mark.parametrize("limit", [1.0, 2.0])
def test_rescaled_rows_at_the_norm_and_at_zero_have_a_derivative(limit: float) -> None:
    # A rescaled row lies on the sphere up to rounding, and a step inwards changes the outputs.
    table = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.3, -0.4]])
    x = torch.tensor([0, 1, 2])
    F.embedding(x, table, max_norm=limit)  # in place
    with PureLookups():
        jac = torch.func.jacfwd(lambda w: F.embedding(x, w, max_norm=limit))(table)
    expected = torch.eye(6).reshape(3, 2, 3, 2)
    torch.testing.assert_close(jac, expected, rtol=1e-6, atol=1e-6)
