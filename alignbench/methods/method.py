"""What a method is: what it collects, what it steps on, and its loss. The harness owns everything else."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from alignbench.errors import ConfigError
from alignbench.policies.policy import Condition, Policy
from alignbench.prompts.prompt import Prompt
from alignbench.sampling.rollout import Sampler
from alignbench.seeding import generator
from alignbench.settings import between
from alignbench.stack import Stack

MOST_IMAGES = 1_000_000  # of an iteration; the largest of a paper is a few thousand


@dataclass(frozen=True)
class Needs:
    """What a method asks of its surroundings; checked before any work.

    Attributes:
        parameterisations: model outputs the equations hold for: ``"velocity"``, ``"epsilon"``.
        differentiable_reward: the loss takes gradients through the reward.
        log_probabilities: the rollout must be stochastic.
        views: named weights to add beside ``current`` and ``reference``.
    """

    parameterisations: tuple[str, ...] = ("velocity",)
    differentiable_reward: bool = False
    log_probabilities: bool = False
    views: tuple[str, ...] = ()


@dataclass(frozen=True)
class Clock:
    """Where a run stands.

    Attributes:
        iteration: completed iterations.
        optimizer_steps: applied optimizer steps.
        fraction: used share of the budget, in [0, 1].
    """

    iteration: int = 0
    optimizer_steps: int = 0
    fraction: float = 0.0


@dataclass(frozen=True)
class BatchSize:
    """How much an iteration collects.

    Attributes:
        prompts: distinct prompts.
        images: images per prompt (the group).
        updates: optimizer steps the collected images are split into.
    """

    prompts: int
    images: int
    updates: int = 1

    def __post_init__(self) -> None:
        for name in ("prompts", "images", "updates"):
            between(getattr(self, name), 1, MOST_IMAGES, f"method.batch.{name}")
        if self.total > MOST_IMAGES:
            raise ConfigError(
                f"{self.prompts} prompts x {self.images} images = {self.total:,} images an iteration: at most "
                f"{MOST_IMAGES:,}"
            )
        if self.total % self.updates:
            raise ConfigError(
                f"{self.prompts} prompts x {self.images} images = {self.total} images cannot be split into "
                f"{self.updates} equal updates; method.batch.updates must divide {self.total}"
            )

    @property
    def total(self) -> int:
        """Images of an iteration, over all processes."""
        return self.prompts * self.images


@dataclass(frozen=True)
class Cost:
    """What an iteration costs, over all processes; an upper bound where a method drops images.

    Attributes:
        rollout: denoiser forward passes of sampling, per sample; guidance counts two.
        training: denoiser forward passes of losses and preparation, per sample.
        backward: denoiser backward passes, per sample.
        images: images decoded, with and without gradient.
        images_with_gradient: those of them that are decoded with gradient.
        reward_calls: images scored.
    """

    rollout: float = 0.0
    training: float = 0.0
    backward: float = 0.0
    images: float = 0.0
    images_with_gradient: float = 0.0
    reward_calls: float = 0.0


@dataclass
class Experience:
    """What one iteration collected: one row per term (an image, an image at a step, a pair), on this process.

    Attributes:
        terms: named tensors, each ``[rows, ...]``.
        condition: encoded prompts of the rows.
        prompts: prompt records of the rows.
        ids: global ids of the rows, the same for any number of processes.
        kept: global ids of the rows to learn from, over all processes.
        metrics: numbers about the whole collection, for the records; with ``reward_std``, the standard deviation of the
            trained reward over the images, the loop notices a reward that never varies.
    """

    terms: dict[str, Tensor]
    condition: Condition
    prompts: Sequence[Prompt]
    ids: Sequence[int]
    kept: Sequence[int]
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class Batch:
    """The rows of some atoms of an update, ready for the loss.

    Attributes:
        terms: named tensors, each ``[rows, ...]``.
        condition: encoded prompts of the rows.
        prompts: prompt records of the rows.
        atoms: indices of the atoms within the update.
    """

    terms: dict[str, Tensor]
    condition: Condition
    prompts: Sequence[Prompt]
    atoms: Sequence[int]


@dataclass
class Update:
    """One optimizer step.

    Attributes:
        atoms: indivisible pieces on this process (a sample, a pair, a group).
        rows: denoiser rows that one atom brings.
        denominator: what the summed loss is divided by: a number over all processes.
        batch: builds the rows of some atoms (indices below ``atoms``); its noise is seeded per sample.
        shared: what ``prepare`` leaves for the losses of this update.
    """

    atoms: int
    denominator: float
    batch: Callable[[Sequence[int]], Batch]
    rows: int = 1
    shared: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class Loss:
    """The sum of a micro-batch's losses and what to log about it.

    Attributes:
        total: scalar, summed (not averaged) over the rows.
        metrics: named sums over the rows, detached; divided by ``denominator`` like the loss.
        largest: named values of which the records keep the maximum.
    """

    total: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)
    largest: dict[str, Tensor] = field(default_factory=dict)


class Method(ABC):
    """One alignment method. Its equations are pure functions of float32 tensors in the same file.

    Args:
        sampler: how the rollout samples.
        batch: how much an iteration collects.
        seed: of the run; every draw is hashed from it.
    """

    needs: ClassVar[Needs] = Needs()

    def __init__(self, *, sampler: Sampler, batch: BatchSize, seed: int) -> None:
        self.sampler = sampler
        self.batch = batch
        self.seed = seed

    @abstractmethod
    def collect(self, stack: Stack, prompts: Sequence[Prompt], clock: Clock) -> Experience:
        """Gather an iteration's experience from ``batch.prompts`` distinct prompts."""

    @abstractmethod
    def updates(self, experience: Experience, stack: Stack, clock: Clock) -> Iterator[Update]:
        """The optimizer steps of an iteration, lazily."""

    def prepare(self, stack: Stack, update: Update) -> None:  # noqa: B027 - optional
        """A pass without gradient over the whole update, before its losses."""

    @abstractmethod
    def loss(self, stack: Stack, update: Update, batch: Batch) -> Loss:
        """Sum the losses of a micro-batch; no backward here."""

    def after_step(self, policy: Policy, clock: Clock) -> None:  # noqa: B027 - optional
        """Called after every applied optimizer step."""

    def after_iteration(self, policy: Policy, clock: Clock) -> None:  # noqa: B027 - optional
        """Called after the last optimizer step of an iteration."""

    def prompts_wanted(self, clock: Clock) -> int:
        """How many distinct prompts the next iteration collects from."""
        return self.batch.prompts

    @abstractmethod
    def expected_cost(self) -> Cost:
        """What an iteration costs, for the plan and the tests of the ledger."""

    def state_dict(self) -> dict[str, Any]:
        """What the method must remember, as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027 - optional
        """Restore what ``state_dict`` returned."""

    def artifact(self) -> dict[str, Tensor] | None:
        """Tensors that are collected once and needed until the end (offline pairs); kept beside the checkpoints."""
        return None

    def load_artifact(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027 - optional
        """Restore what ``artifact`` returned."""

    def parts(self, experience: Experience, clock: Clock) -> Iterator[tuple[list[int], int]]:
        """Split the kept rows at random into ``batch.updates`` parts, the same for any number of processes.

        Yields:
            The local indices of a part's rows, and the part's size over all processes. Parts differ by at most one of
            what ``together`` holds together; an empty part is left out.
        """
        local = {row: index for index, row in enumerate(experience.ids)}
        bundles = self.together(experience.kept)
        order = generator("split", self.seed, clock.iteration).permutation(len(bundles))
        for part in np.array_split(bundles[order], self.batch.updates):
            if part.size:
                yield [local[row] for row in part.flatten().tolist() if row in local], part.size

    def together(self, kept: Sequence[int]) -> NDArray[np.int64]:
        """The kept rows as ``[bundles, rows]``: those of a bundle are trained in one update. Here each is its own."""
        return np.array(kept, dtype=np.int64).reshape(-1, 1)
