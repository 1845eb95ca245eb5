"""Several recorded networks as one module."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fipoptim.anchors.output_space import read_logits
from fipoptim.path.arguments import as_module, network_position, whole_number
from fipoptim.path.snapshot import check_fit, tensors_of


class StateDictionaries(Protocol):
    """State dictionaries by index: a list of them, or a recorded path."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, i: int, /) -> Mapping[str, Tensor]:
        """The i-th one. Tied tensors are under all their names, as one object."""


class PathEnsemble(nn.Module):
    """The sum over several networks of the softmax of their outputs.

    The sum over k networks adds up to k, as in the paper's adversarial ensembles. The networks are called members here.
    They run in eval mode, whatever the mode of the ensemble, and are loaded one at a time, so without autograd memory
    does not grow with their number. Gradients flow to the inputs, not to the members' weights; with autograd the graph
    holds every member. ``model`` gives the architecture only: it is copied, and never changed.

    Args:
        states: The state dictionaries that the members are chosen from. They are read whenever the ensemble is called.
        model: A network of the same architecture. The ensemble runs on its device; ``.to(...)`` moves it.
        indices: The members, by index into ``states``; negative indices count from the end, and an index may be given
            twice. All networks are members if None.
        dim: The dimension of the classes in the model's output.

    Raises:
        TypeError: If ``model`` is not a module, ``indices`` are not whole numbers, or ``dim`` is not one.
        ValueError: If ``indices`` is empty, or if the first member does not fit ``model``. When it is called, if any
            member does not fit, or if the file of a member was changed.
        IndexError: If an index is out of range. When it is called, if the outputs have no dimension ``dim``.
    """

    def __init__(
        self,
        states: StateDictionaries,
        model: nn.Module,
        indices: Sequence[int] | None = None,
        *,
        dim: int = -1,
    ) -> None:
        super().__init__()
        original = as_module(model)
        if indices is not None and not isinstance(indices, Iterable):
            raise TypeError(
                f"indices: must be several whole numbers, got {indices!r}; [0, -1] are the first and the last."
            )
        count = len(states)
        chosen = range(count) if indices is None else indices
        self.indices = tuple(network_position(i, count) for i in chosen)
        if not self.indices:
            raise ValueError("indices: is empty; an ensemble needs at least one recorded network.")
        dimension = whole_number(dim)
        if dimension is None:
            raise TypeError(f"dim: must be a whole number, got {dim!r}.")
        self.dim = dimension
        self._states = states
        self.model = copy.deepcopy(original).requires_grad_(False).eval()
        self.model.zero_grad()
        self._member_tensors(self.indices[0])

    def __len__(self) -> int:
        return len(self.indices)

    def train(self, mode: bool = True) -> PathEnsemble:
        """Set the mode of the ensemble itself; its members stay in eval mode."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(self, *inputs: Any, **keywords: Any) -> Tensor:
        """The sum over the members of softmax(model(...)).

        The arguments are the model's. The sum has the shape of the model's output, and is float32 or wider.
        """
        total: Tensor | None = None
        for i in self.indices:
            tensors = self._member_tensors(i)
            logits = read_logits(functional_call(self.model, tensors, inputs, keywords))
            if not -logits.dim() <= self.dim < logits.dim():
                raise IndexError(
                    f"dim: the model's outputs, {tuple(logits.shape)}, have no dimension {self.dim}."
                )
            shares = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(self.dim)
            total = shares if total is None else total + shares
        assert total is not None
        return total

    def _member_tensors(self, i: int) -> dict[str, Tensor]:
        """Copies of the i-th network's tensors on the model's device and in its dtypes.

        They are copies because a forward may write to buffers. Names of one tensor give one copy, which
        ``functional_call`` asks for.
        """
        model_tensors = tensors_of(self.model)
        state = self._states[i]
        check_fit(model_tensors, state)
        copies: dict[int, Tensor] = {}
        for name, tensor in state.items():
            if id(tensor) not in copies:
                copies[id(tensor)] = tensor.to(model_tensors[name], copy=True)
        return {name: copies[id(tensor)] for name, tensor in state.items()}
