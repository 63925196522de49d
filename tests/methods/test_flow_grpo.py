"""Flow-GRPO's loss, assembled from the stack, against a NumPy evaluation in float64 of the paper's equations."""

import math

import numpy as np
import pytest
import torch

from alignbench import assembly
from alignbench.assembly import Parts
from alignbench.errors import ConfigError
from alignbench.methods.advantages import add_advantages, group_advantages
from alignbench.methods.flow_grpo import FlowGRPO, Window
from alignbench.methods.method import Clock, Experience, Update
from alignbench.prompts.sets import draw
from alignbench.seeding import seeds_of
from alignbench.training import optimizer_step
from tests.conftest import Compose

DOUBLE = (
    "model.policy.dtype=float64",
    "method=flow_grpo",
    "overlay=none",
    "method.algorithm.kl=0.04",
    "method.batch.updates=1",
)


@pytest.fixture
def parts(tiny_run: Compose) -> Parts:
    parts = assembly.assemble(tiny_run(*DOUBLE))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in parts.policy.trainable_parameters().items():
        if "lora_B" in name:  # away from the reference, so that every term matters
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return parts


def collected(parts: Parts) -> tuple[FlowGRPO, Update]:
    method = parts.method
    assert isinstance(method, FlowGRPO)
    prompts = draw(parts.prompts, method.batch.prompts, 0, 0, "none")
    experience = method.collect(parts.stack, prompts, Clock())
    return method, next(method.updates(experience, parts.stack, Clock()))


def perturb(parts: Parts) -> None:
    """Move the current weights off the ones that sampled, so that ratios differ from 1."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parts.policy.trainable_parameters().values():
        parameter.data += 0.003 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


def test_ratio_is_one_before_the_first_update(parts: Parts) -> None:
    method, update = collected(parts)
    loss = method.loss(parts.stack, update, update.batch(range(update.atoms)))
    assert float(loss.largest["ratio_deviation"]) <= 1e-10


def test_ratio_is_one_in_float32_within_a_twentieth_of_the_clip_range(tiny_run: Compose) -> None:
    parts = assembly.assemble(tiny_run("method=flow_grpo", "method.batch.updates=1"))
    method, update = collected(parts)
    for atoms in (range(update.atoms), range(3)):  # also in other company than during the rollout
        loss = method.loss(parts.stack, update, update.batch(atoms))
        assert float(loss.largest["ratio_deviation"]) <= 0.05 * method.clip_range


def test_recomputed_log_probabilities_are_those_of_the_rollout(parts: Parts) -> None:
    method, update = collected(parts)
    method.recompute_log_prob = True
    before = parts.ledger.row()["nfe"]
    method.prepare(parts.stack, update)
    stored = update.batch(range(update.atoms)).terms["old_log_prob"]
    torch.testing.assert_close(update.shared["old_log_prob"], stored, rtol=0, atol=1e-10)
    branches = 2  # guidance
    assert parts.ledger.row()["nfe"] - before == branches * update.atoms


def test_loss_equals_the_papers_equations(parts: Parts) -> None:
    method, update = collected(parts)
    perturb(parts)
    batch = update.batch(range(update.atoms))
    loss = method.loss(parts.stack, update, batch)

    grid = parts.policy.grid(method.sampler.steps).numpy()
    a, guidance = method.sampler.noise_level, method.sampler.guidance
    total, kl_total = 0.0, 0.0
    for row in range(update.atoms):
        step = int(batch.terms["step"][row])
        s, s_next = grid[step], grid[step + 1]
        x, x_next = (batch.terms[name][row].numpy() for name in ("latents", "next_latents"))
        sigma_i = a * math.sqrt(s / (1 - (grid[1] if s == 1 else s)))
        ds, d = s_next - s, math.sqrt(s - s_next)
        means = {}
        for view in ("current", "reference"):
            t = torch.tensor([s])
            latents = batch.terms["latents"][row : row + 1]
            with torch.no_grad():
                cond = parts.policy.predict(latents, t, batch.condition[row : row + 1], view=view)[0].numpy()
                uncond = parts.policy.predict(latents, t, parts.policy.encode([""]), view=view)[0].numpy()
            v = uncond + guidance * (cond - uncond)
            means[view] = x * (1 + sigma_i**2 / (2 * s) * ds) + v * (1 + sigma_i**2 * (1 - s) / (2 * s)) * ds
        squares = (x_next - means["current"]) ** 2 / (2 * sigma_i**2 * d**2)
        log_p = np.mean(-squares - math.log(sigma_i * d) - math.log(math.sqrt(2 * math.pi)))
        ratio = math.exp(log_p - float(batch.terms["old_log_prob"][row]))
        advantage = float(np.clip(batch.terms["advantage"][row], -5, 5))
        clipped = min(max(ratio, 1 - method.clip_range), 1 + method.clip_range)
        total += max(-advantage * ratio, -advantage * clipped)
        kl_total += np.mean((means["current"] - means["reference"]) ** 2) / (2 * sigma_i**2)
    assert kl_total > 0
    assert float(loss.total.detach()) == pytest.approx(total + method.kl * kl_total, rel=1e-8)


def test_kl_weight_zero_makes_no_reference_pass(tiny_run: Compose) -> None:
    passes = {}
    for kl in (0.0, 0.04):
        paper = ("method=flow_grpo", "overlay=none", "method.batch.updates=1")
        parts = assembly.assemble(tiny_run(*paper, f"method.algorithm.kl={kl}"))
        method, update = collected(parts)
        before = parts.ledger.row()["nfe"]
        method.loss(parts.stack, update, update.batch(range(update.atoms)))
        passes[kl] = (parts.ledger.row()["nfe"] - before) / update.atoms
    assert passes == {0.0: 2, 0.04: 4}  # guidance doubles both


def test_constant_groups_are_dropped_and_the_denominator_follows(tiny_run: Compose) -> None:
    parts = assembly.assemble(tiny_run("method=flow_grpo", "method.batch.updates=1"))
    method = parts.method
    prompts = draw(parts.prompts, 2, 0, 0, "none")
    experience = method.collect(parts.stack, prompts, Clock())
    experience.kept = [row for row in experience.kept if row < 4]  # as if the second group had one reward
    (update,) = method.updates(experience, parts.stack, Clock())
    assert (update.atoms, update.denominator) == (4 * 2, 4 * 2)  # 4 images x 2 stochastic steps


# Relatives by settings

RELATIVES = ["flow_grpo", "flow_grpo_nocfg", "flow_grpo_fast", "mix_grpo", "dance_grpo"]
SMALL = ("method.rollout.steps=6", "method.batch.updates=1")


def gather(parts: Parts, clock: Clock = Clock()) -> tuple[FlowGRPO, Experience]:  # noqa: B008 - frozen
    method = parts.method
    assert isinstance(method, FlowGRPO)
    return method, method.collect(parts.stack, draw(parts.prompts, method.batch.prompts, 0, 0, "none"), clock)


def test_a_random_window_starts_at_every_place_of_its_range() -> None:
    """Flow-GRPO-Fast on T = 10: start ~ U{0..5 - 3}."""
    window = Window(size=3, start="random", first=0, last=5, every=1)
    windows = [window.steps(iteration, seed=0) for iteration in range(300)]
    starts = [steps[0] for steps in windows]
    assert all(steps == (steps[0], steps[0] + 1, steps[0] + 2) for steps in windows)
    assert {start: 70 <= starts.count(start) <= 130 for start in set(starts)} == {0: True, 1: True, 2: True}
    assert windows == [window.steps(iteration, seed=0) for iteration in range(300)]
    assert windows != [window.steps(iteration, seed=1) for iteration in range(300)]


def test_a_progressive_window_moves_up_and_begins_again() -> None:
    """MixGRPO on T = 25: start = floor(n / 25) up to T - 2 - w = 19, then 0."""
    window = Window(size=4, start="progressive", first=0, last=23, every=25)
    for iteration, start in ((0, 0), (24, 0), (25, 1), (26, 1), (499, 19), (500, 0), (525, 1)):
        assert window.steps(iteration, seed=3) == tuple(range(start, start + 4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": 0}, "a window of 0 steps does not fit"),
        ({"size": 4}, "a window of 4 steps does not fit into the steps 1 to 3"),
        ({"first": -1}, "does not fit"),
        ({"start": "backwards"}, "choose random or progressive"),
        ({"every": 0}, "window.every is 0"),
        ({"last": 6}, "window.last is 6, but of 6 rollout steps only the first 5 can be stochastic"),
    ],
)
def test_impossible_windows_are_refused(tiny_run: Compose, values: dict[str, object], message: str) -> None:
    config = tiny_run("method=flow_grpo", *SMALL)
    config.method.algorithm.window = {"size": 2, "start": "random", "first": 1, "last": 4, "every": 1} | values
    with pytest.raises(ConfigError, match=message):
        assembly.assemble(config)


@pytest.mark.parametrize(
    "override", ["trained_fraction=0", "trained_fraction=1.1", "aggregate=images", "kl_form=velocity"]
)
def test_settings_out_of_range_are_refused(tiny_run: Compose, override: str) -> None:
    with pytest.raises(ConfigError, match=override.partition("=")[0]):
        assembly.assemble(tiny_run("method=flow_grpo", f"method.algorithm.{override}"))


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_have_ratio_one_and_cost_what_they_say(tiny_run: Compose, name: str) -> None:
    parts = assembly.assemble(tiny_run("model.policy.dtype=float64", f"method={name}", *SMALL))
    method, experience = gather(parts)
    (update,) = method.updates(experience, parts.stack, Clock())
    loss = method.loss(parts.stack, update, update.batch(range(update.atoms)))
    assert float(loss.largest["ratio_deviation"]) <= 1e-10
    assert update.atoms == update.denominator
    row, cost = parts.ledger.row(), method.expected_cost()
    assert (row["nfe"], row["backward"]) == (cost.rollout + cost.training, cost.backward)
    assert (row["images"], row["reward_calls"]) == (cost.images, cost.reward_calls)


def test_costs_by_hand(tiny_run: Compose) -> None:
    """8 images x 6 steps to sample; 2 of the window, or int(0.6 x 5) = 3 of the stochastic ones, to train."""
    for name, trained in (("flow_grpo", 5), ("flow_grpo_fast", 2), ("mix_grpo", 2), ("dance_grpo", 3)):
        cost = assembly.assemble(tiny_run(f"method={name}", *SMALL)).method.expected_cost()
        assert (cost.rollout, cost.training, cost.backward) == (48, 8 * trained, 8 * trained)


def test_steps_outside_the_window_are_deterministic_and_not_trained(tiny_run: Compose) -> None:
    """Windows of 2 in the first 4 steps, moved every 5 iterations; all images of a prompt begin at one noise."""
    parts = assembly.assemble(tiny_run("model.policy.dtype=float64", "method=mix_grpo", *SMALL))
    grid = parts.policy.grid(6, "shifted_linspace")
    for iteration, first in ((0, 0), (5, 1), (10, 2), (15, 0)):
        clock = Clock(iteration=iteration)
        method, experience = gather(parts, clock)
        assert experience.terms["step"].tolist() == [[first, first + 1]] * 8
        origins, condition = experience.terms["latents"][:, 0], experience.condition
        assert all(torch.equal(origins[row], origins[4 * (row // 4)]) for row in range(8))  # same noise, same walk
        assert not torch.equal(origins[0], origins[4])
        assert len({tuple(x.flatten().tolist()) for x in experience.terms["next_latents"][:, 0]}) == 8
        walk = parts.policy.noise(seeds_of("initial noise", 0, iteration, ids=[0, 4])).repeat_interleave(4, 0)
        with torch.no_grad():  # up to here the ODE
            for i in range(first):
                v = parts.policy.predict(walk, grid[i].expand(8), condition)
                walk = walk + (grid[i + 1] - grid[i]) * v
        torch.testing.assert_close(origins, walk, rtol=0, atol=1e-10)
        (update,) = method.updates(experience, parts.stack, clock)
        batch = update.batch(range(update.atoms))
        assert batch.terms["step"].tolist() == [first, first + 1] * 8
        x_next = experience.terms["next_latents"][:, 1]  # from here on the ODE, to an image that has a reward
        with torch.no_grad():
            for i in range(first + 2, 6):
                v = parts.policy.predict(x_next, grid[i].expand(8), condition)
                x_next = x_next + (grid[i + 1] - grid[i]) * v
            red = ((parts.policy.decode(x_next)[:, 0] * 255).round() / 255).mean(dim=(1, 2))
        assert experience.metrics["reward"] == pytest.approx(float(red.mean()), abs=1e-6)


def test_each_image_trains_its_own_share_of_the_steps(tiny_run: Compose) -> None:
    parts = assembly.assemble(tiny_run("method=dance_grpo", "method.batch.images=12", *SMALL))
    method, experience = gather(parts)
    (update,) = method.updates(experience, parts.stack, Clock())
    assert update.denominator == update.atoms == 24 * 3
    batch = update.batch(range(update.atoms))
    chosen = [tuple(batch.terms["step"][start : start + 3].tolist()) for start in range(0, 72, 3)]
    assert all(len(set(steps)) == 3 and steps == tuple(sorted(steps)) for steps in chosen)
    assert {step for steps in chosen for step in steps} == {0, 1, 2, 3, 4}
    assert len(set(chosen)) > 3
    same_image = {tuple(batch.terms["advantage"][start : start + 3].tolist()) for start in range(0, 72, 3)}
    assert all(len(set(values)) == 1 for values in same_image)


def test_images_of_a_prompt_have_noises_of_their_own_unless_asked(tiny_run: Compose) -> None:
    for same, distinct in ((False, 8), (True, 2)):
        parts = assembly.assemble(tiny_run("method=flow_grpo", f"method.algorithm.same_noise={same}"))
        first = gather(parts)[1].terms["latents"][:, 0]
        assert len({tuple(x.flatten().tolist()) for x in first}) == distinct


def test_kl_by_the_variance_of_the_step(parts: Parts) -> None:
    """``mu_step`` divides by ``sigma_i^2 d_i^2`` where ``mu`` divides by ``sigma_i^2``."""
    method, update = collected(parts)
    perturb(parts)
    grid = parts.policy.grid(method.sampler.steps)
    for atom in range(update.atoms):
        kl = {}
        for form in ("mu", "mu_step"):
            method.kl_form = form  # type: ignore[assignment]
            batch = update.batch([atom])
            kl[form] = float(method.loss(parts.stack, update, batch).metrics["kl"])
        step = int(batch.terms["step"])
        assert kl["mu_step"] * float(grid[step] - grid[step + 1]) == pytest.approx(kl["mu"], rel=1e-10)
        assert kl["mu"] > 0


def test_added_advantages_follow_the_equation() -> None:
    generator = np.random.default_rng(3)
    groups = np.repeat([7, 2, 5], [4, 3, 5])
    rewards, weights = generator.normal(0, [[1.0], [100.0]], (2, 12)), (0.5, 2.0)
    rewards[:, groups == 2] = 0.3  # constant for both
    rewards[1, groups == 5] = 0.1  # and for one
    expected = np.zeros(12)
    for values, weight in zip(rewards, weights, strict=True):
        for group in (7, 2, 5):
            own = values[groups == group]
            if own.max() > own.min():
                expected[groups == group] += weight * (own - own.mean()) / (own.std(ddof=1) + 1e-8)
    index = torch.from_numpy(groups)
    parts = [
        (w, group_advantages(torch.from_numpy(r), index, "group", 1, 1e-8))
        for r, w in zip(rewards, weights, strict=True)
    ]
    result = add_advantages(parts, index)
    np.testing.assert_allclose(result.values.numpy(), expected, atol=1e-12)
    assert result.constant.tolist() == (groups == 2).tolist()
    assert result.metrics() == pytest.approx({"constant_groups": 1 / 3, "nearly_constant_groups": 0})


def test_several_rewards_add_up_as_rewards_or_as_advantages(tiny_run: Compose) -> None:
    """Red with weight 3 beside a constant: the advantages of the sum are Red's, their weighted sum is 3 x Red's."""
    values = {}
    for name in ("alone", "rewards", "advantages"):
        config = tiny_run("model.policy.dtype=float64", "method=mix_grpo", *SMALL)
        if name != "alone":
            config.method.algorithm.aggregate = name
            shapes = {"red": "tests.stand_ins.Red", "constant": "tests.stand_ins.Constant"}
            config.reward.parts = {
                part: {"weight": weight, "shapes": {"_target_": shapes[part]}}
                for part, weight in (("red", 3.0), ("constant", 1.0))
            }
        values[name] = gather(assembly.assemble(config))[1].terms["advantage"]
    torch.testing.assert_close(values["rewards"], values["alone"], rtol=0, atol=1e-4)
    torch.testing.assert_close(values["advantages"], 3 * values["alone"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["flow_grpo_fast", "mix_grpo", "dance_grpo"])
def test_relatives_take_the_same_step_for_every_micro_batch(tiny_run: Compose, name: str) -> None:
    weights = []
    for size in (64, 5):
        parts = assembly.assemble(
            tiny_run("model.policy.dtype=float64", f"method={name}", *SMALL, f"micro_batch={size}")
        )
        method, experience = gather(parts)
        for update in method.updates(experience, parts.stack, Clock()):
            optimizer_step(parts.stack, method, update, parts.optimizer, clip=1.0)
        weights.append(parts.policy.trainable_parameters())
    assert weights[0]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=0, atol=1e-9)
