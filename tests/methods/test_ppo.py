"""The clipped surrogate, against numpy in float64, hand-computed cases and finite differences."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignbench.methods.ppo import clip_fraction, ppo

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # nothing here may depend on speed


@pytest.mark.parametrize(
    ("rho", "advantage", "loss"),
    [
        (1.0, 2.0, -2.0),
        (1.5, 2.0, -2.4),  # better and already more likely: clipped at 1.2
        (0.5, 2.0, -1.0),  # better but less likely: not clipped
        (1.5, -2.0, 3.0),  # worse and more likely: not clipped
        (0.5, -2.0, 1.6),  # worse and already less likely: clipped at 0.8
        (1.1, 9.0, -5.5),  # the advantage is clipped to 5 first
        (1.1, -9.0, 5.5),
        (3.0, 0.0, 0.0),
    ],
)
def test_hand_computed_cases(rho: float, advantage: float, loss: float) -> None:
    assert float(ppo(torch.tensor([rho]), torch.tensor([advantage]), 0.2)) == pytest.approx(loss, abs=1e-6)


def test_follows_the_equation() -> None:
    generator = np.random.default_rng(3)
    rho, advantage = np.exp(generator.normal(0, 2e-4, 500)), generator.normal(0, 4, 500)
    clipped = np.clip(advantage, -5, 5)
    expected = np.maximum(-clipped * rho, -clipped * np.clip(rho, 1 - 1e-4, 1 + 1e-4))
    actual = ppo(torch.from_numpy(rho), torch.from_numpy(advantage), 1e-4)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-14)
    single = ppo(torch.from_numpy(rho).float(), torch.from_numpy(advantage).float(), 1e-4)
    np.testing.assert_allclose(single.numpy(), expected, atol=2e-6)


def test_gradient_at_ratio_one_is_the_policy_gradient() -> None:
    log_ratio = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.5, -0.5, 0.0], dtype=torch.float64)
    ppo(log_ratio.exp(), advantage, 1e-4).sum().backward()
    assert log_ratio.grad is not None
    assert torch.equal(log_ratio.grad, -advantage)


def test_gradients_agree_with_finite_differences_and_vanish_where_clipped() -> None:
    rho = torch.tensor([0.5, 0.5, 0.9, 1.1, 1.5, 1.5], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 2.0, -2.0, 1.0, -1.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda rho: ppo(rho, advantage, 0.2), (rho,))
    (gradient,) = torch.autograd.grad(ppo(rho, advantage, 0.2).sum(), rho)
    assert gradient.tolist() == [-1.0, 0.0, -2.0, 2.0, 0.0, 1.0]


@UNTIMED
@given(st.floats(0.01, 10), st.floats(-5, 5), st.floats(1e-6, 0.5))
def test_is_never_more_optimistic_than_the_plain_surrogate(rho: float, advantage: float, clip_range: float) -> None:
    ratio, value = torch.tensor([rho], dtype=torch.float64), torch.tensor([advantage], dtype=torch.float64)
    assert float(ppo(ratio, value, clip_range)) >= -advantage * rho


def test_clip_fraction_counts_both_sides() -> None:
    rho = torch.tensor([0.7, 0.85, 1.0, 1.15, 1.3, 1.25, 1.1, 0.95])
    assert float(clip_fraction(rho, 0.2)) == 3 / 8
    assert float(clip_fraction(torch.ones(4), 1e-6)) == 0
