"""Eq. 4 solved densely in float64, independently of the package: by jacrev, eigendecomposition and brentq."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.linalg
import scipy.optimize
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

SPACES: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "logits": ("logits", lambda y: y),
    "probabilities": ("probabilities", lambda y: 2 * torch.softmax(y, dim=-1).sqrt()),
    "callable": (
        lambda out: (out["logits"] if isinstance(out, dict) else out).sin().flatten(1)[:, :2],
        lambda y: y.sin().flatten(1)[:, :2],
    ),
}


def outputs(model: nn.Module, inputs: Any, space: str, params: dict[str, Tensor]) -> Tensor:
    """The outputs ``(N, m)`` in eval mode as a function of some parameters by name."""
    was_training = model.training
    model.eval()
    try:
        with sdpa_kernel(SDPBackend.MATH):
            if isinstance(inputs, dict):
                y = torch.func.functional_call(model, params, (), inputs)["logits"]
            else:
                args = inputs if isinstance(inputs, tuple) else (inputs,)
                y = torch.func.functional_call(model, params, args)
    finally:
        model.train(was_training)
    z = SPACES[space][1](y)
    return z.reshape(z.shape[0], -1)


def jacobian(model: nn.Module, inputs: Any, space: str, params: Sequence[Tensor]) -> np.ndarray:
    """The stacked Jacobian ``(N, m, n)`` with respect to ``params`` in their order."""
    names = {id(p): name for name, p in model.named_parameters()}
    values = {names[id(p)]: p.detach().clone() for p in params}
    jacobians = torch.func.jacrev(lambda q: outputs(model, inputs, space, q))(values)
    rows = [jacobians[names[id(p)]].detach() for p in params]
    return torch.cat([j.reshape(*j.shape[:2], -1) for j in rows], dim=2).double().numpy()


def flat(tensors: Sequence[Tensor]) -> np.ndarray:
    """Tensors as one flat float64 vector."""
    return torch.cat([t.detach().reshape(-1) for t in tensors]).double().numpy()


def metric(jac: np.ndarray) -> np.ndarray:
    """The metric ``(1/N) sum_i J_i^T J_i``."""
    stacked = jac.reshape(-1, jac.shape[2])
    return stacked.T @ stacked / jac.shape[0]


def roots(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the dense root of P and its inverse; ``weight`` is P or its diagonal."""
    if weight.ndim == 1:
        return np.diag(np.sqrt(weight)), np.diag(1 / np.sqrt(weight))
    values, vectors = scipy.linalg.eigh(weight)
    return (vectors * np.sqrt(values)) @ vectors.T, (vectors / np.sqrt(values)) @ vectors.T


def of_matrix(c: np.ndarray) -> np.ndarray:
    """Returns P of Muon's geometry for one matrix. The polar factor is 5 times as long in it as Adam's step."""
    rows, columns = c.shape
    u, s, vt = np.linalg.svd(c, full_matrices=False)
    if rows <= columns:
        return 5 * np.kron((u * s) @ u.T / np.sqrt(columns), np.eye(columns))
    return 5 * np.kron(np.eye(rows), (vt.T * s) @ vt / np.sqrt(rows))


def newton_schulz(s: np.ndarray) -> np.ndarray:
    """Returns what Muon's five iterations make of singular values, divided by them; they are at most 1."""
    factors = np.ones_like(s)
    for _ in range(5):
        x = s * factors
        factors = factors * (3.4445 - 4.7750 * x**2 + 2.0315 * x**4)
    return factors


def side_of_long_matrix(c: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns P of Muon's geometry on the shorter side of a matrix beyond 256, and the mean of its diagonal.

    The mean is that of the orthogonal factor's product with ``c``.
    """
    c = c if len(c) <= len(c.T) else c.T
    size = np.linalg.norm(c)
    u, s, _ = np.linalg.svd(c / size)
    s = np.concatenate([s, np.zeros(len(u) - len(s))])
    unit = 5 * size / np.sqrt(c.shape[1])
    return unit * (u / newton_schulz(s)) @ u.T, unit * float((s**2 * newton_schulz(s)).mean())


def of_long_matrix(c: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns P of Muon's geometry for one matrix beyond 256, and the mean of its diagonal."""
    side, mean = side_of_long_matrix(c)
    rows, columns = c.shape
    dense = np.kron(side, np.eye(columns)) if rows <= columns else np.kron(np.eye(rows), side)
    return dense, mean


def damped(geometry: np.ndarray, mean: float | None = None) -> np.ndarray:
    """Returns P scaled to a mean diagonal of 1, of which one hundredth comes from the identity."""
    mean = geometry.diagonal().mean() if mean is None else mean
    return (geometry / mean + 0.01 * np.eye(len(geometry))) / 1.01


def sphere_step(
    g: np.ndarray,
    c: np.ndarray,
    length: float,
    weight: np.ndarray | None = None,
    direction: np.ndarray | None = None,
) -> tuple[np.ndarray, float]:
    """The minimiser of ``v g v + c v`` on ``||v||_P = length`` and its multiplier; ``weight`` is P or its diagonal."""
    root, inverse = roots(np.ones(len(c)) if weight is None else weight)
    a = inverse @ c / 2
    eigenvalues, vectors = scipy.linalg.eigh(inverse @ g @ inverse)
    eigenvalues = np.maximum(eigenvalues, 0)
    alpha = vectors.T @ a
    lowest = eigenvalues[0]
    null = eigenvalues - lowest < 1e-11 * max(eigenvalues[-1], 1e-300)
    gap = np.where(null, 0.0, eigenvalues - lowest)
    pole = np.linalg.norm(alpha[null])
    # The length of the step at the pole mu = -lambda_min, without its part in the lowest eigenspace.
    rest = np.zeros_like(alpha)
    rest[~null] = -alpha[~null] / gap[~null]
    if pole < 1e-13 * max(np.linalg.norm(alpha), 1e-300):
        if np.linalg.norm(rest) <= length:
            assert direction is not None, "the hard case needs a direction"
            filling = np.where(null, vectors.T @ (root @ direction), 0.0)
            missing = np.sqrt(length**2 - np.linalg.norm(rest) ** 2)
            y = vectors @ (rest + filling / np.linalg.norm(filling) * missing)
            return inverse @ y, -lowest
        alpha = np.where(null, 0.0, alpha)
        pole = np.linalg.norm(alpha[~null]) * 1e-12

    def excess(log_shift: float) -> float:
        h = alpha / (gap + np.exp(log_shift))
        return np.log(np.linalg.norm(h) / length)

    low, high = np.log(pole / length) - 1e-9, np.log(np.linalg.norm(alpha) / length) + 1e-9
    shift = np.exp(scipy.optimize.brentq(excess, low, high, xtol=1e-15, rtol=8.9e-16, maxiter=500))
    y = vectors @ (-alpha / (gap + shift))
    return inverse @ y * (length / np.linalg.norm(y)), shift - lowest


def objective(g: np.ndarray, c: np.ndarray, v: np.ndarray) -> float:
    """Returns ``v g v + c v``, which Eq. 4 minimises."""
    return float(v @ g @ v + c @ v)
