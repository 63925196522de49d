"""How much of a gradient is signal: the estimate against known mixtures, and gradients that change nothing."""

import json
from typing import Any

import pytest
import torch

from alignbench import assembly
from alignbench.gradients import collected, measure, signal


def mixture(n: int, dimension: int, mean: float, noise: float, seed: int = 0) -> torch.Tensor:
    """Gradients around one vector of norm `mean`, with noise of standard deviation `noise` in every direction."""
    random = torch.Generator().manual_seed(seed)
    direction = torch.randn(dimension, generator=random)
    direction *= mean / direction.norm()
    return direction + noise * torch.randn(n, dimension, generator=random)


def test_a_known_mixture_is_recovered() -> None:
    found = signal(mixture(64, 1000, mean=3.0, noise=0.5))
    assert found.ratio == pytest.approx(9 / (1000 * 0.25), abs=3 * found.error)
    assert found.error < 0.3 * found.ratio
    assert found.cosine == pytest.approx(9 / (9 + 250), rel=0.2)
    assert found.n == 64


def test_the_stated_error_is_the_spread_over_repetitions() -> None:
    found = [signal(mixture(16, 300, mean=1.0, noise=0.2, seed=seed)) for seed in range(200)]
    spread = torch.tensor([each.ratio for each in found]).std()
    assert torch.tensor([each.error for each in found]).mean() == pytest.approx(float(spread), rel=0.25)


def test_noise_alone_shows_no_signal() -> None:
    inside = [
        abs(found.ratio) < 2.5 * found.error for found in (signal(mixture(16, 300, 0.0, 1.0, k)) for k in range(50))
    ]
    assert sum(inside) >= 44
    assert any(signal(mixture(16, 300, 0.0, 1.0, k)).ratio < 0 for k in range(10))  # unbiased, so it may be below 0


def test_the_scale_of_the_loss_does_not_matter() -> None:
    gradients = mixture(8, 50, 1.0, 0.3)
    assert signal(1e-4 * gradients).ratio == pytest.approx(signal(gradients).ratio, rel=1e-5)


def test_two_gradients_are_too_few() -> None:
    with pytest.raises(ValueError, match="at least 3"):
        signal(torch.randn(2, 5))


def test_gradients_are_taken_from_weights_that_stay(tiny_run: Any) -> None:
    config = tiny_run("method=diffusion_nft")
    parts = assembly.assemble(config)
    before = [parameter.clone() for group in parts.optimizer.param_groups for parameter in group["params"]]
    gradients = collected(parts, config, 3)
    after = [parameter for group in parts.optimizer.param_groups for parameter in group["params"]]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert gradients.shape == (3, sum(parameter.numel() for parameter in after))
    assert not torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients, collected(assembly.assemble(config), config, 3))


def test_a_record_counts_what_an_iteration_costs(tiny_run: Any) -> None:
    record = measure(tiny_run("method=diffusion_nft"), 3)
    assert record["tflop_per_iteration"] > 0
    json.dumps(record)
