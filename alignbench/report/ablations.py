"""`python -m alignbench.report.ablations ablations.yaml`: what each part of a method is worth, or that it was not run.

An ablation is a method with a few settings changed. Its runs, whatever the names of their experiment and method, are
compared with the runs of the whole method that differ from them in those settings and the seed alone.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alignbench.errors import AlignbenchError
from alignbench.records import atomic_write
from alignbench.report.data import Records, TrainingRun, load, show
from alignbench.report.statistics import Interval, paired_difference, welch_difference
from alignbench.report.tables import title_of
from alignbench.terminal import lasting


class BadAblations(AlignbenchError):
    """The file of ablations cannot be used."""


NOT_SETTINGS = {"seed", "name", "method.name", "method.tuned"}


@dataclass(frozen=True)
class Ablation:
    """A method without one of its parts.

    Attributes:
        method, reward: of the runs that are compared.
        what: in words, for the table.
        settings: configuration key -> value without the part.
    """

    method: str
    reward: str
    what: str
    settings: Mapping[str, Any]


def read(path: Path) -> tuple[str, list[Ablation]]:
    """The experiment and its ablations, from a YAML file with these two keys.

    Raises:
        BadAblations: unreadable, or a key is missing or unknown.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return str(content["experiment"]), [Ablation(**entry) for entry in content["ablations"]]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise BadAblations(
            f"{path}: expected the keys experiment and ablations, a list of method, reward, what and settings "
            f"(configuration key: value); {type(error).__name__}: {error}"
        ) from error


def compared(records: Records, experiment: str, ablation: Ablation) -> tuple[list[TrainingRun], list[TrainingRun]]:
    """The finished runs of the whole method, and those without the part, that differ in nothing else but the seed."""
    runs = [run for run in records.runs if run.reward == ablation.reward and run.finished]
    whole = [run for run in runs if (run.experiment, run.method, run.variant) == (experiment, ablation.method, "")]
    changed = set(ablation.settings)
    without = [
        run
        for run in runs
        if whole
        and all(run.config.get(key) == value for key, value in ablation.settings.items())
        and changed & _differing(run, whole[0])
        and _differing(run, whole[0]) <= changed | NOT_SETTINGS
    ]
    return whole, without


def _differing(run: TrainingRun, other: TrainingRun) -> set[str]:
    return {key for key in run.config.keys() | other.config.keys() if run.config.get(key) != other.config.get(key)}


def difference(whole: Sequence[TrainingRun], without: Sequence[TrainingRun], metric: str) -> Interval:
    """Without minus whole, final weights at the headline guidance; seed by seed where both have the same seeds."""

    def scores(runs: Sequence[TrainingRun]) -> dict[int, float]:
        finals = {run.seed: run.final(run.final_hash, run.curve_guidance) for run in runs}
        return {seed: final.metrics[metric] for seed, final in finals.items() if final and metric in final.metrics}

    a, b = scores(without), scores(whole)
    if a.keys() == b.keys():
        return paired_difference([a[seed] for seed in a], [b[seed] for seed in a])
    return welch_difference(list(a.values()), list(b.values()))


METRICS = ("reward", "geneval", "exact_scene", "pickscore", "judge")


def page(records: Records, experiment: str, ablations: Sequence[Ablation]) -> str:
    """A Markdown table: a row per ablation, differences with intervals, the folders of the runs, or "not run"."""
    header = ["method", "trained on", "without", "settings", *(title_of(metric) for metric in METRICS), "n", "runs"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for ablation in ablations:
        settings = ", ".join(f"{key.rsplit('.', 1)[-1]} {show(value)}" for key, value in ablation.settings.items())
        cells = [ablation.method, ablation.reward, ablation.what, settings]
        whole, without = compared(records, experiment, ablation)
        if not without or not whole:
            lines.append("| " + " | ".join([*cells, "not run", *[""] * (len(METRICS) + 1)]) + " |")
            continue
        intervals = [difference(whole, without, metric) for metric in METRICS]
        cells += [f"{each.mean:+.3f} ± {each.half_width:.3f}".replace("± nan", "(one run)") for each in intervals]
        paths = "; ".join(f"{run.name}" for run in [*without, *whole])
        lines.append("| " + " | ".join([*cells, f"{len(without)} against {len(whole)}", paths]) + " |")
    return "\n".join(lines) + "\n"


@lasting()
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 with a table beside the file, 1 where the file or the records cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m alignbench.report.ablations", description=__doc__)
    parser.add_argument("ablations", type=Path, help="YAML file: experiment, ablations")
    parser.add_argument("--results", type=Path, default=Path("results"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        experiment, ablations = read(options.ablations)
        output = options.ablations.with_suffix(".md")
        table = page(load([options.results]), experiment, ablations)
        note = "Without the part minus the whole method; 95% Student-t intervals over runs."
        atomic_write(output, f"# Ablations\n\n{note}\n\n{table}")
    except AlignbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
