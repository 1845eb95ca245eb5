"""The cosine of input gradients against its definition, at extreme values, and its side effects."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
from small_networks import batches_of, small_net
from torch import nn

from fipoptim.secondary import Diversity


def input_gradients(model, x, y):
    """Returns the input gradients ``(n, inputs)``, computed one input at a time."""
    rows = []
    for one, label in zip(x, y, strict=True):
        one = one[None].clone().requires_grad_()
        F.cross_entropy(model(one), label[None]).backward()
        rows.append(one.grad.flatten())
    model.zero_grad()
    return torch.stack(rows)


def test_diversity_is_the_mean_cosine_of_input_gradients():
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


def test_a_model_that_writes_to_its_input_writes_to_a_copy():
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


def test_the_gradient_of_diversity_equals_finite_differences():
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


def test_the_model_can_be_its_own_reference():
    model = small_net()
    diversity = Diversity(model, model, batches_of())
    assert float(diversity()) == pytest.approx(1.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        diversity().backward()
        optimizer.step()
    assert float(diversity()) < 0.9


def test_diversity_changes_neither_models_nor_batches_nor_random_state():
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
        assert all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())
        assert all(p.grad is None for p in net.parameters())
    assert all(p.requires_grad for p in reference.parameters())
    assert not batches[0][0].requires_grad


def test_scale_of_the_gradients_does_not_matter():
    model, reference, batches = small_net(0), small_net(1), batches_of()
    plain = Diversity(model, reference, batches)()
    faint = Diversity(model, reference, batches, lambda z, y: 1e-28 * F.cross_entropy(z, y))()
    torch.testing.assert_close(faint, plain)


def test_inputs_without_a_gradient_count_as_zero():
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
def test_gradient_is_finite_however_certain_the_prediction(margin):
    # The input gradient shrinks with exp(-margin) down to subnormal numbers, whose inverses overflow.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(5, 3), torch.zeros(5, dtype=torch.int64)
    with torch.no_grad():
        model[2].bias.copy_(torch.tensor([margin, 0.0]))
    other = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    value = Diversity(model, other, [(x, y)])()
    grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
    assert all(g is None or bool(torch.isfinite(g).all()) for g in grads)


def test_diversity_has_a_value_without_autograd():
    model, batches = small_net(0), batches_of()
    expected = Diversity(model, small_net(1), batches)()
    with torch.no_grad():
        value = Diversity(model, small_net(1), batches)()
    assert not value.requires_grad
    torch.testing.assert_close(value, expected.detach())


def test_attention_can_be_differentiated_twice():
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


def test_bad_arguments():
    model = small_net()
    with pytest.raises(ValueError, match="references: is empty"):
        Diversity(model, [], batches_of())
    with pytest.raises(TypeError, match="references: must be torch.nn.Modules, got OrderedDict"):
        Diversity(model, [model.state_dict()], batches_of())
    with pytest.raises(ValueError, match="batches: yields no batch"):
        Diversity(model, model, [])()
    with pytest.raises(TypeError, match=r"x must be one float tensor.*torch.int64"):
        Diversity(model, model, [(torch.ones(2, 4, dtype=torch.long), torch.ones(2))])()


def test_arguments_of_the_wrong_type():
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
def test_batches_without_an_input_are_refused(x):
    model = small_net()
    with pytest.raises(ValueError, match=r"batches: x must hold at least one input"):
        Diversity(model, model, [(x, torch.zeros(len(x) if x.dim() else 1).long())])()


def test_inputs_may_be_single_numbers():
    class Model(nn.Module):
        def __init__(self, slope):
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(slope))

        def forward(self, x):
            return torch.stack([self.slope * x, -x], dim=1)

    x, y = torch.tensor([0.3, -0.2, 0.1]), torch.tensor([0, 1, 0])
    assert float(Diversity(Model(2.0), Model(3.0), [(x, y)])()) == pytest.approx(1.0)
    assert float(Diversity(Model(2.0), Model(-3.0), [(x, y)])()) == pytest.approx(-1.0)


def test_a_loss_that_does_not_depend_on_the_inputs_is_refused():
    model = small_net()
    loss = Diversity(model, model, batches_of(), lambda z, y: z.detach().sum())
    modes = [m.training for m in model.modules()]
    with pytest.raises(ValueError, match="loss_fn: its value must depend on the inputs"):
        loss()
    assert [m.training for m in model.modules()] == modes


def test_references_follow_the_model_to_its_device():
    # The meta device stands for any other device. It holds no values, so only the device is compared.
    model, reference = small_net(0), small_net(1)
    diversity = Diversity(model, reference, batches_of())
    model.to("meta")
    with contextlib.suppress(NotImplementedError, RuntimeError):
        diversity()
    assert {p.device.type for p in diversity.references[0].parameters()} == {"meta"}
    assert {p.device.type for p in reference.parameters()} == {"cpu"}
