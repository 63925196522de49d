"""Run directories as the report sees them: typed, sorted, and with every oddity written down instead of dropped."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from alignbench import records
from alignbench.errors import AlignbenchError
from alignbench.report.statistics import Array
from alignbench.terminal import printable

BASE, TRAINED = "base", "evaluation"  # the kinds of weights that are compared
UNTUNED = " (untuned)"  # behind the name of a method that inherits its settings
ON_PHOTOGRAPHS = {"geneval": "geneval_hf"}  # a task's metric -> its name where another detector measures it
METHOD_PHASES = ("rollout", "training")  # the method's clock; evaluation is apart


class NothingToReport(AlignbenchError):
    """There is no run directory where one was expected."""


@dataclass(frozen=True)
class Axis:
    """A cost that a score can be drawn against."""

    key: str
    title: str
    unit: str


AXES = (
    Axis("flops", "Compute", "FLOP"),
    Axis("nfe", "NFE", "denoiser passes"),
    Axis("images", "Images", "images"),
    Axis("reward_calls", "Reward calls", "reward calls"),
    Axis("optimizer_steps", "Optimizer steps", "steps"),
    Axis("seconds", "Seconds", "s"),
)
COST_KEYS = tuple(axis.key for axis in AXES)
BUDGET_AXES = {key: key for key in COST_KEYS} | {"gpu_seconds": "seconds", "iterations": "iterations"}


LARGEST = 1e100  # of a number: beyond, squares and sums would overflow
LONGEST = 255  # characters of a name: what file systems take
DEEPEST = 30  # levels of a record; the suite's own have 6


def sound(value: object, where: str, depth: int = 0) -> Any:
    """A record's value with texts that can be shown and numbers that can be computed with.

    Raises:
        ValueError: an infinity, a number beyond any measurement, or bottomless nesting; names the key.
    """
    if depth > DEEPEST:
        raise ValueError(f"{where.split('.', 1)[0]} is nested more than {DEEPEST} levels deep")
    if isinstance(value, str):
        return legible(value)
    if isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) <= LARGEST:
        raise ValueError(f"{where} is {str(value)[:20] if isinstance(value, float) else 'an integer'}, out of range")
    if isinstance(value, Mapping):
        pairs = ((legible(str(key)), item) for key, item in value.items())
        return {key: sound(item, f"{where}.{key}" if where else key, depth + 1) for key, item in pairs}
    if isinstance(value, list):
        return [sound(item, where, depth + 1) for item in value]
    return value


def legible(text: str) -> str:
    """A text of the records without control characters, and without what no encoding can write."""
    return printable(text).encode(errors="replace").decode()


def _numbers(value: object) -> dict[str, float]:
    """The numbers of a mapping."""
    if not isinstance(value, Mapping):
        return {}
    return {str(k): float(v) for k, v in value.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _number(row: Mapping[str, Any], key: str, low: float = -LARGEST) -> float:
    value = row[key]
    if not isinstance(value, int | float) or isinstance(value, bool) or value < low:
        raise ValueError(
            f"{key} is {show(value)[:40]}: it must be a number{f' of {low:g} or more' if low == 0 else ''}"
        )
    return float(value)


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row[key]
    if not isinstance(value, str) or not 0 < len(value.encode()) <= LONGEST:
        told = f"{show(value)[:40]}..." if isinstance(value, str) else show(value)[:40]
        raise ValueError(f"{key} is {told}: it must be a name of 1 to {LONGEST} bytes")
    return value


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; an empty mapping keeps its key."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= flatten(item, f"{prefix}{key}.") if isinstance(item, Mapping) and item else {f"{prefix}{key}": item}
    return flat


def show(value: object) -> str:
    """A configuration value as text: strings as they are, the rest as JSON."""
    return value if isinstance(value, str) else json.dumps(value, default=str, sort_keys=True)


@dataclass(frozen=True)
class Evaluation:
    """One row of evaluations.jsonl; `costs` holds the method's cumulative cost by axis key."""

    fraction: float
    iteration: int
    protocol_hash: str
    weights: str
    guidance: float
    metrics: Mapping[str, float]
    standard_errors: Mapping[str, float]
    costs: Mapping[str, float]
    grid: Path | None
    scores: Path | None


def _seconds(row: Mapping[str, Any]) -> dict[str, float]:
    """Cumulative seconds by phase; `total`, the method's clock, leaves evaluation out."""
    seconds = _numbers(_mapping(row.get("volatile")).get("seconds"))
    if "total" not in seconds and any(phase in seconds for phase in METHOD_PHASES):
        seconds["total"] = sum(seconds.get(phase, 0.0) for phase in METHOD_PHASES)
    return seconds


def confined(folder: Path, row: Mapping[str, Any], key: str) -> Path | None:
    """A file of the run that a row names; None if it names none. ValueError if the file lies outside the run."""
    name = row.get(key)
    if name is None:
        return None
    if not isinstance(name, str):
        raise ValueError(f"{key} is {show(name)[:40]}: it must be the name of a file of the run")
    try:
        path = (folder / name).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links without end, a name that none can be
        raise ValueError(f"{key} is {name[:40]!r}, which names no file ({error})") from error
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{key} is {name[:LONGEST]!r}, which lies outside the run's folder")
    return path


def _evaluation(row: Mapping[str, Any], grid: Path | None, scores: Path | None) -> Evaluation:
    """Raises KeyError or ValueError where the row lacks what a comparison needs."""
    if not isinstance(row["metrics"], Mapping):
        raise ValueError("metrics is no mapping")
    for name in row["metrics"]:
        _number(row["metrics"], name)
    ledger, seconds = _numbers(row.get("ledger")), _seconds(row)
    costs = {axis.key: ledger[axis.key] for axis in AXES if axis.key in ledger}
    if "total" in seconds:
        costs["seconds"] = seconds["total"]
    return Evaluation(
        fraction=_number(row, "fraction", low=0),
        iteration=int(_number(row, "iteration", low=0)),
        protocol_hash=_text(row, "protocol_hash"),
        weights=_text(row, "weights"),
        guidance=_number(row, "guidance"),
        metrics=_numbers(row["metrics"]),
        standard_errors=_numbers(row.get("standard_errors")),
        costs=costs,
        grid=grid,
        scores=scores,
    )


@dataclass(frozen=True)
class Cost:
    """What a run had spent at its last record: counts by name and by phase, seconds by phase, peak memory in MB."""

    total: Mapping[str, float]
    phases: Mapping[str, Mapping[str, float]]
    seconds: Mapping[str, float]
    peak_memory_mb: float


def _cost(rows: Sequence[Mapping[str, Any]]) -> Cost:
    def spent(row: Mapping[str, Any]) -> tuple[float, float]:
        ledger = _mapping(row.get("ledger"))
        evaluation = _numbers(_mapping(ledger.get("phases")).get("evaluation"))
        return _numbers(ledger).get("nfe", 0.0), evaluation.get("nfe", 0.0)

    last = max(rows, key=spent, default={})
    ledger, volatile = _mapping(last.get("ledger")), _mapping(last.get("volatile"))
    waste = {key: value for key, value in _numbers(volatile).items() if key == "wasted_nfe"}
    memory = (_numbers(_mapping(row.get("volatile"))).get("memory_mb", math.nan) for row in rows)
    phases = {str(name): _numbers(counts) for name, counts in _mapping(ledger.get("phases")).items()}
    peak = max((value for value in memory if not math.isnan(value)), default=math.nan)
    return Cost(_numbers(ledger) | waste, phases, _seconds(last), peak)


def _late(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means of the training metrics over the last tenth of the iterations, at least one."""
    values: dict[str, list[float]] = {}
    for row in rows[-max(1, len(rows) // 10) :]:
        for key, value in _numbers(row).items():
            values.setdefault(key, []).append(value)
    return {key: float(np.mean(found)) for key, found in values.items()}


@dataclass(frozen=True)
class TrainingRun:
    """One training run: the unit of replication."""

    name: str  # its folder, as seen from the folder that was searched
    folder: Path
    experiment: str
    model: str
    reward: str
    method: str
    variant: str
    seed: int
    run: Mapping[str, Any]  # run.json
    config: Mapping[str, Any]  # config.yaml, flattened
    status: str  # by status.json; "damaged" where evaluations are lost, so that the last one may not be the final one
    message: str
    fraction: float
    evaluations: tuple[Evaluation, ...]
    cost: Cost
    late: Mapping[str, float]  # training metrics, means over the last tenth of the iterations
    problems: tuple[str, ...]

    @property
    def label(self) -> str:
        """The method's name in the report, with what was changed, and whether nobody tuned it for this setting."""
        name = f"{self.method}@{self.variant}" if self.variant else self.method
        return f"{name}{UNTUNED}" if self.config.get("method.tuned") is False else name

    @property
    def finished(self) -> bool:
        return self.status == "done"

    @property
    def curve_hash(self) -> str:
        return str(self.run.get("protocol_hash") or "")

    @cached_property
    def final_hash(self) -> str:
        """The protocol of the published score: the final one where it was run, else the one used during training."""
        final = str(self.run.get("final_protocol_hash") or "")
        scored = any(row.protocol_hash == final for row in self.evaluations)
        return final if final and (scored or not self.finished) else self.curve_hash

    def select(self, protocol_hash: str, weights: str, guidance: float | None = None) -> list[Evaluation]:
        """Evaluations of one protocol and kind of weights, in the order of the budget."""
        rows = [row for row in self.evaluations if (row.protocol_hash, row.weights) == (protocol_hash, weights)]
        rows = [row for row in rows if guidance is None or row.guidance == guidance]
        return sorted(rows, key=lambda row: row.fraction)

    def guidances(self, protocol_hash: str) -> list[float]:
        """Every guidance that base or trained weights were scored at under one protocol, ascending."""
        return sorted({row.guidance for kind in (BASE, TRAINED) for row in self.select(protocol_hash, kind)})

    def base(self, protocol_hash: str, guidance: float) -> Evaluation | None:
        return next(iter(self.select(protocol_hash, BASE, guidance)), None)

    def final(self, protocol_hash: str, guidance: float) -> Evaluation | None:
        """The last evaluation at or before the budget, never the best; None unless the run finished."""
        rows = self.select(protocol_hash, TRAINED, guidance)
        return rows[-1] if rows and self.finished else None

    @property
    def curve_guidance(self) -> float:
        """The guidance of the curves: the first that the protocol names (the others are scored beside it)."""
        scales = _mapping(self.run.get("protocol")).get("guidance")
        first = scales[0] if isinstance(scales, list) and scales else 1.0
        return float(first) if isinstance(first, int | float) else 1.0

    def curve(self, metric: str, axis: str) -> tuple[Array, Array]:
        """(cost, score) of base and trained weights over training, each [evaluations], cost ascending."""
        guidance = self.curve_guidance
        rows = [row for kind in (BASE, TRAINED) for row in self.select(self.curve_hash, kind, guidance)]
        points = sorted(
            (row.costs[axis], row.metrics[metric]) for row in rows if axis in row.costs and metric in row.metrics
        )
        x, y = zip(*points, strict=True) if points else ((), ())
        return np.array(x, dtype=np.float64), np.array(y, dtype=np.float64)

    @cached_property
    def recorded(self) -> frozenset[str]:
        """Names of all metrics in the run's evaluations."""
        return frozenset(name for row in self.evaluations for name in row.metrics)

    def measured(self, metric: str) -> str:
        """The name under which this run recorded a metric of its task: GenEval on photographs is `geneval_hf`."""
        other = ON_PHOTOGRAPHS.get(metric, metric)
        return other if other in self.recorded and metric not in self.recorded else metric

    def budget(self) -> tuple[str, float]:
        """(axis key, amount) of the limit of which most was used, which ended the run: in units of the axis, so GPU
        seconds, which all processes spend together, are divided by the processes. The compute spent where no axis of
        the report limits the run.
        """
        spent = {key: max((row.costs.get(key, 0.0) for row in self.evaluations), default=0.0) for key in COST_KEYS}
        spent["iterations"] = max((row.iteration for row in self.evaluations), default=0)
        processes = max(1.0, _numbers(self.run).get("processes", 1.0))
        limits = [
            (BUDGET_AXES[key], amount / (processes if key == "gpu_seconds" else 1))
            for key, amount in _numbers(self.run.get("budget")).items()
            if key in BUDGET_AXES and amount > 0
        ]
        axis, amount = max(limits, key=lambda limit: spent[limit[0]] / limit[1], default=("iterations", 0.0))
        return ("flops", spent["flops"]) if axis == "iterations" else (axis, amount)

    @property
    def hardware(self) -> str:
        """What seconds depend on: processor, cores, accelerator, threads, processes."""
        return show({key: self.run.get(key) for key in ("hardware", "threads", "processes")})


@dataclass(frozen=True)
class Unreadable:
    """A run directory that says too little about itself to be compared."""

    name: str
    problems: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Runs of one experiment and model that were trained on one reward."""

    reward: str
    runs: tuple[TrainingRun, ...]

    @property
    def labels(self) -> list[str]:
        return sorted({run.label for run in self.runs})

    def of(self, label: str) -> list[TrainingRun]:
        return [run for run in self.runs if run.label == label]


@dataclass(frozen=True)
class Study:
    """Runs of one experiment and model: what may stand in one table, as far as the protocol allows."""

    experiment: str
    model: str
    comparisons: tuple[Comparison, ...]

    @property
    def runs(self) -> list[TrainingRun]:
        return [run for comparison in self.comparisons for run in comparison.runs]

    def restricted(self, runs: Iterable[TrainingRun]) -> "Study":
        """The same study with some of its runs."""
        kept = {run.name for run in runs}
        parts = (replace(c, runs=tuple(run for run in c.runs if run.name in kept)) for c in self.comparisons)
        return replace(self, comparisons=tuple(part for part in parts if part.runs))


@dataclass(frozen=True)
class Records:
    """Everything that was found below the searched folders."""

    runs: tuple[TrainingRun, ...]
    unreadable: tuple[Unreadable, ...]

    @property
    def studies(self) -> list[Study]:
        studies = []
        for experiment, model in sorted({(run.experiment, run.model) for run in self.runs}):
            runs = [run for run in self.runs if (run.experiment, run.model) == (experiment, model)]
            rewards = sorted({run.reward for run in runs})
            parts = (Comparison(reward, tuple(run for run in runs if run.reward == reward)) for reward in rewards)
            studies.append(Study(experiment, model, tuple(parts)))
        return studies

    @property
    def labels(self) -> list[str]:
        return sorted({run.label for run in self.runs})

    @property
    def protocols(self) -> dict[str, Mapping[str, Any]]:
        """Fields of every protocol by its hash."""
        found: dict[str, Mapping[str, Any]] = {}
        for run in self.runs:
            for prefix in ("", "final_"):
                if run.run.get(f"{prefix}protocol_hash"):
                    found[str(run.run[f"{prefix}protocol_hash"])] = _mapping(run.run.get(f"{prefix}protocol"))
        return found


NAMES = ("experiment", "model", "reward", "method")
MAPPINGS = ("protocol", "final_protocol", "budget", "targets", "normalisation")  # of run.json, where they are there


def _described(found: records.Run, problems: list[str]) -> dict[str, Any]:
    """run.json, without the parts that are not what they must be. ValueError if it does not say which run it is."""
    missing = [key for key in (*NAMES, "seed") if key not in found.run]
    if missing:
        raise ValueError(f"does not give {', '.join(missing)}")
    run: dict[str, Any] = sound(found.run, "")
    for key in NAMES:
        _text(run, key)
    if run.get("variant"):
        _text(run, "variant")
    if not isinstance(run["seed"], int) or isinstance(run["seed"], bool):
        raise ValueError(f"does not give a whole number as seed, but {show(run['seed'])[:40]}")
    for key in MAPPINGS:
        if run.get(key) is not None and not isinstance(run[key], Mapping):
            problems.append(f"run.json: {key} is {show(run.pop(key))[:40]}: it must be a mapping")
    return run


def _sound_rows(rows: Sequence[Mapping[str, Any]], name: str, problems: list[str]) -> dict[int, dict[str, Any]]:
    """Rows that can be computed with, by their number; the others are told."""
    kept = {}
    for number, row in enumerate(rows, start=1):
        try:
            kept[number] = sound(row, "")
        except ValueError as error:
            problems.append(f"{name}: row {number} is left out ({error})")
    return kept


def _evaluations(folder: Path, rows: Mapping[int, dict[str, Any]], problems: list[str]) -> Iterator[Evaluation]:
    """Rows that can be compared; the others, and files that are not the run's, are told."""
    for number, row in rows.items():
        files: dict[str, Path | None] = {}
        try:
            for key in ("grid", "scores"):
                try:
                    files[key] = confined(folder, row, key)
                except ValueError as error:
                    problems.append(f"evaluations.jsonl: row {number}: {error}")
            yield _evaluation(row, files.get("grid"), files.get("scores"))
        except (KeyError, ValueError) as error:
            told = f"{error} is missing" if isinstance(error, KeyError) else error
            problems.append(f"evaluations.jsonl: row {number} is left out ({told})")


def _sound_or_empty(value: Mapping[str, Any], name: str, problems: list[str]) -> dict[str, Any]:
    try:
        return dict(sound(value, ""))
    except ValueError as error:
        problems.append(f"{name} is left out ({error})")
        return {}


def _training_run(folder: Path, name: str) -> TrainingRun | Unreadable:
    found = records.read_run(folder)
    problems = [legible(problem) for problem in found.problems]
    try:
        run = _described(found, problems)
    except ValueError as error:
        return Unreadable(name, (*problems, f"run.json {error}"))
    metrics = list(_sound_rows(found.metrics, "metrics.jsonl", problems).values())
    rows = _sound_rows(found.evaluations, "evaluations.jsonl", problems)
    evaluations = tuple(_evaluations(folder, rows, problems))
    lost = len(evaluations) < len(found.evaluations) or any(told.startswith("evaluations.") for told in found.problems)
    status = _sound_or_empty(found.status, "status.json", problems)
    return TrainingRun(
        name=name,
        folder=folder,
        **{key: str(run.get(key) or "") for key in (*NAMES, "variant")},
        seed=run["seed"],
        run=run,
        config=flatten(_sound_or_empty(found.config, "config.yaml", problems)),
        status="damaged" if lost else _status(status, problems),
        message=str(status.get("message") or ""),
        fraction=_numbers(status).get("fraction", 0.0),
        evaluations=evaluations,
        cost=_cost([*metrics, *rows.values()]),
        late=_late(metrics),
        problems=tuple(problems),
    )


def _status(status: Mapping[str, Any], problems: list[str]) -> str:
    """How a run stands, by status.json."""
    told = status.get("status", "unknown")
    if not isinstance(told, str):
        problems.append(f"status.json: status is {show(told)[:40]}: it must be a word")
        return "unknown"
    return told


def load(paths: Sequence[Path]) -> Records:
    """Read every run directory below `paths`.

    A second directory of the same run (experiment, model, reward, method, variant, seed) is not a second replication:
    it is listed and left out.

    Raises:
        NothingToReport: a path does not exist, or there is no run directory below any of them.
    """
    for path in paths:
        if not path.is_dir():
            raise NothingToReport(
                f"{path} is not a folder; give the results folder of a run or one above it, such as results/"
            )
    folders: dict[Path, str] = {}
    for path in paths:
        for folder in records.find_runs(path):
            below = folder.relative_to(path).as_posix()
            name = folder.as_posix() if len(paths) > 1 or below == "." else below
            folders.setdefault(folder.resolve(), legible(name))
    if not folders:
        where = ", ".join(str(path) for path in paths)
        raise NothingToReport(
            f"no run found below {where}: expected a folder with a run.json; start a run with python -m alignbench"
        )
    runs: dict[tuple[str, ...], TrainingRun] = {}
    unreadable = []
    for folder, name in sorted(folders.items(), key=lambda item: item[1]):
        run = _training_run(folder, name)
        if isinstance(run, Unreadable):
            unreadable.append(run)
            continue
        key = (run.experiment, run.model, run.reward, run.label, str(run.seed))
        if key in runs:
            unreadable.append(
                Unreadable(
                    name, (*run.problems, f"the same run as {runs[key].name}: left out, it is no second replication")
                )
            )
        else:
            runs[key] = run
    ordered = sorted(runs.values(), key=lambda run: (run.experiment, run.model, run.reward, run.label, run.seed))
    return Records(tuple(ordered), tuple(unreadable))
