"""The sections of a configuration: which settings each has, of what type, in what range.

What a section hands on (a method's ``algorithm``, a ``policy``, a reward's parts) is checked against the signature of
its ``_target_`` when it is built.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from omegaconf import DictConfig

from alignbench.configuration import plain
from alignbench.errors import ConfigError
from alignbench.prompts.sets import Balance, Split
from alignbench.settings import checked, construct

Section = Mapping[str, Any]


def check(config: DictConfig) -> None:
    """Refuse a configuration that cannot be run, whatever it is made of.

    Raises:
        ConfigError: a mandatory value is missing, a setting is unknown, of another type or out of range.
    """
    run = construct(Run, plain(config), "")
    method = construct(Method, run.method, "method")
    construct(Optimizer, method.optimizer, "method.optimizer")
    construct(Plan, run.plan, "plan")
    check_evaluated(run.model, run.reward, run.prompts, run.evaluation)
    for axis, limit in run.budget.items():
        checked(limit, float | None, f"budget.{axis}")


def check_evaluated(model: Section, reward: Section, prompts: Section, evaluation: Section) -> None:
    """Refuse sections that say what is evaluated, and how, if they cannot be used; see ``check``."""
    construct(Model, model, "model")
    for name, part in construct(Reward, reward, "reward").parts.items():
        folder_name(name, "reward.parts has a part")
        if "weight" not in part:
            raise ConfigError(f"reward.parts.{name}.weight is missing: it must be a number (1.0 for a single part)")
        checked(part["weight"], float, f"reward.parts.{name}.weight")
    construct(Prompts, prompts, "prompts")
    construct(Evaluation, evaluation, "evaluation")


@dataclass(frozen=True)
class Run:
    """The top of a configuration; see ``conf/config.yaml``."""

    name: str
    results: str
    seed: int
    device: Literal["auto", "cpu", "cuda"]
    threads: int | None
    micro_batch: int
    checkpoint_every: float
    progress: bool
    dry_run: bool
    plan: Section
    model: Section
    method: Section
    reward: Section
    prompts: Section
    evaluation: Section
    budget: Section
    tracker: Section | None = None

    def __post_init__(self) -> None:
        folder_name(self.name, "name is")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads is {self.threads}: it must be 1 or more, or null for torch's own choice")
        if self.micro_batch < 1:
            raise ConfigError(f"micro_batch is {self.micro_batch}: it must be 1 or more")
        if not 0 < self.checkpoint_every <= 1:
            raise ConfigError(f"checkpoint_every is {self.checkpoint_every}: a fraction of the budget in (0, 1]")


@dataclass(frozen=True)
class Plan:
    """What ``dry_run`` assumes about the machine: processes, FLOP/s of each, bytes of its device."""

    processes: int | None
    flops_per_second: float | None
    memory: float

    def __post_init__(self) -> None:
        for name, value in (("processes", self.processes), ("flops_per_second", self.flops_per_second)):
            if value is not None and value <= 0:
                raise ConfigError(f"plan.{name} is {value:g}: it must be positive, or null")
        if self.memory <= 0:
            raise ConfigError(f"plan.memory is {self.memory:g}: it must be positive, in bytes")


@dataclass(frozen=True)
class Model:
    """``conf/model``."""

    name: str
    domain: str
    evaluation_steps: int
    policy: Section

    def __post_init__(self) -> None:
        folder_name(self.name, "model.name is")


@dataclass(frozen=True)
class Method:
    """``conf/method``; ``tuned``: its settings were found with the same effort as the other methods'."""

    name: str
    algorithm: Section
    rollout: Section
    batch: Section
    optimizer: Section
    tuned: bool = False

    def __post_init__(self) -> None:
        folder_name(self.name, "method.name is")


@dataclass(frozen=True)
class Optimizer:
    """``method.optimizer``: AdamW (arXiv 1711.05101), and the largest norm of a gradient (0 does not clip)."""

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    clip: float

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"method.optimizer.lr is {self.lr:g}; it must be positive")
        if self.eps <= 0:
            raise ConfigError(f"method.optimizer.eps is {self.eps:g}; it must be positive")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"method.optimizer.betas is {list(self.betas)}; each must be in [0, 1)")
        if self.weight_decay < 0:
            raise ConfigError(f"method.optimizer.weight_decay is {self.weight_decay:g}; it must be 0 or more")
        if self.clip < 0:
            raise ConfigError(f"method.optimizer.clip is {self.clip:g}; it must be positive, or 0 not to clip")


@dataclass(frozen=True)
class Reward:
    """``conf/reward``; ``renamed`` is what an old name of it tells those who use it."""

    parts: Mapping[str, Section]
    targets: Mapping[str, float]
    normalisation: Mapping[str, float]
    renamed: str | None = None


@dataclass(frozen=True)
class Prompts:
    """``conf/prompts``."""

    source: str
    split: Split
    path: str | None
    balance: Balance
    dataset: Section | None = None


@dataclass(frozen=True)
class Evaluation:
    """``conf/evaluation``."""

    fractions: Sequence[float]
    average: float
    published: bool
    curve: Section
    final: Section
    features: str | None
    scorers: Mapping[str, Section]

    def __post_init__(self) -> None:
        fractions = list(self.fractions)
        if fractions != sorted(set(fractions)) or not fractions or fractions[0] != 0 or fractions[-1] != 1:
            raise ConfigError(f"evaluation.fractions is {fractions}: they must increase from 0 to 1")
        if self.average <= 0:
            raise ConfigError(f"evaluation.average is {self.average}: a positive fraction of the budget")


def folder_name(name: str, what: str) -> None:
    """Refuse what cannot name one folder of the results.

    Raises:
        ConfigError: a path separator, or another character that file systems do not take.
    """
    if not re.fullmatch(r"\w[\w.@=,+-]*", name):
        raise ConfigError(f"{what} {name!r}: it names a folder, so use letters, digits and any of _ . @ = , + -")
