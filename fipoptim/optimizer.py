"""FIPOptimizer: functionally invariant paths behind the interface of ``torch.optim``."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
from torch import Generator, Tensor
from torch.optim.optimizer import ParamsT

from fipoptim.agreement import agree_on_options, agree_on_step
from fipoptim.anchors.batch import AnchorBatch
from fipoptim.anchors.draws import draw_seed
from fipoptim.anchors.refusals import check_callable, check_positive
from fipoptim.automatic import automatic_beta, set_beta
from fipoptim.budget import Budget
from fipoptim.checks import (
    DEFAULT_LENGTH,
    check_choice,
    check_length,
    check_options,
    check_type,
    refuse_grad_scaler,
    refuse_weight_decay,
)
from fipoptim.geometry import GEOMETRIES
from fipoptim.gradients import SecondaryGradient, secondary_gradient
from fipoptim.metric.chunks import FORMS, Form
from fipoptim.metric.forms import Forms
from fipoptim.metric.metric import AnchorMetric
from fipoptim.move import move
from fipoptim.parameters import StepParameters, all_params
from fipoptim.path.record import FIPPath
from fipoptim.promise import (
    START,
    UNMOVED,
    check_within,
    down_drift,
    is_due,
    outputs_after,
    promise_of_step,
)
from fipoptim.restoring import Restored, restore_behind
from fipoptim.room import radius, room_within
from fipoptim.saving import SavedOptimizer
from fipoptim.settle import MAX_PRODUCTS, settle
from fipoptim.solver.settings import Solver
from fipoptim.state import StepState, begin_within, remember_within, steps_taken
from fipoptim.step import (
    direction_onward,
    drift_gradient,
    finite_size,
    linear_term,
    minimise,
)
from fipoptim.step_info import StepInfo


class FIPOptimizer(SavedOptimizer):
    r"""Moves a network along a functionally invariant path (Eq. 4 of Raghavan and Thomson).

    .. math::
        \begin{aligned}
        &b \leftarrow \nabla L(w), \qquad r \leftarrow z(w) - z_{ref} \\
        &c \leftarrow \beta b + \tfrac2N J^\top r \qquad\text{(the second term with drift correction)} \\
        &v \leftarrow \arg\min_{\|v\|_P = \varepsilon} v^\top g v + c^\top v, \qquad
            g = \tfrac1N \textstyle\sum_i J_i^\top J_i \\
        &w \leftarrow w + v
        \end{aligned}

    ``eps`` is the Euclidean **length** of the step, the :math:`\epsilon` of the paper's Fig. 1C (its Eq. 4 writes
    :math:`\langle v, v\rangle = \epsilon`). Each group carries it as ``lr``, so schedulers of ``torch.optim`` drive it.
    With several groups the sphere is :math:`\sum_{groups} \|v_{group}\|^2 / lr_{group}^2 = 1`. A group whose ``lr`` is
    0 does not move. Only ``beta / eps`` turns the step: toward 0 the step becomes the projection of ``-b`` onto the
    directions that leave the anchors' outputs alone, toward infinity the normalised gradient.

    The gradient ``b`` is taken from the first of these that is there:

    1. ``.grad`` as the closure of :meth:`step` leaves it;
    2. the gradient of ``secondary()``;
    3. ``.grad`` as it stands; parameters without one do not move.

    If there is none at all, then ``L = 0`` (Eq. 3): the path continues its previous direction as straight as the
    function allows, from a seeded random start. A gradient that is exactly zero is a minimum: the step then only
    restores the function.

    If another optimizer moves other parts of the network, it steps **first**: ``last_step`` and ``max_drift`` speak of
    the network at the end of this optimizer's step.

    Args:
        params: Parameters of the anchors' model: tensors, named tensors or groups, as in ``torch.optim``.
        anchors: The inputs whose outputs are to stay.
        secondary: A callable without arguments that returns the secondary loss; see :mod:`fipoptim.secondary`.
        beta: Weight of the secondary objective. It may differ by group. ``"auto"`` asks for a budget and chooses it
            from the first gradient; see "How it works". The group then carries the number.
        eps: Length of a step.
        momentum: Decay of the running mean of ``b`` (bias-corrected); 0 takes ``b`` as it is. It may differ by group.
            With ``precondition="muon"`` the mean is that of all of ``c``, with Nesterov's look-ahead.
        drift_correction: Pull the outputs back to the reference, rather than preserve those of the step before.
        max_drift: A promise: ``anchors.drift() <= max_drift``; ``anchors.check.drift()`` if there are check inputs.
        max_flips: A promise: at most this share of the same inputs has a prediction other than the reference's.
        check_every: When the budget holds. 1: after every step, of which only as much is taken as the budget allows; a
            step that moves nothing is checked, too. k: after every k-th step, by :meth:`settle`. None: once
            :meth:`settle` has been called. A budget at every step can cost learning: a path to a better network may
            lead through worse ones. Otherwise the budget bounds the length of a step (``fipoptim.room``).
        precondition: The name of the geometry in which the step's length is measured. ``"adam"``: ``P`` is proportional
            to the damped root of the running mean of :math:`c^2`, scaled to a mean of 1 so that ``eps`` keeps its
            meaning. ``"muon"``: the weights of a linear or convolutional layer are measured as a matrix. ``P`` is
            :math:`(C C^\top)^{1/2}` of the layer's linear term ``C``, on the shorter side, so that a step without
            products is orthogonal, as Muon's. Biases, embeddings, wide heads and groups with ``matrix=False`` are as
            with ``"adam"`` (:func:`fipoptim.geometry.describe`). None is Euclidean. ``register`` there adds others.
        keep_zeros: Weights that are exactly 0 do not move, so that a pruned network stays pruned. Without it such
            weights move even if their gradient is masked, as the restoring term is no part of ``.grad``. In Muon's
            geometry the parameters of such a group are as with ``"adam"``. It may differ by group.
        solver: A :class:`Solver`; None is the adaptive default.
        form: How the metric's products are taken: ``"forward"`` (forward-mode AD), ``"double-vjp"`` or
            ``"finite-difference"`` (any model, fused attention, no trace; errors of 1e-4, or 1e-2 with ReLU). None
            probes which one is right for the model when the first product is taken; a form that is given is not
            checked.
        compile: Compile the trace of the derivative with ``torch.compile``, as :class:`AnchorMetric` does.
        generator: Gives the seed of the random directions; None takes ``torch.initial_seed()``.
        lr, weight_decay: As ``torch.optim`` has them: another name for ``eps``; and 0, or an error says what to use.

    Attributes:
        anchors: The anchors.
        last_step: A :class:`StepInfo`, or None before the first step.

    Raises:
        ValueError: If a number is negative or not finite, or a parameter is not the model's.
        TypeError: If an argument has the wrong type, or a parameter is complex, integer, sparse or of half
            precision.

    Example:
        >>> anchors = AnchorBatch(model, old_inputs)
        >>> opt = FIPOptimizer(model.parameters(), anchors, beta=1.0, eps=0.05)
        >>> for x, y in new_task_loader:
        ...     opt.zero_grad()
        ...     F.cross_entropy(model(x), y).backward()
        ...     opt.step()
    """

    _OPTIONS = (
        *("drift_correction", "max_drift", "max_flips", "check_every"),
        *("precondition", "solver", "compile"),
    )
    _OWN = ("anchors", "secondary", *_OPTIONS, "last_step", "_forms")

    def __init__(
        self,
        params: ParamsT,
        anchors: AnchorBatch,
        secondary: Callable[[], Tensor] | None = None,
        *,
        beta: float | str = 1.0,
        eps: float = DEFAULT_LENGTH,
        momentum: float = 0.0,
        drift_correction: bool = True,
        max_drift: float | None = None,
        max_flips: float | None = None,
        check_every: int | None = 1,
        precondition: str | None = None,
        keep_zeros: bool = False,
        solver: Solver | None = None,
        form: Form | None = None,
        compile: bool = False,
        generator: Generator | None = None,
        lr: float | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        check_type("anchors", anchors, AnchorBatch, "build one with AnchorBatch(model, inputs)")
        anchors.ranks.refuse_outgrown()
        with anchors.ranks.together("FIPOptimizer"):
            check_callable("secondary", secondary)
            eps = check_length(eps, lr)
            refuse_weight_decay(weight_decay)
            budget = Budget.checked(max_drift, max_flips)
            if beta == "auto" and not budget.given:
                raise ValueError("beta: 'auto' needs a budget; give max_drift or max_flips.")
            check_positive("check_every", check_every, or_none=True)
            check_choice("precondition", precondition, tuple(GEOMETRIES))
            check_choice("form", form, (None, *FORMS))
            if solver is not None:
                check_type("solver", solver, Solver, "or give None for the default")
            self.anchors, self.secondary = anchors, secondary
            self.drift_correction = drift_correction
            self.max_drift, self.max_flips = budget.max_drift, budget.max_flips
            self.check_every, self.precondition = check_every, precondition
            self.solver, self.compile = solver or Solver(), compile
            self.last_step: StepInfo | None = None
            self._forms = Forms(anchors, form, compile=compile)
            defaults = {
                "lr": eps,
                "beta": beta,
                "momentum": momentum,
                "keep_zeros": keep_zeros,
                "seed": draw_seed(generator),
                "reference": anchors.fingerprint(),
            }
            super().__init__(params, defaults)
        options = {name: getattr(self, name) for name in self._OPTIONS} | {"form": form}
        agree_on_options(anchors.ranks, anchors.model, self.param_groups, options)
        self.defaults["seed"] = self.param_groups[0]["seed"]

    @property
    def form(self) -> Form | None:
        """How the metric's products are taken, as given or probed. If no product has been taken yet, it is probed now.

        None if no parameter requires a gradient.

        Raises:
            RuntimeError: If the model admits no right Jacobian-vector product, with the cause.
        """
        params = [p for p in all_params(self.param_groups) if p.requires_grad]
        return self._form(params)() if params else None

    @property
    def budget(self) -> Budget:
        """The bounds ``max_drift`` and ``max_flips``, which may change between steps."""
        return Budget.checked(self.max_drift, self.max_flips)

    @property
    def _keeps_within(self) -> bool:
        """Whether the last network known to be within is kept. At every step, that is the network itself."""
        return self.budget.given and self.check_every != 1

    def record(self, every: int = 1, folder: str | PathLike[str] | None = None) -> FIPPath:
        """Sample the networks of a run, on every rank: ``with opt.record(every=10) as path: ...``.

        Args:
            every: Steps between two recorded networks; the start and the last one are always recorded.
            folder: The folder in which rank 0 keeps the networks as safetensors; None keeps them in memory.
        """
        return FIPPath(self, every=every, folder=folder)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Reevaluates the model, calls backward and returns the loss, as in ``torch.optim``. A closure that
                returns None and leaves no gradient skips its batch: nothing moves.

        Returns:
            The closure's loss, or that of ``secondary``, or None.

        Raises:
            RuntimeError: If the closure returns a loss and leaves no gradient, if outputs or gradients are not finite,
                if a budget cannot be held or does not hold at the start, if the model admits no product and the step
                needs one, or under a GradScaler. The weights are then as they were. (The outputs after a step with
                ``Solver(products=0)`` and without a budget are first seen by the next one, which refuses them.)
        """
        refuse_grad_scaler(self)
        with torch.inference_mode(False):
            for group in self.param_groups:
                check_options(group)
            b = secondary_gradient(self.param_groups, closure, self.secondary, self.anchors)
            agree_on_step(self.anchors, b, self.state, self.param_groups, self.budget)
            if b.parameters:
                self._take_step(b)
            elif self.check_every == 1:
                check_within(self.budget, self.anchors, UNMOVED)
            self.begin_resting(within=self._keeps_within)
        return b.loss

    @torch.inference_mode(False)
    def settle(self, max_products: int = MAX_PRODUCTS) -> Restored:
        """Bring the network within the budget, and leave one alone that is within.

        In turns the network takes a restoring step and goes back a little on the straight line to the last one that is
        known to be within, until it lands at the budget.

        Args:
            max_products: The most products of all restoring steps. 0 goes back on the line, by forward passes alone.

        Returns:
            The account of it: the distance from the reference before and after, and what it took.

        Raises:
            ValueError: If there is no budget, or ``max_products`` is no whole number from 0 on.
            RuntimeError: If the network cannot be brought within. The weights are then as they were.
        """
        if not self.budget.given:
            raise ValueError("settle: there is no budget; give max_drift or max_flips.")
        check_positive("max_products", max_products, least=0)
        moved = StepParameters.of_groups(self.param_groups, lambda g, p: p.requires_grad)
        found = settle(
            self.anchors,
            moved,
            self.budget,
            self.state,
            form=self._form(moved.originals),
            max_products=max_products,
        )
        if self.check_every != 1:
            remember_within(self.state, all_params(self.param_groups))
        return found

    @torch.no_grad()
    def _take_step(self, b: SecondaryGradient) -> None:
        r"""Take the step :math:`v` that minimises :math:`v^\top g v + c^\top v` on :math:`\|v\|_P = \varepsilon`."""
        parameters, gradients, budget = self.measured(b.parameters), b.tensors, self.budget
        count, state = steps_taken(self.state), StepState(self.state, parameters)
        room = room_within(budget, self.anchors)
        if count == 0 and budget.given:
            check_within(budget, self.anchors, START)
        geometry = GEOMETRIES[self.precondition](parameters, state)
        zeros, form = parameters.zeros, self._form(parameters.originals)
        metric_of = functools.partial(
            AnchorMetric,
            self.anchors,
            parameters.originals,
            form=form,
            compile=self.compile,
            guard=False,
            frozen=zeros,
        )
        # A trace pays if products are taken. A step that may do without them runs the model, as distillation does.
        may_skip_products = gradients is not None and self.solver.tries_first_order
        trace = not may_skip_products or self.compile
        metric = metric_of(sample=self.anchors.sample(count), trace=trace)

        pull = drift_gradient(metric) if self.drift_correction else None
        if gradients is not None and zeros is not None:
            gradients = [g.masked_fill(z, 0.0) for g, z in zip(gradients, zeros, strict=True)]
        averaged = None if gradients is None else geometry.average(gradients)
        chosen = None
        if gradients is not None and any(math.isnan(beta) for beta in parameters.beta):
            chosen = automatic_beta(metric, gradients, room)
            parameters = parameters.with_beta(1.0 if chosen is None else chosen)
        kept = None
        if pull is not None and self.check_every == 1 and budget.given:
            kept = pull.clone()  # linear_term() writes to it
        c = linear_term(metric, averaged, parameters.beta, pull)
        P = geometry.update(c, finite_size(metric, c, gradients), objective=gradients is not None)
        c = metric.without_frozen(c)  # a running mean remembers weights that have become zero

        without_objective = gradients is None or all(g["beta"] == 0 for g in self.param_groups)
        seed = self.param_groups[0]["seed"]
        step = minimise(
            metric,
            c,
            parameters.length,
            P,
            self.solver,
            radius=radius(self.solver.radius, room, self.check_every),
            gradients=gradients,
            onward=without_objective,
            outputs_after=functools.partial(outputs_after, metric, budget),
            measured=is_due(budget, self.check_every, count + 1),
            direction=functools.partial(direction_onward, metric, state, seed, count),
        )
        if gradients is None:
            for k, part in enumerate(metric.unflatten(step.solution.step)):
                state.keep("velocity", k, part.clone())

        promise = promise_of_step(
            budget,
            self.check_every,
            count + 1,
            metric,
            restoring=functools.partial(down_drift, metric, kept, parameters.length, P),
            settle=self.settle,
            behind=functools.partial(
                restore_behind, self.anchors, parameters, budget, form, step.solution.products
            )
            if step.solution.products
            else None,
        )
        if self._keeps_within:
            begin_within(self.state, parameters.originals)
        end = move(metric, step, promise)
        state.commit(type(geometry))
        set_beta(self.param_groups, chosen)
        if promise is not None and self.check_every != 1:
            remember_within(self.state, all_params(self.param_groups))
        solution = step.solution.shortened(end.fraction)
        first_order = step.outputs is not None or step.unmeasured is not None
        self.last_step = StepInfo(
            loss=None if b.loss is None else float(b.loss),
            step_norm=end.length,
            effect=end.effect,
            output_change_predicted=None if first_order else solution.change,
            flips=end.flips,
            iterations=solution.products,
            residual=solution.residual,
            backtracks=end.backtracks,
        )

    def _form(self, params: list[Tensor]) -> Callable[[], Form]:
        """Tells how the metric's products over these parameters are taken, once one is needed.

        All parameters that may move are probed together.
        """
        return self._forms.later(
            params, [p for p in all_params(self.param_groups) if p.requires_grad]
        )
