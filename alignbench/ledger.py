"""The cost of a run, counted where it is spent, and the budget that ends it.

Counts are whole numbers, per sample: a guided prediction counts two passes, every replay, branch and reference pass
counts. FLOPs are measured once per kind of pass and multiplied by the counts. Three phases have clocks of their own, so
that evaluation never costs a method anything.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import asdict, dataclass, field
from typing import Any

from alignbench.errors import BudgetError

PHASES = ("rollout", "training", "evaluation")
METHOD_PHASES = ("rollout", "training")
Join = Callable[[dict[str, float]], dict[str, float]]
AXES = ("flops", "nfe", "images", "reward_calls", "gpu_seconds", "iterations")


@dataclass
class Counts:
    """What one phase has cost.

    Attributes:
        flops: floating-point operations of all passes.
        nfe: denoiser forward passes, per sample.
        backward: denoiser backward passes, per sample.
        images: images decoded.
        reward_calls: images scored.
    """

    flops: int = 0
    nfe: int = 0
    backward: int = 0
    images: int = 0
    reward_calls: int = 0


@dataclass
class Ledger:
    """Cumulative cost by phase.

    Args:
        synchronise: called before the clock is read, so that queued device work is included.

    Attributes:
        texts: FLOPs of every text that was read, by ``phase/reader/digest of the text``; not part of ``phases``.
        others_seconds: rollout and training of other processes, until the run was continued.
    """

    synchronise: Callable[[], None] = lambda: None
    phases: dict[str, Counts] = field(default_factory=lambda: {phase: Counts() for phase in PHASES})
    seconds: dict[str, float] = field(default_factory=lambda: {"reward": 0.0} | dict.fromkeys(PHASES, 0.0))
    texts: dict[str, int] = field(default_factory=dict)
    optimizer_steps: int = 0
    wasted_nfe: int = 0
    others_seconds: float = 0.0
    phase: str = "rollout"

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Charge everything inside to a phase."""
        outer, self.phase = self.phase, phase
        with self.timed(phase):
            try:
                yield
            finally:
                self.phase = outer

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Passes of an attempt that fails or is stopped are wasted, not charged; the budget sees the one that works."""
        before, texts = copy(self.phases[self.phase]), dict(self.texts)
        try:
            yield
        except BaseException:
            self.wasted_nfe += self.phases[self.phase].nfe - before.nfe
            self.phases[self.phase], self.texts = before, texts
            raise

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to a clock."""
        self.synchronise()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.synchronise()
            self.seconds[name] += time.perf_counter() - start

    def scoring(self) -> AbstractContextManager[None]:
        """Time a reward call, a share of the phase that makes it; evaluation's calls are on its own clock alone."""
        return self.timed("reward") if self.phase in METHOD_PHASES else nullcontext()

    def read(self, reader: str, texts: Iterable[str], flops: int) -> None:
        """Charge a text encoder's pass over each text: once for the method (to ``rollout``), once for evaluation.

        Encoders keep what they have encoded, but neither of the two gets a text for nothing because the other one,
        another process or the run before an interruption has read it: none of them changes what a run is charged.

        Args:
            reader: names the encoder.
            flops: of one text.
        """
        phase = "evaluation" if self.phase == "evaluation" else "rollout"
        for text in dict.fromkeys(texts):
            self.texts.setdefault(f"{phase}/{reader}/{hashlib.sha256(text.encode()).hexdigest()[:16]}", flops)

    def count(self, *, flops: int = 0, nfe: int = 0, backward: int = 0, images: int = 0, reward_calls: int = 0) -> None:
        """Charge passes to the current phase."""
        counts = self.phases[self.phase]
        counts.flops += flops
        counts.nfe += nfe
        counts.backward += backward
        counts.images += images
        counts.reward_calls += reward_calls

    def _joined(self, join: Join) -> tuple[dict[str, Counts], dict[str, int]]:
        """``phases`` and ``texts`` over all processes; a text that several of them read counts once."""
        flat = {f"{phase}/{name}": n for phase, counts in self.phases.items() for name, n in asdict(counts).items()}
        joined = join(flat)
        phases = {
            phase: Counts(**{name: int(joined[f"{phase}/{name}"]) for name in asdict(Counts())})
            for phase in self.phases
        }
        flops, readers = join(dict(self.texts)), join(dict.fromkeys(self.texts, 1))
        return phases, {text: int(flops[text] // readers[text]) for text in flops}

    def row(self, join: Join = lambda values: values) -> dict[str, Any]:
        """The method's cumulative cost (evaluation apart), as it stands in the records.

        Args:
            join: adds named numbers over all processes.
        """
        counts, texts = self._joined(join)
        for text, flops in texts.items():
            counts[text.partition("/")[0]].flops += flops
        phases = {phase: asdict(each) for phase, each in counts.items()}
        total = {name: sum(phases[phase][name] for phase in METHOD_PHASES) for name in asdict(Counts())}
        return total | {"optimizer_steps": self.optimizer_steps, "phases": phases}

    def clocks(self) -> dict[str, float]:
        """Seconds by phase; ``total`` is the method's clock. ``reward`` is part of the phase that asked for it."""
        total = sum(self.seconds[phase] for phase in METHOD_PHASES)
        return {name: round(value, 4) for name, value in (self.seconds | {"total": total}).items()}

    def gpu_seconds(self, join: Join = lambda values: values) -> float:
        """Seconds of rollout and training, over all processes and since the run began."""
        own = sum(self.seconds[phase] for phase in METHOD_PHASES) + self.others_seconds
        return join({"gpu_seconds": own})["gpu_seconds"]

    def state_dict(self, join: Join = lambda values: values) -> dict[str, Any]:
        """All counts, over all processes; ``seconds`` are this process's, ``gpu_seconds`` those of all."""
        phases, texts = self._joined(join)
        return {
            "phases": {phase: asdict(counts) for phase, counts in phases.items()},
            "texts": texts,
            "optimizer_steps": self.optimizer_steps,
            "volatile": {
                "seconds": dict(self.seconds),
                "gpu_seconds": self.gpu_seconds(join),
                "wasted_nfe": self.wasted_nfe,
            },
        }

    def load_state_dict(self, state: Mapping[str, Any], *, main: bool = True) -> None:
        """Continue from ``state_dict``: counts and seconds go to the main process, the others begin at zero.

        What was counted before, to get ready again, is wasted.
        """
        preparing = sum(counts.nfe for counts in self.phases.values())
        self.phases = {phase: Counts(**counts) if main else Counts() for phase, counts in state["phases"].items()}
        self.texts = dict(state["texts"]) if main else {}
        self.wasted_nfe = preparing + (state["volatile"]["wasted_nfe"] if main else 0)
        self.optimizer_steps = state["optimizer_steps"]
        seconds = dict(state["volatile"]["seconds"])
        own = sum(seconds[phase] for phase in METHOD_PHASES)
        self.seconds = seconds if main else dict.fromkeys(seconds, 0.0)
        self.others_seconds = state["volatile"].get("gpu_seconds", own) - own if main else 0.0


class Budget:
    """What a run may spend; it ends on the first axis that is used up.

    Args:
        limits: positive amounts by axis (see ``AXES``); None means no limit on that axis.

    Raises:
        BudgetError: no axis is limited, an axis is unknown, or a limit is not positive and finite.
    """

    def __init__(self, limits: Mapping[str, float | None]) -> None:
        self.limits = {str(axis): float(limit) for axis, limit in limits.items() if limit is not None}
        for axis, limit in self.limits.items():
            if axis not in AXES:
                raise BudgetError(f"budget.{axis} is not counted; choose from {', '.join(AXES)}")
            if not 0 < limit < math.inf:
                raise BudgetError(f"budget.{axis} is {limit:g}: it must be positive, and finite")
        if not self.limits:
            raise BudgetError(f"the run would never end: set a limit on one of budget.{{{', '.join(AXES)}}}")

    def fraction(self, spent: Mapping[str, float]) -> float:
        """The used share of the budget: the largest over its axes; 1 or more ends the run."""
        return max(spent[axis] / limit for axis, limit in self.limits.items())
