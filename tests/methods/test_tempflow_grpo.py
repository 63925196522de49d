"""TempFlow-GRPO against its equations in float64, walks of one branch at a time, and costs counted by hand."""

import math
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from torch import Tensor

from alignbench import assembly
from alignbench.assembly import Parts
from alignbench.errors import ConfigError
from alignbench.methods.flow_grpo import FlowGRPO
from alignbench.methods.method import Clock, Experience, Update
from alignbench.methods.tempflow_grpo import Group, TempFlowGRPO, branch_advantages, noise_weights
from alignbench.processes import Processes
from alignbench.prompts.sets import draw
from alignbench.sampling.flow import pipeline_grid
from alignbench.seeding import seed_of
from alignbench.training import optimizer_step
from tests.conftest import Compose

PROMPTS, SEEDS, BRANCHES, STEPS = 2, 2, 3, 4
ROWS = PROMPTS * SEEDS * (STEPS - 1) * BRANCHES  # 36
SMALL = (
    "model.policy.dtype=float64",
    "method=tempflow_grpo",
    "overlay=none",
    f"method.algorithm.seeds={SEEDS}",
    f"method.algorithm.branches={BRANCHES}",
    f"method.batch.images={SEEDS * BRANCHES}",
    f"method.rollout.steps={STEPS}",
    "method.batch.updates=1",
)


@pytest.fixture
def parts(tiny_run: Compose) -> Parts:
    return moved(assembly.assemble(tiny_run(*SMALL)))


def moved(parts: Parts) -> Parts:
    """Away from the reference, so that every term matters."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in parts.policy.trainable_parameters().items():
        if "lora_B" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return parts


def collected(parts: Parts) -> tuple[TempFlowGRPO, Experience]:
    method = parts.method
    assert isinstance(method, TempFlowGRPO)
    return method, method.collect(parts.stack, draw(parts.prompts, PROMPTS, 0, 0, "none"), Clock())


def perturb(parts: Parts) -> None:
    """Move the current weights off the ones that sampled, so that ratios differ from 1."""
    generator = torch.Generator().manual_seed(1)
    for parameter in parts.policy.trainable_parameters().values():
        parameter.data += 0.003 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


# Equations


def reference_advantages(rewards: np.ndarray, group: Group, std: str) -> np.ndarray:
    """Advantages ``[prompts, seeds, steps, branches]``, one group at a time; population std, eps 1e-4."""
    values = np.zeros_like(rewards)
    prompts, seeds, steps, _ = rewards.shape
    for p in range(prompts):
        for n in range(seeds):
            for k in range(steps):
                own = rewards[p, n, k] if group == "seed_step" else rewards[p, :, k]
                if own.max() > own.min():
                    scale = own.std() if std == "group" else rewards[:, :, k].std()
                    values[p, n, k] = (rewards[p, n, k] - own.mean()) / (scale + 1e-4)
    return values


@pytest.mark.parametrize("group", ["seed_step", "prompt_step"])
@pytest.mark.parametrize("std", ["group", "global"])
def test_advantages_follow_the_equation(group: Group, std: str) -> None:
    rewards = np.random.default_rng(5).normal(size=(3, 2, 4, 5)) * np.array([1, 10, 0.1, 3])[:, None]
    rewards[1, 0, 2] = 0.1  # the branches of one seed at one step
    rewards[2, :, 3] = 1 / 3  # and those of all seeds of a prompt at one step
    result = branch_advantages(torch.from_numpy(rewards), group, std, 0, 1e-4)  # type: ignore[arg-type]
    np.testing.assert_allclose(
        result.values.view(3, 2, 4, 5).numpy(), reference_advantages(rewards, group, std), atol=1e-12
    )
    constant = np.zeros_like(rewards, dtype=bool)
    constant[2, :, 3] = True
    constant[1, 0, 2] = group == "seed_step"
    assert result.constant.tolist() == constant.flatten().tolist()
    share = 3 / 24 if group == "seed_step" else 1 / 12
    assert result.metrics() == pytest.approx({"constant_groups": share, "nearly_constant_groups": 0})


@pytest.mark.parametrize("group", ["seed_step", "prompt_step"])
def test_an_image_is_compared_with_images_of_its_own_step_alone(group: Group) -> None:
    """A reward that differs between the steps (or the seeds, where seeds are groups) says nothing."""
    generator = torch.Generator().manual_seed(2)
    rewards = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64)
    offsets = torch.randn(2, 3 if group == "seed_step" else 1, 4, 1, generator=generator, dtype=torch.float64)
    before, after = (branch_advantages(each, group, "group", 0, 1e-4) for each in (rewards, rewards + 7 * offsets))
    torch.testing.assert_close(before.values, after.values, rtol=0, atol=1e-9)
    alone = branch_advantages(offsets.expand(2, 3, 4, 5), group, "group", 0, 1e-4)
    assert not alone.values.any()


def test_weights_are_each_steps_share_of_the_noise() -> None:
    """``sigma_k d_k`` on SD3's grid; the released constant 2.25 is one over its mean."""
    grid = pipeline_grid(10, shift=3.0).double()
    s = grid.tolist()
    stds = [0.7 * math.sqrt(s[k] / (1 - s[max(k, 1)])) * math.sqrt(s[k] - s[k + 1]) for k in range(9)]
    weights = noise_weights(grid, 0.7)
    assert weights.tolist() == pytest.approx([std / (sum(stds) / 9) for std in stds], rel=1e-12)
    assert 9 / sum(stds) == pytest.approx(2.25, abs=0.02)
    assert float(weights.mean()) == pytest.approx(1)
    torch.testing.assert_close(noise_weights(grid, 0.1), weights)  # the noise level cancels
    assert bool((weights[1:].diff() < 0).all())  # step 0 borrows the second point of the grid


# The walk


def test_every_branch_is_that_of_a_walk_of_its_own(parts: Parts) -> None:
    """One row at a time, batch 1: noise, trunk, one stochastic step, the rest of the walk, picture, reward."""
    method, experience = collected(parts)
    policy, stack = parts.policy, parts.stack
    grid = policy.grid(STEPS)
    a, guidance = method.sampler.noise_level, method.sampler.guidance
    prompts = draw(parts.prompts, PROMPTS, 0, 0, "none")
    rollout = stack.branch(
        [prompts[trunk // SEEDS] for trunk in range(PROMPTS * SEEDS)],
        method.sampler,
        [seed_of("initial noise", 0, 0, trunk) for trunk in range(PROMPTS * SEEDS)],
        branches=BRANCHES,
        step_seeds=lambda trunk, step, branch: seed_of("step noise", 0, 0, trunk, step, branch),
    )
    rewards = np.zeros((PROMPTS, SEEDS, STEPS - 1, BRANCHES))
    row = 0
    for trunk in range(PROMPTS * SEEDS):
        condition = policy.encode([prompts[trunk // SEEDS].text])

        def v_at(x: Tensor, i: int, condition: object = condition) -> Tensor:
            with torch.no_grad():
                return policy.predict(x, grid[i].expand(1), condition, guidance=guidance)  # type: ignore[arg-type]

        for step in range(STEPS - 1):
            for branch in range(BRANCHES):
                x = policy.noise([seed_of("initial noise", 0, 0, trunk)])
                for i in range(STEPS):
                    s, ds, v = float(grid[i]), float(grid[i + 1] - grid[i]), v_at(x, i)
                    if i != step:
                        x = x + ds * v
                        continue
                    assert torch.equal(experience.terms["step"][row], torch.tensor([step]))
                    torch.testing.assert_close(experience.terms["latents"][row, 0], x[0], rtol=0, atol=1e-10)
                    sigma = a * math.sqrt(s / (1 - float(grid[max(i, 1)])))
                    z = policy.noise([seed_of("step noise", 0, 0, trunk, step, branch)])
                    mean = x + (v + sigma**2 / (2 * s) * (x + (1 - s) * v)) * ds
                    std = sigma * math.sqrt(-ds)
                    x = mean + std * z
                    torch.testing.assert_close(experience.terms["next_latents"][row, 0], x[0], rtol=0, atol=1e-10)
                    density = -float((z**2).mean()) / 2 - math.log(std) - math.log(2 * math.pi) / 2
                    assert float(experience.terms["old_log_prob"][row, 0]) == pytest.approx(density, abs=1e-10)
                torch.testing.assert_close(rollout.latents[row], x[0], rtol=0, atol=1e-10)
                image = (policy.decode(x) * 255).round() / 255
                rewards.flat[row] = float(image[0, 0].mean())
                assert float(rollout.scores["reward"][row]) == pytest.approx(rewards.flat[row], abs=1e-6)
                assert experience.prompts[row] == prompts[trunk // SEEDS]
                row += 1
    assert row == ROWS == len(rollout.latents) == len(experience.ids)
    advantages = reference_advantages(rewards, "seed_step", "group")
    np.testing.assert_allclose(experience.terms["advantage"].numpy(), advantages.flatten(), atol=1e-4)
    assert experience.metrics["reward"] == pytest.approx(rewards.mean(), abs=1e-6)
    assert experience.metrics["reward_std"] == pytest.approx(rewards.std(), abs=1e-6)


# Costs


@pytest.mark.parametrize(("guidance", "kl", "detach"), [(1.0, 0.0, False), (4.5, 0.004, False), (4.5, 0.0, True)])
def test_costs_by_hand(tiny_run: Compose, guidance: float, kl: float, detach: bool) -> None:
    """T = 4: a trunk takes 3 passes, the branches of its steps 3, 2 and 1."""
    parts = assembly.assemble(
        tiny_run(
            *SMALL,
            f"method.rollout.guidance={guidance}",
            f"method.algorithm.kl={kl}",
            f"method.algorithm.detach_uncond={detach}",
        )
    )
    method, experience = collected(parts)
    passes = 1 if guidance == 1 else 2
    row = parts.ledger.row()
    trunks = PROMPTS * SEEDS
    assert row["nfe"] == passes * trunks * (3 + BRANCHES * (3 + 2 + 1)) == passes * 84
    assert (row["images"], row["reward_calls"]) == (36, 36)
    for update in method.updates(experience, parts.stack, Clock()):
        optimizer_step(parts.stack, method, update, parts.optimizer, clip=1.0)
    row, cost = parts.ledger.row(), method.expected_cost()
    assert row["nfe"] == passes * 84 + passes * 36 * (2 if kl else 1)
    assert row["backward"] == 36 * (1 if detach else passes)
    assert (cost.rollout + cost.training, cost.backward) == (row["nfe"], row["backward"])
    assert (cost.images, cost.reward_calls) == (36, 36)


def test_the_papers_setting_scores_nine_times_the_images_of_flow_grpo(tiny_run: Compose) -> None:
    overrides = ("method.batch.prompts=4", "method.batch.images=24", "method.rollout.steps=10", "overlay=none")
    branched, flow = (
        assembly.assemble(tiny_run(f"method={name}", *overrides)).method.expected_cost()
        for name in ("tempflow_grpo", "flow_grpo")
    )
    assert branched.images == 9 * flow.images == 4 * 24 * 9
    assert branched.rollout == 2 * 4 * (4 * 9 + 24 * 45)
    assert flow.rollout == 2 * 4 * 24 * 10


# The loss


def whole(parts: Parts) -> tuple[TempFlowGRPO, Update]:
    method, experience = collected(parts)
    return method, next(method.updates(experience, parts.stack, Clock()))


def test_ratio_is_one_before_the_first_update(parts: Parts, tiny_run: Compose) -> None:
    method, update = whole(parts)
    loss = method.loss(parts.stack, update, update.batch(range(update.atoms)))
    assert float(loss.largest["ratio_deviation"]) <= 1e-10

    single = moved(assembly.assemble(tiny_run(*SMALL[1:])))
    for parameter in single.policy.trainable_parameters().values():
        parameter.data = parameter.data.float()
    method, update = whole(single)
    for atoms in (range(update.atoms), range(3)):  # also in other company than during the rollout
        loss = method.loss(single.stack, update, update.batch(atoms))
        assert float(loss.largest["ratio_deviation"]) <= 0.05 * method.clip_range


def test_loss_equals_the_papers_equations(parts: Parts) -> None:
    method, update = whole(parts)
    perturb(parts)
    batch = update.batch(range(update.atoms))
    assert update.atoms == update.denominator == ROWS
    loss = method.loss(parts.stack, update, batch)

    grid = parts.policy.grid(STEPS).tolist()
    a, guidance = method.sampler.noise_level, method.sampler.guidance
    sigmas = [a * math.sqrt(grid[k] / (1 - grid[max(k, 1)])) for k in range(STEPS - 1)]
    stds = [sigmas[k] * math.sqrt(grid[k] - grid[k + 1]) for k in range(STEPS - 1)]
    total, kl_total = 0.0, 0.0
    for row in range(update.atoms):
        k = int(batch.terms["step"][row])
        s, ds = grid[k], grid[k + 1] - grid[k]
        x, x_next = (batch.terms[name][row].numpy() for name in ("latents", "next_latents"))
        means = {}
        for view in ("current", "reference"):
            latents, t = batch.terms["latents"][row : row + 1], torch.tensor([s], dtype=torch.float64)
            with torch.no_grad():
                cond = parts.policy.predict(latents, t, batch.condition[row : row + 1], view=view)[0].numpy()
                uncond = parts.policy.predict(latents, t, parts.policy.encode([""]), view=view)[0].numpy()
            v = uncond + guidance * (cond - uncond)
            means[view] = x * (1 + sigmas[k] ** 2 / (2 * s) * ds) + v * (1 + sigmas[k] ** 2 * (1 - s) / (2 * s)) * ds
        squares = (x_next - means["current"]) ** 2 / (2 * stds[k] ** 2)
        log_p = np.mean(-squares - math.log(stds[k]) - math.log(math.sqrt(2 * math.pi)))
        ratio = math.exp(log_p - float(batch.terms["old_log_prob"][row]))
        advantage = float(batch.terms["advantage"][row])
        clipped = min(max(ratio, 1 - method.clip_range), 1 + method.clip_range)
        weight = stds[k] / (sum(stds) / (STEPS - 1))
        total += weight * max(-advantage * ratio, -advantage * clipped)
        kl_total += np.mean((means["current"] - means["reference"]) ** 2) / (2 * stds[k] ** 2)
    assert method.kl == 0.004
    assert kl_total > 0
    assert float(loss.total.detach()) == pytest.approx(total + method.kl * kl_total, rel=1e-8)
    assert float(loss.metrics["kl"]) == pytest.approx(kl_total, rel=1e-8)


@pytest.mark.parametrize("kl", [0.0, 0.04])
def test_without_branches_and_weights_it_is_flow_grpo(tiny_run: Compose, kl: float) -> None:
    common = (
        "overlay=none",
        "model.policy.dtype=float64",
        "method.batch.updates=1",
        "method.batch.images=6",
        f"method.algorithm.kl={kl}",
        "method.algorithm.kl_form=mu_step",
        "method.algorithm.std=global",
        "method.algorithm.detach_uncond=true",
    )
    ablated = (
        "method=tempflow_grpo",
        "method.algorithm.seeds=2",
        "method.algorithm.branches=3",
        "method.algorithm.branching=false",
        "method.algorithm.noise_weighting=false",
    )
    gradients = []
    for own in (("method=flow_grpo",), ablated, (*ablated[:-1], "method.algorithm.noise_weighting=true")):
        parts = moved(assembly.assemble(tiny_run(*own, *common)))
        method = parts.method
        assert isinstance(method, FlowGRPO)
        experience = method.collect(parts.stack, draw(parts.prompts, PROMPTS, 0, 0, "none"), Clock())
        (update,) = method.updates(experience, parts.stack, Clock())
        perturb(parts)
        loss = method.loss(parts.stack, update, update.batch(range(update.atoms)))
        gradients.append(torch.autograd.grad(loss.total, list(parts.policy.trainable_parameters().values())))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients[1], gradients[0], strict=True))
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(gradients[2], gradients[0], strict=True))


def test_branches_that_are_alike_at_every_step_are_dropped(tiny_run: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward of the step alone leaves nothing to learn, though the images of a seed have many rewards. A branch that
    one step tells apart is kept whole, as in the released code: its other steps are counted, and held to the reference.
    """
    parts = moved(assembly.assemble(tiny_run(*SMALL, "method.algorithm.kl=0.0")))
    branch = type(parts.stack).branch
    step = torch.arange(STEPS - 1).repeat_interleave(BRANCHES).repeat(PROMPTS * SEEDS)

    def scored(alike: Tensor) -> Experience:
        def replaced(self, *arguments, **options):  # type: ignore[no-untyped-def]
            rollout = branch(self, *arguments, **options)
            rollout.scores["reward"] = torch.where(alike, step.float(), rollout.scores["reward"])
            return rollout

        monkeypatch.setattr(type(parts.stack), "branch", replaced)
        return collected(parts)[1]

    everything = scored(torch.ones(ROWS, dtype=torch.bool))
    assert everything.metrics["constant_groups"] == 1
    assert everything.metrics["reward_std"] > 0
    assert list(parts.method.updates(everything, parts.stack, Clock())) == []

    experience = scored(step == 1)
    assert experience.metrics["constant_groups"] == pytest.approx(1 / 3)
    (update,) = parts.method.updates(experience, parts.stack, Clock())
    assert update.denominator == experience.metrics["kept_images"] == ROWS
    assert update.atoms == ROWS * 2 // 3  # without a divergence the others add nothing, so they make no pass
    assert set(update.batch(range(update.atoms)).terms["step"].tolist()) == {0, 2}
    parts.method.kl = 0.004  # type: ignore[attr-defined]
    (update,) = parts.method.updates(experience, parts.stack, Clock())
    assert update.atoms == update.denominator == ROWS

    first_seed = torch.arange(ROWS) < ROWS // (PROMPTS * SEEDS)
    experience = scored(first_seed)
    assert experience.metrics["kept_images"] == ROWS - ROWS // (PROMPTS * SEEDS)
    assert not set(experience.kept) & set(first_seed.nonzero().flatten().tolist())


def test_the_released_rule_keeps_and_divides_by_whole_branches(tiny_run: Compose) -> None:
    """By hand: advantages ``[trunks, steps, branches]`` and which branches have any that is not zero."""
    method = assembly.assemble(tiny_run(*SMALL)).method
    assert isinstance(method, TempFlowGRPO)
    advantages = torch.zeros(PROMPTS * SEEDS, STEPS - 1, BRANCHES)
    advantages[0, 1] = torch.tensor([1.0, 0.0, -1.0])  # one step of one seed tells two of its branches apart
    advantages[2, 0, 1], advantages[2, 2, 1] = 0.5, -0.5
    kept = method.kept(advantages.flatten()).view_as(advantages)
    expected = torch.zeros_like(kept)
    expected[0, :, [0, 2]] = True
    expected[2, :, 1] = True
    assert torch.equal(kept, expected)
    bundles = method.together(kept.flatten().nonzero().flatten().tolist())
    assert bundles.tolist() == [[0, 3, 6], [2, 5, 8], [19, 22, 25]]  # row (trunk (T - 1) + step) K + branch


def test_updates_split_whole_branches(tiny_run: Compose) -> None:
    parts = moved(assembly.assemble(tiny_run(*SMALL, "method.batch.updates=3")))
    method, experience = collected(parts)
    seen = []
    for rows, count in method.parts(experience, Clock()):
        assert len(rows) == count == ROWS // 3
        slots = {(row // (BRANCHES * (STEPS - 1)), row % BRANCHES) for row in rows}
        assert len(slots) * (STEPS - 1) == len(rows)
        seen += rows
    assert sorted(seen) == list(range(ROWS))


# Micro-batches and processes


def stepped(parts: Parts) -> dict[str, Tensor]:
    """Weights after an iteration of two updates."""
    method, experience = collected(parts)
    for update in method.updates(experience, parts.stack, Clock()):
        optimizer_step(parts.stack, method, update, parts.optimizer, clip=1.0)
    return {name: value.detach().clone() for name, value in parts.policy.trainable_parameters().items()}


def test_micro_batch_size_does_not_change_the_step(tiny_run: Compose) -> None:
    results = [
        stepped(moved(assembly.assemble(tiny_run(*SMALL, "method.batch.updates=2", f"micro_batch={size}"))))
        for size in (64, 5, 1)
    ]
    for other in results[1:]:
        for name, value in results[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-9)


class Rank(Processes):
    """One of three processes that live in threads."""

    barrier = Barrier(3)
    shared: dict[int, object] = {}  # noqa: RUF012 - what the ranks have in common

    def __init__(self, rank: int) -> None:
        self.device, self.rank, self.count = torch.device("cpu"), rank, 3

    def _all(self, value: object) -> list[object]:
        self.shared[self.rank] = value
        self.barrier.wait(60)
        everything = [self.shared[rank] for rank in range(3)]
        self.barrier.wait(60)
        return everything

    def gather(self, local: Tensor) -> Tensor:
        return torch.cat(self._all(local))  # type: ignore[arg-type]

    def sum(self, tensors):  # type: ignore[no-untyped-def]
        totals = [sum(same) for same in zip(*self._all([each.clone() for each in tensors]), strict=True)]  # type: ignore[call-overload]
        for tensor, total in zip(tensors, totals, strict=True):
            tensor.copy_(total)

    def join(self, values, join):  # type: ignore[no-untyped-def]
        return {name: join([part[name] for part in self._all(values) if name in part]) for name in values}  # type: ignore[index, operator]


@pytest.mark.parametrize("group", ["seed_step", "prompt_step"])
def test_three_processes_take_the_same_step(tiny_run: Compose, group: Group) -> None:
    """4 trunks on 3 processes: a prompt's seeds lie on two of them."""
    overrides = (*SMALL, "method.batch.updates=2", f"method.algorithm.group={group}")
    alone = stepped(moved(assembly.assemble(tiny_run(*overrides))))
    ranks = [moved(assembly.assemble(tiny_run(*overrides))) for _ in range(3)]
    for rank, parts in enumerate(ranks):
        parts.stack.processes = parts.processes = Rank(rank)
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(stepped, ranks))
    for each in together:
        for name, value in alone.items():
            torch.testing.assert_close(each[name], value, rtol=0, atol=1e-9)
    assert sum(parts.ledger.row()["nfe"] for parts in ranks) == 2 * (84 + 36 * 2)


# What cannot work


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.batch.images=8", "2 seeds x 3 branches are not the 8 images of a prompt"),
        ("method.algorithm.branches=0", "2 seeds x 0 branches"),
        ("method.algorithm.group=step", "choose seed_step or prompt_step"),
        ("method.rollout.solver=dpm2", "choose euler, ddim or dpm1"),
        ("method.rollout.stochastic=null", "needs log-probabilities"),
    ],
)
def test_settings_that_cannot_work(tiny_run: Compose, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        assembly.assemble(tiny_run(*SMALL, override))


def test_a_single_branch_has_nothing_to_be_compared_with(tiny_run: Compose) -> None:
    single = (*SMALL, "method.algorithm.seeds=6", "method.algorithm.branches=1")
    with pytest.raises(ConfigError, match="branches is 1, use 2 or more"):
        assembly.assemble(tiny_run(*single))
    for working in ("method.algorithm.group=prompt_step", "method.algorithm.branching=false"):
        assembly.assemble(tiny_run(*single, working))


def test_more_processes_than_trunks_are_refused(parts: Parts) -> None:
    rank = Rank(0)
    rank.count = 5
    parts.stack.processes = rank
    with pytest.raises(ConfigError, match="2 prompts x 2 seeds for 5 processes: every process needs at least one seed"):
        collected(parts)
