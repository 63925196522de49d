"""``python -m alignbench.evaluate``: score weights or images that were made elsewhere, under a named protocol.

A LoRA, a checkpoint or a folder of images becomes a run directory with evaluations alone, so that it stands in the
report beside the methods that were trained here. The base model is scored beside it, or taken over from a run that has
scored it. A finished evaluation is skipped, an unfinished one continues with what is missing.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import diffusers
import hydra
import numpy as np
import torch
import transformers
from omegaconf import DictConfig
from torch import Tensor

from alignbench import assembly, base_evaluation, inputs, record_fields, schema
from alignbench.command import command_line, composed
from alignbench.configuration import CONF, identity, plain, reward_name
from alignbench.errors import AlignbenchError, CheckpointError, ConfigError, DataError, RecordError
from alignbench.evaluation import Evaluation, Evaluator, Samples, tag_of
from alignbench.ledger import Ledger
from alignbench.policies.denoiser import install_denoiser, is_pipeline, local_denoiser
from alignbench.policies.policy import Policy
from alignbench.processes import Processes, Stopped
from alignbench.prompts import sampled
from alignbench.prompts.sampled import SampledImages
from alignbench.prompts.sets import tell
from alignbench.records import RunDirectory, config_hash, read_run
from alignbench.rewards.reward import Reward
from alignbench.run import stop_requested, verdict
from alignbench.settings import construct
from alignbench.shapes.scenes import SIZE
from alignbench.stack import MicroBatch, Stack

Draw = Callable[[Sequence[int]], Tensor]  # rows of the samples -> images [rows, 3, height, width] in [0, 1]
SUBJECTS = ("lora", "checkpoint", "images")


@dataclass(frozen=True)
class Task:
    """``conf/evaluate.yaml``: what is scored, and where the scores go."""

    label: str | None
    seed: int
    lora: str | None
    checkpoint: str | None
    images: str | None
    base_images: str | None
    guidance: float | None
    protocol: Literal["curve", "final"]
    save_images: bool
    name: str
    results: str
    device: Literal["auto", "cpu", "cuda"]
    threads: int | None
    micro_batch: int
    model: Mapping[str, Any]
    reward: Mapping[str, Any]
    prompts: Mapping[str, Any]
    evaluation: Mapping[str, Any]

    def __post_init__(self) -> None:
        given = [name for name in SUBJECTS if getattr(self, name) is not None]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} are given: score one of them at a time, with a label each")
        if given and self.label is None:
            raise ConfigError(f"label=NAME is missing: the name of this {given[0]}'s row in the tables")
        if self.base_images is not None and self.images is None:
            raise ConfigError("base_images stand beside images=FOLDER; the base of a model is the model itself")
        if (self.images is None) != (self.guidance is None):
            raise ConfigError(
                "guidance=G is the scale that images=FOLDER were sampled at, and is needed with them alone; models are "
                "scored at the scales of the protocol: evaluation.final.guidance=[...]"
            )
        if self.images is not None and self.save_images:
            raise ConfigError("save_images=true with images=FOLDER: they are in that folder already")
        for what, value in (("name", self.name), ("label", self.label or "base")):
            schema.folder_name(value, f"{what} is")
        schema.check_machine(self.seed, self.threads, self.micro_batch)


@dataclass(frozen=True)
class Due:
    """One row to measure.

    Attributes:
        weights: ``"base"`` or, for what is scored, ``"evaluation"``: the names that the report compares.
        guidance: scale.
        measure: does it; calls what it is given now and then.
        repeat: charges the cost of a row that is recorded already, so that later ones cost what they always do.
    """

    weights: str
    guidance: float
    measure: Callable[[Callable[[], None]], Evaluation]
    repeat: Callable[[Mapping[str, int]], None]


class Subject(ABC):
    """What is scored.

    Attributes:
        protocols: descriptions with their hashes, as run.json gives them: of the curves, and of the final scores.
        protocol: the one that is scored under.
        due: the rows, the base's first.
        ledger: what they cost.
        micro_batch: rows of one call.
    """

    protocols: tuple[dict[str, Any], dict[str, Any]]
    protocol: dict[str, Any]
    due: list[Due]
    ledger: Ledger
    micro_batch: MicroBatch

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What identifies it in the records, beside its label."""

    @abstractmethod
    def inputs(self) -> dict[str, str]:
        """The inputs of its scores by hash, beside its own files; see ``inputs.of``."""

    def prepare(self) -> None:  # noqa: B027 - optional
        """What comes before the first row and belongs to none."""


class Weights(Subject):
    """The base model, and a LoRA or checkpoint of it where there is one.

    Args:
        config: the composed configuration.
        task: the same, checked.
        processes: of the run.
        samples: folder of the run for saved images; None to save none.
    """

    def __init__(self, config: DictConfig, task: Task, processes: Processes, samples: Path | None) -> None:
        self.config, self.task, self.processes, self.samples = config, task, processes, samples
        curve, final = assembly.configured_protocols(config)
        self._protocol = final if task.protocol == "final" else curve
        self.ledger = assembly.new_ledger(processes)
        self._reward = assembly.trained_reward(config, processes)
        self._scorers = assembly.scorers(config, processes)
        self._prompts = assembly.evaluated_prompts(config)
        self._lora = assembly.lora(config, task.lora) if task.lora else None
        self._own = task.checkpoint if task.checkpoint and is_pipeline(task.checkpoint) else None
        if self._own is not None:  # it needs a policy of its own
            assembly.check_source(config, self._own)  # it is loaded only after the base has been scored
        self._denoiser = local_denoiser(task.checkpoint) if task.checkpoint and not self._own else None
        self._content = content(str(self._denoiser or task.checkpoint)) if task.checkpoint else {}
        self._loaded: Policy | None = None
        self._evaluator = self._base()
        policy = self._evaluator.stack.policy
        self.micro_batch = self._evaluator.stack.micro_batch
        described = tuple(assembly.described(config, each, self._evaluator, policy) for each in (curve, final))
        self.protocols = described[0], described[1]
        self.protocol = described[task.protocol == "final"]
        views = ["reference"]
        if task.lora or task.checkpoint:
            views.append("own" if self._own else "evaluation")
        self.due = [
            Due(
                "base" if view == "reference" else "evaluation",
                guidance,
                self._measuring(view, guidance),
                self._repeating(guidance),
            )
            for view in views
            for guidance in self._protocol.guidance
        ]

    def settings(self) -> dict[str, Any]:
        if self._lora:
            described = {"lora": self.task.lora, "sha256": inputs.digest(str(self._lora.source))}
            return described | ({"config_sha256": inputs.digest(str(self._lora.config))} if self._lora.config else {})
        return {"checkpoint": self.task.checkpoint} | self._content if self.task.checkpoint else {}

    def prepare(self) -> None:
        self._evaluator.sample_reference()

    def _measuring(self, view: str, guidance: float) -> Callable[[Callable[[], None]], Evaluation]:
        def measure(between: Callable[[], None]) -> Evaluation:
            if view == "own":
                evaluator, drawing = self._other(), "reference"
            else:
                evaluator, drawing = self._evaluator, view
            samples = evaluator.samples(self._protocol)
            draw = evaluator.sampled(self._protocol, samples, view=drawing, guidance=guidance)
            if self.samples is not None:
                shown = "base" if view == "reference" else "evaluation"
                draw = saving(draw, samples, self.samples / f"{self._protocol.name}_{shown}_g{guidance:g}")
            result = evaluator.measure(samples, draw, between)
            if view != "own":  # a whole checkpoint's drift from the base would need both at once
                result.metrics["drift"] = evaluator.drift(view)
            return result

        return measure

    def _repeating(self, guidance: float) -> Callable[[Mapping[str, int]], None]:
        return lambda cost: self._evaluator.repeat(self._evaluator.samples(self._protocol), guidance, cost)

    def inputs(self) -> dict[str, str]:
        return inputs.of(self.config, prompts=None, evaluated=self._prompts)

    def _base(self) -> Evaluator:
        """The base model, with the view ``evaluation`` where its weights fit the base's layers."""
        if self._lora:
            policy = assembly.pretrained(self.config, self.processes, **self._lora.settings())
            self._lora.install(policy, "evaluation")
        elif self._denoiser is not None:
            policy = assembly.pretrained(self.config, self.processes, trainable="full")
            install_denoiser(self._denoiser, policy)
        else:
            policy = assembly.pretrained(self.config, self.processes)
        return self._evaluating(policy)

    def _other(self) -> Evaluator:
        """The whole checkpoint, in the base model's place; the base is let go."""
        if self._loaded is None:
            shape = self._evaluator.stack.policy.latent_shape
            del self._evaluator
            self._loaded = assembly.pretrained(self.config, self.processes, source=self._own, revision=None)
            if self._loaded.latent_shape != shape:
                raise CheckpointError(
                    f"{self._own} makes latents of {list(self._loaded.latent_shape)}, {self.config.model.name} of "
                    f"{list(shape)}: one protocol needs one size; set model.policy.resolution, or score it as the "
                    "model itself (model.policy.source)"
                )
            self._evaluator = self._evaluating(self._loaded)
        return self._evaluator

    def _evaluating(self, policy: Policy) -> Evaluator:
        stack = Stack(policy, self._reward, self.ledger, self.processes, micro_batch=self.task.micro_batch)
        return assembly.evaluator(self.config, stack, self._prompts, self._scorers)


class Images(Subject):
    """A folder of images and, where there is one, a folder of the untrained model's images of the same prompts.

    How they were sampled is not known, so they have a protocol of their own: its hash holds the prompts, their number,
    the size and the scorers.
    """

    def __init__(self, config: DictConfig, task: Task, processes: Processes) -> None:
        assert task.images is not None  # as Task has checked
        assert task.guidance is not None
        self.task = task
        folders = {"evaluation": SampledImages.read(Path(task.images))}
        if task.base_images is not None:
            folders = {"base": SampledImages.read(Path(task.base_images))} | folders
            check_same(*folders.values())
        own = folders["evaluation"]
        if config.model.domain == "shapes" and own.size != (SIZE, SIZE):
            raise DataError(
                f"{own.folder}: images of {own.size[0]} x {own.size[1]} pixels, those of the embedded world have "
                f"{SIZE} x {SIZE}; model=NAME with a model of the domain photo scores photographs"
            )
        self.ledger = assembly.new_ledger(processes)
        stack = Scoring(assembly.trained_reward(config, processes), self.ledger, processes, task.micro_batch)
        self.micro_batch = stack.micro_batch
        evaluator = assembly.evaluator(config, stack, own.prompts, assembly.scorers(config, processes))
        rows = [(prompt, image) for prompt, files in enumerate(own.files) for image in range(len(files))]
        samples = Samples(own.prompts, rows)
        description = {
            "name": "images",
            "version": 1,
            "guidance": [task.guidance],
            "prompts": len(own.prompts),
            "images": len(rows),
            "images_of_tags": {tag_of(prompt): len(own.files[place]) for place, prompt in enumerate(own.prompts)},
            "prompts_hash": config_hash({prompt.id: prompt.text for prompt in own.prompts}),
            "scorers": list(evaluator.scorers),
            "resolution": [3, own.size[1], own.size[0]],
            "weights": "images from a folder: solver, steps and noise are not known",
        }
        self.protocol = description | {"hash": config_hash(description)}
        if whole := suite_of(config, own):
            self.protocol["part"] = f"{len(own.prompts)} of the {whole} prompts of its suite"
            tell(
                f"{own.folder}: {self.protocol['part']}; the scores have a protocol of their own "
                f"({self.protocol['hash']}) and stand in no column with those of all prompts"
            )
        self.protocols = self.protocol, self.protocol

        def measuring(folder: SampledImages) -> Callable[[Callable[[], None]], Evaluation]:
            def draw(chosen: Sequence[int]) -> Tensor:
                pixels = np.stack([folder.pixels(*rows[row]) for row in chosen])
                return torch.from_numpy(pixels).permute(0, 3, 1, 2).to(processes.device).float() / 255

            return lambda between: evaluator.measure(samples, draw, between)

        def repeat(cost: Mapping[str, int]) -> None:
            evaluator.repeat(samples, 1.0, cost)

        self.due = [Due(weights, task.guidance, measuring(folder), repeat) for weights, folder in folders.items()]
        of_scores = inputs.of(config, prompts=None, evaluated=own.prompts)
        self._inputs = {name: of_scores[name] for name in of_scores if not name.startswith("model.")}

    def inputs(self) -> dict[str, str]:
        return self._inputs

    def settings(self) -> dict[str, Any]:
        described = {
            "images": self.task.images,
            "sha256": inputs.digest(str(self.task.images)),
            "guidance": self.task.guidance,
        }
        if self.task.base_images is not None:
            described |= {"base_images": self.task.base_images, "base_sha256": inputs.digest(self.task.base_images)}
        return described


class Scoring(Stack):
    """A stack without a policy: it scores images that are there already."""

    def __init__(self, reward: Reward, ledger: Ledger, processes: Processes, micro_batch: int) -> None:
        self.reward, self.ledger, self.processes = reward, ledger, processes
        self.micro_batch = MicroBatch(micro_batch, ledger)
        self._reward_flops, self._score_names = {}, {}


def suite_of(config: DictConfig, images: SampledImages) -> int:
    """How many prompts the configured suite has, if the images show a part of them and nothing else; otherwise 0."""
    if config.prompts.source not in ("domain", *assembly.DOMAIN_PROMPTS.values()):
        return 0
    suite = {prompt.text for prompt in assembly.evaluated_prompts(config)}
    return len(suite) if {prompt.text for prompt in images.prompts} < suite else 0


def check_same(base: SampledImages, other: SampledImages) -> None:
    """Refuse two folders that differ in more than their pixels.

    Raises:
        DataError: other prompts, other numbers of images, or another size.
    """
    of_base, of_other = (
        {prompt.text: len(files) for prompt, files in zip(each.prompts, each.files, strict=True)}
        for each in (base, other)
    )
    for text in [*of_other, *of_base]:
        if of_base.get(text) != of_other.get(text):
            raise DataError(
                f"{base.folder} has {of_base.get(text, 0)} images of {text!r}, {other.folder} has "
                f"{of_other.get(text, 0)}: base and other images need the same prompts and numbers"
            )
    if [prompt.text for prompt in base.prompts] != [prompt.text for prompt in other.prompts]:
        raise DataError(f"{base.folder} and {other.folder} have the same prompts in another order")
    if base.size != other.size:
        raise DataError(f"{base.folder} has images of {base.size} pixels, {other.folder} of {other.size}")


def saving(draw: Draw, samples: Samples, folder: Path) -> Draw:
    """The same images, written to a folder in GenEval's layout on the way."""

    def draw_and_save(rows: Sequence[int]) -> Tensor:
        images = draw(rows)
        pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        try:
            for row, each in zip(rows, pixels, strict=True):
                prompt, image = samples.rows[row]
                sampled.write(folder, prompt, samples.prompts[prompt], image, each)
        except OSError as error:
            raise RecordError(f"cannot write images to {folder}: {error.strerror}") from error
        return images

    return draw_and_save


def content(source: str) -> dict[str, str | None]:
    """What identifies a checkpoint: SHA-256 of the files of a folder, the commit of a repository of the hub."""
    found = {"sha256": inputs.digest(source)}
    return found if found["sha256"] else found | {"commit": inputs.identified(source)}


def evaluate(config: DictConfig) -> Path:
    """Score what the configuration names; rows that are recorded already are kept.

    Args:
        config: the composed configuration, see ``conf/evaluate.yaml``.

    Returns:
        The folder of the records.

    Raises:
        AlignbenchError: whatever a user can act on; records of something else are never overwritten.
    """
    processes = assembly.launched(config)
    with processes.together():
        task = checked(config)
        label = task.label or "base"
        folder = Path(task.results, task.name, config.model.name, reward_name(config), label, f"seed{task.seed}")
        if processes.main and task.images is None:
            evaluated = assembly.evaluated_prompts(config)
            inputs.check_unchanged(folder, inputs.of(config, prompts=None, evaluated=evaluated), config)
        subject: Subject
        if task.images is not None:
            subject = Images(config, task, processes)
        else:
            subject = Weights(config, task, processes, (folder / "samples").absolute() if task.save_images else None)
        settings = identity(config)
        for key in (*SUBJECTS, "base_images", "guidance", "label", "save_images"):
            settings.pop(key, None)
        settings["method"] = {"name": label} | subject.settings()
        described = {
            "kind": "evaluated",
            "experiment": task.name,
            "model": config.model.name,
            "reward": reward_name(config),
            "method": label,
            "variant": "",
            "seed": task.seed,
            "config_hash": config_hash(settings),
            "protocol": subject.protocols[0],
            "protocol_hash": subject.protocols[0]["hash"],
            "final_protocol": subject.protocols[1],
            "final_protocol_hash": subject.protocols[1]["hash"],
            "targets": dict(task.reward["targets"]),
            "normalisation": dict(task.reward["normalisation"]),
            "inputs": subject.inputs(),
            **assembly.environment(processes),
        }
        with (
            RunDirectory.open(folder.absolute(), config=settings, run=described) if processes.main else nullcontext()
        ) as records:
            if processes.share(records is not None and records.status.get("status") == "done"):
                if processes.main:
                    print(f"{folder}: already done, skipped")
            else:
                carry_out(subject, processes, records)
            if records is not None:
                print(summary(records))
    return folder


def checked(config: DictConfig) -> Task:
    """The settings, each of the type and in the range that it needs.

    Raises:
        ConfigError: otherwise.
    """
    task = construct(Task, plain(config), "")
    schema.check_evaluated(task.model, task.reward, task.prompts, task.evaluation)
    if task.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch sees no CUDA device; device=cpu runs everything, slowly")
    if task.threads is not None:
        torch.set_num_threads(task.threads)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    return task


def carry_out(subject: Subject, processes: Processes, records: RunDirectory | None) -> None:
    """Measure and record the rows that are missing; whatever ends it stands in the records."""
    with stop_requested(tell=processes.main) as stopping:

        def between() -> None:
            if processes.any(bool(stopping)):
                raise Stopped

        try:
            if records is not None:
                records.set_status("running")
            written = processes.share(recorded_rows(records))
            subject.prepare()
            for number, due in enumerate(subject.due):
                if (cost := written.get((due.weights, subject.protocol["hash"], due.guidance))) is None:
                    measure(subject, due, number, processes, records, between)
                else:
                    due.repeat(cost)
                between()
            if records is not None:
                records.set_status("done", fraction=1.0)
        except BaseException as error:
            status, message = verdict(error)
            if records is not None:
                with suppress(RecordError):  # a full disk: what stopped it says more
                    records.set_status(status, message)
            if status == "out_of_memory":
                raise AlignbenchError(message) from error
            raise


def recorded_rows(records: RunDirectory | None) -> dict[tuple[str, str, float], dict[str, int]]:
    """The cost of the rows that are there, by weights, protocol hash and guidance.

    Raises:
        RecordError: a row that no evaluation wrote.
    """
    if records is None:
        return {}
    known = read_run(records.folder)
    amiss = [problem for problem in known.problems if problem.startswith("evaluations.jsonl")]
    costs = ((number, record_fields.wrong_cost(row.get("cost"))) for number, row in enumerate(known.evaluations, 1))
    amiss += [f"evaluations.jsonl, row {number}: {reason}" for number, reason in costs if reason]
    if amiss:
        raise RecordError(
            f"{records.folder}: {amiss[0]}. Put the file back as it was, or delete that line, and the row is made again"
        )
    return {(row["weights"], row["protocol_hash"], row["guidance"]): row["cost"] for row in known.evaluations}


def measure(
    subject: Subject,
    due: Due,
    number: int,
    processes: Processes,
    records: RunDirectory | None,
    between: Callable[[], None],
) -> None:
    """Measure one row, or take it over from a run that has, and record it."""
    protocol, ledger = subject.protocol, subject.ledger
    known = None
    if records is not None and due.weights == "base" and isinstance(subject, Weights) and not subject.samples:
        known, passed_over = base_evaluation.recorded(records.folder, protocol["hash"], due.guidance, number)
        for reason in passed_over:
            print(reason, flush=True)
    known = processes.share(known)
    if known is None:

        def spent() -> dict[str, int]:
            return dict(ledger.row(lambda values: processes.join(values, sum))["phases"]["evaluation"])

        before = spent()
        with ledger.during("evaluation"), ledger.attempt():
            result = due.measure(between)
        after = spent()
        measured: dict[str, Any] = {
            "metrics": result.metrics,
            "standard_errors": result.standard_errors,
            "cost": {key: after[key] - before[key] for key in after},
        }
        scores, grid, source = result.scores, result.grid, None
    else:
        measured, scores, grid, source = known.measured, known.scores, known.grid, known.source
        due.repeat(measured["cost"])
    if records is None:
        return
    name = f"{number:04d}_{protocol['name']}_{due.weights}_g{due.guidance:g}"
    records.append_evaluation(
        {
            "evaluation": number,
            "fraction": 0.0 if due.weights == "base" else 1.0,
            "iteration": 0,
            "optimizer_steps": 0,
            "protocol": protocol["name"],
            "protocol_hash": protocol["hash"],
            "weights": due.weights,
            "guidance": due.guidance,
            "prompts": protocol["prompts"],
            "images": protocol["images"],
            **measured,
            "scores": records.write_scores(name, scores),
            "grid": records.write_image(name, grid),
            "ledger": {"phases": {"evaluation": measured["cost"]}},  # what the training cost is not known here
            "volatile": {
                "seconds": {"evaluation": ledger.clocks()["evaluation"]},
                "micro_batch": subject.micro_batch.size,
                "reused_from": source,
            },
        }
    )


def summary(records: RunDirectory) -> str:
    """The recorded scores as text, one line per row."""
    lines = [str(records.folder)]
    for row in read_run(records.folder).evaluations:
        errors = row["standard_errors"]
        scores = ", ".join(
            f"{name} {value:.4f}" + (f" (se {errors[name]:.4f})" if name in errors else "")
            for name, value in row["metrics"].items()
            if "/" not in name
        )
        lines.append(
            f"  {row['protocol']} {row['protocol_hash']}, {row['weights']}, guidance {row['guidance']:g}: {scores}"
        )
    return "\n".join(lines)


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="evaluate")
def job(config: DictConfig) -> None:
    """Score what the composed configuration names."""
    plain(config)  # what has no value is told by its name, before anything is read off it
    evaluate(config)


def main() -> None:
    """Run the command line."""
    command_line(composed(job), "alignbench.evaluate")


if __name__ == "__main__":
    main()
