"""One run from configuration to records: the loop, on one page."""

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

from alignbench import assembly, base_evaluation, inputs, model_card, optimizer, plan, schema
from alignbench.assembly import Parts
from alignbench.configuration import check_overlay, identity, reward_name, run_folder, variant
from alignbench.errors import AlignbenchError, LockedError, RecordError, RewardError
from alignbench.evaluation import Protocol
from alignbench.memory import out_of_memory
from alignbench.methods.method import Clock
from alignbench.processes import Processes, Stopped
from alignbench.prompts.sets import draw
from alignbench.records import (
    Checkpoint,
    RunDirectory,
    Status,
    differences,
    missing_files,
    read_run,
    rebuild_status,
    writer,
)
from alignbench.tracking import Tracker, numbers_of
from alignbench.training import optimizer_step

CONSTANT_ITERATIONS = 3  # a reward that never varied over the first iterations teaches nothing: an error


def run(config: DictConfig, overrides: Sequence[str] = ()) -> Path:
    """Run, or continue, one run; a finished one is skipped.

    Args:
        config: the composed configuration, see ``conf/config.yaml``.
        overrides: what was changed on the command line; names the variant.

    Returns:
        The run's folder.

    Raises:
        AlignbenchError: whatever a user can act on; the status file says the same. LockedError: another live process
            is at this run.
    """
    processes = assembly.launched(config)
    with processes.together():
        check_overlay()
        schema.check(config)
        folder = run_folder(config, overrides)
        if not config.dry_run and processes.share(processes.main and finished(folder, config, processes)):
            return folder
        if config.dry_run:
            told, outline = plan.dry_run(config, processes, folder)
            if processes.main:
                print(told, flush=True)
            plan.check_budget(config, outline)
            return folder
        parts = assembly.assemble(config, processes)
        outline = plan.Outline.of(parts)
        if processes.main:
            print(plan.table(config, outline, folder), flush=True)
        plan.check_budget(config, outline)
        described = assembly.describe(config, parts) | {"variant": variant(overrides), "reward": reward_name(config)}
        with (
            # absolute, since code of the user's may change the working directory
            RunDirectory.open(folder.absolute(), config=identity(config), run=described)
            if processes.main
            else nullcontext()
        ) as records:
            if not processes.share(records is not None and records.status.get("status") == "done"):
                carry_out(config, parts, records)  # otherwise another process has done it meanwhile
    return folder


def finished(folder: Path, config: DictConfig, processes: Processes) -> bool:
    """Whether the run is done already, as its records say before anything is loaded; tells so.

    Raises:
        LockedError: another live process is at it.
        RecordError: it was begun with inputs that have changed since.
    """
    known = read_run(folder)
    same = not differences(known.config, identity(config))
    if known.status.get("status") == "done" and same:
        before, now = known.run.get("git", {}), assembly.environment(processes)["git"]
        since = ""
        if changed := differences({"git": before}, {"git": now}):
            since += f"; warning: it was made by other code ({', '.join(changed)})"
        with suppress(AlignbenchError):  # an input that is gone: nothing to compare with
            changed = inputs.changes(folder, assembly.read_inputs(config), config)
            since += "".join(f"; warning: other content now: {each}" for each in changed)
        if missing := missing_files(known):
            since += f"; warning: {len(missing)} files that its evaluations name are missing ({missing[0]})"
        if rebuild_status(folder):
            since += "; status.json was lost and is written again"
        print(f"{folder}: already done, skipped{since}", flush=True)
        return True
    if (busy := writer(folder)) is not None:
        raise LockedError(folder, busy)
    if same and known.config:
        inputs.check_unchanged(folder, assembly.read_inputs(config), config)
    return False


def carry_out(config: DictConfig, parts: Parts, records: RunDirectory | None) -> None:
    """Run the loop; whatever ends it stands in the records."""
    tracker = None
    forget_peak_memory()
    with stop_requested(tell=parts.processes.main) as stopping:
        try:
            tracker = assembly.tracker(config, records.folder) if records is not None else None
            Loop(config, parts, records, tracker, stopping).go()
        except BaseException as error:
            status, message = verdict(error)
            if records is not None:
                with suppress(RecordError):  # a full disk: what stopped the run says more
                    wasted = max(parts.ledger.wasted_nfe, wasted_before(records))
                    records.set_status(status, message, volatile={"wasted_nfe": wasted})
            if status == "out_of_memory":
                raise AlignbenchError(message) from error
            raise
        finally:
            if tracker is not None:
                tracker.close()


def forget_peak_memory() -> None:
    """Begin the measurement of the peak again: this process may have done other runs of a sweep before."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with suppress(OSError):  # only Linux has it
        Path("/proc/self/clear_refs").write_text("5")


def verdict(error: BaseException) -> tuple[Status, str]:
    """How a run that ended with this error stands in the records."""
    if isinstance(error, KeyboardInterrupt | SystemExit):  # the second one: a launcher that takes the job back
        return "interrupted", "stopped by a signal; the same command continues from the last checkpoint"
    if isinstance(error, RuntimeError) and out_of_memory(error):
        return "out_of_memory", (
            f"out of memory with one row a call ({str(error).splitlines()[0]}); "
            "model.policy.gradient_checkpointing=true or a smaller model.policy.resolution needs less"
        )
    return "failed", str(error) if isinstance(error, AlignbenchError) else f"{type(error).__name__}: {error}"


def wasted_before(records: RunDirectory) -> int:
    """The passes that earlier attempts at this run have wasted, by its status."""
    return recorded_number(records.status, "volatile", "wasted_nfe")


def recorded_number(row: Mapping[str, Any], part: str, name: str) -> int:
    """A count of a row that nothing vouches for; 0 where there is none."""
    section = row.get(part)
    value = section.get(name) if isinstance(section, Mapping) else None
    return value if isinstance(value, int) else 0


@contextmanager
def stop_requested(*, tell: bool) -> Iterator[list[int]]:
    """Turn the first Ctrl-C (or SIGTERM) into an entry of the returned list; a second Ctrl-C interrupts at once.

    A second SIGTERM does not: launchers pass on what their processes got already.
    """
    received: list[int] = []

    def handle(number: int, frame: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if tell and not received:
            print("\nstopping as soon as the run can be continued (Ctrl-C: at once)", file=sys.stderr, flush=True)
        received.append(number)

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
        stopping: not empty once this process was asked to stop.
    """

    def __init__(
        self,
        config: DictConfig,
        parts: Parts,
        records: RunDirectory | None,
        tracker: Tracker | None,
        stopping: Sequence[int],
    ) -> None:
        self.config, self.parts, self.records, self.tracker, self.stopping = config, parts, records, tracker, stopping
        self.clock = Clock()
        self.evaluations = 0  # rows written
        self.evaluated = 0.0  # last fraction of the budget that has been evaluated
        self.finished = 0  # evaluations made after the budget was spent
        self.varied = False  # whether the reward has ever differed between images
        self.protocols = assembly.protocols(config, parts)

    def go(self) -> None:
        """Run until the budget is spent, from the last checkpoint if there is one.

        Raises:
            Stopped: it was asked to, and has saved where it stands.
        """
        self.parts.evaluator.sample_reference()
        self.restore()
        self.set_status("running")
        try:
            self.evaluate_base()
            self.train()
            self.evaluate_final()
        except Stopped:
            self.save()
            raise
        self.save()
        if self.records is not None:
            self.records.write_folder("lora", self.export)
        self.set_status("done")

    def export(self, folder: Path) -> None:
        """Write the final weights, and what they scored as their model card."""
        assert self.records is not None
        self.parts.policy.export(folder, view="evaluation")
        model_card.write(read_run(self.records.folder), folder)

    def train(self) -> None:
        """Iterations, curve evaluations and checkpoints, until the budget is spent."""
        self.evaluate_if_due()  # a run may have been stopped within it
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
                self.stop_if_asked()
                if self.clock.fraction >= 1 or self.clock.fraction - saved >= self.config.checkpoint_every:
                    self.save()
                    saved = self.clock.fraction

    def stop_if_asked(self) -> None:
        """Raise ``Stopped`` on every process if one of them was asked to stop."""
        if self.parts.processes.any(bool(self.stopping)):
            raise Stopped

    def set_status(self, status: Status) -> None:
        """Write how the run stands, and what its attempts have wasted so far."""
        if self.records is not None:
            wasted = {"wasted_nfe": self.parts.ledger.wasted_nfe}
            self.records.set_status(status, fraction=min(1.0, self.clock.fraction), volatile=wasted)

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
        # A rollout that is stopped is thrown away, and its passes are wasted: the run continues from the iteration's
        # start. Several processes finish it, since they need not make equally many calls.
        stopping = parts.stack.micro_batch.interrupted_by(self.stop_if_asked)
        with ledger.during("rollout"), ledger.attempt(), stopping if parts.processes.count == 1 else nullcontext():
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
        seconds = {"gpu_seconds": self.parts.ledger.gpu_seconds(self._sum)}
        fraction = max(before, self.parts.budget.fraction(spent | seconds | {"iterations": iteration}))
        self.clock = replace(self.clock, iteration=iteration, fraction=fraction)
        decay = math.exp(-(fraction - before) / self.config.evaluation.average)
        self.parts.policy.blend("evaluation", decay)
        return spent

    def _check_reward(self, reward_std: float) -> None:
        self.varied = self.varied or reward_std > 0
        if not self.varied and self.clock.iteration + 1 >= CONSTANT_ITERATIONS:
            raise RewardError(
                f"every image had the same reward over the first {CONSTANT_ITERATIONS} iterations, so there is nothing "
                "to learn from. Check that the reward fits the prompts, or use one with partial credit (reward=geneval)"
            )
        if self.varied and reward_std == 0 and self.records is not None:
            tqdm.write(f"iteration {self.clock.iteration + 1}: every image has the same reward (saturated?)")

    # Evaluation

    def evaluate_base(self) -> None:
        """The base model, under the curve protocol and under the final one at every guidance."""
        curve, final = self.parts.curve, self.parts.final
        due = [(curve, curve.guidance[0]), *((final, guidance) for guidance in final.guidance)][self.evaluations :]
        for protocol, guidance in due:
            self._evaluate(protocol, "base", guidance)
        if due:
            self.save()

    def evaluate_if_due(self) -> None:
        """The curve protocol, when a fraction of the budget that asks for it has been passed."""
        passed = [each for each in self.config.evaluation.fractions if self.evaluated < each <= self.clock.fraction]
        if passed:
            self._evaluate(self.parts.curve, "evaluation", self.parts.curve.guidance[0])
            self.evaluated = passed[-1]

    def evaluate_final(self) -> None:
        """The final weights: their average at every guidance; the current ones under the curve protocol."""
        curve, final = self.parts.curve, self.parts.final
        due = [(final, "evaluation", guidance) for guidance in final.guidance] + [(curve, "current", curve.guidance[0])]
        for protocol, weights, guidance in due[self.finished :]:
            self._evaluate(protocol, weights, guidance)
            self.finished += 1

    def _evaluate(self, protocol: Protocol, weights: str, guidance: float) -> None:
        described = self.protocols[protocol.name]
        name = f"{self.evaluations:04d}_{protocol.name}_{weights}_g{guidance:g}"
        known = None
        if weights == "base" and self.records is not None:
            folder, number = self.records.folder, self.evaluations
            known, passed_over = base_evaluation.recorded(folder, described["hash"], guidance, number)
            for reason in passed_over:
                tqdm.write(reason)
        known = self.parts.processes.share(known)
        if known is None:
            if self.config.progress and self.records is not None:
                of = f"{described['images']} images under {protocol.name} at guidance {guidance:g}"
                tqdm.write(f"evaluating the {'base model' if weights == 'base' else f'{weights} weights'}: {of}")
            before = self._spent()["phases"]["evaluation"]
            view = "reference" if weights == "base" else weights
            with self.parts.ledger.during("evaluation"), self.parts.ledger.attempt():
                result = self.parts.evaluator(protocol, view=view, guidance=guidance, between=self.stop_if_asked)
            after = self._spent()["phases"]["evaluation"]
            measured = {
                "metrics": result.metrics,
                "standard_errors": result.standard_errors,
                "cost": {key: after[key] - before[key] for key in after},
            }
            scores, grid, source = result.scores, result.grid, None
        else:
            measured, scores, grid, source = known.measured, known.scores, known.grid, known.source
            self.parts.evaluator.repeat(self.parts.evaluator.samples(protocol), guidance, measured["cost"])
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

    # Checkpoints

    def save(self) -> None:
        """Write a checkpoint: every view, the optimizer, the method and the loop."""
        ledger = self.parts.ledger.state_dict(self._sum)
        if self.records is None:
            return
        artifact = self.parts.method.artifact()
        state = {
            "clock": asdict(self.clock),
            "evaluations": self.evaluations,
            "evaluated": self.evaluated,
            "finished": self.finished,
            "varied": self.varied,
            "ledger": ledger,
            "method": self.parts.method.state_dict(),
            "artifact": self.records.write_artifact(self.config.method.name, artifact) if artifact else None,
        }
        parts = self.parts
        tensors = {"policy": parts.policy.state_dict(), "optimizer": optimizer.state_of(parts.optimizer, parts.policy)}
        self.records.save_checkpoint(self.clock.iteration, tensors, state)
        self.records.prune_artifacts()
        self.set_status("running")

    def restore(self) -> None:
        """Go back to the newest whole checkpoint; work done after it is counted as wasted."""
        checkpoint: Checkpoint | None = None
        wasted, lost = 0, 0
        if self.records is not None:
            checkpoint = self.records.latest_checkpoint()
            for problem in self.records.problems:
                tqdm.write(problem)
            wasted = wasted_before(self.records)
            cut = self.records.restore(checkpoint)["metrics.jsonl"]
            if cut:
                wasted = max(wasted, recorded_number(cut[-1], "volatile", "wasted_nfe"))
                lost = recorded_number(cut[-1], "ledger", "nfe")
            for name in missing_files(read_run(self.records.folder)):
                tqdm.write(f"{self.records.folder / name} is missing; the run goes on without it")
        checkpoint = self.parts.processes.share(checkpoint)
        if checkpoint is None:
            self.parts.ledger.wasted_nfe += wasted + lost
            return
        tensors, state = RunDirectory.load_checkpoint(checkpoint)
        self.parts.policy.load_state_dict(tensors["policy"])
        optimizer.restore(self.parts.optimizer, self.parts.policy, tensors.get("optimizer", {}))
        self.parts.method.load_state_dict(state["method"])
        if state["artifact"]:
            self.parts.method.load_artifact(RunDirectory.load_artifact(checkpoint.folder.parents[1], state["artifact"]))
        ledger = self.parts.ledger
        ledger.load_state_dict(state["ledger"], main=self.parts.processes.main)
        ledger.wasted_nfe += max(0, wasted - state["ledger"]["volatile"]["wasted_nfe"])  # an attempt that saved nothing
        ledger.wasted_nfe += max(0, lost - ledger.row()["nfe"])
        self.clock = Clock(**state["clock"])
        self.evaluations, self.evaluated, self.varied = state["evaluations"], state["evaluated"], state["varied"]
        self.finished = state["finished"]
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
