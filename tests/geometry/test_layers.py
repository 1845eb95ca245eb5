"""Which parameters Muon's geometry measures as matrices: by custom, as a group says, and as is reported."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fipoptim import AnchorBatch, FIPOptimizer, Solver
from fipoptim.geometry import GEOMETRIES, Geometry, describe
from fipoptim.geometry.layers import other_than_matrices

WIDTH = 264


class Transformer(nn.Module):
    """A small transformer over tokens, with a head over more classes than it is wide."""

    def __init__(self, classes: int = 300) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, WIDTH), nn.Embedding(4, WIDTH)
        self.layer = nn.TransformerEncoderLayer(
            WIDTH, nhead=2, dim_feedforward=270, dropout=0.0, batch_first=True
        )
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places.weight[: tokens.shape[1]]
        return self.head(self.layer(x)[:, 0])


def optimizer(model: nn.Module, params: object = None, **options: object) -> FIPOptimizer:
    torch.manual_seed(0)
    anchors = AnchorBatch(model, torch.randint(20, (2, 4)))
    options = {"eps": 0.1, "precondition": "muon", "solver": Solver(products=0)} | options
    return FIPOptimizer(params or model.parameters(), anchors, **options)  # type: ignore[arg-type]


def train(model: nn.Module, opt: FIPOptimizer) -> None:
    opt.zero_grad()
    model(torch.randint(20, (3, 4))).square().mean().backward()
    opt.step()


MATRICES = {
    "layer.self_attn.in_proj_weight",
    "layer.self_attn.out_proj.weight",
    "layer.linear1.weight",
    "layer.linear2.weight",
}


def test_a_transformers_matrices_are_orthogonalised_and_its_tables_head_and_norms_are_not() -> None:
    torch.manual_seed(0)
    model = Transformer()
    opt = optimizer(model)
    kinds = describe(opt)
    assert list(kinds) == [name for name, _ in model.named_parameters()]
    assert {name for name, kind in kinds.items() if kind == "matrix"} == MATRICES
    assert set(kinds.values()) == {"matrix", "squares"}
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, opt)
    for name, p in model.named_parameters():
        assert ("exp_avg_sq" in opt.state[p]) == (kinds[name] == "squares")
    moved = model.layer.linear1.weight - start["layer.linear1.weight"]
    values = torch.linalg.svdvals(moved.detach())
    assert float(values[0] / values[2]) < 2  # three inputs have gradients of at least this rank


def test_a_head_of_up_to_256_classes_is_a_matrix_unless_its_group_says_otherwise() -> None:
    torch.manual_seed(0)
    model = Transformer(classes=3)
    assert describe(optimizer(model))["head.weight"] == "matrix"
    body = [p for name, p in model.named_parameters() if not name.startswith("head")]
    groups = [{"params": body}, {"params": model.head.parameters(), "matrix": False}]
    opt = optimizer(model, groups)
    kinds = describe(opt)
    assert {name for name, kind in kinds.items() if kind == "matrix"} == MATRICES
    train(model, opt)
    assert "exp_avg_sq" in opt.state[model.head.weight]


def test_a_group_may_measure_its_table_as_a_matrix_and_a_resumed_run_does_so() -> None:
    torch.manual_seed(0)
    model = Transformer()
    rest = [p for name, p in model.named_parameters() if name != "words.weight"]
    opt = optimizer(model, [{"params": rest}, {"params": [model.words.weight], "matrix": True}])
    train(model, opt)
    assert describe(opt)["words.weight"] == "matrix"
    assert "exp_avg_sq" not in opt.state[model.words.weight]
    twin = copy.deepcopy(model)
    rest = [p for name, p in twin.named_parameters() if name != "words.weight"]
    resumed = FIPOptimizer(
        [{"params": rest}, {"params": [twin.words.weight]}],
        AnchorBatch(twin, opt.anchors.inputs),
        precondition="muon",
    )
    resumed.anchors.load_state_dict(opt.anchors.state_dict())
    resumed.load_state_dict(opt.state_dict())
    assert describe(resumed) == describe(opt)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (nn.Sequential(nn.Linear(4, 300), nn.Linear(300, 290)), {"1.weight"}),
        # The last layer gives back what the first takes, or what another layer has as well: it is no head.
        (nn.Sequential(nn.Linear(300, 270), nn.Linear(270, 300)), set()),
        (nn.TransformerEncoderLayer(264, 2, 280, batch_first=True), set()),
        (nn.Sequential(nn.Linear(300, 270), nn.Linear(270, 256)), set()),
        (nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)), {"0.weight"}),
        (nn.EmbeddingBag(5, 4), {"weight"}),
        (nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()), set()),
        # A table is as long as the head over its entries.
        (nn.Sequential(nn.Embedding(999, 260), nn.Linear(260, 999)), {"0.weight", "1.weight"}),
    ],
)
def test_tables_and_a_wide_head_are_no_matrices(model: nn.Module, names: set[str]) -> None:
    found = other_than_matrices(model)
    assert {name for name, p in model.named_parameters() if p in found} == names


def test_a_table_with_a_parametrization_is_no_matrix() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))
    nn.utils.parametrizations.weight_norm(model[0])
    assert other_than_matrices(model) == set(model[0].parameters())


@pytest.mark.parametrize(("precondition", "kind"), [(None, "euclidean"), ("adam", "squares")])
def test_the_report_of_other_geometries(precondition: str | None, kind: str) -> None:
    kinds = describe(optimizer(Transformer(classes=2), precondition=precondition))
    assert set(kinds.values()) == {kind}


def test_a_geometry_of_another_package_is_reported_by_its_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Mine(GEOMETRIES[None]):  # type: ignore[misc]
        pass

    assert issubclass(Mine, Geometry)
    monkeypatch.setitem(GEOMETRIES, "mine", Mine)
    assert set(describe(optimizer(Transformer(2), precondition="mine")).values()) == {"mine"}


@pytest.mark.parametrize("value", [1, "yes"])
def test_matrix_must_be_true_false_or_none(value: object) -> None:
    model = Transformer(2)
    with pytest.raises(TypeError, match="^matrix: must be True, False or None, got "):
        optimizer(model, [{"params": model.parameters(), "matrix": value}])


def test_matrices_cannot_keep_zeros() -> None:
    model = Transformer(2)
    group = {"params": model.parameters(), "matrix": True, "keep_zeros": True}
    with pytest.raises(
        ValueError, match="^matrix: a group with keep_zeros=True .* got True; leave"
    ):
        optimizer(model, [group])
    opt = optimizer(model, [group | {"matrix": None}])
    assert set(describe(opt).values()) == {"squares"}
