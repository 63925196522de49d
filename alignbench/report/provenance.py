"""Where the numbers come from: runs and commands, protocols, settings, environments; what is missing or differs."""

import json
import math
import re
import shlex
from collections.abc import Iterable, Sequence

from alignbench.report.data import Records, Study, TrainingRun, flatten, show
from alignbench.report.tables import DASH, Cell, Column, Group, Row, Table, count, slug


def runs(records: Records) -> Table:
    """Every run that was found, the failed, unfinished, corrupt and interrupted ones included, with their message."""
    rows, tidy = [], []
    for run in records.runs:
        steps = run.cost.total.get("optimizer_steps", math.nan)
        remark = "; ".join([*([run.message] if run.message else []), *run.problems])
        cells = (
            Cell(run.name), Cell(run.status, flag=not run.finished), Cell(f"{run.fraction:.0%}"), Cell(count(steps)),
            Cell(str(len(run.evaluations))), Cell(remark, flag=bool(run.problems)),
        )  # fmt: skip
        rows.append(Row(cells, run.label))
        tidy.append(
            {"run": run.name, "status": run.status, "fraction": run.fraction, "optimizer_steps": steps,
             "evaluations": len(run.evaluations), "remark": remark}
        )  # fmt: skip
    for broken in records.unreadable:
        remark = "; ".join(broken.problems)
        blank = Cell(DASH)
        rows.append(Row((Cell(broken.name), Cell("left out", flag=True), blank, blank, blank, Cell(remark, flag=True))))
        tidy.append({"run": broken.name, "status": "left out", "remark": remark})
    columns = (
        Column("Run", numeric=False), Column("Status", numeric=False), Column("Budget used"), Column("Optimizer steps"),
        Column("Evaluations"), Column("Message", numeric=False),
    )  # fmt: skip
    return Table("runs", "Every run that was found", columns, (Group("", tuple(rows)),), (), tuple(tidy))


def _trained(study: Study) -> list[TrainingRun]:
    """The study's runs but evaluations of given weights, which no training stands behind."""
    return [run for run in study.runs if run.run.get("kind") != "evaluated"]


def _listed(values: Iterable[object], by: str = ", ") -> str:
    return by.join(map(str, values))


def missing(study: Study) -> Table:
    """Cells (method, seed) of a trained reward that some method has a run of and another lacks; variants apart."""
    found: dict[str, dict[str, set[int]]] = {}
    for run in _trained(study):
        if not run.variant:
            found.setdefault(run.reward, {}).setdefault(run.label, set()).add(run.seed)
    rows, notes, tidy = [], [], []
    for reward, seeds in found.items():
        wanted = set[int]().union(*seeds.values())
        for label, having in seeds.items():
            lacking = sorted(wanted - having)
            if lacking:
                cells = (Cell(label), Cell(reward), Cell(_listed(lacking), flag=True), Cell(_listed(sorted(having))))
                rows.append(Row(cells, label))
            where = {"experiment": study.experiment, "model": study.model, "trained_on": reward, "method": label}
            tidy += [where | {"seed": seed} for seed in lacking]
        if any(having != wanted for having in seeds.values()):
            each = "; ".join(f"{label} {_listed(sorted(having))}" for label, having in seeds.items())
            notes.append(f"Trained on {reward}, the methods were not run with the same seeds: {each}.")
    columns = (
        Column("Method", numeric=False), Column("Trained on", numeric=False), Column("Missing seeds", numeric=False),
        Column("Seeds it has", numeric=False),
    )  # fmt: skip
    number = f"{len(tidy) or 'no'} missing cell{'s' * (len(tidy) > 1)}"
    return Table(
        slug("missing", study.experiment, study.model), f"{study.experiment}, {study.model}: {number}", columns,
        (Group("", tuple(rows)),), tuple(notes) or ("The methods of a comparison have the same seeds.",), tuple(tidy),
    )  # fmt: skip


GROUPS = ("overlay", "prompts", "evaluation", "budget")  # folders of conf/ from which a variant may take another file


def _overrides(run: TrainingRun) -> tuple[str, ...] | None:
    """What makes a variant, as command line; its name has the last part of each key. None if it says too little."""
    found = []
    for part in filter(None, re.split(r",(?=[^,=]+=)", run.variant)):
        key, _, value = part.partition("=")
        if key not in GROUPS:
            settings = {name: _value(run.config[name]) for name in run.config if f".{name}".endswith(f".{key}")}
            if len(settings) > 1:
                settings = {name: text for name, text in settings.items() if re.sub(r"[^\w.=,+-]+", "_", text) == value}
            if len(settings) != 1:
                return None
            ((name, text),) = settings.items()
            part = f"{name}={text if '_' in value else value}"  # "_" can stand for anything
        found.append(part)
    return tuple(found)


def _value(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def commands(study: Study) -> Table:
    """The commands that make the study's runs again, as few as their methods, rewards, seeds and variants allow."""
    cells: dict[tuple[str, str, str], dict[int, TrainingRun]] = {}
    for run in _trained(study):
        cells.setdefault((run.variant, run.reward, run.method), {})[run.seed] = run
    methods: dict[tuple[str, tuple[str, ...] | None, str, tuple[int, ...]], list[str]] = {}
    for (variant, reward, method), of in sorted(cells.items()):
        told = _overrides(next(iter(of.values())))
        methods.setdefault((variant, told, reward, tuple(sorted(of))), []).append(method)
    blocks: dict[tuple[str, tuple[str, ...] | None, tuple[str, ...], tuple[int, ...]], list[str]] = {}
    for (variant, told, reward, seeds), names in methods.items():
        blocks.setdefault((variant, told, tuple(names), seeds), []).append(reward)
    rows, tidy = [], []
    for (variant, told, together, seeds), rewards in blocks.items():
        experiment = [] if study.experiment == "default" else [f"experiment={study.experiment}"]
        words = ["python", "-m", "alignbench", "-m", *experiment]
        words += [f"model={study.model}", f"method={_listed(together, ',')}", f"reward={_listed(rewards, ',')}"]
        words += [f"seed={_listed(seeds, ',')}", *(told or ())]
        runs, lost = len(together) * len(rewards) * len(seeds), variant if told is None else ""
        remark = f"and what {lost} stands for, which the records do not say in full" if lost else ""
        rows.append(Row((Cell(shlex.join(words), remark, flag=bool(lost)), Cell(str(runs)))))
        tidy.append({"command": shlex.join(words), "runs": runs, "not_in_the_command": lost})
    name, title = slug("commands", study.experiment, study.model), f"{study.experiment}, {study.model}: commands"
    columns = (Column("Command", numeric=False), Column("Runs"))
    return Table(name, title, columns, (Group("", tuple(rows)),), (), tuple(tidy), ordered=True)


OWN = ("method", "reward", "seed", "variant", "targets", "normalisation")  # may differ between compared runs
LISTED = 4  # runs named on the page for one value; the CSV names all
IDENTITY_FIELDS = ("experiment", "model", "created", "config_hash", "config", "protocol", "final_protocol")


def _settings(run: TrainingRun) -> dict[str, str]:
    """Everything about a run that a fair comparison holds fixed, and what it may change, as dotted keys."""
    recorded = {
        key: value for key, value in run.run.items() if key not in (*IDENTITY_FIELDS, "method", "reward", "seed")
    }
    return {key: show(value) for key, value in (dict(run.config) | flatten(recorded)).items()}


def _owner(key: str) -> str:
    return key.split(".", 1)[0]


def _differing(
    runs: Sequence[TrainingRun], owners: tuple[str, ...], inside: bool
) -> dict[str, dict[str, list[TrainingRun]]]:
    """key -> value -> runs, for keys with more than one value whose owner is (or is not) among `owners`."""
    settings = [(run, _settings(run)) for run in runs]
    keys = sorted({key for _, values in settings for key in values if (_owner(key) in owners) is inside})
    found = {}
    for key in keys:
        values: dict[str, list[TrainingRun]] = {}
        for run, setting in settings:
            values.setdefault(setting.get(key, "(absent)"), []).append(run)
        if len(values) > 1:
            found[key] = values
    return found


def differences(study: Study) -> Table:
    """Settings that differ between the compared runs although a fair comparison holds them fixed.

    Everything that is not method, reward, seed or their own settings; and a method's (a reward's) own settings where
    they differ between runs that carry the same name.
    """
    found = [(key, values) for key, values in _differing(study.runs, OWN, inside=False).items()]
    for comparison in study.comparisons:
        inside = _differing(comparison.runs, ("reward", "targets", "normalisation"), inside=True)
        found += [(f"{key} (within {comparison.reward})", values) for key, values in inside.items()]
        for label in comparison.labels:  # a method may be set differently for another reward, not for another seed
            inside = _differing(comparison.of(label), ("method",), inside=True)
            found += [(f"{key} (within {label} on {comparison.reward})", values) for key, values in inside.items()]
    rows, tidy = [], []
    for key, values in found:
        for position, (value, having) in enumerate(sorted(values.items())):
            names = [run.name for run in having]
            listed = ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
            first = Cell(key if position == 0 else "", flag=True)
            rows.append(Row((first, Cell(value, flag=True), Cell(str(len(having))), Cell(listed))))
            tidy.append(
                {
                    "experiment": study.experiment,
                    "model": study.model,
                    "setting": key,
                    "value": value,
                    "runs": ", ".join(names),
                }
            )
    columns = (
        Column("Setting", numeric=False),
        Column("Value", numeric=False),
        Column("Runs"),
        Column("Which", numeric=False),
    )
    title = f"{study.experiment}, {study.model}: differences between the compared runs"
    notes = () if rows else ("None: the runs differ in method, reward, seed and the methods' own settings only.",)
    name = slug("differences", study.experiment, study.model)
    return Table(name, title, columns, (Group("", tuple(rows)),), notes, tuple(tidy), ordered=True)


def own_settings(study: Study) -> Table:
    """The methods' own settings side by side; several values of one are those for different rewards."""
    labels = sorted({run.label for run in study.runs})
    settings: dict[str, dict[str, list[str]]] = {}
    for run in study.runs:
        for key, value in _settings(run).items():
            if _owner(key) == "method":
                values = settings.setdefault(key, {}).setdefault(run.label, [])
                values += [value] if value not in values else []
    texts = {
        key: {label: " or ".join(found.get(label, [])) for label in labels} for key, found in sorted(settings.items())
    }
    rows = tuple(Row((Cell(key), *(Cell(text[label] or DASH) for label in labels))) for key, text in texts.items())
    tidy = tuple({"setting": key} | text for key, text in texts.items())
    columns = (Column("Setting", numeric=False), *(Column(label, numeric=False) for label in labels))
    title = f"{study.experiment}, {study.model}: the methods' own settings"
    return Table(slug("settings", study.experiment, study.model), title, columns, (Group("", rows),), (), tidy)


def protocols(records: Records) -> Table:
    """All fields of every protocol that a number in this report was measured under."""
    rows, tidy = [], []
    for key, fields in sorted(records.protocols.items(), key=lambda item: (str(item[1].get("name")), item[0])):
        for position, (name, value) in enumerate(flatten(fields).items()):
            first = f"{fields.get('name', 'unnamed')} {key}" if position == 0 else ""
            rows.append(Row((Cell(first), Cell(name), Cell(show(value)))))
            tidy.append({"protocol_hash": key, "field": name, "value": show(value)})
    columns = (Column("Protocol", numeric=False), Column("Field", numeric=False), Column("Value", numeric=False))
    return Table("protocols", "Evaluation protocols", columns, (Group("", tuple(rows)),), (), tuple(tidy), ordered=True)


ENVIRONMENT = ("git", "packages", "hardware", "threads", "processes", "schema")


def environment(records: Records) -> Table:
    """Commit, packages, hardware and threads of the runs; several values of one field are flagged."""
    values: dict[str, dict[str, int]] = {}
    for run in records.runs:
        for key, value in flatten({name: run.run.get(name) for name in ENVIRONMENT}).items():
            tally = values.setdefault(key, {})
            tally[show(value)] = tally.get(show(value), 0) + 1
    rows, tidy = [], []
    for key, tally in values.items():
        for position, (value, n) in enumerate(sorted(tally.items())):
            flag = len(tally) > 1 or (key == "git.dirty" and value == "true")
            rows.append(Row((Cell(key if position == 0 else "", flag=flag), Cell(value, flag=flag), Cell(str(n)))))
            tidy.append({"field": key, "value": value, "runs": n})
    columns = (Column("Field", numeric=False), Column("Value", numeric=False), Column("Runs"))
    groups = (Group("", tuple(rows)),)
    return Table("environment", "Code, packages and hardware", columns, groups, (), tuple(tidy), ordered=True)
