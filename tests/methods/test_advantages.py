"""Group advantages, against numpy in float64, hand-computed cases and their invariances."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignbench.errors import ConfigError
from alignbench.methods.advantages import Std, group_advantages

UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # nothing here may depend on speed

SETTINGS: list[tuple[Std, int, float]] = [
    ("global", 0, 1e-4),
    ("group", 0, 1e-4),
    ("group", 1, 1e-8),
    ("global", 1, 1e-8),
    ("none", 0, 1e-4),
]


def reference(rewards: np.ndarray, groups: np.ndarray, std: Std, ddof: int, eps: float) -> np.ndarray:
    values = np.zeros(len(rewards))
    for group in np.unique(groups):
        members = groups == group
        own = rewards[members]
        if own.max() == own.min():
            continue
        scale = {"global": rewards.std(ddof=ddof), "group": own.std(ddof=ddof)}.get(std)
        values[members] = (own - own.mean()) / (1 if scale is None else scale + eps)
    return values


@pytest.mark.parametrize(("std", "ddof", "eps"), SETTINGS)
def test_follows_the_equation(std: Std, ddof: int, eps: float) -> None:
    generator = np.random.default_rng(7)
    groups = generator.permutation(np.repeat([5, -2, 900, 17], [6, 24, 1, 9]))
    rewards = generator.normal(0.3, 0.2, 40)
    rewards[groups == 17] = 0.1
    expected = reference(rewards, groups, std, ddof, eps)
    result = group_advantages(torch.from_numpy(rewards), torch.from_numpy(groups), std, ddof, eps)
    np.testing.assert_allclose(result.values.numpy(), expected, rtol=1e-12, atol=1e-14)
    assert result.constant.tolist() == np.isin(groups, [900, 17]).tolist()
    assert result.metrics() == {"constant_groups": 0.5, "nearly_constant_groups": 0}
    single = group_advantages(torch.from_numpy(rewards).float(), torch.from_numpy(groups), std, ddof, eps)
    assert single.values.dtype == torch.float32
    np.testing.assert_allclose(single.values.numpy(), expected, atol=1e-5)


def test_hand_computed_case() -> None:
    """The population std of all six is 1 exactly; the groups' sample variances are 1 / 2 and 19 / 12."""
    rewards = torch.tensor([0.0, 1.0, 1.0, 1.0, 3.0, 0.0])
    groups = torch.tensor([0, 0, 1, 1, 1, 1])
    assert group_advantages(rewards, groups, "global", 0, 0.0).values.tolist() == [-0.5, 0.5, -0.25, -0.25, 1.75, -1.25]
    by_group = group_advantages(rewards, groups, "group", 1, 0.0).values
    root = (19 / 12) ** 0.5
    expected = [-(0.5**0.5), 0.5**0.5, -0.25 / root, -0.25 / root, 1.75 / root, -1.25 / root]
    assert by_group.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("std", "ddof", "eps"), SETTINGS)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 26.3, 0.0])
def test_a_constant_group_has_no_advantage_whatever_the_rounding(std: Std, ddof: int, eps: float, value: float) -> None:
    result = group_advantages(torch.full((7,), value), torch.zeros(7, dtype=torch.int64), std, ddof, eps)
    assert not result.values.any()
    assert result.constant.all()
    assert result.metrics() == {"constant_groups": 1, "nearly_constant_groups": 0}


@pytest.mark.parametrize("eps", [1e-4, 1e-8])
def test_what_rounding_leaves_between_rewards_is_no_signal(eps: float) -> None:
    """Divided by a std with eps 1e-8, rewards 1e-7 apart would have advantages of 0.67 and -0.67."""
    rewards = torch.tensor([1.0, 1.0 + 1e-7, 0.5, 0.75, 0.2, 0.2 - 1e-7, 0.0, 0.0], dtype=torch.float64)
    groups = torch.arange(4).repeat_interleave(2)
    result = group_advantages(rewards, groups, "group", 1, eps)
    assert result.constant.tolist() == [True, True, False, False, True, True, True, True]
    assert result.nearly.tolist() == [True, True, False, False, True, True, False, False]
    assert result.metrics() == {"constant_groups": 0.75, "nearly_constant_groups": 0.5}
    assert result.values[[0, 1, 4, 5, 6, 7]].tolist() == [0] * 6
    assert result.values[3] == pytest.approx(0.125 / (0.125 * 2**0.5 + eps))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 26.0, 1e6])
def test_rounding_is_relative_to_the_scale_of_the_rewards(scale: float) -> None:
    groups = torch.tensor([0, 0, 1, 1])
    for apart, constant in ((5e-7, True), (2e-6, False)):
        rewards = scale * torch.tensor([1.0, 1 - apart, 0.5, 0.7], dtype=torch.float64)
        assert group_advantages(rewards, groups, "group", 1, 1e-8).constant.tolist() == [constant] * 2 + [False] * 2


def test_an_average_image_is_not_a_constant_group() -> None:
    result = group_advantages(torch.tensor([0.0, 1.0, 2.0]), torch.zeros(3, dtype=torch.int64), "group")
    assert result.values[1] == 0
    assert not result.constant.any()


batches = st.lists(st.tuples(st.integers(0, 4), st.integers(-8, 8)), min_size=1, max_size=30)
settings_drawn = st.sampled_from(SETTINGS)


def tensors(batch: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    groups, eighths = zip(*batch, strict=True)
    return torch.tensor(eighths, dtype=torch.float64) / 8, torch.tensor(groups)  # exact, so constancy survives a shift


@UNTIMED
@given(batches, settings_drawn, st.lists(st.integers(-20, 20), min_size=5, max_size=5))
def test_adding_a_constant_to_a_group_changes_nothing_within_it(
    batch: list[tuple[int, int]], setting: tuple[Std, int, float], offsets: list[int]
) -> None:
    """A shift of all rewards for every std; a shift of each group by its own offset where the scale is local."""
    rewards, groups = tensors(batch)
    own = setting[0] != "global"
    shift = torch.tensor(offsets, dtype=torch.float64)[groups] if own else torch.full_like(rewards, offsets[0])
    before, after = group_advantages(rewards, groups, *setting), group_advantages(rewards + shift, groups, *setting)
    torch.testing.assert_close(before.values, after.values, rtol=1e-9, atol=1e-9)
    assert torch.equal(before.constant, after.constant)


@UNTIMED
@given(batches, settings_drawn, st.randoms(use_true_random=False), st.permutations(range(5)))
def test_order_and_names_of_groups_do_not_matter(
    batch: list[tuple[int, int]], setting: tuple[Std, int, float], random: object, names: list[int]
) -> None:
    rewards, groups = tensors(batch)
    order = list(range(len(batch)))
    random.shuffle(order)  # type: ignore[attr-defined]
    before = group_advantages(rewards, groups, *setting)
    after = group_advantages(rewards[order], torch.tensor(names)[groups][order], *setting)
    torch.testing.assert_close(before.values[order], after.values, rtol=1e-12, atol=1e-12)
    assert torch.equal(before.constant[order], after.constant)
    assert before.metrics() == after.metrics()


@UNTIMED
@given(batches, settings_drawn)
def test_advantages_of_a_group_sum_to_zero_and_keep_its_order(
    batch: list[tuple[int, int]], setting: tuple[Std, int, float]
) -> None:
    rewards, groups = tensors(batch)
    values = group_advantages(rewards, groups, *setting).values
    for group in groups.unique():
        own = groups == group
        assert abs(float(values[own].sum())) < 1e-9
        assert torch.equal(values[own][rewards[own].argsort()], values[own].sort().values)


@UNTIMED
@given(batches)
def test_group_std_of_one_and_scale_invariance(batch: list[tuple[int, int]]) -> None:
    rewards, groups = tensors(batch)
    result = group_advantages(rewards, groups, "group", 0, 0.0)
    scaled = group_advantages(rewards * 16, groups, "group", 0, 0.0)
    torch.testing.assert_close(result.values, scaled.values, rtol=1e-12, atol=1e-12)
    for group in groups[~result.constant].unique():
        assert float(result.values[groups == group].std(correction=0)) == pytest.approx(1, rel=1e-9)


def test_unknown_settings_say_what_works() -> None:
    rewards, groups = torch.tensor([0.0, 1.0]), torch.tensor([0, 0])
    with pytest.raises(ConfigError, match="one of global, group, none, got 'batch'"):
        group_advantages(rewards, groups, "batch")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"ddof 0 .* or 1 .*, got 2"):
        group_advantages(rewards, groups, "group", ddof=2)
