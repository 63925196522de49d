"""The plan of a run, printed before it starts: batches, passes, memory, time, and where results go."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig

from alignbench import architecture, assembly
from alignbench.architecture import Costs
from alignbench.assembly import Parts
from alignbench.configuration import chosen_overlay, embedded, reward_name
from alignbench.errors import BudgetError
from alignbench.evaluation import Protocol, Samples
from alignbench.ledger import Budget
from alignbench.methods.method import Cost, Method
from alignbench.processes import Processes
from alignbench.prompts.prompt import Prompt

BACKWARD = 2.0  # a backward pass takes about as long as two forward passes
LARGEST_ITERATION = 0.05  # of the budget, for curves that are published
Rows = list[tuple[str, str]]


@dataclass(frozen=True)
class Outline:
    """What a plan is made from.

    Attributes:
        method: says what an iteration collects, and what that costs.
        budget: what ends the run.
        flops: of a pass, by kind: ``denoiser``, ``denoiser_backward``, ``decode``.
        processes: how many share an iteration.
        micro_batch: rows of one call to begin with.
    """

    method: Method
    budget: Budget
    flops: Mapping[str, int]
    processes: int
    micro_batch: int

    @classmethod
    def of(cls, parts: Parts) -> "Outline":
        """That of a run whose parts are there."""
        size = parts.stack.micro_batch.size
        return cls(parts.method, parts.budget, parts.stack.flops, parts.processes.count, size)

    @property
    def cost(self) -> Cost:
        """What an iteration costs."""
        return self.method.expected_cost()

    def flops_per_iteration(self) -> float:
        """Expected FLOPs of an iteration's denoiser and decoder passes."""
        decodes = self.cost.images + BACKWARD * self.cost.images_with_gradient
        return (
            (self.cost.rollout + self.cost.training) * self.flops["denoiser"]
            + self.cost.backward * self.flops["denoiser_backward"]
            + decodes * self.flops["decode"]
        )

    def costs(self) -> dict[str, float]:
        """What an iteration costs on each axis of the budget but its seconds."""
        return {
            "flops": self.flops_per_iteration(),
            "nfe": self.cost.rollout + self.cost.training,
            "images": self.cost.images,
            "reward_calls": self.cost.reward_calls,
            "iterations": 1,
        }

    def iterations(self) -> float | None:
        """How many iterations the budget allows; None if only its seconds are limited."""
        costs = self.costs()
        limits = [limit / costs[axis] for axis, limit in self.budget.limits.items() if costs.get(axis)]
        return min(limits) if limits else None


def table(config: DictConfig, outline: Outline, folder: Path) -> str:
    """The plan of a run as text."""
    return text(summary(config, outline, folder))


def text(rows: Rows) -> str:
    """Named rows, aligned."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {content}" for name, content in rows)


def summary(config: DictConfig, outline: Outline, folder: Path) -> Rows:
    """What every run says about itself before it starts."""
    batch, cost, count = outline.method.batch, outline.cost, outline.processes
    collected = (
        f"{batch.prompts} prompts x {batch.images} images = {batch.total:,}, in {batch.updates} optimizer step(s); "
        f"{count} process(es) x {shares(batch.total, count)} images"
    )
    if not cost.rollout:
        collected = f"none after the first, {batch.updates} optimizer step(s); {count} process(es)"
    rows = [
        ("run", f"{config.method.name} on {reward_name(config)}, model {config.model.name}, seed {config.seed}"),
        *overlay(),
        ("results", str(folder)),
        ("images an iteration", f"{collected}, micro-batches of {outline.micro_batch}"),
        (
            "passes an iteration",
            f"{cost.rollout:,.0f} to sample, {cost.training:,.0f} to train, {cost.backward:,.0f} backward",
        ),
        ("images an iteration, decoded", f"{cost.images:,.0f}, with {cost.reward_calls:,.0f} reward calls"),
        ("FLOPs an iteration", f"{outline.flops_per_iteration():.3g} (denoiser and decoder)"),
        ("budget", ", ".join(f"{axis} {limit:.4g}" for axis, limit in outline.budget.limits.items())),
    ]
    if config.reward.get("renamed"):
        rows.append(("warning", config.reward.renamed))
    iterations = outline.iterations()
    if iterations is not None:
        share = 100 / iterations
        rows.append(("iterations", f"about {iterations:.0f}; one is {share:.2g}% of the budget"))
        if share > 100 * LARGEST_ITERATION:
            rows.append(("warning", "an iteration above 5% of the budget makes coarse curves; raise the budget"))
    return rows


def overlay() -> Rows:
    """Which overlay acts on the method's published settings; nothing where it is not known."""
    known = chosen_overlay()
    if known is None:
        return []
    name, there = known
    return [("overlay", name if there and name != "none" else "none: the published settings")]


def shares(total: float, count: int) -> str:
    """How much of a total each of some processes gets."""
    least, most = total // count, math.ceil(total / count)
    return f"{most:,.0f}" if least == most else f"{least:,.0f} or {most:,.0f}"


def dry_run(config: DictConfig, launched: Processes, folder: Path, found: Costs | None = None) -> tuple[str, Outline]:
    """The plan of a run and what it is made from: no weights are loaded, and no reward model.

    Prompts and data sets are read, and every setting is checked.

    Args:
        launched: the processes that make the plan.
        folder: where the run's results would go.
        found: what its model costs, if that is known already.

    Raises:
        ConfigError, CheckpointError, DataError, BudgetError: as the run itself.
    """
    count = config.plan.processes or launched.count
    checked = assembly.check(config, count)
    assembly.check_models(config)
    evaluated = assembly.evaluated_prompts(config)
    found = found or model_costs(config)
    outline = Outline(checked.method, checked.budget, found.flops, count, config.micro_batch)
    passes, images, evaluations = evaluation(config, (checked.curve, checked.final), evaluated)
    of_evaluation = passes * found.flops["denoiser"] + images * found.flops["decode"]
    rows = summary(config, outline, folder)
    rows += [
        ("an optimizer step", steps(outline)),
        (
            "a pass",
            f"{found.flops['denoiser']:.3g} FLOPs forward, {found.flops['denoiser_backward']:.3g} backward; "
            f"{found.flops['decode']:.3g} to decode an image",
        ),
        (
            "evaluation",
            f"{evaluations} evaluations, {images:,} images, {passes:,} passes, {of_evaluation:.3g} FLOPs; "
            "without scorers",
        ),
        *memory(config, outline, found),
        *hours(config, launched, outline, of_evaluation),
    ]
    return text(rows), outline


def model_costs(config: DictConfig) -> Costs:
    """What the configured model and one sample cost, by its architecture."""
    with architecture.abstract():
        return architecture.costs(assembly.abstract_policy(config))


def steps(outline: Outline) -> str:
    """What one optimizer step runs through, in all and in a process."""
    updates = outline.method.batch.updates
    backward = outline.cost.backward / updates
    decoded = 0 if outline.cost.images_with_gradient else outline.cost.images
    images = decoded or outline.method.batch.total
    each = "" if not outline.cost.rollout else (
        f"; an image takes {outline.cost.rollout / images:.4g} passes to sample, "
        f"{outline.cost.training / images:.4g} to train, {outline.cost.backward / images:.4g} backward"
    )  # fmt: skip
    return f"{backward:,.0f} samples with a gradient, {shares(backward, outline.processes)} a process{each}"


def evaluation(config: DictConfig, protocols: tuple[Protocol, Protocol], prompts: Sequence[Prompt]) -> tuple[int, ...]:
    """Passes, images and number of a run's evaluations."""
    curve, final = protocols
    points = sum(1 for each in config.evaluation.fractions if each > 0) + 2  # the base, and the current weights
    due = [(curve, curve.guidance[0])] * points
    due += [(final, guidance) for guidance in final.guidance] * 2  # the base and the final weights
    passes = images = 0
    for protocol, guidance in due:
        looked_at = len(Samples.choose(prompts, protocol.images_per_tag).rows)
        images += looked_at
        passes += looked_at * protocol.steps * (1 if guidance == 1 else 2)
    return passes, images, len(due)


def memory(config: DictConfig, outline: Outline, found: Costs) -> Rows:
    """What lies on the device of one process."""
    views = len({"reference", "evaluation", *outline.method.needs.views})
    copies, fixed = resident(found, views, outline.processes)
    through_decoder = outline.cost.images_with_gradient > 0
    sample = found.sample + (found.decode_gradient if through_decoder else 0)
    room = int((config.plan.memory - fixed) // sample)
    decoder = " and through the decoder" if through_decoder else f", {gb(found.decode)} to decode an image"
    size = f"{config.plan.memory / 1e9:.4g} GB"
    if room < 1:
        fits = f"does not fit in {size}"
    elif room < outline.micro_batch:
        fits = f"{size} have room for {room} samples with a gradient at once: smaller micro-batches"
    else:
        fits = f"{size} have room for {room} samples with a gradient at once"
    return [
        ("memory, models", ", ".join(f"{name} {gb(size)}" for name, size in found.weights.items())),
        (
            "memory, trained weights",
            f"{gb(found.trained)} x {copies}: {views} further views, gradient, two moments"
            + (", gradients of other processes" if outline.processes > 1 else ""),
        ),
        ("memory, a sample", f"{gb(sample)} with a gradient{decoder}"),
        ("memory, a process", f"at least {gb(fixed + sample)}, without reward models; {fits}"),
    ]


def resident(found: Costs, views: int, processes: int) -> tuple[int, int]:
    """What stays on a device whatever the batch: further copies of the trained weights, and all bytes.

    Args:
        found: what the model costs.
        views: named weights beside the current ones.
        processes: where there are several, gradients on their way between them are one more copy.
    """
    copies = views + 3 + (processes > 1)  # a gradient and two moments
    return copies, sum(found.weights.values()) + copies * found.trained + found.call


def gb(size: float) -> str:
    """Bytes as gigabytes to a tenth, or as megabytes."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Hours, or minutes below one."""
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def hours(config: DictConfig, launched: Processes, outline: Outline, of_evaluation: float) -> Rows:
    """How long the run takes at a rate that is assumed, or measured where weights are at hand."""
    iterations = outline.iterations()
    rate = config.plan.flops_per_second or measured_rate(config, launched)
    if rate is None:
        return [("time", "unknown; plan.flops_per_second=RATE, what one process reaches, gives it")]
    if iterations is None:
        return []
    known = "assumed" if config.plan.flops_per_second else "as one call of the model takes"
    seconds = [flops / rate for flops in (iterations * outline.flops_per_iteration(), of_evaluation)]
    of_devices = " and ".join(
        f"{duration(each)} to {what}" for each, what in zip(seconds, ("train", "evaluate"), strict=True)
    )
    return [
        ("rate", f"{rate:.3g} FLOP/s of a process, {known}"),
        (
            "time",
            f"about {duration(sum(seconds) / outline.processes)}; device time: {of_devices}; "
            "without rewards and scorers",
        ),
    ]


def measured_rate(config: DictConfig, launched: Processes) -> float | None:
    """FLOP/s of a micro-batch of predictions by the model itself; None if its weights are not in a folder."""
    if not Path(embedded(config.model.policy.source)).is_dir():
        return None
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    policy, size = assembly.pretrained(config, launched), int(config.micro_batch)
    latents = policy.noise(range(size))
    sigma, condition = latents.new_full((size,), 0.5), policy.encode([""] * size)
    ledger = assembly.new_ledger(launched)
    with torch.no_grad():
        policy.predict(latents, sigma, condition)
        ledger.synchronise()
        start = time.perf_counter()
        policy.predict(latents, sigma, condition)
        ledger.synchronise()
    return size * policy.flops()["denoiser"] / (time.perf_counter() - start)


def check_budget(config: DictConfig, outline: Outline) -> None:
    """Refuse a budget that ends within an iteration, and one of fewer than 20 iterations for published curves.

    Raises:
        BudgetError: names the cost of an iteration and the budget that would do.
    """
    costs = outline.costs()
    wanted = LARGEST_ITERATION if config.evaluation.published else 1.0
    for axis, limit in outline.budget.limits.items():
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
