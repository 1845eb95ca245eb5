"""Secondary objectives: what pulls a network along its path while the anchors hold its function.

A secondary objective is any callable without arguments that returns a scalar tensor which depends on the
model's parameters. The optimizer takes its gradient; smaller is better. One's own is a function or a lambda:

    def shrink() -> Tensor:
        return sum(p.square().sum() for p in model.parameters())

    opt = FIPOptimizer(model.parameters(), anchors, secondary=shrink)

Sums of them are written the same way: ``lambda: task() + 0.1 * sparse()``. The classes here hold what such a
function needs to remember between steps.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fipoptim.anchors.evaluation import device_of, evaluation, unwrap
from fipoptim.anchors.output_space import read_logits
from fipoptim.metric.metric import AnchorMetric

__all__ = ["Diversity", "SparseProjection", "TaskLoss"]

LossFunction = Callable[[Tensor, Tensor], Tensor]
Weighting = Mapping[str, Tensor] | AnchorMetric | None


class TaskLoss:
    """The loss of a new task: ``loss_fn(model(x), y)`` on the next batch of a loader.

    Batches are taken in turn and the loader is started again when it is exhausted, so a shuffling DataLoader
    shuffles anew at each pass. The model runs in the mode it is in, as in a training loop. ``x`` is a tensor, a
    tuple of tensors (positional inputs) or a dict of tensors (keyword inputs); an output that is a dict or a
    ``ModelOutput`` is read at ``logits``.

    A deep copy or a pickle goes on with the batch that was next: it starts the loader anew, with the random states of
    torch and of the loader's own generators as they were when this pass began, skips the batches that were used, and
    puts the random states back.

    Args:
        model: The network that is optimized.
        loader: A DataLoader or any iterable of ``(x, y)`` pairs that can be iterated more than once. Batches
            are moved to the model's device.
        loss_fn: Takes the output and ``y`` and returns a scalar.

    Raises:
        TypeError: If an argument has the wrong type; when called, if the loader yields something that is not a pair.
        ValueError: When called, if the loader yields nothing or the loss is not a scalar.
    """

    def __init__(
        self, model: nn.Module, loader: Iterable[Any], loss_fn: LossFunction = F.cross_entropy
    ) -> None:
        self.model = _module("model", model)
        self.loss_fn = _callable(loss_fn)
        self._batches = _Batches("loader", loader)

    def __call__(self) -> Tensor:
        """The loss on the next batch, a scalar with a graph to the model's parameters."""
        x, y = self._batches.next(device_of(self.model))
        if isinstance(x, dict):
            output = self.model(**x)
        elif isinstance(x, tuple):
            output = self.model(*x)
        else:
            output = self.model(x)
        return _scalar(self.loss_fn(read_logits(output), y))


class SparseProjection:
    r"""Squared distance to the nearest network that has the given sparsity.

    The nearest network, in the norm :math:`\sum_i h_i w_i^2`, is the one whose :math:`k` prunable weights of
    smallest :math:`h_i w_i^2` are zero, so the squared distance is the sum of these,

    .. math:: L(w) = \sum_{i \in S_k(w)} h_i w_i^2, \qquad k = \mathrm{round}(\text{sparsity} \cdot n),

    and :math:`\nabla L = 2 h_i w_i` on them and zero elsewhere: the pull towards the projection. With
    :math:`h = 1` this is the Euclidean distance and magnitude pruning. With the diagonal of the anchors' metric
    the distance is, to leading order and neglecting cross terms, how far pruning would move the outputs, and
    the network nearest in the *function* is approached.

    Args:
        model: The network that is optimized.
        sparsity: The fraction of the prunable weights that are to be zero, in ``[0, 1)``. It can be assigned
            later, so a schedule may raise it.
        weighting: :math:`h`: None for 1; a mapping from parameter names to tensors of non-negative weights of
            the parameter's shape, which must cover the prunable parameters; or an :class:`AnchorMetric`, of which
            the diagonal is taken now. It can be assigned later, to follow the metric along the path.
        per_layer: Whether each parameter gets the sparsity by itself. Otherwise the smallest of all are chosen.
        keep: Names of parameters or modules (all parameters below a module) that are not to be pruned.

    Attributes:
        names: The prunable parameters: those that require a gradient, have two dimensions or more (the weights
            of linear, convolution and embedding layers; no biases, no norms) and are not kept.
        total: How many weights these have together.

    The parameters are looked up by name at each use, so they may be replaced, or moved to another device. A
    ValueError says so if one is gone, has become a plain tensor, or no longer has the shape of its weighting.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the sparsity is outside ``[0, 1)`` or leaves no weight (``per_layer``: in some layer), if
            a name is unknown, if nothing is prunable, or if a weighting has the wrong shape, lacks a prunable
            parameter or holds negative or non-finite values.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float,
        *,
        weighting: Weighting = None,
        per_layer: bool = False,
        keep: Iterable[str] = (),
    ) -> None:
        self._model = unwrap(_module("model", model))
        self.names = _prunable(self._model, _checked_names(keep))
        self.per_layer = per_layer
        self._weighting: dict[str, Tensor] | None = None
        self.sparsity = sparsity
        self.weighting = weighting

    @property
    def _parameters(self) -> dict[str, nn.Parameter]:
        # Looked up each time: wrappers may put new parameters in place of the old ones.
        try:
            return {name: self._model.get_parameter(name) for name in self.names}
        except AttributeError as error:
            raise ValueError(
                f"model: a parameter that was to be pruned is gone ({error}); of {list(self.names)} all must stay "
                "parameters. Make a new SparseProjection of the model as it is."
            ) from error

    @property
    def total(self) -> int:
        """How many prunable weights there are."""
        return sum(p.numel() for p in self._parameters.values())

    @property
    def sparsity(self) -> float:
        """The fraction of the prunable weights that are to be zero."""
        return self._sparsity

    @sparsity.setter
    def sparsity(self, sparsity: float) -> None:
        given, sparsity = sparsity, _number("sparsity", sparsity)
        if not 0.0 <= sparsity < 1.0:  # also refuses NaN
            raise ValueError(
                f"sparsity: must be at least 0 and below 1, got {given!r}; 0.9 zeroes 90 % of the weights."
            )
        for name, size in self._sizes().items():
            if round(sparsity * size) >= size:
                raise ValueError(
                    f"sparsity: {sparsity!r} would leave {name} none of its {size} weights. Lower it"
                    + (", or name the layer in keep." if self.per_layer else ".")
                )
        self._sparsity = sparsity

    @property
    def zeros(self) -> int:
        """How many weights are zero in the nearest network: ``round(sparsity * total)``, or that of each layer."""
        return sum(round(self._sparsity * size) for size in self._sizes().values())

    @property
    def weighting(self) -> Mapping[str, Tensor] | None:
        """The weights ``h`` by parameter name, or None for the Euclidean distance."""
        return self._weighting

    @weighting.setter
    def weighting(self, weighting: Weighting) -> None:
        if isinstance(weighting, AnchorMetric):
            parts = weighting.unflatten(weighting.diagonal())
            weighting = dict(zip(weighting.names, parts, strict=True))
        self._weighting = None if weighting is None else self._checked(weighting)

    def __call__(self) -> Tensor:
        """The squared distance, a scalar with a graph to the prunable parameters."""
        parts = []
        parameters, weighting = self._parameters, self._fitting_weighting()
        for name, kept in self.masks().items():
            # Half-precision weights are widened: their squares and the sums of these are not taken in half.
            dropped = parameters[name].masked_fill(kept, 0.0)
            squares = dropped.to(_wide(dropped)).square()
            parts.append((squares if weighting is None else squares * weighting[name]).sum())
        return torch.stack([part.to(parts[0].device) for part in parts]).sum()

    def distance(self) -> float:
        """The distance itself: the root of the squared one, in the units of the weights times those of √h."""
        with torch.no_grad():
            return math.sqrt(float(self()))

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        """What the nearest network keeps: by parameter name a bool tensor, False at exactly ``zeros`` weights.

        Among equal weights those with the lower index, parameters in the order of ``names``, are dropped.
        """
        # The root of h w², which orders the weights alike and does not underflow where w² would.
        scores = {name: p.detach().abs() for name, p in self._parameters.items()}
        weighting = self._fitting_weighting()
        if weighting is not None:
            scores = {name: score * weighting[name].sqrt() for name, score in scores.items()}
        if self.per_layer:
            kept = [
                _largest(s.flatten(), round(self._sparsity * s.numel())) for s in scores.values()
            ]
        else:
            device = scores[self.names[0]].device
            flat = torch.cat([score.flatten().to(device) for score in scores.values()])
            kept = list(_largest(flat, self.zeros).split([s.numel() for s in scores.values()]))
        return {
            name: part.view_as(score).to(score.device)
            for (name, score), part in zip(scores.items(), kept, strict=True)
        }

    @torch.no_grad()
    def project_(self) -> dict[str, Tensor]:
        """Set the model's weights to the nearest network's, exactly, and return the masks of what was kept.

        Raises:
            ValueError: If a prunable weight is NaN; the weights stay as they were.
        """
        parameters = self._parameters
        for name, parameter in parameters.items():
            if bool(parameter.isnan().any()):
                raise ValueError(
                    f"model: {name} holds NaN, so no network is nearest; reload the weights."
                )
        masks = self.masks()
        for name, parameter in parameters.items():
            parameter.masked_fill_(~masks[name], 0.0)
        return masks

    def _sizes(self) -> dict[str, int]:
        """The number of weights of whatever gets the sparsity by itself."""
        if self.per_layer:
            return {name: p.numel() for name, p in self._parameters.items()}
        return {"the network": self.total}

    def _fitting_weighting(self) -> dict[str, Tensor] | None:
        """The weighting on the devices where the parameters are now."""
        if self._weighting is None:
            return None
        fitting = {}
        for name, parameter in self._parameters.items():
            h = self._weighting[name]
            _check_shape(name, h, parameter)
            fitting[name] = h.to(parameter.device)
        return fitting

    def _checked(self, weighting: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not isinstance(weighting, Mapping):
            raise TypeError(
                "weighting: must be None, an AnchorMetric or a mapping from parameter names to tensors, "
                f"got {type(weighting).__name__}."
            )
        missing = [name for name in self.names if name not in weighting]
        if missing:
            raise ValueError(
                f"weighting: lacks {missing}; give weights for every prunable parameter, "
                f"{list(self.names)}, or name the others in keep."
            )
        checked = {}
        for name, parameter in self._parameters.items():
            h = weighting[name]
            if not isinstance(h, Tensor) or h.is_complex():
                got = f"a {h.dtype} tensor" if isinstance(h, Tensor) else type(h).__name__
                raise TypeError(f"weighting: {name} must be a tensor of real numbers, got {got}.")
            _check_shape(name, h, parameter)
            # Checked as it is kept, which may overflow.
            checked[name] = h.detach().to(parameter.device, _wide(parameter), copy=True)
            if not bool(((checked[name] >= 0) & torch.isfinite(checked[name])).all()):
                raise ValueError(f"weighting: {name} must be finite and not negative.")
        return checked


class Diversity:
    r"""Likeness of the input gradients to those of reference networks; minimised, the network becomes different.

    The mean over a batch and over the references of the cosine

    .. math:: \cos\bigl(\nabla_x \ell(f(x; w), y),\; \nabla_x \ell(f_{ref}(x), y)\bigr),

    between -1 and 1. An attack made on a reference follows its input gradient, so the less the two are aligned,
    the less it transfers. Where either gradient vanishes, as for inputs classified beyond rounding, the cosine
    counts as 0. All networks are evaluated in eval mode, without autocast, and left in the mode they were in.

    Args:
        model: The network that is optimized.
        references: One network or several. They are copied now: what becomes of them later does not matter, and
            ``model`` itself may be given to stand for what it is now.
        batches: A DataLoader or any re-iterable of ``(x, y)`` pairs; see :class:`TaskLoss`. ``x`` is one float
            tensor with the inputs along dimension 0, at least one.
        loss_fn: Takes the output and ``y`` and returns a scalar that is a sum or mean over the inputs.

    Raises:
        ValueError: If there is no reference; when called, as :class:`TaskLoss`, or if a batch holds no input or the
            loss does not depend on the inputs.
        TypeError: If an argument has the wrong type; when called, if ``x`` is not a float tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        references: nn.Module | Sequence[nn.Module],
        batches: Iterable[Any],
        loss_fn: LossFunction = F.cross_entropy,
    ) -> None:
        modules: list[nn.Module]
        if isinstance(references, nn.Module) or not isinstance(references, Iterable):
            modules = [references]
        else:
            modules = list(references)
        if not modules:
            raise ValueError("references: is empty; give at least one network to differ from.")
        for module in modules:
            if not isinstance(module, nn.Module):
                raise TypeError(
                    f"references: must be torch.nn.Modules, got {type(module).__name__}; "
                    "load weights into a module first."
                )
        self.model = _module("model", model)
        self.references = tuple(copy.deepcopy(unwrap(m)).requires_grad_(False) for m in modules)
        self.loss_fn = _callable(loss_fn)
        self._batches = _Batches("batches", batches)

    def __call__(self) -> Tensor:
        """The mean cosine on the next batch, a scalar with a graph to the model's parameters."""
        model = unwrap(self.model)
        device = device_of(model)
        x, y = self._batches.next(device)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            got = f"a {x.dtype} tensor" if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(
                f"batches: x must be one float tensor, which has an input gradient; got {got}."
            )
        if x.numel() == 0 or x.dim() == 0:
            raise ValueError(
                f"batches: x must hold at least one input along dimension 0, got shape {tuple(x.shape)}."
            )
        for reference in self.references:
            if device_of(reference) != device:
                reference.to(device)  # the model was moved
        ours = self._input_gradient(model, x, y, create_graph=torch.is_grad_enabled())
        cosines = [
            _cosine(ours, self._input_gradient(reference, x, y, create_graph=False))
            for reference in self.references
        ]
        return torch.cat(cosines).mean()

    def _input_gradient(self, model: nn.Module, x: Tensor, y: Any, *, create_graph: bool) -> Tensor:
        """The gradient of the loss with respect to each input, flattened: (N, d)."""
        x = x.detach().requires_grad_()
        # Evaluation also picks attention that can be differentiated twice.
        with torch.enable_grad(), evaluation(model, x.device):
            # A model may write to what it gets, which a leaf does not allow.
            loss = _scalar(self.loss_fn(read_logits(model(x.clone())), y))
            if not loss.requires_grad:
                raise ValueError(
                    "loss_fn: its value must depend on the inputs through autograd; it is detached from them."
                )
            (gradient,) = torch.autograd.grad(
                loss, x, create_graph=create_graph, materialize_grads=True
            )
        return gradient.reshape(len(x), -1)


class _Batches:
    """The batches of a loader, one after the other without end."""

    def __init__(self, argument: str, loader: Iterable[Any]) -> None:
        if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
            raise TypeError(
                f"{argument}: must be a DataLoader or another iterable of (x, y) pairs, "
                f"got {type(loader).__name__}."
            )
        self._argument = argument
        self._loader = loader
        self._iterator: Iterator[Any] | None = None
        self._used = 0  # batches taken from this pass
        self._random: list[Tensor] = []  # states of self._generators() when this pass began

    def next(self, device: torch.device) -> tuple[Any, Any]:
        """The next pair, its tensors on ``device``."""
        batch = self._next()
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            size = f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
            raise TypeError(
                f"{self._argument}: must yield (x, y) pairs, got a {type(batch).__name__}{size}. "
                "For batches of another form write the loss as a function of your own."
            )
        x, y = (_move(part, device) for part in batch)
        return x, y

    def _next(self) -> Any:
        if self._iterator is None:
            # Batches were used if this is a copy of one that was under way.
            self._iterator = self._resume() if self._used else self._begin()
        for batch in self._iterator:
            self._used += 1
            return batch
        self._used = 0
        self._iterator = self._begin()
        for batch in self._iterator:
            self._used += 1
            return batch
        self._iterator = None
        raise ValueError(
            f"{self._argument}: yields no batch. Give a DataLoader or a list with at least one; "
            "a generator can be used up only once."
        )

    def _begin(self) -> Iterator[Any]:
        self._random = [generator.get_state() for generator in self._generators()]
        return iter(self._loader)

    def _resume(self) -> Iterator[Any]:
        """The pass that was under way, after the batches that were used."""
        if isinstance(self._loader, Iterator):
            return self._loader  # its copy is where it was
        generators = self._generators()
        now = [generator.get_state() for generator in generators]
        try:
            for generator, state in zip(generators, self._random, strict=True):
                generator.set_state(state)
            iterator = iter(self._loader)
            for _ in itertools.islice(iterator, self._used):
                pass
        finally:
            for generator, state in zip(generators, now, strict=True):
                generator.set_state(state)
        return iterator

    def _generators(self) -> list[torch.Generator]:
        """What the loader may shuffle with: torch's own generator, and any that it or its sampler was given."""
        sampler = getattr(self._loader, "sampler", None)
        batch_sampler = getattr(self._loader, "batch_sampler", None)
        owners = (self._loader, sampler, batch_sampler, getattr(batch_sampler, "sampler", None))
        given = [getattr(owner, "generator", None) for owner in owners]
        own = {id(g): g for g in given if isinstance(g, torch.Generator)}
        return [torch.default_generator, *own.values()]

    def __getstate__(self) -> dict[str, Any]:
        # The iterators of a DataLoader can be neither copied nor pickled.
        return self.__dict__ | {"_iterator": None}


def _move(part: Any, device: torch.device) -> Any:
    """``part`` with its tensors on ``device``; a mapping as a dict, a list as a tuple."""
    if isinstance(part, Tensor):
        # A copy to the CPU that does not block may be read before it has arrived.
        return part.to(device, non_blocking=device.type == "cuda")
    if isinstance(part, Mapping):
        return {name: _move(value, device) for name, value in part.items()}
    if isinstance(part, (tuple, list)):
        return tuple(_move(value, device) for value in part)
    return part


def _module(argument: str, value: Any) -> nn.Module:
    if not isinstance(value, nn.Module):
        raise TypeError(f"{argument}: must be a torch.nn.Module, got {type(value).__name__}.")
    return value


def _callable(loss_fn: LossFunction) -> LossFunction:
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn: must be a function of the output and y, got {type(loss_fn).__name__}."
        )
    return loss_fn


def _number(argument: str, value: Any) -> float:
    """``value``, a real number of any library but no bool, as a float."""
    whole = isinstance(value, bool) or getattr(value, "dtype", None) in (torch.bool, "bool")
    if whole or isinstance(value, (str, bytes)):
        raise TypeError(f"{argument}: must be a number, got {value!r}.")
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{argument}: must be a number, got {value!r}.") from error


def _checked_names(keep: Iterable[str]) -> tuple[str, ...]:
    names = (keep,) if isinstance(keep, str) else tuple(keep) if isinstance(keep, Iterable) else ()
    if not isinstance(keep, Iterable) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"keep: must be names of parameters or modules, got {keep!r}.")
    return names


def _check_shape(name: str, h: Tensor, parameter: Tensor) -> None:
    if h.shape != parameter.shape:
        raise ValueError(
            f"weighting: {name} must have the parameter's shape {tuple(parameter.shape)}, "
            f"got {tuple(h.shape)}."
        )


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _scalar(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(
            f"loss_fn: must return a scalar tensor, got {got}; reduce it with .mean()."
        )
    return loss.reshape(())


def _prunable(model: nn.Module, keep: Sequence[str]) -> tuple[str, ...]:
    parameters = dict(model.named_parameters())
    # A tied parameter may be kept under any of its names.
    every_name = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    kept: set[int] = set()
    for asked in keep:
        found = {i for name, i in every_name.items() if f"{name}.".startswith(f"{asked}.")}
        if not found:
            raise ValueError(
                f"keep: the model has no parameter or module {asked!r} with parameters; "
                f"choose from {sorted(every_name)} or a module that holds some of them."
            )
        kept |= found
    prunable = tuple(
        name
        for name, p in parameters.items()
        if p.dim() >= 2 and p.numel() > 0 and p.requires_grad and id(p) not in kept
    )
    if not prunable:
        raise ValueError(
            f"keep: nothing is left to prune. Of the model's parameters {list(parameters)} those with two "
            f"dimensions or more that require a gradient can be; keep names {list(keep)}."
        )
    return prunable


def _largest(scores: Tensor, drop: int) -> Tensor:
    """True at all but the ``drop`` smallest of the flat ``scores``; of equal ones the first are dropped."""
    kept = torch.ones_like(scores, dtype=torch.bool)
    if drop == 0:
        return kept
    threshold = scores.kthvalue(drop).values
    below = scores < threshold
    ties = (scores == threshold).nonzero().flatten()
    kept[below] = False
    kept[ties[: drop - int(below.sum())]] = False
    return kept


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosines of the rows of a and b, (N,); 0 where one of them is zero."""
    # Scaled by the largest entry first: gradients of well-classified inputs are small enough to underflow. The
    # cosine's own gradient grows as they shrink, and must not overflow.
    sizes = [v.detach().abs().amax(dim=1, keepdim=True) for v in (a, b)]
    least = torch.finfo(a.dtype).tiny / torch.finfo(a.dtype).eps
    present = ((sizes[0] > least) & (sizes[1] > least)).flatten()
    # Rows without a direction are left out before they are divided, so that their gradient is 0 and not NaN.
    u, v = (x[present] / size[present] for x, size in zip((a, b), sizes, strict=True))
    cosines = F.cosine_similarity(u, v, dim=1)
    return a.new_zeros(len(a)).index_put((present.nonzero().flatten(),), cosines)
