"""A run killed anywhere continues to the same numbers."""

import itertools
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import DictConfig
from safetensors.torch import load_file

from alignbench import records
from alignbench.evaluation import DRIFT_SAMPLES, Evaluator
from alignbench.policies.stable_diffusion_3 import StableDiffusion3Policy
from alignbench.records import strip_volatile
from alignbench.run import Loop, run
from tests.conftest import Compose

PRIMITIVES = ("_write", "_fsync", "_replace")
FORK = multiprocessing.get_context("fork")
ITERATIONS = 4


def configured(tiny_run: Compose, results: Path, method: str = "flow_grpo") -> DictConfig:
    return tiny_run(f"method={method}", f"results={results}", f"budget.iterations={ITERATIONS}", "checkpoint_every=0.2")


def numbers(folder: Path) -> dict[str, Any]:
    """Everything of a run's records that must not depend on interruptions."""
    rows = {
        name: [strip_volatile(json.loads(line)) for line in (folder / name).read_text().splitlines()]
        for name in ("metrics.jsonl", "evaluations.jsonl")
    }
    scores = {path.name: json.loads(path.read_text()) for path in (folder / "scores").iterdir()}
    images = {path.name: path.read_bytes() for path in (folder / "images").iterdir()}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    status = strip_volatile(json.loads((folder / "status.json").read_text()))
    checkpoint = folder / "checkpoints" / f"step_{ITERATIONS}"
    weights = {
        f"{path.stem}/{name}": tensor.numpy().tobytes()
        for path in (*checkpoint.glob("*.safetensors"), *(folder / "lora").glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    state = strip_volatile(json.loads((checkpoint / "state.json").read_text()))
    return {"rows": rows, "scores": scores, "images": images, "config": config, "status": status} | {
        "weights": weights,
        "state": state,
    }


def in_child(target: Callable[[], object], kill_after: float | None = None) -> int:
    """Run in a forked process; its exit code (-9 if it was killed)."""
    child = FORK.Process(target=target)
    child.start()
    if kill_after is not None:
        time.sleep(kill_after)
        if child.pid is not None and child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def killed_at(config: DictConfig, call: int) -> Callable[[], None]:
    """A run that is killed at its n-th write, fsync or rename: every other time before, every other time after it."""

    def target() -> None:
        counter = itertools.count(1)

        def wrapped(primitive: Callable[..., Any]) -> Callable[..., Any]:
            def function(*arguments: Any, **options: Any) -> Any:
                now = next(counter) == call
                if now and call % 2:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = primitive(*arguments, **options)
                if now:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            return function

        for name in PRIMITIVES:
            setattr(records, name, wrapped(getattr(records, name)))
        run(config)

    return target


@pytest.fixture
def uninterrupted(tiny_run: Compose, tmp_path: Path) -> dict[str, Any]:
    """The records of a run that was left alone."""
    return numbers(run(configured(tiny_run, tmp_path / "whole")))


def check_every(calls: range, tiny_run: Compose, tmp_path: Path, uninterrupted: dict[str, Any]) -> int:
    """Kill a run at each of these calls, resume it, compare; returns how many were really killed."""
    killed = 0
    for call in calls:
        config = configured(tiny_run, tmp_path / f"killed{call}")
        code = in_child(killed_at(config, call))
        if code == 0:
            break
        assert code == -signal.SIGKILL
        killed += 1
        folder = run(config)
        assert numbers(folder) == uninterrupted, f"killed at call {call}"
    return killed


def test_killed_around_saves(tiny_run: Compose, tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    assert check_every(range(1, 400, 37), tiny_run, tmp_path, uninterrupted) >= 3


@pytest.mark.soak
def test_killed_at_every_write_fsync_and_rename(
    tiny_run: Compose, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    assert check_every(range(1, 10_000), tiny_run, tmp_path, uninterrupted) >= 100


def test_killed_at_five_random_moments(tiny_run: Compose, tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    start = time.perf_counter()
    in_child(lambda: run(configured(tiny_run, tmp_path / "timed")))
    duration = time.perf_counter() - start
    moments = random.Random(0)
    config = configured(tiny_run, tmp_path / "killed")
    for _ in range(5):
        in_child(lambda: run(config), kill_after=moments.uniform(0.2, 1.0) * duration)
    assert numbers(run(config)) == uninterrupted


def test_work_done_twice_is_counted_as_waste(tiny_run: Compose, tmp_path: Path) -> None:
    config = configured(tiny_run, tmp_path / "wasted", method="diffusion_nft")
    config.checkpoint_every = 1.0  # only the base and the end: the kill loses every iteration
    rows = 0

    def target() -> None:
        append = records.RunDirectory.append_metrics

        def counted(self: records.RunDirectory, row: dict[str, Any]) -> None:
            nonlocal rows
            append(self, row)
            rows += 1
            if rows == 3:
                os.kill(os.getpid(), signal.SIGKILL)

        records.RunDirectory.append_metrics = counted  # type: ignore[method-assign, assignment]
        run(config)

    assert in_child(target) == -signal.SIGKILL
    folder = run(config)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == ITERATIONS
    reference = DRIFT_SAMPLES * 10  # drawn again to measure drift
    assert lines[-1]["volatile"]["wasted_nfe"] == lines[2]["ledger"]["nfe"] + reference


def test_work_of_several_attempts_adds_up(tiny_run: Compose, tmp_path: Path) -> None:
    config = configured(tiny_run, tmp_path / "wasted", method="diffusion_nft")
    config.checkpoint_every = 1.0  # only the base and the end: every kill loses all iterations

    def killed_in(iteration: int) -> Callable[[], None]:
        def target() -> None:
            iterate = Loop.iterate

            def counted(self: Loop) -> dict[str, Any]:
                if self.clock.iteration == iteration:
                    os.kill(os.getpid(), signal.SIGKILL)
                return iterate(self)

            Loop.iterate = counted  # type: ignore[method-assign]
            run(config)

        return target

    for iteration in (3, 0, 2):
        assert in_child(killed_in(iteration)) == -signal.SIGKILL
    folder = run(config)
    spent = [json.loads(line)["ledger"]["nfe"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    status = json.loads((folder / "status.json").read_text())
    reference = 3 * DRIFT_SAMPLES * 10  # drawn again by the second, third and fourth attempt
    assert status["volatile"]["wasted_nfe"] == spent[2] + spent[1] + reference


def test_a_signal_within_an_evaluation_stops_it_and_the_run_continues(
    tiny_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base (0 to 2), during training (3, 4), of the final weights (5 to 7): 8 images in micro-batches of 3 each."""
    settings = (f"budget.iterations={ITERATIONS}", "checkpoint_every=1", "micro_batch=3", "method=flow_grpo")
    uninterrupted = numbers(run(tiny_run(*settings, f"results={tmp_path / 'whole'}")))
    begin, decode = Evaluator.__call__, StableDiffusion3Policy.decode
    begun, decoded = 0, 0
    signals = {0: signal.SIGINT, 2: signal.SIGTERM, 3: signal.SIGINT, 6: signal.SIGTERM}

    def counted(self: Evaluator, *arguments: Any, **options: Any) -> Any:
        nonlocal begun, decoded
        begun, decoded = begun + 1, 0
        return begin(self, *arguments, **options)

    def interrupting(self: StableDiffusion3Policy, latents: torch.Tensor) -> torch.Tensor:
        nonlocal decoded
        decoded += 1
        if begun == stop + 1 and decoded == 1:
            os.kill(os.getpid(), signals[stop])
        return decode(self, latents)

    for stop in signals:
        config = tiny_run(*settings, f"results={tmp_path / f'stopped{stop}'}")
        begun = 0
        with monkeypatch.context() as patch:
            patch.setattr(Evaluator, "__call__", counted)
            patch.setattr(StableDiffusion3Policy, "decode", interrupting)
            with pytest.raises(KeyboardInterrupt):
                run(config)
        assert decoded == 1  # of three micro-batches
        folder = next((tmp_path / f"stopped{stop}").rglob("status.json")).parent
        assert json.loads((folder / "status.json").read_text())["status"] == "interrupted"
        rows = (folder / "evaluations.jsonl").read_text().splitlines() if stop else []
        assert len(rows) == stop
        assert len(list(folder.glob("scores/*"))) == stop
        assert numbers(run(config)) == uninterrupted, f"stopped in evaluation {stop}"


def test_a_signal_within_a_rollout_throws_it_away_and_the_run_continues(
    tiny_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """8 images in micro-batches of 3, 3 passes each; the signal comes with the first micro-batch of iteration 3."""
    settings = (f"budget.iterations={ITERATIONS}", "checkpoint_every=1", "micro_batch=3", "method=flow_grpo")
    uninterrupted = numbers(run(tiny_run(*settings, f"results={tmp_path / 'whole'}")))
    iterate, decode = Loop.iterate, StableDiffusion3Policy.decode
    iteration, decoded = 0, 0

    def counted(self: Loop) -> dict[str, Any]:
        nonlocal iteration
        iteration += 1
        return iterate(self)

    def interrupting(self: StableDiffusion3Policy, latents: torch.Tensor) -> torch.Tensor:
        nonlocal decoded
        if iteration == 3:
            decoded += 1
            os.kill(os.getpid(), signal.SIGTERM)
        return decode(self, latents)

    config = tiny_run(*settings, f"results={tmp_path / 'stopped'}")
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "iterate", counted)
        patch.setattr(StableDiffusion3Policy, "decode", interrupting)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    assert decoded == 1  # of three micro-batches
    (status,) = (tmp_path / "stopped").rglob("status.json")
    stopped = json.loads(status.read_text())
    assert (stopped["status"], stopped["volatile"]["wasted_nfe"]) == ("interrupted", 3 * 3)
    assert (status.parent / "checkpoints" / "step_2" / "COMPLETE").exists()
    assert numbers(run(config)) == uninterrupted
    wasted = json.loads(status.read_text())["volatile"]["wasted_nfe"]
    assert wasted == 3 * 3 + DRIFT_SAMPLES * 10  # which a new attempt draws again


def test_ctrl_c_stops_cleanly_and_continues(
    tiny_run: Compose, tmp_path: Path, uninterrupted: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tiny_run, tmp_path / "stopped")
    append = records.RunDirectory.append_metrics

    def interrupting(self: records.RunDirectory, row: dict[str, Any]) -> None:
        append(self, row)
        if row["iteration"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(records.RunDirectory, "append_metrics", interrupting)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    folder = next((tmp_path / "stopped").rglob("status.json")).parent
    status = json.loads((folder / "status.json").read_text())
    assert status["status"] == "interrupted"
    assert "continues from the last checkpoint" in status["message"]
    assert (folder / "checkpoints" / "step_2" / "COMPLETE").exists()
    assert numbers(run(config)) == uninterrupted


def test_a_finished_run_is_skipped(tiny_run: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configured(tiny_run, tmp_path / "twice")
    before = numbers(run(config))
    assert numbers(run(config)) == before
    printed = capsys.readouterr().out
    assert "already done, skipped" in printed
    assert "warning: it was made by other code" not in printed


def test_a_finished_run_is_skipped_with_a_warning_where_its_prompt_file_has_changed(
    tiny_run: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, file = configured(tiny_run, tmp_path / "twice"), tmp_path / "prompts.jsonl"
    run(config)
    before = file.read_text()
    file.write_text(before.replace("ef", "xy"))
    run(config)
    printed = capsys.readouterr().out
    assert f"already done, skipped; warning: other content now: prompts ({file}): sha256:" in printed
    assert f"warning: other content now: evaluation.prompts ({file}): sha256:" in printed
    file.write_text(before)
    run(config)
    assert "already done, skipped\n" in capsys.readouterr().out
    file.unlink()  # nothing to compare with
    run(config)
    assert "already done, skipped\n" in capsys.readouterr().out


def test_a_finished_run_of_other_code_is_skipped_with_a_warning(
    tiny_run: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tiny_run, tmp_path / "twice")
    for commit in ("aaa", "bbb"):
        monkeypatch.setattr("alignbench.assembly._git", lambda commit=commit: {"commit": commit, "dirty": False})
        run(config)
    warning = 'already done, skipped; warning: it was made by other code (git.commit: "aaa" -> "bbb")'
    assert warning in capsys.readouterr().out
