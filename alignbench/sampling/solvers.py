"""Deterministic steps along a time grid, one short function each.

All share one signature, so that a rollout is a loop over ``i`` in ``range(T)``::

    v = predict(x, grid[i])
    x, state = step(x, v, i, grid, state)

``x`` and ``v`` are [B, ...]; ``grid`` is [T + 1], decreasing from 1 to 0; ``i`` is one step for the whole batch or an
int64 tensor [B] with a step per sample. ``state`` starts as None and is what a multistep solver remembers.
In the formulas ``s = grid[i]``, ``s' = grid[i + 1]``, ``alpha = 1 - s``, ``lambda = log(alpha / s)`` and
``h = lambda' - lambda``.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from alignbench.sampling.flow import per_sample

Index = int | Tensor
State = Tensor | None
Solver = Callable[[Tensor, Tensor, Index, Tensor, State], tuple[Tensor, State]]


def euler(x: Tensor, v: Tensor, i: Index, grid: Tensor, state: State = None) -> tuple[Tensor, State]:
    """Euler's method: ``x' = x + (s' - s) v``."""
    return x + per_sample(grid[i + 1] - grid[i], x) * v, None


def ddim(x: Tensor, v: Tensor, i: Index, grid: Tensor, state: State = None) -> tuple[Tensor, State]:
    """DDIM with eta = 0 (arXiv 2010.02502, eq. 12): ``x' = (1 - s') x0_hat + s' e_hat``; Euler up to rounding."""
    s, s_next = per_sample(grid[i], x), per_sample(grid[i + 1], x)
    x0_hat = x - s * v
    e_hat = x + (1 - s) * v
    return (1 - s_next) * x0_hat + s_next * e_hat, None


def dpm1(x: Tensor, v: Tensor, i: Index, grid: Tensor, state: State = None) -> tuple[Tensor, State]:
    """DPM-Solver++ of first order (arXiv 2211.01095); Euler up to rounding.

    ``x' = (s' / s) x - alpha' (e^{-h} - 1) m_0`` with ``m_0 = x0_hat``. At both ends of the grid h is infinite, and the
    formula turns into the DDIM step by itself.
    """
    s, s_next = per_sample(grid[i], x), per_sample(grid[i + 1], x)
    h = _log_snr(s_next) - _log_snr(s)
    m_0 = x - s * v
    return s_next / s * x - (1 - s_next) * torch.expm1(-h) * m_0, None


def dpm2(x: Tensor, v: Tensor, i: Index, grid: Tensor, state: State = None) -> tuple[Tensor, State]:
    """DPM-Solver++ (2M), multistep of second order in the data prediction (arXiv 2211.01095, algorithm 2).

    ``x' = (s' / s) x - alpha' (e^{-h} - 1) (m_0 + (m_0 - m_1) / (2 r_0))``, ``r_0 = h_prev / h``. Steps 0, 1 and T - 1
    are of first order, because h is infinite in them or before them, and so is a step with ``state`` None.
    ``state`` is ``m_1``, the data prediction [B, ...] of each sample's previous step.
    """
    s, s_next = per_sample(grid[i], x), per_sample(grid[i + 1], x)
    h = _log_snr(s_next) - _log_snr(s)
    m_0 = m = x - s * v
    if state is not None:
        h_prev = _log_snr(s) - _log_snr(per_sample(grid[i - 1], x))
        second_order = h.isfinite() & h_prev.isfinite()
        m = m_0 + torch.where(second_order, h / h_prev, 0.0) / 2 * (m_0 - state)
    return s_next / s * x - (1 - s_next) * torch.expm1(-h) * m, m_0


def _log_snr(s: Tensor) -> Tensor:
    """``lambda = log((1 - s) / s)``: -inf at s = 1, +inf at s = 0."""
    return torch.log((1 - s) / s)


SOLVERS: dict[str, Solver] = {"euler": euler, "ddim": ddim, "dpm1": dpm1, "dpm2": dpm2}
