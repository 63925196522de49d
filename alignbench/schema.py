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
from alignbench.settings import between, checked, construct

Section = Mapping[str, Any]

# Wider than anything useful, and narrow enough that no slip of the hand overflows, hangs or fills the memory.
LARGEST_SEED = 2**63 - 1  # what torch takes
MOST_THREADS = 1024
MOST_ROWS = 65_536  # of one call
POLICY = {  # of a model's policy, where it has them
    "rank": (1, 4096),
    "alpha": (1e-6, 1e6),
    "max_sequence_length": (0, 4096),
    "resolution": (8, 8192),
}


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
        folder_name(str(name), "reward.parts has a part")
        checked(part, Section, f"reward.parts.{name}")
        if "weight" not in part:
            raise ConfigError(f"reward.parts.{name}.weight is missing: it must be a number (1.0 for a single part)")
        checked(part["weight"], float, f"reward.parts.{name}.weight")
    construct(Prompts, prompts, "prompts")
    for name, node in construct(Evaluation, evaluation, "evaluation").scorers.items():
        for domain, scorer in checked(node, Section, f"evaluation.scorers.{name}").items():
            checked(scorer, Section, f"evaluation.scorers.{name}.{domain}")


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
        check_machine(self.seed, self.threads, self.micro_batch)
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
        for name, (least, most) in POLICY.items():
            value = self.policy.get(name)
            if isinstance(value, int | float):
                between(value, least, most, f"model.policy.{name}")


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
        for name, value in (("lr", self.lr), ("eps", self.eps)):
            if not 0 < value <= 1:  # a step moves each weight by at most about lr
                raise ConfigError(f"method.optimizer.{name} is {value:g}; it must be positive and at most 1")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"method.optimizer.betas is {list(self.betas)}; each must be in [0, 1)")
        if not 0 <= self.lr * self.weight_decay < 1:  # a step multiplies weights by 1 - lr weight_decay
            raise ConfigError(
                f"method.optimizer.weight_decay is {self.weight_decay:g}; it must be 0 or more, and less than 1 / lr = "
                f"{1 / self.lr:g}"
            )
        if self.clip < 0:
            raise ConfigError(f"method.optimizer.clip is {self.clip:g}; it must be positive, or 0 not to clip")


@dataclass(frozen=True)
class Reward:
    """``conf/reward``; ``renamed`` is what an old name of it tells those who use it."""

    parts: Mapping[str, Any]
    targets: Mapping[str, float]
    normalisation: Mapping[str, float]
    renamed: str | None = None

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError("reward.parts is empty: it must have at least one part; see conf/reward/*.yaml")


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
    scorers: Mapping[str, Any]

    def __post_init__(self) -> None:
        fractions = list(self.fractions)
        if fractions != sorted(set(fractions)) or not fractions or fractions[0] != 0 or fractions[-1] != 1:
            raise ConfigError(f"evaluation.fractions is {fractions}: they must increase from 0 to 1")
        if not 0 < self.average <= 1:
            raise ConfigError(f"evaluation.average is {self.average}: a fraction of the budget in (0, 1]")


def check_machine(seed: int, threads: int | None, micro_batch: int) -> None:
    """Refuse a seed, a number of threads or a micro-batch that torch or the machine cannot take.

    Raises:
        ConfigError: names the setting and its range.
    """
    between(seed, 0, LARGEST_SEED, "seed")
    if threads is not None:
        between(threads, 1, MOST_THREADS, "threads", ", or null for torch's own choice")
    between(micro_batch, 1, MOST_ROWS, "micro_batch")


def folder_name(name: str, what: str) -> None:
    """Refuse what cannot name one folder of the results.

    Raises:
        ConfigError: a path separator, or another character that file systems do not take.
    """
    if not re.fullmatch(r"\w[\w.@=,+-]*", name):
        raise ConfigError(f"{what} {name!r}: it names a folder, so use letters, digits and any of _ . @ = , + -")
