"""Sweeps: what becomes of each cell, with every launcher, and with two sweeps on one grid."""

import fcntl
import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from alignbench import assembly, status, sweep
from alignbench.__main__ import main
from alignbench.policies.stable_diffusion_3 import StableDiffusion3Policy
from alignbench.prompts.prompt import Prompt
from alignbench.records import LOCK, RunDirectory, writer
from alignbench.run import Loop
from tests.report.synthetic import write_run
from tests.stand_ins import Red

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


class Waits(Red):
    """Scores nothing as long as a file exists."""

    def __init__(self, until_gone: str) -> None:
        self.file = Path(until_gone)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        while self.file.exists():
            time.sleep(0.05)
        return super().score(images, prompts)


@pytest.fixture
def tiny(tiny_checkpoint: Path, tmp_path: Path) -> list[str]:
    """Overrides that make a cell two iterations on the tiny checkpoint."""
    (tmp_path / "prompts.txt").write_text("ab\ncd\nef\ngh\n")
    return [
        f"results={tmp_path / 'results'}",
        f"model.policy.source={tiny_checkpoint}",
        "prompts=file",
        f"prompts.path={tmp_path / 'prompts.txt'}",
        "method.batch.prompts=2",
        "method.batch.images=4",
        "method.rollout.steps=3",
        "reward=exact_scene",
        "reward.parts.exact_scene.shapes._target_=tests.stand_ins.Red",
        "~evaluation.scorers.geneval",
        "~evaluation.scorers.pickscore",
        "~evaluation.scorers.judge",
        "evaluation.features=null",
        "evaluation.published=false",
        "evaluation.fractions=[0,1]",
        "evaluation.curve.images_per_tag=4",
        "evaluation.final.images_per_tag=4",
        "budget.flops=null",
        "budget.iterations=2",
        "device=cpu",
        "progress=false",
    ]


def swept(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """Run a sweep in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["alignbench", "-m", *arguments])
    try:
        main()
    except SystemExit as ended:
        return ended.code
    return 0


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "alignbench", "-m", *arguments]


def outcomes(results: Path) -> list[list[tuple[str, str]]]:
    """(outcome, message) of each cell of each sweep, in order."""
    sweeps = sorted((results / ".sweep").iterdir())
    return [[(cell["outcome"], cell["message"]) for cell in sweep._cells(folder)] for folder in sweeps]


def cell_of(results: Path, method: str, seed: int) -> Path:
    (folder,) = results.glob(f"default/shapes/exact_scene/{method}@*/seed{seed}")
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def policies() -> int:
    """How many models this process holds."""
    return sum(type(thing) is StableDiffusion3Policy for thing in gc.get_objects())


def test_results_that_cannot_be_written_are_told_before_the_first_cell(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").write_text("a file")
    told = swept(monkeypatch, *tiny, "seed=0,1")
    assert told == 1
    shown = capsys.readouterr()
    assert shown.err.startswith(f"alignbench: cannot write {tmp_path / 'results' / '.sweep'}")
    assert "choose a results folder that this user can write to" in shown.err
    assert "seed 0" not in shown.out


def test_a_failed_cell_does_not_stop_the_others_and_finished_ones_are_skipped(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, assembled, loaded = tmp_path / "results", [], []
    gc.collect()
    others = policies()  # of tests before this one
    assemble, iterate = assembly.assemble, Loop.iterate

    def counted(config: Any, processes: Any) -> Any:
        assembled.append((config.method.name, config.seed))
        loaded.append(policies() - others)
        return assemble(config, processes)

    def faulty(self: Loop) -> dict[str, Any]:
        if self.config.seed == 1 and self.clock.iteration == 1:
            raise ZeroDivisionError("a mistake")
        return iterate(self)

    monkeypatch.setattr(assembly, "_git", lambda: {"commit": "abc", "dirty": False})
    monkeypatch.setattr(assembly, "assemble", counted)
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "iterate", faulty)
        assert swept(patch, *tiny, "method=dpo,flow_grpo", "seed=0,1") == 1
    indivisible = (
        "2 prompts x 4 images = 8 images cannot be split into 6 equal updates; method.batch.updates must divide 8"
    )
    told = capsys.readouterr()
    assert "ZeroDivisionError: a mistake" in told.err
    assert "sweep: 1 done, 3 failed" in told.out
    assembled.clear()
    assert swept(monkeypatch, *tiny, "method=dpo,flow_grpo", "seed=0,1") == 1
    assert ("flow_grpo", 0) not in assembled  # nothing was loaded for it
    assert not any(loaded)  # the model of a cell is gone when the next one's is loaded, also after an error
    assert outcomes(results) == [
        [("failed", indivisible), ("failed", indivisible), ("done", ""), ("failed", "ZeroDivisionError: a mistake")],
        [("failed", indivisible), ("failed", indivisible), ("skipped", ""), ("done", "")],
    ]
    printed = capsys.readouterr().out
    finished = cell_of(results, "flow_grpo", 0)
    assert [line for line in printed.splitlines() if str(finished) in line] == [f"{finished}: already done, skipped"]
    assert "  skipped  method=flow_grpo seed=0\n  done     method=flow_grpo seed=1\n" in printed
    assert [row["iteration"] for row in rows(cell_of(results, "flow_grpo", 1))] == [1, 2]


def test_ctrl_c_stops_the_sweep_and_the_same_command_continues_it(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    append = RunDirectory.append_metrics

    def interrupting(self: RunDirectory, row: dict[str, Any]) -> None:
        append(self, row)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "append_metrics", interrupting)
        assert swept(patch, *tiny, "method=flow_grpo", "seed=0,1") == 130
    assert "sweep: 1 stopped" in capsys.readouterr().out
    results = tmp_path / "results"
    assert len(list(results.rglob("status.json"))) == 1  # the second cell was not begun
    assert swept(monkeypatch, *tiny, "method=flow_grpo", "seed=0,1") == 0
    assert [[name for name, _ in cells] for cells in outcomes(results)] == [["stopped"], ["done", "done"]]
    assert [row["volatile"]["wasted_nfe"] > 0 for row in rows(cell_of(results, "flow_grpo", 0))] == [False, True]


def test_two_sweeps_share_a_grid_and_one_goes_on_when_the_other_is_killed(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one is killed in cell 0 while the second one, which has left that to it, is in cell 1."""
    results, hold = tmp_path / "results", tmp_path / "hold"
    hold.touch()
    waiting = [f"reward.parts.exact_scene.shapes._target_={__name__}.Waits"]
    waiting += [f"+reward.parts.exact_scene.shapes.until_gone={hold}"]
    grid = [*tiny, *waiting, "method=flow_grpo", "seed=0,1"]
    log = (tmp_path / "log").open("w+")

    def started(seed: int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(command(*grid), stdout=log, stderr=log, env=ENVIRONMENT)
        end = time.monotonic() + 600
        while not any(writer(folder) for folder in results.glob(f"default/*/*/*/seed{seed}")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.1)
        return process

    first = started(seed=0)
    second = started(seed=1)
    assert writer(cell_of(results, "flow_grpo", 0)) == f"process {first.pid}"
    first.kill()
    first.wait(timeout=60)
    assert writer(cell_of(results, "flow_grpo", 0)) is None
    hold.unlink()
    assert second.wait(timeout=600) == 1  # nobody shall believe that all is done
    ended = f"left to process {first.pid}, which has ended; the same command continues it"
    assert outcomes(results) == [[], [("not done", ended), ("done", "")]]
    told = (tmp_path / "log").read_text()
    assert "sweep: 1 done, 1 not done" in told
    assert f"  not done seed=0: {ended}\n" in told
    assert {cell.place[3:]: cell.state for cell in status.grid(results)} == {
        (folder.parent.name, seed): state
        for seed, state in ((0, "stopped"), (1, "done"))
        for folder in [cell_of(results, "flow_grpo", seed)]
    }

    before = cell_of(results, "flow_grpo", 1).joinpath("metrics.jsonl").read_bytes()
    assert swept(monkeypatch, *grid) == 0
    assert outcomes(results)[2] == [("done", ""), ("skipped", "")]
    assert cell_of(results, "flow_grpo", 1).joinpath("metrics.jsonl").read_bytes() == before
    for seed in (0, 1):
        assert [row["iteration"] for row in rows(cell_of(results, "flow_grpo", seed))] == [1, 2]


def test_only_what_was_left_to_a_process_that_has_ended_is_not_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Cells that were left: one is done since, one has a live writer, one has nobody, one has no folder."""
    folder = tmp_path / ".sweep" / "now"
    folder.mkdir(parents=True)
    for seed, state in enumerate(("done", "running", "running")):
        write_run(tmp_path, seed=seed, status=state, until=0.0, grids=False)
    for number in range(4):
        told = {"overrides": [f"seed={number}"], "folder": f"../../first/shapes/geneval/diffusion_nft/seed{number}"}
        (folder / f"{number}.json").write_text(json.dumps(told | {"outcome": "left", "message": "to process 1"}))
    refused = {"overrides": ["seed=4"], "folder": None, "outcome": "done", "message": ""}
    (folder / "4.json").write_text(json.dumps(refused))

    def conclude() -> int | str | None:
        try:
            with sweep.concluded():
                sweep._begun.append(folder)
        except SystemExit as ended:
            return ended.code
        return 0

    with (tmp_path / "first/shapes/geneval/diffusion_nft/seed1" / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert conclude() == 1
        assert [name for name, _ in outcomes(tmp_path)[0]] == ["left", "left", "not done", "not done", "done"]
        assert "sweep: 1 done, 2 left, 2 not done" in capsys.readouterr().out
        for number in (2, 3):
            (folder / f"{number}.json").unlink()
        assert conclude() == 0


@pytest.mark.parametrize(
    ("launcher", "methods", "ended"),
    [
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], "flow_grpo,dpo", "1 done, 1 failed"),
        (["hydra/launcher=submitit_local"], "flow_grpo", "1 done"),
    ],
)
def test_launchers(tiny: list[str], tmp_path: Path, launcher: list[str], methods: str, ended: str) -> None:
    arguments = command(*tiny, *launcher, f"method={methods}")
    finished = subprocess.run(arguments, timeout=600, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert finished.returncode == int("failed" in ended), finished.stderr
    assert f"sweep: {ended}\n" in finished.stdout
    assert [row["iteration"] for row in rows(cell_of(tmp_path / "results", "flow_grpo", 0))] == [1, 2]


def test_a_stray_rank_hides_no_failure(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a batch system leaves it in the environment, without processes that belong to it."""
    monkeypatch.setenv("RANK", "3")
    assert swept(monkeypatch, *tiny, "seed=0", "micro_batch=0") == 1
    assert "micro_batch is 0" in capsys.readouterr().out
    assert [[outcome for outcome, _ in cells] for cells in outcomes(tmp_path / "results")] == [["failed"]]
