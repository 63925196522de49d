"""The plan of a run, printed before it starts: batches, passes, memory, time, and where results go."""

import math
import time
from pathlib import Path

import torch
from omegaconf import DictConfig

from alignbench.assembly import Parts
from alignbench.configuration import reward_name
from alignbench.errors import BudgetError

BACKWARD = 2.0  # a backward pass takes about as long as two forward passes
LARGEST_ITERATION = 0.05  # of the budget, for curves that are published


def table(config: DictConfig, parts: Parts, folder: Path) -> str:
    """The plan as text; with ``dry_run`` it measures one model call to estimate the time."""
    method, processes = parts.method, parts.processes
    batch = method.batch
    cost = method.expected_cost()
    rows = [
        ("run", f"{config.method.name} on {reward_name(config)}, model {config.model.name}, seed {config.seed}"),
        ("results", str(folder)),
        (
            "images an iteration",
            f"{batch.prompts} prompts x {batch.images} images = {batch.total:,}, in {batch.updates} optimizer step(s); "
            f"{processes.count} process(es) x {len(processes.shard(batch.total))} images, "
            f"micro-batches of {parts.stack.micro_batch.size}",
        ),
    ]
    rows.append(
        (
            "passes an iteration",
            f"{cost.rollout:,.0f} to sample, {cost.training:,.0f} to train, {cost.backward:,.0f} backward",
        )
    )
    rows.append(("images an iteration, decoded", f"{cost.images:,.0f}, with {cost.reward_calls:,.0f} reward calls"))
    flops = flops_per_iteration(parts)
    iterations = expected_iterations(parts, flops)
    rows += [
        ("FLOPs an iteration", f"{flops:.3g} (denoiser and decoder)"),
        ("budget", ", ".join(f"{axis} {limit:.4g}" for axis, limit in parts.budget.limits.items())),
    ]
    if iterations is not None:
        share = 100 / iterations
        rows.append(("iterations", f"about {iterations:.0f}; one is {share:.1f}% of the budget"))
        if share > 100 * LARGEST_ITERATION:
            rows.append(("warning", "an iteration above 5% of the budget makes coarse curves; raise the budget"))
    if config.dry_run:
        weights = sum(p.numel() * p.element_size() for p in parts.policy.trainable_parameters().values())
        copies = len(parts.policy.views) + 3  # gradient and two moments
        rows.append(
            ("memory of the trained weights", f"{weights * copies / 2**20:,.1f} MiB ({len(parts.policy.views)} views)")
        )
        if iterations is not None:
            seconds = iterations * seconds_per_iteration(parts)
            rows.append(("time", f"about {seconds / 60:.1f} minutes for rollout and training, evaluation apart"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {text}" for name, text in rows)


def flops_per_iteration(parts: Parts) -> float:
    """Expected FLOPs of an iteration's denoiser and decoder passes."""
    cost, flops = parts.method.expected_cost(), parts.stack.flops
    decodes = cost.images + BACKWARD * cost.images_with_gradient
    return (
        (cost.rollout + cost.training) * flops["denoiser"]
        + cost.backward * flops["denoiser_backward"]
        + decodes * flops["decode"]
    )


def expected_iterations(parts: Parts, flops: float) -> float | None:
    """How many iterations the budget allows; None if only its seconds are limited."""
    costs = expected_costs(parts, flops)
    limits = [limit / costs[axis] for axis, limit in parts.budget.limits.items() if costs.get(axis)]
    return min(limits) if limits else None


def expected_costs(parts: Parts, flops: float) -> dict[str, float]:
    """What an iteration costs on each axis of the budget but its seconds."""
    cost = parts.method.expected_cost()
    return {
        "flops": flops,
        "nfe": cost.rollout + cost.training,
        "images": cost.images,
        "reward_calls": cost.reward_calls,
        "iterations": 1,
    }


def check_budget(config: DictConfig, parts: Parts) -> None:
    """Refuse a budget that ends within an iteration, and one of fewer than 20 iterations for published curves.

    Raises:
        BudgetError: names the cost of an iteration and the budget that would do.
    """
    costs = expected_costs(parts, flops_per_iteration(parts))
    wanted = LARGEST_ITERATION if config.evaluation.published else 1.0
    for axis, limit in parts.budget.limits.items():
        cost = costs.get(axis, 0.0)
        if cost > wanted * limit * (1 + 1e-9):
            asked = f"published curves need {1 / wanted:.0f} iterations" if wanted < 1 else "a run needs one"
            instead = "evaluation.published=false for a trial" if cost <= limit else "a smaller method.batch"
            raise BudgetError(
                f"an iteration costs {cost:.3g} {axis}, {100 * cost / limit:.1f}% of budget.{axis}={limit:.4g}, but "
                f"{asked}: budget.{axis}={rounded_up(cost / wanted):.4g} would do, or {instead}"
            )


def rounded_up(value: float) -> float:
    """To two significant digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(round(value / unit, 9)) * unit


def seconds_per_iteration(parts: Parts) -> float:
    """Estimated from the time of one micro-batch of predictions."""
    policy, size = parts.policy, parts.stack.micro_batch.size
    latents = policy.noise(range(size))
    sigma, condition = latents.new_full((size,), 0.5), policy.encode([""] * size)
    with torch.no_grad():
        policy.predict(latents, sigma, condition)
        parts.ledger.synchronise()
        start = time.perf_counter()
        policy.predict(latents, sigma, condition)
        parts.ledger.synchronise()
    cost = parts.method.expected_cost()
    forward = cost.rollout + cost.training + BACKWARD * cost.backward
    return (time.perf_counter() - start) / size * forward / parts.processes.count
