"""The weights that a projection changes, found by name at each use, and how much each of them counts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fipoptim.anchors.evaluation import unwrap
from fipoptim.metric import AnchorMetric
from fipoptim.secondary.arguments import checked_module

Weighting = Mapping[str, Tensor] | AnchorMetric | None


class ProjectedWeights:
    """The parameters of a model that a projection changes.

    They are those that require a gradient, have two dimensions or more (the weights of linear, convolution and
    embedding layers; neither biases nor norms), and are not excluded.

    Args:
        model: The network.
        keep: Names of parameters or modules (all parameters below a module) that are excluded.
        verb: What happens to the weights, for messages: ``"prune"`` or ``"quantize"``.
        owner: The class that asks, for messages.

    Attributes:
        names: The names of the parameters.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a name is unknown, or if no parameter is left.
    """

    def __init__(
        self, model: nn.Module, keep: Iterable[str], *, verb: str, owner: type[object]
    ) -> None:
        self._model = unwrap(checked_module("model", model))
        self._done, self._owner = f"{verb}d", owner.__name__
        self.names = _names(self._model, _checked_names(keep), verb)
        self._weighting: dict[str, Tensor] | None = None

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters by name, looked up now: wrappers may have put new ones in place of the old ones.

        Raises:
            ValueError: If one is gone, or is no parameter any more.
        """
        try:
            return {name: self._model.get_parameter(name) for name in self.names}
        except AttributeError as error:
            raise ValueError(
                f"model: a parameter that was to be {self._done} is gone ({error}); {list(self.names)} must all stay "
                f"parameters. Make a new {self._owner} of the model as it is."
            ) from error

    @property
    def weighting(self) -> Mapping[str, Tensor] | None:
        """How much each weight counts, by parameter name; None if all count alike."""
        return self._weighting

    @weighting.setter
    def weighting(self, weighting: Weighting) -> None:
        if isinstance(weighting, AnchorMetric):
            diagonal = weighting.unflatten(weighting.diagonal())
            weighting = dict(zip(weighting.names, diagonal, strict=True))
        self._weighting = None if weighting is None else self._checked_weighting(weighting)

    def weighting_on_devices(self) -> dict[str, Tensor] | None:
        """The weighting, moved to the devices where the parameters are now.

        Raises:
            ValueError: If a parameter no longer has the shape of its weighting.
        """
        if self._weighting is None:
            return None
        moved = {}
        for name, parameter in self.parameters.items():
            h = self._weighting[name]
            _check_shape(name, h, parameter)
            moved[name] = h.to(parameter.device)
        return moved

    def _checked_weighting(self, weighting: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of what ``weighting`` has for the parameters, on the devices of these and in float32 or wider."""
        if not isinstance(weighting, Mapping):
            raise TypeError(
                "weighting: must be None, an AnchorMetric or a mapping from parameter names to tensors, "
                f"got {type(weighting).__name__}."
            )
        missing = [name for name in self.names if name not in weighting]
        if missing:
            raise ValueError(
                f"weighting: lacks {missing}; give weights for every parameter that is to be {self._done}, "
                f"{list(self.names)}, or name the others in keep."
            )
        checked = {}
        for name, parameter in self.parameters.items():
            h = weighting[name]
            if not isinstance(h, Tensor) or h.is_complex():
                got = f"a {h.dtype} tensor" if isinstance(h, Tensor) else type(h).__name__
                raise TypeError(f"weighting: {name} must be a tensor of real numbers, got {got}.")
            _check_shape(name, h, parameter)
            # The copy is checked, and not h, because a cast to a narrower type may overflow.
            checked[name] = h.detach().to(parameter.device, wide(parameter), copy=True)
            if not bool(((checked[name] >= 0) & torch.isfinite(checked[name])).all()):
                raise ValueError(f"weighting: {name} must be finite and not negative.")
        return checked


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype of ``tensor``, or float32 if that is wider."""
    return torch.promote_types(tensor.dtype, torch.float32)


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


def _names(model: nn.Module, keep: Sequence[str], verb: str) -> tuple[str, ...]:
    """The names of the parameters that a projection changes, without those that ``keep`` names or holds."""
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
    chosen = tuple(
        name
        for name, p in parameters.items()
        if p.dim() >= 2 and p.numel() > 0 and p.requires_grad and id(p) not in excluded
    )
    if not chosen:
        raise ValueError(
            f"keep: nothing is left to {verb}. A parameter can be {verb}d if it has two dimensions or more and "
            f"requires a gradient; the model has {list(parameters)}, and keep names {list(keep)}. Name fewer."
        )
    return chosen
