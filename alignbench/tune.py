"""`python -m alignbench.tune space.yaml`: tune several methods with equal effort.

Every method gets the same number of trials, of the same budget, drawn from its own space of levels by a Latin
hypercube: each level of each knob is tried equally often, up to rounding. A second round may run the best of them again
under another experiment, with a larger budget (one step of successive halving, Jamieson & Talwalkar 2016, arXiv
1502.07943): what gains early is not always what gains most. Trials are ordinary runs, so finished ones are
skipped, interrupted ones continue, and those that another process is at are left to it. The trials are scored on
prompts that evaluation never uses. What came out is written beside the space: ``trials.md`` and ``trials.png``.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from scipy.stats import qmc

from alignbench.errors import AlignbenchError, ConfigError
from alignbench.records import atomic_write, find_runs
from alignbench.report import curves, data, tuning
from alignbench.report.data import Records
from alignbench.report.tuning import Trial
from alignbench.terminal import lasting


@dataclass(frozen=True)
class Space:
    """What is tried.

    Attributes:
        experiment: the config of group ``experiment`` that every trial runs under: budget, evaluation, seed.
        trials: of each method.
        seed: of the design.
        methods: by name: the reward it is tuned on (``reward``) and the ordered levels of its knobs (``knobs``), by
            configuration key.
        second: the second round, if there is one: its ``experiment``, and how many of each method's ``best`` trials.
    """

    experiment: str
    trials: int
    seed: int
    methods: Mapping[str, Mapping[str, Any]]
    second: Mapping[str, Any] | None = None

    @classmethod
    def read(cls, path: Path) -> "Space":
        """Read a YAML file with the attributes as keys.

        Raises:
            ConfigError: unreadable, or a key is missing, unknown, or of another shape.
        """
        try:
            space = cls(**yaml.safe_load(path.read_text(encoding="utf-8")))
            sizes = [len(levels) for method in space.methods.values() for levels in method["knobs"].values()]
            if not all(isinstance(method["reward"], str) for method in space.methods.values()):
                raise TypeError("the reward of a method is the name of a configuration")
            if space.second is not None and set(space.second) != {"experiment", "best"}:
                raise KeyError("experiment, best")
        except (OSError, UnicodeError, yaml.YAMLError, TypeError, AttributeError, KeyError) as error:
            raise ConfigError(
                f"{path}: expected the keys experiment, trials, seed and methods, each method with a reward and knobs "
                f"(configuration key: list of levels), and perhaps second (experiment, best); "
                f"{type(error).__name__}: {error}"
            ) from error
        if space.second is not None and space.second["best"] not in range(1, space.trials + 1):
            raise ConfigError(f"{path}: second.best is {space.second['best']}: from 1 to the {space.trials} trials")
        if space.trials < 1 or not sizes or min(sizes) < 2:
            raise ConfigError(f"{path}: needs trials of 1 or more and at least two levels for every knob")
        return space

    def design(self, method: str) -> list[dict[str, Any]]:
        """The settings of a method's trials, in order: knob -> level.

        Raises:
            ConfigError: two trials would be the same.
        """
        knobs = self.methods[method]["knobs"]
        points = qmc.LatinHypercube(len(knobs), optimization="random-cd", rng=self.seed).random(self.trials)
        settings = [
            {knob: levels[int(x * len(levels))] for (knob, levels), x in zip(knobs.items(), point, strict=True)}
            for point in points.tolist()
        ]
        if any(settings.count(setting) > 1 for setting in settings):
            raise ConfigError(f"{method}: two of {self.trials} trials are the same; change seed, or add levels")
        return settings

    def command(self, experiment: str, method: str, setting: Mapping[str, Any], results: Path) -> list[str]:
        """The command that runs one trial."""
        chosen = [f"{knob}={'null' if level is None else level}" for knob, level in setting.items()]
        return [
            *(sys.executable, "-m", "alignbench"),
            *(f"experiment={experiment}", f"method={method}", f"reward={self.methods[method]['reward']}"),
            *(f"results={results}", "progress=false"),
            *chosen,
        ]


def found(
    space: Space, methods: Sequence[str], results: Path
) -> tuple[dict[str, list[Trial]], dict[str, list[Trial | None]]]:
    """The trials of both rounds by method, as their records say.

    The second round has an entry for every trial of the first, None for those that are not among the best; it is empty
    for a method whose first round has not finished.
    """
    records = data.load([results]) if results.is_dir() and find_runs(results) else Records((), ())
    first: dict[str, list[Trial]] = {}
    second: dict[str, list[Trial | None]] = {}
    for method in methods:
        reward = space.methods[method]["reward"]
        first[method] = [
            tuning.find(records, space.experiment, method, reward, setting) for setting in space.design(method)
        ]
        if space.second is not None and all(trial.gain is not None for trial in first[method]):
            again = tuning.best(first[method], space.second["best"])
            second[method] = [
                tuning.find(records, space.second["experiment"], method, reward, trial.setting)
                if trial in again
                else None
                for trial in first[method]
            ]
    return first, second


def summarise(space: Space, methods: Sequence[str], results: Path, output: Path) -> None:
    """Write trials.md and trials.png from the records of the trials."""
    first, second = found(space, methods, results)
    atomic_write(output / "trials.md", f"# Trials\n\n{tuning.page(space.methods, first, second)}")
    atomic_write(output / "trials.png", curves.png(tuning.draw(first, second), dpi=120))
    print(f"{output / 'trials.md'}, {output / 'trials.png'}")


def carry_out(
    space: Space, trials: Sequence[tuple[str, str, Mapping[str, Any]]], results: Path, jobs: int
) -> list[int]:
    """Run trials (experiment, method, setting), some at a time; returns their exit statuses."""

    def run(number: int) -> int:
        experiment, method, setting = trials[number]
        command = space.command(experiment, method, setting, results)
        ended = subprocess.run(command, capture_output=True, text=True)
        shown = ", ".join(f"{knob.rsplit('.', 1)[-1]}={level}" for knob, level in setting.items())
        last = (ended.stderr.strip().splitlines() or ["no message"])[-1]
        told = {0: "done", os.EX_TEMPFAIL: "left to another process"}.get(ended.returncode, last)
        print(f"{experiment} [{number + 1}/{len(trials)}] {method}: {shown}: {told}", flush=True)
        return ended.returncode

    with ThreadPoolExecutor(jobs) as pool:
        try:
            return list(pool.map(run, range(len(trials))))
        except KeyboardInterrupt:  # the trials get it too and save themselves
            pool.shutdown(cancel_futures=True)
            raise


@lasting()
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 if every trial finished, 1 if some failed (the others still run)."""
    parser = argparse.ArgumentParser(prog="python -m alignbench.tune", description=__doc__)
    parser.add_argument("space", type=Path, help="YAML file: experiment, trials, seed, methods with their knobs")
    parser.add_argument("--results", type=Path, default=Path("results"), help="default: %(default)s")
    parser.add_argument("--methods", nargs="+", help="some of the space's methods; default: all")
    parser.add_argument("--summary", action="store_true", help="run nothing: only write what the records hold")
    parser.add_argument("--jobs", type=int, default=1, help="trials at a time (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        space = Space.read(options.space)
        unknown = [name for name in options.methods or () if name not in space.methods]
        if unknown:
            raise ConfigError(f"{options.space} has no method {unknown[0]!r}; it has: {', '.join(space.methods)}")
        methods = options.methods or list(space.methods)
        designs = {method: space.design(method) for method in methods}
    except AlignbenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    ended: list[int] = []
    if not options.summary:
        trials = [
            (space.experiment, method, designs[method][trial]) for trial in range(space.trials) for method in methods
        ]
        try:
            ended += carry_out(space, trials, options.results, options.jobs)
            if space.second is not None and os.EX_TEMPFAIL not in ended:
                _, second = found(space, methods, options.results)
                again = [
                    (space.second["experiment"], method, trial.setting)
                    for method, of_method in second.items()
                    for trial in of_method
                    if trial is not None
                ]
                ended += carry_out(space, again, options.results, options.jobs)
        except KeyboardInterrupt:
            print("stopped; the same command continues")
            return 130
    summarise(space, methods, options.results, options.space.parent)
    left = ended.count(os.EX_TEMPFAIL)
    failed = len(ended) - ended.count(0) - left
    if failed:
        print(f"{failed} trials failed; the same command tries them again")
    if left:
        print(f"{left} trials are left to another process; the same command goes on when they have ended")
    return 1 if failed or left else 0


if __name__ == "__main__":
    sys.exit(main())
