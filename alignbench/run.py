"""One run from configuration to records: the loop, on one page."""

import json
import math
import resource
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tqdm import tqdm

from alignbench import assembly, plan
from alignbench.assembly import Parts
from alignbench.configuration import identity, reward_name, run_folder, variant
from alignbench.errors import AlignbenchError, RecordError, RewardError
from alignbench.evaluation import Protocol
from alignbench.methods.method import Clock
from alignbench.prompts.sets import draw
from alignbench.records import Checkpoint, RunDirectory, Status, find_runs, read_run
from alignbench.stack import out_of_memory
from alignbench.tracking import Tracker, numbers_of
from alignbench.training import optimizer_step

BASE_SETTINGS = ("model", "reward", "prompts", "evaluation")  # what the base model's scores depend on
CONSTANT_ITERATIONS = 3  # a reward that never varied over the first iterations teaches nothing: an error


def run(config: DictConfig, overrides: Sequence[str] = ()) -> Path:
    """Run, or continue, one run; a finished one is skipped.

    Args:
        config: the composed configuration, see ``conf/config.yaml``.
        overrides: what was changed on the command line; names the variant.

    Returns:
        The run's folder.

    Raises:
        AlignbenchError: whatever a user can act on; the status file says the same.
    """
    folder = run_folder(config, overrides)
    parts = assembly.assemble(config)
    print(plan.table(config, parts, folder), flush=True) if parts.processes.main else None
    if config.dry_run:
        return folder
    described = assembly.describe(config, parts) | {"variant": variant(overrides), "reward": reward_name(config)}
    main = parts.processes.main
    with RunDirectory.open(folder, config=identity(config), run=described) if main else nullcontext() as records:
        if parts.processes.share(records is not None and records.status.get("status") == "done"):
            print(f"{folder}: already done, skipped")
            return folder
        tracker = assembly.tracker(config, folder) if main else None
        try:
            with stop_requested() as stopping:
                Loop(config, parts, records, tracker).go(stopping)
        except BaseException as error:
            if records is not None:
                with suppress(RecordError):  # a full disk: what stopped the run says more
                    records.set_status(*verdict(error))
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise AlignbenchError(verdict(error)[1]) from error
            raise
        finally:
            if tracker is not None:
                tracker.close()
    return folder


def verdict(error: BaseException) -> tuple[Status, str]:
    """How a run that ended with this error stands in the records."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", "stopped by a signal; the same command continues from the last checkpoint"
    if isinstance(error, RuntimeError) and out_of_memory(error):
        return "out_of_memory", (
            f"out of memory with one row a call ({str(error).splitlines()[0]}); "
            "model.policy.gradient_checkpointing=true or a smaller model.policy.resolution needs less"
        )
    return "failed", str(error) if isinstance(error, AlignbenchError) else f"{type(error).__name__}: {error}"


@contextmanager
def stop_requested() -> Iterator[list[int]]:
    """Turn the first Ctrl-C (or SIGTERM) into an entry of the returned list; a second one interrupts at once."""
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        print("\nstopping after this iteration (again: at once)", file=sys.stderr, flush=True)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Loop:
    """The loop of a run, and what it must remember to continue.

    Args:
        config: the composed configuration.
        parts: what it was assembled to.
        records: the run's directory; None on processes that do not write.
        tracker: where else the rows are shown; None for nowhere.
    """

    def __init__(
        self, config: DictConfig, parts: Parts, records: RunDirectory | None, tracker: Tracker | None = None
    ) -> None:
        self.config, self.parts, self.records, self.tracker = config, parts, records, tracker
        self.clock = Clock()
        self.evaluations = 0  # rows written
        self.evaluated = 0.0  # last fraction of the budget that has been evaluated
        self.varied = False  # whether the reward has ever differed between images
        self.protocols = assembly.protocols(config, parts)

    def go(self, stopping: Sequence[int]) -> None:
        """Run until the budget is spent, from the last checkpoint if there is one."""
        self.parts.evaluator.sample_reference()
        self.restore()
        if self.records is not None:
            self.records.set_status("running", fraction=self.clock.fraction)
        if self.evaluations == 0:
            self.evaluate_at_start()
        saved = self.clock.fraction
        with self._bar() as bar:
            while self.clock.fraction < 1:
                row = self.iterate()
                if self.records is not None:
                    self.records.append_metrics(row)
                if self.tracker is not None:
                    self.tracker.log(self.clock.iteration, numbers_of(row, "train"))
                bar.update(100 * min(1.0, self.clock.fraction) - bar.n)
                shown = "reward" if "reward" in row else "loss"
                bar.set_postfix({shown: f"{row[shown]:.3f}", "iteration": self.clock.iteration})
                self.evaluate_if_due()
                stop = self.parts.processes.share(bool(stopping))
                if stop or self.clock.fraction >= 1 or self.clock.fraction - saved >= self.config.checkpoint_every:
                    self.save()
                    saved = self.clock.fraction
                if stop:
                    raise KeyboardInterrupt
        self.evaluate_at_end()
        if self.records is not None:
            self.parts.policy.export(self.records.folder / "lora", view="evaluation")
            self.records.set_status("done", fraction=1.0)

    def _bar(self) -> "tqdm[Any]":
        return tqdm(
            total=100,
            initial=100 * self.clock.fraction,
            desc=f"{self.config.method.name} on {reward_name(self.config)}, seed {self.config.seed}",
            bar_format="{desc}: {n:.1f}% |{bar}| {elapsed}<{remaining}{postfix}",
            disable=not self.config.progress or self.records is None,
        )

    def iterate(self) -> dict[str, Any]:
        """Collect, update, account; returns the iteration's row."""
        parts, method, ledger = self.parts, self.parts.method, self.parts.ledger
        prompts = draw(
            parts.prompts,
            method.prompts_wanted(self.clock),
            self.config.seed,
            self.clock.iteration,
            self.config.prompts.balance,
        )
        with ledger.during("rollout"):
            experience = method.collect(parts.stack, prompts, self.clock)
        if "reward_std" in experience.metrics:
            self._check_reward(experience.metrics["reward_std"])
        sums: dict[str, list[float]] = {}
        with ledger.during("training"):
            for update in method.updates(experience, parts.stack, self.clock):
                metrics, largest = optimizer_step(
                    parts.stack, method, update, parts.optimizer, self.config.method.optimizer.clip
                )
                ledger.optimizer_steps += 1
                self.clock = replace(self.clock, optimizer_steps=ledger.optimizer_steps)
                method.after_step(parts.policy, self.clock)
                for name, value in metrics.items():
                    sums.setdefault(name, []).append(value)
                for name, value in largest.items():
                    sums.setdefault(f"{name}/largest", []).append(value)
        trained = {
            name: max(values) if name.endswith("/largest") else sum(values) / len(values)
            for name, values in sums.items()
        }
        trained |= {
            name.replace("/largest", "/first_update"): sums[name][0] for name in sums if name.endswith("/largest")
        }
        method.after_iteration(parts.policy, self.clock)
        spent = self._advance()
        return {
            "iteration": self.clock.iteration,
            "optimizer_steps": self.clock.optimizer_steps,
            "fraction": self.clock.fraction,
            **experience.metrics,
            **trained,
            "ledger": spent,
            "volatile": self._volatile(),
        }

    def _advance(self) -> dict[str, Any]:
        """Move the clock by one iteration and the evaluation average by the budget it took."""
        before = self.clock.fraction
        spent = self._spent()
        iteration = self.clock.iteration + 1
        seconds = self._sum({"gpu_seconds": self.parts.ledger.clocks()["total"]})
        fraction = self.parts.budget.fraction(spent | seconds | {"iterations": iteration})
        self.clock = replace(self.clock, iteration=iteration, fraction=fraction)
        decay = math.exp(-(fraction - before) / self.config.evaluation.average)
        self.parts.policy.blend("evaluation", decay)
        return spent

    def _check_reward(self, reward_std: float) -> None:
        self.varied = self.varied or reward_std > 0
        if not self.varied and self.clock.iteration + 1 >= CONSTANT_ITERATIONS:
            raise RewardError(
                f"every image had the same reward over the first {CONSTANT_ITERATIONS} iterations, so there is nothing "
                "to learn from. Check that the reward fits the prompts, or use one with partial credit "
                "(reward=geneval_soft)"
            )
        if self.varied and reward_std == 0 and self.records is not None:
            tqdm.write(f"iteration {self.clock.iteration + 1}: every image has the same reward (saturated?)")

    # Evaluation

    def evaluate_at_start(self) -> None:
        """The base model, under the curve protocol and under the final one at every guidance."""
        self._evaluate(self.parts.curve, "base", self.parts.curve.guidance[0])
        for guidance in self.parts.final.guidance:
            self._evaluate(self.parts.final, "base", guidance)
        self.save()

    def evaluate_if_due(self) -> None:
        """The curve protocol, when a fraction of the budget that asks for it has been passed."""
        passed = [each for each in self.config.evaluation.fractions if self.evaluated < each <= self.clock.fraction]
        if passed:
            self.evaluated = passed[-1]
            self._evaluate(self.parts.curve, "evaluation", self.parts.curve.guidance[0])

    def evaluate_at_end(self) -> None:
        """The final weights: their average at every guidance; the current ones under the curve protocol."""
        for guidance in self.parts.final.guidance:
            self._evaluate(self.parts.final, "evaluation", guidance)
        self._evaluate(self.parts.curve, "current", self.parts.curve.guidance[0])

    def _evaluate(self, protocol: Protocol, weights: str, guidance: float) -> None:
        described = self.protocols[protocol.name]
        name = f"{self.evaluations:04d}_{protocol.name}_{weights}_g{guidance:g}"
        known = self._known_base(described["hash"], guidance) if weights == "base" else None
        if known is None:
            before = self._spent()["phases"]["evaluation"]
            view = "reference" if weights == "base" else weights
            result = self.parts.evaluator(protocol, view=view, guidance=guidance)
            after = self._spent()["phases"]["evaluation"]
            measured = {
                "metrics": result.metrics,
                "standard_errors": result.standard_errors,
                "cost": {key: after[key] - before[key] for key in after},
            }
            scores, grid, source = result.scores, result.grid, None
        else:
            measured, scores, grid, source = known
            if self.parts.processes.main:
                with self.parts.ledger.during("evaluation"):
                    self.parts.ledger.count(**measured["cost"])
        spent = self._spent()
        if self.records is not None:
            self.records.append_evaluation(
                {
                    "evaluation": self.evaluations,
                    "fraction": self.clock.fraction,
                    "iteration": self.clock.iteration,
                    "optimizer_steps": self.clock.optimizer_steps,
                    "protocol": protocol.name,
                    "protocol_hash": described["hash"],
                    "weights": weights,
                    "guidance": guidance,
                    "prompts": described["prompts"],
                    "images": described["images"],
                    **measured,
                    "scores": self.records.write_scores(name, scores),
                    "grid": self.records.write_image(name, grid),
                    "ledger": spent,
                    "volatile": self._volatile() | {"reused_from": source},
                }
            )
            if self.tracker is not None:
                shown = f"{protocol.name}/{weights}_g{guidance:g}"
                self.tracker.log(self.clock.iteration, numbers_of(measured["metrics"], shown))
                self.tracker.picture(self.clock.iteration, shown, self.records.folder / "images" / f"{name}.png")
        self.evaluations += 1

    def _known_base(
        self, protocol_hash: str, guidance: float
    ) -> tuple[dict[str, Any], dict[str, Any], bytes, str] | None:
        """The same evaluation of the same base model, as another run of this experiment has recorded it.

        Only from a run with the same model, reward and evaluation settings, code, packages, hardware and threads: its
        numbers would come out again to the last bit.
        """
        found = None
        if self.records is not None:
            mine = read_run(self.records.folder)
            for folder in find_runs(self.records.folder.parent.parent):
                other = read_run(folder)
                same_settings = all(other.config.get(key) == mine.config[key] for key in BASE_SETTINGS)
                if (
                    folder == self.records.folder
                    or not same_settings
                    or environment(other.run) != environment(mine.run)
                ):
                    continue
                for row in other.evaluations:
                    key = (row.get("weights"), row.get("protocol_hash"), row.get("guidance"))
                    files = [folder / str(row.get(kind)) for kind in ("scores", "grid")]
                    if key == ("base", protocol_hash, guidance) and all(file.is_file() for file in files):
                        measured = {key: row[key] for key in ("metrics", "standard_errors", "cost")}
                        scores = json.loads((folder / row["scores"]).read_text())
                        found = measured, scores, (folder / row["grid"]).read_bytes(), "/".join(folder.parts[-3:])
        return self.parts.processes.share(found)

    # Checkpoints

    def save(self) -> None:
        """Write a checkpoint: every view, the optimizer, the method and the loop."""
        ledger = self.parts.ledger.state_dict(self._sum)
        if self.records is None:
            return
        state = {
            "clock": asdict(self.clock),
            "evaluations": self.evaluations,
            "evaluated": self.evaluated,
            "varied": self.varied,
            "ledger": ledger,
            "method": self.parts.method.state_dict(),
        }
        tensors = {"policy": self.parts.policy.state_dict(), "optimizer": optimizer_tensors(self.parts)}
        self.records.save_checkpoint(self.clock.iteration, tensors, state)
        self.records.set_status("running", fraction=self.clock.fraction)

    def restore(self) -> None:
        """Go back to the newest whole checkpoint; work done after it is counted as wasted."""
        checkpoint: Checkpoint | None = None
        wasted = 0
        if self.records is not None:
            checkpoint = self.records.latest_checkpoint()
            for problem in self.records.problems:
                tqdm.write(problem)
            cut = self.records.restore(checkpoint)["metrics.jsonl"]
            wasted = cut[-1]["ledger"]["nfe"] if cut else 0
        checkpoint = self.parts.processes.share(checkpoint)
        if checkpoint is None:
            self.parts.ledger.wasted_nfe += wasted
            return
        tensors, state = RunDirectory.load_checkpoint(checkpoint)
        self.parts.policy.load_state_dict(tensors["policy"])
        load_optimizer(self.parts, tensors.get("optimizer", {}))
        self.parts.method.load_state_dict(state["method"])
        self.parts.ledger.load_state_dict(state["ledger"], main=self.parts.processes.main)
        self.parts.ledger.wasted_nfe += max(0, wasted - self.parts.ledger.row()["nfe"]) if wasted else 0
        self.clock = Clock(**state["clock"])
        self.evaluations, self.evaluated, self.varied = state["evaluations"], state["evaluated"], state["varied"]
        if self.records is not None:
            for change in self.records.changes:
                tqdm.write(f"since this run began, {change}")
            tqdm.write(f"{self.records.folder}: continuing at {100 * self.clock.fraction:.0f}% of the budget")

    # Accounts

    def _sum(self, values: dict[str, float]) -> dict[str, float]:
        return self.parts.processes.join(values, sum)

    def _spent(self) -> dict[str, Any]:
        return self.parts.ledger.row(self._sum)

    def _volatile(self) -> dict[str, Any]:
        on_gpu = self.parts.processes.device.type == "cuda"
        peak = (
            torch.cuda.max_memory_allocated() / 2**20
            if on_gpu
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        )
        return {
            "seconds": self.parts.ledger.clocks(),
            "memory_mb": round(peak, 1),
            "micro_batch": self.parts.stack.micro_batch.size,
            "wasted_nfe": self.parts.ledger.wasted_nfe,
        }


def environment(run: Mapping[str, Any]) -> list[Any]:
    """What must agree for two runs to compute the same numbers, beside their settings; a dirty checkout never does."""
    clean = run.get("git", {}).get("dirty") is False
    return [run.get(key) for key in ("git", "packages", "hardware", "threads", "processes")] + [
        None if clean else object()
    ]


def optimizer_tensors(parts: Parts) -> dict[str, torch.Tensor]:
    """The optimizer's state by ``parameter/quantity``; empty before the first step."""
    state = parts.optimizer.state
    return {
        f"{name}/{key}": value
        for name, parameter in parts.policy.trainable_parameters().items()
        for key, value in state.get(parameter, {}).items()
    }


def load_optimizer(parts: Parts, tensors: dict[str, torch.Tensor]) -> None:
    """Restore ``optimizer_tensors``."""
    for name, parameter in parts.policy.trainable_parameters().items():
        prefix = f"{name}/"
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if own:
            parts.optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in own.items()
            }
