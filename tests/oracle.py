"""The paper's equations in float64 NumPy, on lists of arrays, as a reference for the library."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np


class Step(NamedTuple):
    updates: list[np.ndarray]
    global_std: float
    scale_factor: float
    exponent: int


def float64(array: Any) -> np.ndarray:
    return np.asarray(array).astype(np.float64)


def global_std(grads: Sequence[Any]) -> float:
    entries = np.concatenate([float64(g).ravel() for g in grads if np.ndim(g) > 1])
    return float(np.std(entries, ddof=1))


def zscore(grad: Any, eps: float = 1e-8) -> np.ndarray:
    """One layer's gradient, of any real or complex dtype."""
    wide = np.asarray(grad)
    wide = wide.astype(np.complex128 if np.iscomplexobj(wide) else np.float64)
    return (wide - wide.mean()) / (np.std(wide, ddof=1) + eps)


def autoscale(
    steps: Sequence[Sequence[Any]], eps: float = 1e-8, max_scale: float = np.inf
) -> list[Step]:
    """Equations 1 and 2 over a sequence of steps, each a list of gradient arrays."""
    exponent, history = 2, []
    for t, grads in enumerate(steps, start=1):
        s = global_std(grads)
        base = ((0.5 + 1 / (0.5 * (abs(np.log(s)) + eps))) - 0.5) * 2
        a = min(base**exponent, max_scale)
        updates = [a * (g - g.mean()) if g.ndim > 1 else g for g in map(float64, grads)]
        if t == 1:
            exponent = 1 if base**2 < 0.5 else 2
        history.append(Step(updates, s, float(a), exponent))
    return history
