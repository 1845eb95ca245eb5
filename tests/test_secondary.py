"""Secondary objectives against brute force and against their definitions."""

import contextlib
import copy
import math
import pickle
from collections import UserDict
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.metric.metric import AnchorMetric
from fipoptim.secondary import Diversity, SparseProjection, TaskLoss


def small_net(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3)
    )


def batches_of(n=10, size=4, seed=0):
    torch.manual_seed(seed)
    x, y = torch.randn(n, 4), torch.randint(3, (n,))
    return [(x[i : i + size], y[i : i + size]) for i in range(0, n, size)]


class TestTaskLoss:
    def test_takes_batches_in_turn_and_starts_again(self):
        model, batches = small_net().eval(), batches_of()
        task = TaskLoss(model, batches)
        expected = [F.cross_entropy(model(x), y) for x, y in batches] * 2
        torch.testing.assert_close([task() for _ in range(6)], expected)

    def test_gradient_is_the_training_loops(self):
        model, batches = small_net(), batches_of()
        grads = torch.autograd.grad(TaskLoss(model, batches)(), list(model.parameters()))
        model.zero_grad()
        F.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
        torch.testing.assert_close(list(grads), [p.grad for p in model.parameters()])

    def test_a_dataloader_shuffles_anew_each_pass(self):
        x = torch.arange(64.0).reshape(64, 1)
        seen = []
        loader = DataLoader(
            TensorDataset(x, x), batch_size=16, shuffle=True, generator=torch.Generator()
        )

        def remember(out, y):
            seen.append(y.flatten())
            return out.mean()

        task = TaskLoss(nn.Linear(1, 1), loader, remember)
        for _ in range(8):
            task()
        first, second = torch.cat(seen[:4]), torch.cat(seen[4:])
        assert not torch.equal(first, second)
        assert torch.equal(first.sort().values, second.sort().values)

    def test_several_inputs_and_logits_in_a_dict(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(3, 2)

            def forward(self, a, b):
                return {"logits": self.layer(a + b)}

        model = Model()
        a, b, y = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
        expected = F.cross_entropy(model.layer(a + b), y)
        for x in [(a, b), [a, b], {"b": b, "a": a}]:
            torch.testing.assert_close(TaskLoss(model, [(x, y)])(), expected)

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    @pytest.mark.parametrize("used", [1, 3])
    def test_a_copy_goes_on_with_the_batch_that_was_next(self, duplicate, used):
        model = small_net().eval()
        x, y = torch.randn(10, 4), torch.randint(3, (10,))
        task = TaskLoss(model, DataLoader(TensorDataset(x, y), batch_size=4))
        for _ in range(used):
            task()
        twin = duplicate(task)
        torch.testing.assert_close([twin() for _ in range(4)], [task() for _ in range(4)])

    def test_bad_loaders(self):
        model = small_net()
        with pytest.raises(ValueError, match="loader: yields no batch"):
            TaskLoss(model, [])()
        used_up = TaskLoss(model.eval(), (b for b in batches_of(4)))
        used_up()
        with pytest.raises(ValueError, match="used up only once"):
            used_up()
        with pytest.raises(TypeError, match=r"loader: must yield \(x, y\) pairs, got a Tensor"):
            TaskLoss(model, [torch.ones(2, 4)])()
        with pytest.raises(TypeError, match="tuple of length 3"):
            TaskLoss(model, [(torch.ones(2, 4), torch.ones(2), torch.ones(2))])()

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
    @pytest.mark.parametrize("own_generator", [False, True])
    @pytest.mark.parametrize("used", [0, 1, 3, 4])
    def test_a_copy_shuffles_as_the_original_does(self, duplicate, own_generator, used):
        """Each goes on with the random state that the copy was made with, as after a resumed run."""
        torch.manual_seed(5)
        model = small_net().eval()
        x, y = torch.randn(10, 4), torch.randint(3, (10,))
        generator = torch.Generator().manual_seed(3) if own_generator else None
        loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=True, generator=generator)
        task = TaskLoss(model, loader)
        for _ in range(used):
            task()
        twin = duplicate(task)
        state = torch.get_rng_state()

        def go_on(loss):
            torch.set_rng_state(state)
            losses = []
            for _ in range(9):  # the rest of this pass, and two more
                losses.append(float(loss()))
                losses.append(float(torch.rand(())))  # what the training draws beside the loader
            return losses

        assert go_on(task) == go_on(twin)

    def test_a_copy_of_an_iterator_goes_on(self):
        model, batches = small_net().eval(), batches_of(16)
        task = TaskLoss(model, iter(batches))
        task()
        twin = copy.deepcopy(task)
        expected = [F.cross_entropy(model(x), y) for x, y in batches[1:]]
        torch.testing.assert_close([twin() for _ in range(3)], expected)

    def test_batches_are_moved_whatever_they_are_made_of(self):
        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(3, 2)

            def forward(self, a, scale=1.0, mask=None):
                assert mask is None
                return self.layer(a) * scale

        model, a, y = Model(), torch.randn(4, 3), torch.tensor([0, 1, 0, 1])
        expected = F.cross_entropy(2 * model.layer(a), y)
        for x in [
            (a, 2.0),
            [a, 2.0, None],
            UserDict(a=a, scale=2.0),
            {"a": a, "scale": 2.0, "mask": None},
        ]:
            torch.testing.assert_close(TaskLoss(model, [(x, y)])(), expected)
        loss = TaskLoss(
            model,
            [(a, {"label": y, "names": ["u", "v"]})],
            lambda z, y: F.cross_entropy(2 * z, y["label"]),
        )
        torch.testing.assert_close(loss(), expected)

    def test_arguments_of_the_wrong_type(self):
        model, batches = small_net(), batches_of()
        for loader in (None, 3, nn.Linear(1, 1)):
            with pytest.raises(TypeError, match="loader: must be a DataLoader or another iterable"):
                TaskLoss(model, loader)
        with pytest.raises(TypeError, match=r"model: must be a torch\.nn\.Module, got OrderedDict"):
            TaskLoss(model.state_dict(), batches)
        with pytest.raises(TypeError, match="loss_fn: must be a function .*, got str"):
            TaskLoss(model, batches, "cross_entropy")

    def test_loss_must_be_a_scalar(self):
        with pytest.raises(ValueError, match=r"loss_fn: must return a scalar tensor, .*\(4,\)"):
            TaskLoss(
                small_net(), batches_of(), lambda z, y: F.cross_entropy(z, y, reduction="none")
            )()


weights = st.lists(
    # Few distinct values, so that ties are common, zeros among them.
    st.sampled_from([0.0, -0.5, 0.5, 1.0, -1.0, 1e-30, 2.0, 1e20, -3.25]),
    min_size=12,
    max_size=12,
)


def two_layers(values):
    """Linear layers of 2x3 and 3x2 weights with the given values, and biases that are not zero."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
    flat = torch.tensor(values)
    with torch.no_grad():
        model[0].weight.copy_(flat[:6].view(2, 3))
        model[1].weight.copy_(flat[6:].view(3, 2))
    return model


def flat_weights(model):
    return torch.cat([model[0].weight.flatten(), model[1].weight.flatten()]).detach().double()


class TestSparseProjection:
    @given(weights, st.floats(0.0, 0.95), st.booleans())
    def test_projection_has_exactly_the_count_and_is_idempotent(self, values, sparsity, per_layer):
        if per_layer:
            sparsity = min(sparsity, 0.9)
        model = two_layers(values)
        biases = [model[0].bias.clone(), model[1].bias.clone()]
        projection = SparseProjection(model, sparsity, per_layer=per_layer)
        expected = 2 * round(sparsity * 6) if per_layer else round(sparsity * 12)
        before = flat_weights(model)
        masks = projection.masks()
        assert projection.zeros == expected
        assert sum(int((~mask).sum()) for mask in masks.values()) == expected

        returned = projection.project_()
        once = flat_weights(model)
        kept = torch.cat([mask.flatten() for mask in returned.values()])
        assert all(torch.equal(returned[name], masks[name]) for name in masks)
        assert torch.equal(once, torch.where(kept, before, 0.0))
        assert projection.distance() == 0.0
        assert torch.equal(model[0].bias, biases[0])
        assert torch.equal(model[1].bias, biases[1])

        projection.project_()
        assert torch.equal(flat_weights(model), once)

    @given(
        st.lists(st.floats(-4, 4, width=32), min_size=12, max_size=12),
        st.lists(st.floats(0, 4, width=32), min_size=12, max_size=12),
        st.integers(0, 4),
        st.booleans(),
    )
    def test_distance_is_that_to_the_nearest_of_all_sparse_networks(
        self, values, weighting, zeros, weighted
    ):
        model = two_layers(values)
        h = torch.tensor(weighting) if weighted else torch.ones(12)
        projection = SparseProjection(
            model,
            zeros / 12,
            weighting={"0.weight": h[:6].view(2, 3), "1.weight": h[6:].view(3, 2)}
            if weighted
            else None,
        )
        squares = (h.double() * flat_weights(model).square()).tolist()
        nearest = min(sum(squares[i] for i in chosen) for chosen in combinations(range(12), zeros))
        assert float(projection()) == pytest.approx(nearest, rel=1e-5, abs=1e-30)
        assert projection.distance() == pytest.approx(math.sqrt(nearest), rel=1e-5, abs=1e-18)

    @given(st.permutations(list(range(1, 13))), st.integers(0, 11))
    def test_gradient_points_to_the_projection(self, sizes, zeros):
        model = two_layers([float(x) for x in sizes])
        projection = SparseProjection(model, zeros / 12)
        projection().backward()
        grad = torch.cat([layer.weight.grad.flatten() for layer in model]).double()
        before = flat_weights(model)
        projection.project_()
        # w - grad/2 is the nearest network: one gradient step lands on it.
        torch.testing.assert_close(before - grad / 2, flat_weights(model))
        assert model[0].bias.grad is None

    def test_ties_drop_the_first(self):
        model = two_layers([1.0] * 12)
        masks = SparseProjection(model, 4 / 12).masks()
        assert masks["0.weight"].flatten().tolist() == [False] * 4 + [True] * 2
        assert masks["1.weight"].all()

    def test_weights_too_small_to_square_are_still_told_apart(self):
        model = two_layers([2e-30] * 11 + [1e-30])
        assert not SparseProjection(model, 1 / 12).masks()["1.weight"][2, 1]

    def test_weighting_by_the_metrics_diagonal(self):
        model = small_net().eval()
        inputs = torch.randn(16, 4)
        metric = AnchorMetric(AnchorBatch(model, inputs), list(model.parameters()))
        projection = SparseProjection(model, 0.5, weighting=metric)

        def outputs(*weights):
            named = {"0.weight": weights[0], "4.weight": weights[1]}
            return torch.func.functional_call(model, named, (inputs,))

        chosen = (model[0].weight.detach(), model[4].weight.detach())
        jacobians = torch.autograd.functional.jacobian(outputs, chosen)
        for name, jacobian in zip(["0.weight", "4.weight"], jacobians, strict=True):
            expected = jacobian.square().sum(dim=(0, 1)) / 16
            torch.testing.assert_close(projection.weighting[name], expected)
        scores = torch.cat(
            [
                (projection.weighting[f"{i}.weight"] * model[i].weight.square()).flatten()
                for i in (0, 4)
            ]
        )
        torch.testing.assert_close(projection(), scores.sort().values[: projection.zeros].sum())

    def test_weighting_can_be_replaced(self):
        model = two_layers([float(i) for i in range(1, 13)])
        projection = SparseProjection(model, 1 / 12)
        assert float(projection()) == 1.0
        projection.weighting = {
            "0.weight": torch.full((2, 3), 10.0),
            "1.weight": torch.full((3, 2), 0.1),
        }
        assert float(projection()) == pytest.approx(0.1 * 49)
        assert not projection.masks()["1.weight"][0, 0]

    def test_schedule_raises_the_sparsity(self):
        model = two_layers([float(i) for i in range(1, 13)])
        projection = SparseProjection(model, 0.0)
        loss = projection()
        assert float(loss) == 0.0
        loss.backward()  # still has a graph, so a schedule may begin at zero
        assert not model[0].weight.grad.any()
        for sparsity, expected in [(0.25, 3), (0.5, 6), (0.75, 9)]:
            projection.sparsity = sparsity
            projection.project_()
            assert int((flat_weights(model) == 0).sum()) == expected == projection.zeros

    def test_prunable_parameters(self):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.embed = nn.Embedding(6, 4)
                self.conv = nn.Conv1d(4, 4, 3)
                self.norm = nn.LayerNorm(4)
                self.body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
                self.head = nn.Linear(4, 6, bias=False)
                self.head.weight = self.embed.weight
                self.frozen = nn.Linear(4, 4).requires_grad_(False)

        model = Tied()
        every = SparseProjection(model, 0.5)
        assert every.names == ("embed.weight", "conv.weight", "body.0.weight", "body.1.weight")
        assert every.total == 24 + 48 + 16 + 16
        assert SparseProjection(model, 0.5, keep=["head", "body.0"]).names == (
            "conv.weight",
            "body.1.weight",
        )
        assert SparseProjection(model, 0.5, keep="body").names == ("embed.weight", "conv.weight")

    def test_replaced_parameters_are_followed(self):
        model = two_layers([float(i) for i in range(1, 13)])
        projection = SparseProjection(model, 1 / 12)
        model[0].weight = nn.Parameter(torch.full((2, 3), 0.5))
        assert float(projection()) == 0.25

    def test_parameters_of_another_size_are_followed(self):
        model = two_layers([float(i) for i in range(1, 13)])
        projection = SparseProjection(model, 0.5)
        model[1] = nn.Linear(2, 5)
        assert projection.total == 16
        assert projection.zeros == 8
        projection.project_()
        assert int((flat_weights(model) == 0).sum()) == 8

    def test_parameters_that_are_gone(self):
        model = two_layers([float(i) for i in range(1, 13)])
        projection = SparseProjection(model, 0.5)
        torch.nn.utils.prune.identity(model[1], "weight")
        before = flat_weights(model)
        for use in (projection, projection.project_, projection.masks, lambda: projection.total):
            with pytest.raises(
                ValueError, match="model: a parameter that was to be pruned is gone"
            ):
                use()
        assert torch.equal(flat_weights(model), before)

    def test_a_weighting_of_the_parameters_that_were(self):
        model = two_layers([float(i) for i in range(1, 13)])
        weighting = {"0.weight": torch.ones(2, 3), "1.weight": torch.ones(3, 2)}
        projection = SparseProjection(model, 0.5, weighting=weighting)
        model[0].weight = nn.Parameter(torch.ones(1, 3))  # would be broadcast
        before = flat_weights(model)
        for use in (projection, projection.project_, projection.masks):
            with pytest.raises(ValueError, match=r"weighting: 0\.weight .*\(1, 3\), got \(2, 3\)"):
                use()
        assert torch.equal(flat_weights(model), before)

    def test_a_model_that_is_moved(self):
        # The meta device stands for any other one.
        model = two_layers([float(i) for i in range(1, 13)])
        weighting = {"0.weight": torch.ones(2, 3), "1.weight": torch.ones(3, 2)}
        projection = SparseProjection(model, 0.0, weighting=weighting)
        model.to("meta")
        assert projection().device.type == "meta"
        model.to_empty(device="cpu")
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(2.0)
        assert float(projection()) == 0.0
        projection.sparsity = 0.5
        assert float(projection()) == 6 * 4.0

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_weights(self, dtype):
        values = [300.0 + 2 * i for i in range(12)]  # their squares overflow in float16
        model = two_layers(values).to(dtype)
        exact = sorted(v * v for v in flat_weights(model).tolist())
        projection = SparseProjection(model, 0.5)
        assert float(projection()) == pytest.approx(sum(exact[:6]), rel=1e-6)
        h = 1e6  # as does this
        projection.weighting = {
            "0.weight": torch.full((2, 3), h),
            "1.weight": torch.full((3, 2), h),
        }
        assert float(projection()) == pytest.approx(h * sum(exact[:6]), rel=1e-6)
        assert sum(int((~mask).sum()) for mask in projection.masks().values()) == 6
        with pytest.raises(ValueError, match=r"weighting: 0\.weight must be finite"):
            projection.weighting = {
                name: torch.full_like(p, 1e300, dtype=torch.float64)
                for name, p in model.named_parameters()
            }

    @pytest.mark.parametrize(
        "sparsity",
        [True, False, "0.5", None, 0.5j, [0.5], torch.tensor([0.1, 0.2]), torch.tensor(True)],
    )
    def test_sparsity_that_is_no_number(self, sparsity):
        with pytest.raises(TypeError, match="sparsity: must be a number, got"):
            SparseProjection(small_net(), sparsity)
        projection = SparseProjection(small_net(), 0.25)
        with pytest.raises(TypeError, match="sparsity: must be a number, got"):
            projection.sparsity = sparsity
        assert projection.sparsity == 0.25

    def test_sparsity_of_other_libraries(self):
        for sparsity in (torch.tensor(0.5), np.float32(0.5), Fraction(1, 2)):
            projection = SparseProjection(small_net(), sparsity)
            assert type(projection.sparsity) is float
            assert projection.sparsity == 0.5
            assert projection.zeros == round(0.5 * 35)

    def test_arguments_of_the_wrong_type(self):
        model = small_net()
        with pytest.raises(TypeError, match=r"model: must be a torch\.nn\.Module"):
            SparseProjection(model.state_dict(), 0.5)
        for keep in (3, [4], None):
            with pytest.raises(TypeError, match="keep: must be names of parameters or modules"):
                SparseProjection(model, 0.5, keep=keep)
        for weighting in (1.0, [torch.ones(5, 4)], torch.ones(35)):
            with pytest.raises(TypeError, match="weighting: must be None, an AnchorMetric or"):
                SparseProjection(model, 0.5, weighting=weighting)
        for h in (1.0, None, torch.ones(5, 4, dtype=torch.complex64)):
            with pytest.raises(TypeError, match=r"weighting: 0\.weight must be a tensor of real"):
                SparseProjection(
                    model, 0.5, weighting={"0.weight": h, "4.weight": torch.ones(3, 5)}
                )

    @pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan])
    def test_sparsity_outside_its_range(self, sparsity):
        with pytest.raises(ValueError, match="sparsity: must be at least 0 and below 1"):
            SparseProjection(small_net(), sparsity)

    def test_sparsity_that_leaves_nothing(self):
        model = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 1), nn.Linear(1, 2))
        assert SparseProjection(model, 0.8).zeros == round(0.8 * 422)
        with pytest.raises(ValueError, match=r"leave 2\.weight none of its 2 weights.*keep"):
            SparseProjection(model, 0.8, per_layer=True)
        projection = SparseProjection(model, 0.8, per_layer=True, keep="2")
        with pytest.raises(ValueError, match=r"leave 1\.weight none"):
            projection.sparsity = 0.99
        assert projection.sparsity == 0.8
        with pytest.raises(ValueError, match="leave the network none of its 422"):
            SparseProjection(model, 0.9999)

    def test_unknown_names(self):
        with pytest.raises(ValueError, match=r"keep: .*'4\.wight'.*choose from.*'4\.weight'"):
            SparseProjection(small_net(), 0.5, keep=["4.wight"])
        with pytest.raises(ValueError, match="nothing is left to prune"):
            SparseProjection(small_net(), 0.5, keep=["0", "4"])

    def test_bad_weightings(self):
        model = small_net()
        good = {"0.weight": torch.ones(5, 4), "4.weight": torch.ones(3, 5)}
        with pytest.raises(ValueError, match=r"weighting: lacks \['4\.weight'\]"):
            SparseProjection(model, 0.5, weighting={"0.weight": torch.ones(5, 4)})
        with pytest.raises(
            ValueError, match=r"weighting: 4\.weight must have .*\(3, 5\), got \(15,\)"
        ):
            SparseProjection(model, 0.5, weighting=good | {"4.weight": torch.ones(15)})
        for bad in (-1.0, math.nan, math.inf):
            with pytest.raises(ValueError, match=r"weighting: 4\.weight must be finite"):
                SparseProjection(model, 0.5, weighting=good | {"4.weight": torch.full((3, 5), bad)})

    def test_nan_weights_are_not_projected(self):
        model = two_layers([float(i) for i in range(1, 13)])
        with torch.no_grad():
            model[1].weight[0, 0] = math.nan
        before = flat_weights(model)
        with pytest.raises(ValueError, match=r"model: 1\.weight holds NaN"):
            SparseProjection(model, 0.5).project_()
        torch.testing.assert_close(flat_weights(model), before, rtol=0, atol=0, equal_nan=True)


def input_gradients(model, x, y):
    """One input at a time, by the definition."""
    rows = []
    for one, label in zip(x, y, strict=True):
        one = one[None].clone().requires_grad_()
        F.cross_entropy(model(one), label[None]).backward()
        rows.append(one.grad.flatten())
    model.zero_grad()
    return torch.stack(rows)


class TestDiversity:
    def test_is_the_mean_cosine_of_input_gradients(self):
        model, references = small_net(0).eval(), [small_net(1).eval(), small_net(2).eval()]
        batches = batches_of()
        diversity = Diversity(model, references, batches)
        for x, y in batches:
            ours = input_gradients(model, x, y)
            expected = torch.cat(
                [
                    F.cosine_similarity(ours, input_gradients(r, x, y), dim=1, eps=1e-30)
                    for r in references
                ]
            ).mean()
            torch.testing.assert_close(diversity(), expected)

    def test_a_model_that_writes_to_its_input_writes_to_a_copy(self):
        class InPlace(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, x):
                return self.inner(x.sub_(0.3).div_(0.5))

        class OutOfPlace(InPlace):
            def forward(self, x):
                return self.inner((x - 0.3) / 0.5)

        model, reference = small_net(0).eval(), small_net(1).eval()
        batches = batches_of()
        found = Diversity(InPlace(model), InPlace(reference), batches)
        expected = Diversity(OutOfPlace(model), OutOfPlace(reference), batches)
        for _ in range(2 * len(batches)):
            torch.testing.assert_close(found(), expected(), rtol=0, atol=0)

    def test_gradient_against_finite_differences(self):
        model = small_net(0).double().eval()
        reference = small_net(1).double().eval()
        x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
        diversity = Diversity(model, reference, [(x, y)])
        params = [p for p in model.parameters() if p.dim() == 2]
        grads = torch.autograd.grad(diversity(), params)
        for p, grad in zip(params, grads, strict=True):
            v = torch.randn_like(p)
            h = 1e-6
            with torch.no_grad():
                p.add_(v, alpha=h)
                up = diversity()
                p.sub_(v, alpha=2 * h)
                down = diversity()
                p.add_(v, alpha=h)
            assert float((grad * v).sum()) == pytest.approx(float((up - down) / (2 * h)), rel=1e-5)

    def test_the_model_itself_as_its_reference(self):
        model = small_net()
        diversity = Diversity(model, model, batches_of())
        assert float(diversity()) == pytest.approx(1.0)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(30):
            optimizer.zero_grad()
            diversity().backward()
            optimizer.step()
        assert float(diversity()) < 0.9

    def test_nothing_else_is_touched(self):
        model, reference = small_net(0, dropout=0.5).train(), small_net(1, dropout=0.5).train()
        model[3].eval()
        states = [copy.deepcopy(m.state_dict()) for m in (model, reference)]
        modes = [[m.training for m in net.modules()] for net in (model, reference)]
        batches = batches_of()
        diversity = Diversity(model, reference, batches)
        random_state = torch.get_rng_state()
        first = diversity()
        torch.autograd.grad(first, list(model.parameters()), allow_unused=True)
        torch.testing.assert_close(Diversity(model, reference, batches)(), first)
        assert torch.equal(torch.get_rng_state(), random_state)
        assert [[m.training for m in net.modules()] for net in (model, reference)] == modes
        for net, state in zip((model, reference), states, strict=True):
            assert all(
                torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items()
            )
            assert all(p.grad is None for p in net.parameters())
        assert all(p.requires_grad for p in reference.parameters())
        assert not batches[0][0].requires_grad

    def test_scale_of_the_gradients_does_not_matter(self):
        model, reference, batches = small_net(0), small_net(1), batches_of()
        plain = Diversity(model, reference, batches)()
        faint = Diversity(model, reference, batches, lambda z, y: 1e-28 * F.cross_entropy(z, y))()
        torch.testing.assert_close(faint, plain)

    def test_inputs_without_a_gradient_count_as_zero(self):
        model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        with torch.no_grad():
            model[0].weight.fill_(1.0)
            model[0].bias.zero_()
        x, y = torch.tensor([[1.0, 1.0], [-1.0, -1.0]]), torch.tensor([0, 1])
        value = Diversity(model, model, [(x, y)])()
        assert float(value) == pytest.approx(0.5)
        grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
        assert all(g is None or bool(torch.isfinite(g).all()) for g in grads)
        dead = Diversity(model, model, [(x[1:], y[1:])])()
        assert float(dead) == 0.0
        dead.backward()
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())

    @pytest.mark.parametrize("margin", [20.0, 60.0, 80.0, 90.0, 100.0, 110.0])
    def test_gradient_is_finite_however_certain_the_prediction(self, margin):
        # The input gradient shrinks with exp(-margin): through the subnormal numbers, of which no inverse exists.
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        x, y = torch.randn(5, 3), torch.zeros(5, dtype=torch.int64)
        with torch.no_grad():
            model[2].bias.copy_(torch.tensor([margin, 0.0]))
        other = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        value = Diversity(model, other, [(x, y)])()
        grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
        assert all(g is None or bool(torch.isfinite(g).all()) for g in grads)

    def test_without_autograd_it_is_still_a_value(self):
        model, batches = small_net(0), batches_of()
        expected = Diversity(model, small_net(1), batches)()
        with torch.no_grad():
            value = Diversity(model, small_net(1), batches)()
        assert not value.requires_grad
        torch.testing.assert_close(value, expected.detach())

    def test_attention_can_be_differentiated_twice(self):
        class Encoder(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
                self.head = nn.Linear(4, 3)

            def forward(self, x):
                return self.head(self.layer(x).mean(dim=1))

        torch.manual_seed(0)
        model = Encoder()
        x, y = torch.randn(5, 3, 4), torch.tensor([0, 1, 2, 0, 1])
        Diversity(model, Encoder(), [(x, y)])().backward()
        assert bool(model.layer.self_attn.in_proj_weight.grad.any())

    def test_bad_arguments(self):
        model = small_net()
        with pytest.raises(ValueError, match="references: is empty"):
            Diversity(model, [], batches_of())
        with pytest.raises(
            TypeError, match="references: must be torch.nn.Modules, got OrderedDict"
        ):
            Diversity(model, [model.state_dict()], batches_of())
        with pytest.raises(ValueError, match="batches: yields no batch"):
            Diversity(model, model, [])()
        with pytest.raises(TypeError, match=r"x must be one float tensor.*torch.int64"):
            Diversity(model, model, [(torch.ones(2, 4, dtype=torch.long), torch.ones(2))])()

    def test_arguments_of_the_wrong_type(self):
        model = small_net()
        for references in (None, 3, "model", [None]):
            with pytest.raises(TypeError, match=r"references: must be torch\.nn\.Modules"):
                Diversity(model, references, batches_of())
        with pytest.raises(TypeError, match=r"model: must be a torch\.nn\.Module"):
            Diversity(None, model, batches_of())
        with pytest.raises(TypeError, match="batches: must be a DataLoader"):
            Diversity(model, model, None)
        with pytest.raises(TypeError, match="loss_fn: must be a function"):
            Diversity(model, model, batches_of(), None)

    @pytest.mark.parametrize("x", [torch.ones(0, 4), torch.tensor(1.0), torch.ones(3, 0)])
    def test_batches_without_an_input(self, x):
        model = small_net()
        with pytest.raises(ValueError, match=r"batches: x must hold at least one input"):
            Diversity(model, model, [(x, torch.zeros(len(x) if x.dim() else 1).long())])()

    def test_inputs_that_are_single_numbers(self):
        class Model(nn.Module):
            def __init__(self, slope):
                super().__init__()
                self.slope = nn.Parameter(torch.tensor(slope))

            def forward(self, x):
                return torch.stack([self.slope * x, -x], dim=1)

        x, y = torch.tensor([0.3, -0.2, 0.1]), torch.tensor([0, 1, 0])
        assert float(Diversity(Model(2.0), Model(3.0), [(x, y)])()) == pytest.approx(1.0)
        assert float(Diversity(Model(2.0), Model(-3.0), [(x, y)])()) == pytest.approx(-1.0)

    def test_a_loss_that_does_not_depend_on_the_inputs(self):
        model = small_net()
        loss = Diversity(model, model, batches_of(), lambda z, y: z.detach().sum())
        modes = [m.training for m in model.modules()]
        with pytest.raises(ValueError, match="loss_fn: its value must depend on the inputs"):
            loss()
        assert [m.training for m in model.modules()] == modes

    def test_references_follow_the_model_to_its_device(self):
        # The meta device stands for any other one; there values cannot be read, only the device be seen.
        model, reference = small_net(0), small_net(1)
        diversity = Diversity(model, reference, batches_of())
        model.to("meta")
        with contextlib.suppress(NotImplementedError, RuntimeError):
            diversity()
        assert {p.device.type for p in diversity.references[0].parameters()} == {"meta"}
        assert {p.device.type for p in reference.parameters()} == {"cpu"}
