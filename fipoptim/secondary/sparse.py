"""The distance to the nearest sparse network, as an objective."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fipoptim.anchors.evaluation import unwrap
from fipoptim.metric import AnchorMetric
from fipoptim.secondary.arguments import checked_module

Weighting = Mapping[str, Tensor] | AnchorMetric | None


class SparseProjection:
    r"""Squared distance to the nearest network that has the given sparsity.

    The distance is measured in the norm :math:`\sum_i h_i w_i^2` over the prunable weights. The nearest network is
    then the one whose :math:`k` weights of smallest :math:`h_i w_i^2` are set to zero, and the squared distance is
    the sum over these weights,

    .. math:: L(w) = \sum_{i \in S_k(w)} h_i w_i^2, \qquad k = \mathrm{round}(\text{sparsity} \cdot n).

    Its gradient is :math:`2 h_i w_i` on them and zero elsewhere: the pull towards the projection. With :math:`h = 1`
    the distance is Euclidean, and the projection is magnitude pruning. With the diagonal of the anchors' metric as
    :math:`h` the squared distance is, to leading order and neglecting cross terms, the mean squared change of the
    anchors' outputs by pruning, so the objective approaches the network that is nearest in its *function*.

    The parameters are looked up by name at each use, so they may be replaced, or moved to another device. A use raises
    a ValueError if one of them is gone, is no parameter any more, or no longer has the shape of its weighting.

    Args:
        model: The network that is optimized.
        sparsity: The fraction of the prunable weights that are to be zero, in ``[0, 1)``. ``sparsity`` can be
            assigned later, so a schedule may raise it.
        weighting: :math:`h`. None stands for 1. A mapping gives a tensor of non-negative weights for each parameter
            name, in the parameter's shape; it must cover the prunable parameters. An :class:`AnchorMetric` stands for
            its diagonal, which is computed at once. ``weighting`` can be assigned later, to follow the metric along
            the path.
        per_layer: True gives each parameter the sparsity by itself. False takes the smallest weights of the network.
        keep: Names of parameters or modules (all parameters below a module) that are not to be pruned.

    Attributes:
        names: The prunable parameters: those that require a gradient, have two dimensions or more (the weights of
            linear, convolution and embedding layers; neither biases nor norms), and are not excluded by ``keep``.
        per_layer: As given.

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
        self._model = unwrap(checked_module("model", model))
        self.names = _prunable_names(self._model, _checked_names(keep))
        self.per_layer = per_layer
        self._weighting: dict[str, Tensor] | None = None
        self.sparsity = sparsity
        self.weighting = weighting

    @property
    def _parameters(self) -> dict[str, nn.Parameter]:
        # They are looked up each time, because wrappers may put new parameters in place of the old ones.
        try:
            return {name: self._model.get_parameter(name) for name in self.names}
        except AttributeError as error:
            raise ValueError(
                f"model: a parameter that was to be pruned is gone ({error}); {list(self.names)} must all stay "
                "parameters. Make a new SparseProjection of the model as it is."
            ) from error

    @property
    def total(self) -> int:
        """The number of prunable weights."""
        return sum(p.numel() for p in self._parameters.values())

    @property
    def sparsity(self) -> float:
        """The fraction of the prunable weights that are to be zero."""
        return self._sparsity

    @sparsity.setter
    def sparsity(self, sparsity: float) -> None:
        given, sparsity = sparsity, _number("sparsity", sparsity)
        if not 0.0 <= sparsity < 1.0:  # NaN is refused too.
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
        """The number of zeros in the nearest network: ``round(sparsity * total)``, or the sum over the layers."""
        return sum(round(self._sparsity * size) for size in self._sizes().values())

    @property
    def weighting(self) -> Mapping[str, Tensor] | None:
        """The weights ``h`` by parameter name, or None for the Euclidean distance."""
        return self._weighting

    @weighting.setter
    def weighting(self, weighting: Weighting) -> None:
        if isinstance(weighting, AnchorMetric):
            diagonal = weighting.unflatten(weighting.diagonal())
            weighting = dict(zip(weighting.names, diagonal, strict=True))
        self._weighting = None if weighting is None else self._checked_weighting(weighting)

    def __call__(self) -> Tensor:
        """The squared distance, a scalar with a graph to the prunable parameters."""
        parts = []
        parameters, weighting = self._parameters, self._weighting_on_devices()
        for name, mask in self.masks().items():
            smallest = parameters[name].masked_fill(mask, 0.0)
            # The squares of half-precision weights, and their sums, are taken in float32.
            squares = smallest.to(_wide(smallest)).square()
            parts.append((squares if weighting is None else squares * weighting[name]).sum())
        return torch.stack([part.to(parts[0].device) for part in parts]).sum()

    def distance(self) -> float:
        """The root of the squared distance, in the units of the weights times those of √h."""
        with torch.no_grad():
            return math.sqrt(float(self()))

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        """A bool tensor in the shape of each prunable parameter: False at exactly ``zeros`` weights, True elsewhere.

        The weights at False are zero in the nearest network. Equal weights come in the order of ``names``, and by
        index within a parameter; the first of them are set to zero.
        """
        # √h |w| orders the weights as h w² does, and does not underflow as w² may.
        scores = {name: p.detach().abs() for name, p in self._parameters.items()}
        weighting = self._weighting_on_devices()
        if weighting is not None:
            scores = {name: score * weighting[name].sqrt() for name, score in scores.items()}
        if self.per_layer:
            masks = [
                _largest(s.flatten(), round(self._sparsity * s.numel())) for s in scores.values()
            ]
        else:
            device = scores[self.names[0]].device
            flat = torch.cat([score.flatten().to(device) for score in scores.values()])
            masks = list(_largest(flat, self.zeros).split([s.numel() for s in scores.values()]))
        return {
            name: mask.view_as(score).to(score.device)
            for (name, score), mask in zip(scores.items(), masks, strict=True)
        }

    @torch.no_grad()
    def project_(self) -> dict[str, Tensor]:
        """Set the model's weights to those of the nearest network, and return ``masks()``.

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
        """The number of weights of each part that has the sparsity by itself: a layer, or the network."""
        if self.per_layer:
            return {name: p.numel() for name, p in self._parameters.items()}
        return {"the network": self.total}

    def _weighting_on_devices(self) -> dict[str, Tensor] | None:
        """The weighting, moved to the devices where the parameters are now."""
        if self._weighting is None:
            return None
        moved = {}
        for name, parameter in self._parameters.items():
            h = self._weighting[name]
            _check_shape(name, h, parameter)
            moved[name] = h.to(parameter.device)
        return moved

    def _checked_weighting(self, weighting: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the weights of the prunable parameters, on the devices of these and in float32 or wider."""
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
            # The copy is checked, and not h, because a cast to a narrower type may overflow.
            checked[name] = h.detach().to(parameter.device, _wide(parameter), copy=True)
            if not bool(((checked[name] >= 0) & torch.isfinite(checked[name])).all()):
                raise ValueError(f"weighting: {name} must be finite and not negative.")
        return checked


def _number(argument: str, value: Any) -> float:
    """``value`` as a float, if it is a real number of any library and no bool.

    Raises:
        TypeError: If it is not.
    """
    is_bool = isinstance(value, bool) or getattr(value, "dtype", None) in (torch.bool, "bool")
    if is_bool or isinstance(value, (str, bytes)):
        raise TypeError(f"{argument}: must be a number, got {value!r}.")
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{argument}: must be a number, got {value!r}.") from error


def _checked_names(keep: Iterable[str]) -> tuple[str, ...]:
    """``keep`` as a tuple of names; one str is one name."""
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
    """The dtype of ``tensor``, or float32 if that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _prunable_names(model: nn.Module, keep: Sequence[str]) -> tuple[str, ...]:
    """The names of the parameters that can be pruned, without those that ``keep`` names or holds."""
    parameters = dict(model.named_parameters())
    # A tied parameter can be excluded by any of its names.
    every_name = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    excluded: set[int] = set()
    for asked in keep:
        found = {i for name, i in every_name.items() if f"{name}.".startswith(f"{asked}.")}
        if not found:
            raise ValueError(
                f"keep: the model has no parameter or module {asked!r} with parameters; "
                f"choose from {sorted(every_name)} or a module that holds some of them."
            )
        excluded |= found
    prunable = tuple(
        name
        for name, p in parameters.items()
        if p.dim() >= 2 and p.numel() > 0 and p.requires_grad and id(p) not in excluded
    )
    if not prunable:
        raise ValueError(
            f"keep: nothing is left to prune. A parameter can be pruned if it has two dimensions or more and requires "
            f"a gradient; the model has {list(parameters)}, and keep names {list(keep)}. Name fewer."
        )
    return prunable


def _largest(scores: Tensor, drop: int) -> Tensor:
    """A mask (n,) that is False at the ``drop`` smallest of the ``scores`` (n,), the first ones among equals."""
    mask = torch.ones_like(scores, dtype=torch.bool)
    if drop == 0:
        return mask
    threshold = scores.kthvalue(drop).values
    below = scores < threshold
    ties = (scores == threshold).nonzero().flatten()
    mask[below] = False
    mask[ties[: drop - int(below.sum())]] = False
    return mask
