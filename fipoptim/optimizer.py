"""FIPOptimizer: functionally invariant paths behind the interface of ``torch.optim``."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from os import PathLike
from typing import Any, cast

import torch
from torch import Generator, Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.anchors.draws import draw_seed, seed_of_step
from fipoptim.anchors.fingerprint import same_reference
from fipoptim.anchors.output_space import squared_distance
from fipoptim.budget import DriftBudget, check_unmoved, displace
from fipoptim.geometry.base import Diagonal, Geometry, Layers, is_matrix, orthogonalizing
from fipoptim.metric.chunks import Form
from fipoptim.metric.flat import parameter_names
from fipoptim.metric.metric import AnchorMetric
from fipoptim.metric.probe import probe
from fipoptim.path.record import FIPPath
from fipoptim.solver.krylov import norm
from fipoptim.solver.sphere import Solver, SphereSolution, first_order_step, solve_on_sphere

SECOND_MOMENT_DECAY = 0.999  # Adam's, of the squared gradient
# What is smaller is 0: with factors down to the precision it would give subnormal numbers.
_SMALLEST = {
    dtype: torch.finfo(dtype).tiny / torch.finfo(dtype).eps
    for dtype in (torch.float32, torch.float64)
}


@dataclass(frozen=True)
class StepInfo:
    r"""What the last step did.

    Attributes:
        loss: The secondary loss before the step; None where only ``.grad`` was given, or L = 0.
        step_norm: Euclidean length of the step taken.
        multiplier: The multiplier :math:`\mu` of Eq. 4.
        output_change_predicted: :math:`\sqrt{v^\top g v}`, the change of the outputs to first order: RMS over this
            step's anchors of :math:`\|\Delta z\|`. None where a step without products was judged by what it did.
        output_change: The same, measured.
        drift: Mean over anchors of :math:`\|z - z_{ref}\|^2` after the step: over all anchors if ``max_drift`` is
            given, else over this step's.
        iterations: Metric products taken.
        residual: Relative KKT residual of Eq. 4; None where the step took no product, or all that it was allowed: to
            know it would take half a product more.
        backtracks: How often the step was shortened or replaced to hold ``max_drift``.
    """

    loss: float | None
    step_norm: float
    multiplier: float
    output_change_predicted: float | None
    output_change: float
    drift: float
    iterations: int
    residual: float | None
    backtracks: int


class FIPOptimizer(Optimizer):
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
    :math:`\langle v, v\rangle = \epsilon`). Each group carries it as ``lr``, so schedulers of ``torch.optim`` drive it;
    with several groups the ball is :math:`\sum_{groups} \|v_{group}\|^2 / lr_{group}^2 = 1`. A group whose ``lr`` is 0
    does not move. Only ``beta / eps`` turns the step: towards 0 it is the projection of ``-b`` onto the directions
    that leave the anchors' outputs alone, towards infinity the normalised gradient.

    The gradient ``b`` is, in this order: what the closure of :meth:`step` leaves in ``.grad``; the gradient of
    ``secondary()``; ``.grad`` as it stands, where parameters without one are skipped. If there is none at all then
    ``L = 0`` (Eq. 3): the path continues its previous direction as straight as the function allows, from a seeded
    random start. A gradient that is exactly zero is a minimum: nothing moves but what restores the function.

    Where another optimizer moves other parts of the network it steps **first**: ``last_step`` and ``max_drift`` speak
    of the network as it is when this step ends.

    Args:
        params: Parameters of the anchors' model: tensors, named tensors or groups, as in ``torch.optim``.
        anchor_batch: The inputs whose outputs are to stay.
        secondary: A callable without arguments that returns the secondary loss; see :mod:`fipoptim.secondary`.
        beta: Weight of the secondary objective. May differ by group.
        eps: Length of a step.
        momentum: Decay of the running mean of ``b`` (bias-corrected); 0 takes ``b`` as it is. May differ by group. With
            ``precondition="muon"`` the mean is that of all of ``c``, with Nesterov's look-ahead.
        drift_correction: Pull back to the reference outputs rather than preserve those of the step before.
        max_drift: A promise: after every step ``anchor_batch.drift() <= max_drift``, on all anchors. Steps are
            shortened, or spent on restoring the function, until it holds. It is checked where nothing moves, too.
        precondition: ``"adam"`` measures the step in the geometry of Adam, ``P`` proportional to the damped root of
            the running mean of :math:`c^2`, scaled to a mean of 1 so that ``eps`` keeps its meaning. ``"muon"``
            measures the weights of a linear or convolutional layer as a matrix: ``P`` is :math:`(C C^\top)^{1/2}` of
            its linear term on the shorter side, so that a step without products is orthogonal, as Muon's. Biases, and
            matrices whose shorter side is beyond 256, are as with ``"adam"``.
        keep_zeros: Weights that are exactly 0 do not move, so a pruned network stays pruned. Without it they do, also
            where their gradient is masked, as what restores the function is no part of ``.grad``. In Muon's geometry
            the parameters of such a group are as with ``"adam"``. May differ by group.
        solver: A :class:`Solver`; None is the adaptive default.
        form: How the metric's products are taken, ``"forward"`` (forward-mode AD) or ``"double-vjp"``, by one who knows
            that it is right for the model. None looks which one is, on construction.
        compile: Compile the trace of the derivative with ``torch.compile``, as :class:`AnchorMetric` does.
        generator: Where the seed of the random directions comes from; None takes ``torch.initial_seed()``.

    Attributes:
        anchors: The anchors.
        last_step: A :class:`StepInfo`, or None before the first step.

    Raises:
        ValueError: If a number is negative or not finite, or a parameter is not the model's.
        TypeError: If an argument has the wrong type, or a parameter is complex, integer, sparse or of half
            precision.
        RuntimeError: If the model admits no Jacobian-vector product, with the cause.

    Example:
        >>> anchors = AnchorBatch(model, old_inputs)
        >>> opt = FIPOptimizer(model.parameters(), anchors, beta=1.0, eps=0.05)
        >>> for x, y in new_task_loader:
        ...     opt.zero_grad()
        ...     F.cross_entropy(model(x), y).backward()
        ...     opt.step()
    """

    # A GradScaler then hands its scale over in attributes instead of unscaling on its own; step() refuses it.
    _step_supports_amp_scaling = True
    _OWN = (
        "anchors",
        "secondary",
        "drift_correction",
        "max_drift",
        "precondition",
        "solver",
        "compile",
        "last_step",
        "_given_form",
        "_forms",
    )

    def __init__(
        self,
        params: ParamsT,
        anchor_batch: AnchorBatch,
        secondary: Callable[[], Tensor] | None = None,
        *,
        beta: float = 1.0,
        eps: float = 1e-2,
        momentum: float = 0.0,
        drift_correction: bool = True,
        max_drift: float | None = None,
        precondition: str | None = None,
        keep_zeros: bool = False,
        solver: Solver | None = None,
        form: Form | None = None,
        compile: bool = False,
        generator: Generator | None = None,
    ) -> None:
        if not isinstance(anchor_batch, AnchorBatch):
            raise TypeError(
                f"anchor_batch: must be an AnchorBatch, got {type(anchor_batch).__name__}; "
                "build one with AnchorBatch(model, inputs)."
            )
        if secondary is not None and not callable(secondary):
            raise TypeError(f"secondary: must be callable or None, got {type(secondary).__name__}.")
        _check_number("eps", eps)
        _check_number("beta", beta)
        _check_number("momentum", momentum, below=1.0)
        if max_drift is not None:
            _check_number("max_drift", max_drift)
        if precondition not in (None, "adam", "muon"):
            raise ValueError(f"precondition: choose None, 'adam' or 'muon', got {precondition!r}.")
        if form not in (None, "forward", "double-vjp"):
            raise ValueError(f"form: choose None, 'forward' or 'double-vjp', got {form!r}.")
        if solver is not None and not isinstance(solver, Solver):
            raise TypeError(
                f"solver: must be a fipoptim.Solver or None, got {type(solver).__name__}."
            )
        self.anchors = anchor_batch
        self.secondary = secondary
        self.drift_correction = drift_correction
        self.max_drift = max_drift
        self.precondition = precondition
        self.solver = solver or Solver()
        self.compile = compile
        self.last_step: StepInfo | None = None
        self._given_form = form
        # The probed form of the metric's products, for each set of parameters by name.
        self._forms: dict[tuple[str, ...], Form] = {}
        defaults = {
            "lr": eps,
            "beta": beta,
            "momentum": momentum,
            "keep_zeros": keep_zeros,
            "seed": draw_seed(generator),
            "reference": anchor_batch.fingerprint(),
        }
        super().__init__(params, defaults)
        _ = self.form  # probes the products before any step

    # --- torch.optim ------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of the model's parameters; ``lr``, ``beta`` and ``momentum`` may be its own.

        Raises:
            ValueError: If an option is negative or not finite, or a parameter is not the model's.
            TypeError: If a parameter is complex, integer, sparse or of half precision.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_options(group)
            parameter_names(self.anchors.model, group["params"])
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, Any]:
        """What pickle and deepcopy carry: the base class keeps only defaults, state and groups."""
        return super().__getstate__() | {name: getattr(self, name) for name in self._OWN}

    def __repr__(self) -> str:
        """As torch's, without what only a resumed run needs."""
        lines = super().__repr__().splitlines()
        return "\n".join(x for x in lines if not x.strip().startswith(("reference:", "seed:")))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a pickle's content, or what ``load_state_dict`` has read, checked here as it is all known now."""
        if "anchors" not in state:
            state = state | {"state": self._checked_state(state["state"], state["param_groups"])}
        super().__setstate__(state)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state; each group carries the fingerprint of the anchors' reference of now."""
        reference = self.anchors.fingerprint()
        for group in self.param_groups:
            group["reference"] = reference
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state as in ``torch.optim``, all of it or, where something is wrong with it, nothing.

        The anchors are not in it: restore them first, by ``anchors.load_state_dict``, or build them on the network that
        is their reference before its trained weights are loaded.

        Raises:
            ValueError: If it is the state of another optimizer, of other parameters, or of other reference outputs than
                those that the anchors hold.
        """
        super().load_state_dict(state_dict)

    @property
    def form(self) -> Form | None:
        """How the metric's products are taken, ``"forward"`` or ``"double-vjp"``, as given or probed on construction.

        None if no parameter requires a gradient.
        """
        params = [p for p in self._all_params() if p.requires_grad]
        return self._form(params) if params else None

    def record(self, every: int = 1, folder: str | PathLike[str] | None = None) -> FIPPath:
        """Sample the networks of a run: ``with opt.record(every=10) as path: ...``.

        Args:
            every: Steps between two recorded networks; the start and the last one are always recorded.
            folder: Where to keep them as safetensors; None keeps them in memory.
        """
        return FIPPath(self, every=every, folder=folder)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Reevaluates the model, calls backward and returns the loss, as in ``torch.optim``.

        Returns:
            The closure's loss, or that of ``secondary``, or None.

        A closure that returns None and leaves no gradient skips its batch: nothing moves.

        Raises:
            RuntimeError: If the closure returns a loss and leaves no gradient, if outputs or gradients are not finite,
                if ``max_drift`` cannot be held, or under a GradScaler. The weights are then as they were.
        """
        self._refuse_grad_scaler()
        with torch.inference_mode(False):
            loss, params, gradients = self._gradient(closure)
            if params:
                self._move(loss, params, gradients)
            elif self.max_drift is not None:
                check_unmoved(self.max_drift, self.anchors)
            self._begin_resting()
        return loss

    # --- the gradient of the secondary objective -------------------------------------------------------

    def _gradient(
        self, closure: Callable[[], Any] | None
    ) -> tuple[Any, list[Tensor], list[Tensor] | None]:
        """The loss, the parameters that move, and their gradients; None for the last means L = 0."""
        if closure is None and self.secondary is not None:
            return self._secondary_gradient()
        if closure is None:
            loss = None
            if all(p.grad is None for p in self._all_params()):
                return None, self._moving(lambda p: p.requires_grad), None
        else:
            loss, changed = self._call(closure)
            if loss is None and not (changed and self._any_gradient()):
                return None, [], None
            if not changed:
                raise RuntimeError(
                    "closure: it left no new gradient on any parameter; it must call loss.backward() "
                    "and return the loss, or return None to skip a batch."
                )
        params = self._moving(lambda p: p.grad is not None)
        return loss, params, [_dense(cast(Tensor, p.grad)) for p in params]

    def _call(self, closure: Callable[[], Any]) -> tuple[Any, bool]:
        """The closure's loss, and whether it has changed any ``.grad``."""

        def gradients() -> list[tuple[Tensor | None, int]]:
            found = [p.grad for p in self._all_params()]
            return [(g, 0 if g is None else g._version) for g in found]

        before = gradients()
        with torch.enable_grad():
            loss = closure()
        pairs = zip(before, gradients(), strict=True)
        return loss, any(old is not new or version != now for (old, version), (new, now) in pairs)

    def _any_gradient(self) -> bool:
        """Whether any ``.grad`` is there and not zero."""
        gradients = [p.grad for p in self._all_params() if p.grad is not None]
        return any(bool(g.to_dense().any()) for g in gradients)

    def _secondary_gradient(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        params = self._moving(lambda p: p.requires_grad)
        loss = self._secondary_loss()
        gradients = torch.autograd.grad(loss, params, allow_unused=True) if params else ()
        if params and all(g is None for g in gradients):
            raise RuntimeError(
                "secondary: its loss depends on none of the parameters that this optimizer moves. "
                "Does it still hold the model that was optimized before a copy?"
            )
        # A parameter that the loss does not depend on may still move to keep the function.
        found = zip(params, gradients, strict=True)
        return (
            loss.detach(),
            params,
            [torch.zeros_like(p) if g is None else _dense(g) for p, g in found],
        )

    def _secondary_loss(self) -> Tensor:
        assert self.secondary is not None
        with torch.enable_grad():
            loss = self.secondary()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise RuntimeError(f"secondary: must return a scalar loss tensor, got {got}.")
        if not loss.requires_grad:
            raise RuntimeError(
                "secondary: its loss does not depend on any parameter; compute it from the model, "
                "without detach() or no_grad()."
            )
        return loss.reshape(())

    # --- the step ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def _move(self, loss: Any, params: list[Tensor], gradients: list[Tensor] | None) -> None:
        count = self._steps_taken()
        sample, form = self.anchors.sample(count), self._form(params)
        # A trace pays where products are taken; a step that may do without runs the model, as distillation does.
        first_order = gradients is not None and self.solver.products in ("adaptive", 0)
        trace = not first_order or self.compile
        held = self._zeros_to_keep(params)
        metric = AnchorMetric(
            self.anchors,
            params,
            sample=sample,
            form=form,
            trace=trace,
            compile=self.compile,
            guard=False,
            frozen=held,
        )
        residual_outputs = metric.outputs - metric.sample.reference.to(metric.outputs.device)
        restoring = self._restoring_term(metric, residual_outputs)
        new_state: dict[Tensor, dict[str, Tensor]] = {p: {} for p in params}
        if gradients is not None and held is not None:
            gradients = [
                g.masked_fill(zeros, 0.0) for g, zeros in zip(gradients, held, strict=True)
            ]
        linear, squares, unit = self._linear_term(metric, gradients, restoring, new_state)
        geometry, length = self._ball(metric, linear, squares, unit)
        del squares
        idle = all(float(group["beta"]) == 0 for group in self.param_groups)
        tried = self._try(metric, linear, geometry, length)
        if tried is not None:
            solution = tried.solution
        else:
            if not trace and form == "forward":
                del metric  # with all that it kept of the evaluation
                metric = AnchorMetric(
                    self.anchors,
                    params,
                    sample=sample,
                    form=form,
                    compile=self.compile,
                    guard=False,
                    frozen=held,
                )
            # At a minimum of L nothing is to be gained by moving; without L there is always a direction.
            stationary = gradients is not None and not idle and _size(gradients) == 0.0
            solution = self._solve(
                metric,
                linear,
                geometry,
                length,
                None if stationary else lambda: self._direction(metric, count),
                onward=gradients is None or idle,
            )
        if gradients is None:
            velocity = metric.unflatten(solution.step)
            for p, part in zip(params, velocity, strict=True):
                new_state[p]["velocity"] = part.clone()
        self._apply(loss, metric, solution, geometry, length, tried)
        self._commit(params, new_state)

    def _restoring_term(self, metric: AnchorMetric, residual: Tensor) -> Tensor | None:
        r""":math:`\frac2N J^\top r`, the gradient of the drift; None for zero, and without drift correction."""
        if not self.drift_correction or not bool(residual.any()):
            return None
        return metric.vjp(residual * (2.0 / residual.shape[0]))

    def _linear_term(
        self,
        metric: AnchorMetric,
        gradients: list[Tensor] | None,
        restoring: Tensor | None,
        new_state: dict[Tensor, dict[str, Tensor]],
    ) -> tuple[Tensor, dict[int, Tensor], float]:
        """``c`` with momentum, running means of the squares of ``c``, by parameter, where the geometry needs them, and
        the unit of ``c`` in these.

        ``restoring`` may be written over.
        """
        muon = self.precondition == "muon"
        if gradients is None:
            if restoring is None:
                restoring = metric.flatten(torch.zeros_like(p) for p in metric.params)
            return restoring, *self._mean_squares(
                metric, restoring, _finite_size(restoring, None), new_state
            )
        means = None if muon else self._averaged(metric, gradients, new_state)
        linear = self._combined(metric, gradients if means is None else means, restoring)
        squares, unit = self._mean_squares(
            metric, linear, _finite_size(linear, gradients), new_state
        )
        if muon:
            # Of all of c, as what the draw of anchors adds to the restoring term would turn an orthogonal step too.
            means = self._averaged(metric, metric.unflatten(linear), new_state)
            if means is not None:  # Nesterov's look-ahead: the mean if c came again
                momenta = self._options("momentum", metric.params)
                given = [mean.to(linear) for mean in means]
                torch._foreach_lerp_(metric.views(linear), given, momenta)
        return linear, squares, unit

    def _combined(
        self, metric: AnchorMetric, gradients: list[Tensor], restoring: Tensor | None
    ) -> Tensor:
        r""":math:`\beta b + \frac2N J^\top r`, flat; the restoring term is written over."""
        betas = self._options("beta", metric.params)
        if len(set(betas)) > 1:
            gradients, betas = list(torch._foreach_mul(gradients, betas)), [1.0]
        if restoring is None:
            return metric.flatten(gradients).mul_(betas[0])
        given = [g.to(restoring.device) for g in gradients]
        torch._foreach_add_(metric.views(restoring), given, alpha=betas[0])
        return restoring

    def _averaged(
        self,
        metric: AnchorMetric,
        gradients: list[Tensor],
        new_state: dict[Tensor, dict[str, Tensor]],
    ) -> list[Tensor] | None:
        """Running means of ``gradients``, free of the bias of a start at zero; None without momentum."""
        momenta = self._options("momentum", metric.params)
        if not any(momenta):
            return None
        # The weight that a mean has seen so far, which a scheduler may change on the way. It is kept on the CPU, as
        # the steps are: to read it from a GPU would wait for all that is queued there.
        seen = [
            float(self.state.get(p, {}).get("exp_avg_weight", 0.0)) * m + (1 - m)
            for p, m in zip(metric.params, momenta, strict=True)
        ]
        fresh = [(1 - m) / share for m, share in zip(momenta, seen, strict=True)]
        running = torch._foreach_lerp(self._kept("exp_avg", metric.params), gradients, fresh)
        for mean in running:
            # The mean of a gradient that stays zero, as a dead unit's, would decay into subnormal numbers and never
            # reach zero, and a CPU, unlike a GPU, computes with those many times slower.
            if mean.device.type == "cpu":
                torch.hardshrink(mean, _SMALLEST[mean.dtype], out=mean)
        for p, m, mean, share in zip(metric.params, momenta, running, seen, strict=True):
            if m > 0:
                new_state[p] |= {
                    "exp_avg": mean,
                    "exp_avg_weight": torch.tensor(share, dtype=p.dtype, device="cpu"),
                }
        return list(running)

    def _kept(self, name: str, params: list[Tensor]) -> list[Tensor]:
        """The running means kept under ``name``, of each parameter; zeros before its first step."""
        states = [self.state.get(p, {}) for p in params]
        return [
            state[name] if name in state else torch.zeros_like(p)
            for p, state in zip(params, states, strict=True)
        ]

    def _mean_squares(
        self,
        metric: AnchorMetric,
        linear: Tensor,
        size: float,
        new_state: dict[Tensor, dict[str, Tensor]],
    ) -> tuple[dict[int, Tensor], float]:
        """The running means of the squares of ``c``, free of the bias of a start at zero, where they are needed.

        That is for all parameters in Adam's geometry, and in Muon's for those that are no matrices. They are in units
        of the number that comes second: 1, unless squares of ``c``, whose length is ``size``, overflow or underflow.
        """
        of = [k for k, wanted in enumerate(self._by_squares(metric.params)) if wanted]
        if not of:
            return {}, 1.0
        parts = metric.unflatten(linear)
        params, terms = [metric.params[k] for k in of], [parts[k] for k in of]
        steps = [float(self.state.get(p, {}).get("step", 0.0)) + 1 for p in params]
        fresh = [(1 - SECOND_MOMENT_DECAY) / (1 - SECOND_MOMENT_DECAY**count) for count in steps]
        kept = self._kept("exp_avg_sq", params)
        unit = _unit(size, kept)
        running = _running_squares(kept, terms, fresh)
        measured = running
        if unit != 1.0:
            kept = [mean.double().div_(unit).div_(unit).to(mean) for mean in kept]
            measured = _running_squares(kept, [term / unit for term in terms], fresh)
            # The largest number of a precision stands for those beyond it.
            running = [mean.clamp_(max=torch.finfo(mean.dtype).max) for mean in running]
        for p, mean_square in zip(params, running, strict=True):
            new_state[p]["exp_avg_sq"] = mean_square
        return dict(zip(of, measured, strict=True)), unit

    def _ball(
        self, metric: AnchorMetric, linear: Tensor, squares: dict[int, Tensor], unit: float
    ) -> tuple[Geometry | None, float]:
        """The geometry of the step (None for the Euclidean one) and its length; ``unit`` is that of ``squares``."""
        params = metric.params
        rates = self._options("lr", params)
        # Only the ratios matter: measure lengths in units of the largest.
        length = max(rates)
        # Bounded, so that a rate of almost nothing does not overflow float32.
        stretch = [min(length / rate, 1e15) for rate in rates]
        if self.precondition is not None:
            # All that has no mean square is a matrix.
            measured = linear if unit == 1.0 else linear / unit
            matrices = {k: c for k, c in enumerate(metric.views(measured)) if k not in squares}
            shapes = [p.shape for p in params]
            return Layers(shapes, squares, orthogonalizing(matrices), linear, stretch), length
        if all(factor == 1.0 for factor in stretch):
            return None, length
        ratios = (torch.full_like(p, factor**2) for p, factor in zip(params, stretch, strict=True))
        return Diagonal(metric.flatten(ratios)), length

    def _direction(self, metric: AnchorMetric, count: int) -> Tensor:
        """The direction of the hard case: the previous velocity, or a seeded random one."""
        parts = []
        seed = seed_of_step(self.param_groups[0]["seed"], count)
        seeded = torch.Generator("cpu").manual_seed(seed)
        fixed = self.anchors.padding_rows()
        for name, p in zip(metric.names, metric.params, strict=True):
            velocity = self.state.get(p, {}).get("velocity")
            if velocity is None or not bool(velocity.any()):
                velocity = torch.randn(
                    p.shape, generator=seeded, dtype=torch.float64, device="cpu"
                ).to(p)
            if name in fixed:
                rows = torch.tensor(fixed[name], device=p.device)
                velocity = velocity.index_fill(0, rows, 0.0)  # Eq. 4 has no say there
            parts.append(velocity)
        return metric.without_frozen(metric.flatten(parts))

    def _solve(
        self,
        metric: AnchorMetric,
        linear: Tensor,
        geometry: Geometry | None,
        length: float,
        direction: Callable[[], Tensor] | None,
        *,
        onward: bool = False,
    ) -> SphereSolution:
        """Solve Eq. 4 with as many products as the solver's settings say."""
        solver = self.solver
        adaptive = solver.products == "adaptive"
        solution = solve_on_sphere(
            metric.matvec,
            linear,
            length,
            geometry=geometry,
            direction=direction,
            # To go on takes one product for the direction and one for what restores.
            max_products=max(
                solver.max_products if adaptive else int(solver.products), 2 if onward else 1
            ),
            tol=solver.tol,
            accept=self._accepts if adaptive else None,
            quadratic=lambda v: _rms(metric.jvp(v)) ** 2,
            onward=onward,
        )
        return self._within_radius(solution)

    def _try(
        self, metric: AnchorMetric, linear: Tensor, geometry: Geometry | None, length: float
    ) -> _Tried | None:
        r"""The step without products, where what it would do to the outputs is good enough; None where it is not.

        If no products are allowed, it is shortened to the radius instead. The outputs after a step are evaluated in
        any case; here they stand for :math:`J v` as well.
        """
        adaptive = self.solver.products == "adaptive"
        if not adaptive and self.solver.products != 0:
            return None
        step, gain = first_order_step(linear, length, geometry)
        if gain == 0.0 or not math.isfinite(gain):
            return None
        outputs = self._outputs_after(metric, step)
        change = _rms(outputs - metric.outputs)
        # Eq. 4 restricted to this line: its multiplier is negative where the step passes the line's minimum.
        multiplier = (gain / 2 - change**2) / length**2
        if adaptive and not self._accepts(change, multiplier):
            return None
        whole = SphereSolution(step, multiplier, change, 0, None)
        solution = self._within_radius(whole)
        return _Tried(
            solution, outputs if solution is whole else self._outputs_after(metric, solution.step)
        )

    def _outputs_after(self, metric: AnchorMetric, step: Tensor) -> Tensor:
        """The outputs that a step leads to; a promise about them is judged by the evaluation that drift() takes."""
        if self.max_drift is None or metric.sample.inputs is not self.anchors.inputs:
            return metric.outputs_after(step)
        return self.anchors.outputs(self.anchors.inputs, metric.weights_after(step))

    def _within_radius(self, solution: SphereSolution) -> SphereSolution:
        """The step, shortened to the solver's radius if it goes further; one that breaks is left, to be told."""
        radius = self.solver.radius
        if radius is not None and radius < solution.change < math.inf:
            return _shortened(solution, radius / solution.change)
        return solution

    def _accepts(self, change: float, multiplier: float) -> bool:
        radius = self.solver.radius
        return change <= radius if radius is not None else multiplier >= 0

    # --- moving the weights, and back --------------------------------------------------------------------

    def _apply(
        self,
        loss: Any,
        metric: AnchorMetric,
        solution: SphereSolution,
        geometry: Geometry | None,
        length: float,
        tried: _Tried | None,
    ) -> None:
        """Move the weights by the step; put them back if the outputs break, shorten it if the drift does."""
        params, step = metric.params, metric.unflatten(solution.step)
        moved = norm(solution.step)
        if not math.isfinite(moved):
            raise RuntimeError("step: the solution of Eq. 4 is not finite; no weight was changed.")
        factor, backtracks, drift = 1.0, 0, None
        outputs = None if tried is None else _finite(tried.outputs)
        if outputs is not None and self.max_drift is None:
            torch._foreach_add_(params, step)  # it is known where that leads
        else:
            start = metric.unflatten(metric.flatten(params))
            try:
                if self.max_drift is None:
                    torch._foreach_add_(params, step)
                else:
                    every_anchor = metric.sample.inputs is self.anchors.inputs
                    budget = DriftBudget(
                        self.max_drift,
                        self.anchors,
                        params,
                        self._form(params),
                        geometry=geometry,
                        length=length,
                        max_products=self.solver.max_products,
                        frozen=metric.frozen,
                        compile=self.compile,
                    )
                    end = budget.hold(start, step, outputs if every_anchor else None)
                    factor, backtracks, drift = end.kept, end.backtracks, end.drift
                    if every_anchor:
                        outputs = end.outputs
                    elif backtracks:
                        outputs = None
                outputs = _finite(metric.outputs_now() if outputs is None else outputs)
            except BaseException:
                displace(params, start)
                raise
            if backtracks:  # the function was restored behind the step
                moved = norm(metric.flatten(torch._foreach_sub(params, start)))
        solution = _shortened(solution, factor)
        if drift is None:
            drift = float(squared_distance(outputs, metric.sample.reference).mean())
        self.last_step = StepInfo(
            loss=None if loss is None else float(loss),
            step_norm=moved,
            multiplier=solution.multiplier,
            output_change_predicted=None if tried else solution.change,
            output_change=_rms(outputs - metric.outputs),
            drift=drift,
            iterations=solution.products,
            residual=solution.residual,
            backtracks=backtracks,
        )

    # --- state ------------------------------------------------------------------------------------------

    def _commit(self, params: list[Tensor], new_state: dict[Tensor, dict[str, Tensor]]) -> None:
        self._begin_state(params)
        for p in params:
            self.state[p]["step"] += 1
            self.state[p] |= new_state[p]

    def _begin_resting(self) -> None:
        """Begin the state of parameters that have a gradient and an ``lr`` of 0, as distributed checkpointing asks for.

        It loads a state into the one that such a step leaves. For the next step it is as if there were none.
        """
        resting = [
            p
            for group in self.param_groups
            if float(group["lr"]) == 0
            for p in group["params"]
            if p.grad is not None
        ]
        self._begin_state(resting, own_memory=True)

    def _begin_state(self, params: list[Tensor], *, own_memory: bool = False) -> None:
        """Complete the state of ``params`` by zeros: its keys depend on the options and not on the run.

        Args:
            params: The parameters.
            own_memory: Give each zero memory of its own, to be written to.
        """
        options = zip(
            params, self._options("momentum", params), self._by_squares(params), strict=True
        )
        for p, momentum, squares in options:
            state = self.state[p]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
            if momentum > 0 and "exp_avg" not in state:
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_weight"] = torch.zeros((), dtype=p.dtype, device="cpu")
            if squares and "exp_avg_sq" not in state:
                state["exp_avg_sq"] = torch.zeros_like(p)
            if "velocity" not in state:
                state["velocity"] = torch.zeros_like(p) if own_memory else _no_velocity(p)

    def _by_squares(self, params: list[Tensor]) -> list[bool]:
        """For each parameter whether the geometry measures it by the running mean of its squares."""
        if self.precondition != "muon":
            return [self.precondition is not None] * len(params)
        kept = self._options("keep_zeros", params)
        return [not is_matrix(p) or bool(keep) for p, keep in zip(params, kept, strict=True)]

    def _checked_state(
        self, state: Mapping[Tensor, dict[str, Any]], groups: list[dict[str, Any]]
    ) -> defaultdict[Tensor, dict[str, Any]]:
        """The state of each parameter that is being loaded, if it can be this optimizer's.

        Raises:
            ValueError: If it cannot.
        """
        reference = self.anchors.fingerprint()
        for i, group in enumerate(groups):
            if missing := _OPTIONS - group.keys():
                raise ValueError(
                    f"state_dict: group {i} lacks {sorted(missing)}; it is not the state of a FIPOptimizer. "
                    "Nothing was loaded."
                )
            try:
                _check_options(group)
            except (TypeError, ValueError) as error:
                raise ValueError(f"state_dict: group {i}: {error} Nothing was loaded.") from error
            if not same_reference(group["reference"], reference):
                raise ValueError(
                    "state_dict: was saved with other reference outputs than those that the anchors hold. Anchors that "
                    "are built after the trained weights were restored take the resumed network for the reference. "
                    "Save anchors.state_dict() beside the optimizer's and restore it first, by "
                    "anchors.load_state_dict(...), or build the AnchorBatch on the network that is its reference "
                    "before its weights are replaced. Nothing was loaded."
                )
        checked = {p: _checked_entries(p, entries) for p, entries in state.items()}
        return defaultdict(dict, checked)

    # --- parameters ---------------------------------------------------------------------------------------

    def _all_params(self) -> list[Tensor]:
        return list(dict.fromkeys(p for group in self.param_groups for p in group["params"]))

    def _options(self, name: str, params: list[Tensor]) -> list[float]:
        """An option of the groups, of each parameter."""
        of: dict[Tensor, float] = {}
        for group in self.param_groups:
            of |= dict.fromkeys(group["params"], float(group[name]))
        return [of[p] for p in params]

    def _zeros_to_keep(self, params: list[Tensor]) -> list[Tensor] | None:
        """Where each parameter is zero and is to stay it; None if that is nowhere asked for."""
        kept = self._options("keep_zeros", params)
        if not any(kept):
            return None
        return [
            p == 0 if keep else torch.zeros_like(p, dtype=torch.bool)
            for p, keep in zip(params, kept, strict=True)
        ]

    def _moving(self, wanted: Callable[[Tensor], bool]) -> list[Tensor]:
        """The parameters a step may move: those wanted, in groups whose ``lr`` is not zero."""
        return [
            p
            for group in self.param_groups
            if _check_options(group)
            for p in dict.fromkeys(group["params"])
            if wanted(p)
        ]

    def _steps_taken(self) -> int:
        return int(max((float(state.get("step", 0)) for state in self.state.values()), default=0))

    def _form(self, params: list[Tensor]) -> Form:
        """How the metric's products over these parameters are taken: as the caller says, or probed once."""
        if self._given_form is not None:
            return self._given_form
        names = tuple(parameter_names(self.anchors.model, params))
        if names not in self._forms:
            self._forms[names] = probe(self.anchors, params)
        return self._forms[names]

    def _refuse_grad_scaler(self) -> None:
        handed = [self.__dict__.pop(name, None) for name in ("grad_scale", "found_inf")]
        if any(value is not None for value in handed):
            raise RuntimeError(
                "GradScaler: FIPOptimizer cannot be stepped by one, as scaled gradients change beta. Use "
                "bfloat16 autocast, which needs no scaler, or GradScaler(enabled=False)."
            )


@dataclass(frozen=True)
class _Tried:
    """A step without products, and the outputs on its anchors that it leads to."""

    solution: SphereSolution
    outputs: Tensor


def _check_number(name: str, value: Any, *, below: float = math.inf) -> float:
    """``value`` as a float, if it is a number or a tensor of one, finite, not negative and less than ``below``."""
    if not isinstance(value, (Real, Tensor)):
        raise TypeError(f"{name}: must be a number, got {value!r}.")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(
            f"{name}: must be a single number, got a tensor of shape {tuple(value.shape)}."
        )
    number = float(value)
    if not (math.isfinite(number) and 0 <= number < below):
        limit = "finite and >= 0" if below == math.inf else f"in [0, {below:g})"
        raise ValueError(f"{name}: must be {limit}, got {value!r}.")
    return number


def _check_options(group: dict[str, Any]) -> bool:
    """Check the numbers of a group, which schedulers and users may have changed; whether it moves at all."""
    _check_number("beta", group["beta"])
    _check_number("momentum", group["momentum"], below=1.0)
    if not isinstance(group["keep_zeros"], bool):
        raise TypeError(f"keep_zeros: must be True or False, got {group['keep_zeros']!r}.")
    return _check_number("lr", group["lr"]) > 0


# What this optimizer keeps of a group, beside the parameters, and of a parameter.
_OPTIONS = {"lr", "beta", "momentum", "keep_zeros", "seed", "reference"}
_ENTRIES = {"step", "exp_avg", "exp_avg_weight", "exp_avg_sq", "velocity"}


def _checked_entries(p: Any, entries: dict[str, Any]) -> dict[str, Any]:
    """The state of one parameter; a flattened distributed checkpoint gives what it lacks as an empty dictionary."""
    if not isinstance(p, Tensor):
        raise ValueError(
            f"state_dict: holds {p!r} beside the state of each parameter; it is not the state of a FIPOptimizer. "
            "Nothing was loaded."
        )
    entries = {
        name: value
        for name, value in entries.items()
        if not (isinstance(value, dict) and not value)
    }
    if unknown := entries.keys() - _ENTRIES:
        raise ValueError(
            f"state_dict: holds {sorted(map(str, unknown))} of a parameter; it is not the state of a FIPOptimizer. "
            "Nothing was loaded."
        )
    for name, value in entries.items():
        single = name in ("step", "exp_avg_weight")
        if isinstance(value, Tensor):
            fits = value.numel() == 1 if single else value.shape == p.shape
            right = fits and bool(torch.isfinite(value).all())
        else:
            right = single and isinstance(value, Real) and math.isfinite(value)
        if not right:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ValueError(
                f"state_dict: {name!r} of a parameter of shape {tuple(p.shape)} must be finite and "
                f"{'one number' if single else 'of that shape'}, got {got}. Nothing was loaded."
            )
    velocity = entries.get("velocity")
    if velocity is not None and not bool(velocity.any()):
        entries["velocity"] = _no_velocity(p)
    return entries


def _no_velocity(p: Tensor) -> Tensor:
    """Zeros in the shape of ``p`` that take the memory of one: only a run without an objective has a velocity."""
    return torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape)


def _dense(gradient: Tensor) -> Tensor:
    if gradient.layout != torch.strided:
        raise RuntimeError(
            "gradient: is sparse; FIPOptimizer needs dense gradients (build embeddings with sparse=False)."
        )
    return gradient.detach()


def _finite_size(linear: Tensor, gradients: list[Tensor] | None) -> float:
    """The length of the linear term.

    Raises:
        RuntimeError: If it is not finite, with the cause.
    """
    size = norm(linear)
    if math.isfinite(size):
        return size
    if gradients is not None and not math.isfinite(_size(gradients)):
        raise RuntimeError(
            "gradient: holds NaN or infinite values; no weight was changed. "
            "Skip such batches or lower the learning rate."
        )
    raise RuntimeError(
        "gradient: with the restoring term it is not finite; no weight was changed. Lower eps or beta."
    )


def _unit(size: float, kept: list[Tensor]) -> float:
    """A power of two near the largest of what is squared, if its square overflows or underflows; else 1."""
    if 1e-12 < size < 1e15:
        return 1.0
    largest = max([float(mean.max()) for mean in kept if mean.numel()], default=0.0)
    largest = max(size, math.sqrt(largest))
    return 1.0 if largest == 0.0 or 1e-12 < largest < 1e15 else 2.0 ** math.frexp(largest)[1]


def _running_squares(kept: list[Tensor], terms: list[Tensor], fresh: list[float]) -> list[Tensor]:
    running = torch._foreach_mul(kept, [1 - f for f in fresh])
    torch._foreach_addcmul_(running, terms, terms, fresh)
    return list(running)


def _size(parts: list[Tensor]) -> float:
    """The Euclidean length of all parts together; NaN or infinite if, and only if, an entry is."""
    result = float(get_total_norm(parts))
    if 1e-15 < result < math.inf:
        return result
    # Also where the squares of float32 overflow or underflow.
    return float(get_total_norm([p.double() for p in parts]))


def _finite(outputs: Tensor) -> Tensor:
    """The outputs after a step, unless they break."""
    if not bool(torch.isfinite(outputs).all()):
        raise RuntimeError(
            "model: its outputs on the anchors are not finite after the step; "
            "the weights are as they were. Lower eps."
        )
    return outputs


def _rms(change: Tensor) -> float:
    r"""RMS over anchors of :math:`\|\Delta z\|`, for ``change`` of shape ``(N, m)``."""
    return math.sqrt(float(change.double().square().sum()) / change.shape[0])


def _shortened(solution: SphereSolution, factor: float) -> SphereSolution:
    """The same step, ``factor`` times as long."""
    return SphereSolution(
        solution.step * factor if factor != 1.0 else solution.step,
        solution.multiplier,
        solution.change * factor,
        solution.products,
        solution.residual,
    )
