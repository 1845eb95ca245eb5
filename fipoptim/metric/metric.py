r"""The metric :math:`g = \frac1N \sum_i J_i^\top J_i` of weight space: products with J, J^T and g.

``g`` is never formed. One product ``g v`` is a Jacobian-vector product followed by a vector-Jacobian product
over the anchors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Generator, Tensor

from fipoptim.anchors.batch import AnchorBatch
from fipoptim.anchors.draws import draw_seed
from fipoptim.anchors.network_function import Weights
from fipoptim.anchors.refusals import check_width, is_finite, outputs_not_finite
from fipoptim.anchors.sample import Sample
from fipoptim.flat import FlatSum, FlatVectors
from fipoptim.mean import AnchorMean
from fipoptim.metric.chunks import Form
from fipoptim.metric.density import density_of_metric
from fipoptim.metric.linearizer import Linearizer
from fipoptim.metric.matrix import (
    dense_matrix,
    estimated_diagonal,
    exact_diagonal,
    largest_of_spectrum,
    leading_eigenvectors,
)
from fipoptim.metric.parameters import parameter_names
from fipoptim.metric.probe import check_form, probe
from fipoptim.shards import local, named_parameters, space_of
from fipoptim.solver.density import SpectralDensity


class AnchorMetric:
    r"""The metric :math:`g = \frac1N \sum_i J_i^\top J_i` at the weights the model has now.

    Vectors are flat, of shape ``(n,)``, in the order of ``params``; outputs have shape ``(N, m)``. With several ranks
    those are the outputs that this rank evaluates, and every product is a collective. Of a fully sharded model each
    rank has its part of every vector, and products are taken by finite differences. A metric
    belongs to the weights it was built at and says so when they have changed. If the anchors' ``chunk_size`` is
    smaller than their number, every product evaluates the model again, chunk by chunk, and memory grows with
    the chunk; otherwise the forward pass is kept and products reuse it.

    Args:
        anchors: The anchors.
        params: The parameters, all of the model's; None takes those that require a gradient.
        sample: The anchors to use with their reference; None takes all, plain.
        form: ``"forward"`` (forward-mode AD), ``"double-vjp"``, or ``"finite-difference"``, which works on any model
            and is less precise; None probes which one is right. A function is asked for one of these when the first
            product is taken, or when a trace is made.
        trace: Trace the forward form once for each shape of anchors, which takes tenths of a second for a small
            network and seconds for a deep one; products are then faster, and do not run the model. A model that
            cannot be traced is run.
        compile: Compile the trace with ``torch.compile``: tens of seconds for each shape of anchors, and faster
            products after that. On a CPU it needs a C++ compiler.
        guard: Keep a copy of the parameters, to notice every change of them; without it, a change that torch does not
            count, such as one through ``.data``, goes unnoticed.
        frozen: For each parameter a bool tensor of its shape, True at weights that do not move: they count as
            constants, without a derivative.

    Attributes:
        anchors: The anchors.
        originals: The parameters, as the model has them.
        params: The parameters; of those that are divided among ranks, the part that this rank has.
        space: The space of flat vectors.
        names: The parameters' names in the model.
        sample: The anchors that are used, with their reference.
        frozen: The masks of weights that do not move, as given.
        flat: The layout of flat vectors.
        linearizer: The linearized outputs.
        mean: The mean over the anchors that are used.

    Raises:
        ValueError: If a parameter is not the model's, if there is none, or if the model is random in eval mode.
        TypeError: If a parameter is not a dense real float32 or float64 tensor.
        RuntimeError: If the outputs are not finite, or no form gives right products (with the cause).
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        anchors: AnchorBatch,
        params: Iterable[Tensor] | None = None,
        *,
        sample: Sample | None = None,
        form: Form | Callable[[], Form] | None = None,
        trace: bool = True,
        compile: bool = False,
        guard: bool = True,
        frozen: Sequence[Tensor] | None = None,
    ) -> None:
        if params is None:
            params = [p for p in named_parameters(anchors.model).values() if p.requires_grad]
        self.anchors = anchors
        self.originals = list(params)
        if not self.originals:
            raise ValueError("params: got none; give at least one parameter of the anchors' model.")
        self.names = parameter_names(anchors.model, self.originals)
        self.params, self.space = [local(p) for p in self.originals], space_of(self.originals)
        anchors.function.synchronize()
        if not callable(form):
            check_form(anchors, form, compile=compile)
        form = form or probe(anchors, self.originals)
        self._find_form = form if callable(form) else None
        self._form: Form | None = None if callable(form) else form
        self.sample = sample or anchors.all()
        self.flat = FlatVectors(self.params)
        self.frozen = frozen
        self._flat_mask = (
            None if frozen is None else torch.cat([mask.reshape(-1) for mask in frozen])
        )
        self._linearize = functools.partial(
            Linearizer,
            anchors,
            self.sample.inputs,
            self.names,
            compile=compile,
            guard=guard,
        )
        self._tries_trace = trace
        self.linearizer = self._linearize(form=self.form if trace else self._form, trace=trace)
        self.mean = self._check_outputs()

    @property
    def form(self) -> Form:
        """How Jacobian-vector products are taken; found out now if that was left for the first product."""
        if self._form is None:
            assert self._find_form is not None
            self._form = self._find_form()
        return self._form

    def prepare_products(self) -> None:
        """Linearize again by a trace of the derivative, if the metric was built without one and has the forward form.

        Raises:
            RuntimeError: If the outputs are not finite, or no form gives right products.
        """
        if self._tries_trace or self.form != "forward":
            return
        self._tries_trace = True
        self._linearize_again(trace=True)

    def _linearize_again(self, *, trace: bool) -> None:
        form = self.form
        del self.linearizer  # frees everything that it keeps of its evaluation
        self.linearizer = self._linearize(form=form, trace=trace)
        self._check_outputs()

    def _products(self) -> Linearizer:
        """The linearized outputs, of which Jacobian-vector products can be taken."""
        form = self.form  # which refuses a network of which no product is right
        if self.linearizer.form is None:
            self._linearize_again(trace=False)
        assert self.linearizer.form == form
        return self.linearizer

    def _check_outputs(self) -> AnchorMean:
        """The mean over the rows of all ranks, if all of them are finite."""
        check_width(self.outputs, self.sample.reference)
        ranks = self.anchors.ranks
        count, broken = ranks.sums(len(self.outputs), not is_finite(self.outputs))
        if broken:
            raise outputs_not_finite()
        return AnchorMean(int(count), ranks)

    def __repr__(self) -> str:
        """One line: sizes and the form of the products."""
        rows, columns = self.outputs.shape
        return (
            f"AnchorMetric(n={self.size}, anchors={rows}, outputs={columns}, form={self._form!r})"
        )

    @property
    def size(self) -> int:
        """The number n of weights, on all ranks together."""
        return sum(p.numel() for p in self.originals)

    @property
    def outputs(self) -> Tensor:
        """The outputs ``z`` at the weights of the metric, shape ``(N, m)``."""
        return self.linearizer.outputs

    @property
    def traced(self) -> bool:
        """Whether products come from a trace of the derivative rather than from running the model."""
        return self.linearizer.traced

    def residual(self) -> Tensor:
        """Today's distance of the outputs from the reference, :math:`r = z - z_{ref}`, shape ``(N, m)``."""
        return self.outputs - self.sample.reference.to(self.outputs.device)

    # --- products ---------------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def jvp(self, v: Tensor) -> Tensor:
        """:math:`J v`: the first-order change of the outputs, shape ``(N, m)``, for ``v`` ``(n,)``.

        Raises:
            ValueError: If ``v`` does not have the shape ``(n,)``.
            RuntimeError: If the model's weights have changed.
        """
        tangents = self.unflatten(self.without_frozen(v))
        linearizer = self._products()
        with linearizer.evaluation():
            changes = []
            for chunk in linearizer.chunks():
                changes.append(chunk.jvp(tangents))
                del chunk  # frees it before the next one is made
            return torch.cat(changes)

    @torch.inference_mode(False)
    def vjp(self, u: Tensor) -> Tensor:
        r""":math:`J^\top u`, shape ``(n,)``, for ``u`` of shape ``(N, m)``.

        Raises:
            ValueError: If ``u`` does not have the shape ``(N, m)``.
            RuntimeError: If the model's weights have changed.
        """
        if u.shape != self.outputs.shape:
            raise ValueError(
                f"u: must have the outputs' shape {tuple(self.outputs.shape)}, got {tuple(u.shape)}."
            )
        start = 0
        total = FlatSum(self.flat)
        with self.linearizer.evaluation():
            for chunk in self.linearizer.chunks():
                rows = chunk.outputs.shape[0]
                total.add(chunk.vjp(u[start : start + rows].to(chunk.outputs)))
                start += rows
                del chunk
        return self._without_frozen_(self._of_all_ranks(total.vector))

    @torch.inference_mode(False)
    def matvec(self, v: Tensor) -> Tensor:
        """:math:`g v`, shape ``(n,)``, for ``v`` ``(n,)``.

        Raises:
            ValueError: If ``v`` does not have the shape ``(n,)``.
            RuntimeError: If the model's weights have changed.
        """
        tangents = self.unflatten(self.without_frozen(v))
        total = FlatSum(self.flat)
        linearizer = self._products()
        with linearizer.evaluation():
            for chunk in linearizer.chunks():
                total.add(chunk.vjp(self.mean.weighted(chunk.jvp(tangents))))
                del chunk
        return self._without_frozen_(self._of_all_ranks(total.vector))

    def _of_all_ranks(self, vector: Tensor) -> Tensor:
        """A sum of pullbacks of this rank, over all ranks. The hooks of a fully sharded model have summed already."""
        return self.mean.total(vector) if self.space.whole else vector

    def without_frozen(self, v: Tensor) -> Tensor:
        """``v`` ``(n,)`` with 0 at the weights that do not move."""
        self.flat.check(v)
        return v if self._flat_mask is None else v.masked_fill(self._flat_mask, 0.0)

    def _without_frozen_(self, v: Tensor) -> Tensor:
        """The same in place."""
        return v if self._flat_mask is None else v.masked_fill_(self._flat_mask, 0.0)

    # --- outputs elsewhere --------------------------------------------------------------------------------

    @torch.inference_mode(False)
    def outputs_now(self) -> Tensor:
        """The outputs ``(N, m)`` at the weights the model has now, which may have moved since."""
        return self.linearizer.outputs_at(self.anchors.weights())

    @torch.inference_mode(False)
    def outputs_after(self, v: Tensor) -> Tensor:
        """The outputs ``(N, m)`` that a step ``v`` ``(n,)`` would lead to; no weight is moved."""
        return self.linearizer.outputs_at(self.weights_after(v))

    @torch.inference_mode(False)
    def weights_after(self, v: Tensor) -> Weights:
        """The network that a step ``v`` ``(n,)`` would lead to; no weight is moved."""
        weights = self.anchors.weights()
        moved = [
            # A sum may come out in the step's layout, in which a convolution can be much slower.
            total if total.stride() == p.stride() else torch.empty_like(p).copy_(total)
            for p, total in zip(
                self.params, torch._foreach_add(self.params, self.unflatten(v)), strict=True
            )
        ]
        parameters = {**weights.parameters, **dict(zip(self.names, moved, strict=True))}
        return weights._replace(parameters=parameters)

    # --- flat vectors -------------------------------------------------------------------------------------

    def flatten(self, parts: Iterable[Tensor]) -> Tensor:
        """See :meth:`FlatVectors.flatten`."""
        return self.flat.flatten(parts)

    def unflatten(self, v: Tensor) -> list[Tensor]:
        """See :meth:`FlatVectors.unflatten`."""
        return self.flat.unflatten(v)

    def views(self, v: Tensor) -> list[Tensor]:
        """See :meth:`FlatVectors.views`."""
        return self.flat.views(v)

    # --- the matrix, for small problems and for looking at it ---------------------------------------------

    def dense(self) -> Tensor:
        """The matrix ``g``, shape ``(n, n)``; for small problems, as it takes n products.

        Raises:
            ValueError: If the matrix would have more than 10^9 entries, or the model is fully sharded.
        """
        self._refuse_sharded("dense", "matvec")
        return dense_matrix(self.matvec, self.flat)

    @torch.inference_mode(False)
    def diagonal(self, probes: int | None = None, *, generator: Generator | None = None) -> Tensor:
        r"""The diagonal of ``g``, shape ``(n,)``: :math:`\frac1N \sum_{i,k} (\partial z_{ik}/\partial w_j)^2`.

        Args:
            probes: None is exact, from the N m gradients of all outputs, vectorized over anchors. A number is an
                unbiased estimate from that many pullbacks, :math:`\frac1N (J^\top u)_j^2` for random signs ``u``,
                averaged: its standard deviation is about :math:`\sqrt{2/\text{probes}}` of the value.
            generator: Draws the signs, on the CPU; None is torch's own.

        Raises:
            ValueError: If ``probes`` is not positive; or if it is None and an anchor's outputs depend on the other
                anchors (batch norm without running statistics), or the model cannot be vectorized (an RNN) or is fully
                sharded.
        """
        if probes is not None:
            return estimated_diagonal(
                self.vjp, self.outputs, self.mean, self.flat, probes, generator
            )
        self._refuse_sharded("diagonal", "a number of probes")
        diagonal = exact_diagonal(self.linearizer, self.mean, self.flat, self.anchors.chunk_size)
        return self._without_frozen_(diagonal)

    def spectrum(self, k: int, *, tol: float = 1e-4, max_products: int | None = None) -> Tensor:
        """The ``k`` largest eigenvalues of ``g``, each as often as it occurs, descending, shape ``(k,)``, float64.

        Block Lanczos with re-orthogonalisation, until the residual of each eigenvalue is below ``tol`` times the
        largest. It starts from two random vectors, because one start finds a repeated eigenvalue only once; this takes
        a fifth more products, as a rule. An eigenvalue that occurs m times takes m + 1 starts, and products in
        proportion. Under a linear head by itself each eigenvalue occurs once for each output.

        Raises:
            ValueError: If ``k`` is not between 1 and n.
            RuntimeError: If they have not converged within ``max_products`` (default: 50 (k + 1)).
        """
        return largest_of_spectrum(
            self.matvec, self.flat, k, tol=tol, max_products=max_products, space=self.space
        )

    def eigenvectors(
        self, k: int, *, tol: float = 1e-4, max_products: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The eigenvalues of :meth:`spectrum`, shape ``(k,)``, and orthonormal eigenvectors as rows, ``(k, n)``.

        There are fewer if fewer eigenvalues are other than 0. Arguments and errors are those of :meth:`spectrum`.
        """
        return leading_eigenvectors(
            self.matvec, self.flat, k, tol=tol, max_products=max_products, space=self.space
        )

    def density(
        self, probes: int = 4, steps: int = 32, *, generator: Generator | None = None
    ) -> SpectralDensity:
        r"""The density of all n eigenvalues, by stochastic Lanczos quadrature: ``probes * steps`` products at most.

        If there are fewer outputs than weights, the products are with :math:`\frac1N J J^\top`, which has the same
        eigenvalues but for zeros, and shorter vectors.

        Args:
            probes: The number of random vectors, over which the density is averaged.
            steps: Lanczos steps from each. They hold ``steps`` vectors in memory.
            generator: Gives the seed of the vectors; None takes ``torch.initial_seed()``.

        Raises:
            ValueError: If ``probes`` or ``steps`` is not positive.
        """
        seed = self.anchors.ranks.first(draw_seed(generator))
        return density_of_metric(self, probes, steps, torch.Generator("cpu").manual_seed(seed))

    def _refuse_sharded(self, what: str, advice: str) -> None:
        if self.linearizer.sharded:
            raise ValueError(f"{what}: a fully sharded model does not give it; use {advice}.")
