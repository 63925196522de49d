"""One and two processes take the same steps."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignbench.processes import Processes
from tests import iterations

LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def launched(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes wrote what every kind of method ended with, in micro-batches of 3."""
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, *LAUNCHER, "-m", "tests.iterations", str(tiny_checkpoint), str(folder)]
    ended = subprocess.run(command, timeout=900, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert ended.returncode == 0, ended.stderr
    return folder


def close(found: Any, expected: Any, tolerance: float) -> bool:
    """Whether two rows hold the same: numbers within the tolerance, counts exactly."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(close(found[key], expected[key], tolerance) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(close, found, expected, [tolerance] * len(expected)))
    return bool(found == (pytest.approx(expected, rel=0, abs=tolerance) if isinstance(expected, float) else expected))


@pytest.mark.parametrize("kind", iterations.KINDS)
def test_two_processes_and_uneven_micro_batches_give_the_same_weights_and_rows(
    launched: Path, tiny_checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    one, rows = iterations.iterated(kind, tiny_checkpoint, tmp_path, 64, Processes("cpu"))
    two = load_file(launched / f"{kind}.safetensors")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-9)
    assert close(json.loads((launched / f"{kind}.json").read_text()), rows, 1e-9)
    moved = [name for name in one if name.endswith("exp_avg") and one[name].abs().max() > 0]
    assert moved
    assert rows[1]["ledger"]["backward"] > rows[0]["ledger"]["backward"] > 0


def test_two_processes_evaluate_each_image_once(launched: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """5 images by 2 processes, in micro-batches of 3."""
    one = iterations.evaluated(tiny_checkpoint, tmp_path, 64, Processes("cpu"))
    two = json.loads((launched / "evaluation.json").read_text())
    assert two.pop("processes") == 2
    assert close(two, one, 1e-4)  # the embedded PickScore computes in float32
    assert {name: len(values) for name, values in two["scores"]["metrics"].items()} == {"reward": 5, "pickscore": 5}
    assert (two["cost"]["images"], two["cost"]["reward_calls"]) == (5, 2 * 5)


@pytest.fixture
def two(tiny_checkpoint: Path, tmp_path: Path) -> list[str]:
    """A command that runs two processes on the tiny checkpoint, with a reward for tests."""
    (tmp_path / "prompts.txt").write_text("ab\ncd\nef\ngh\n")
    arguments = [
        f"results={tmp_path / 'results'}",
        f"model.policy.source={tiny_checkpoint}",
        "prompts=file",
        f"prompts.path={tmp_path / 'prompts.txt'}",
        "method.batch.prompts=4",
        "method.batch.images=4",
        "method.rollout.steps=3",
        "reward=exact_scene",
        "evaluation.features=null",
        "evaluation.published=false",
        "evaluation.curve.images_per_tag=4",
        "evaluation.final.images_per_tag=4",
        "budget.flops=null",
        "budget.iterations=1000",
        "device=cpu",
        "progress=false",
    ]
    return [sys.executable, *LAUNCHER, "-m", "alignbench", *arguments]


def reward(name: str, **settings: object) -> list[str]:
    """Overrides that choose a reward of the tests."""
    part = "reward.parts.exact_scene.shapes"
    chosen = [f"{part}._target_=tests.stand_ins.{name}"]
    return chosen + [f"+{part}.{key}={value}" for key, value in settings.items()]


def messages(command: list[str]) -> list[str]:
    """What a command that fails says."""
    ended = subprocess.run(command, timeout=300, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert ended.returncode == 1
    return [line for line in ended.stderr.splitlines() if line.startswith("alignbench: ")]


def test_an_error_of_one_process_ends_both_and_is_told_once(two: list[str], tmp_path: Path) -> None:
    command = [*two, *reward("Constant", bad_prompt="gh")]  # the last prompt: the second process scores its images
    (message,) = messages(command)
    assert message.startswith("alignbench: process 1: reward is nan for image ")
    assert "prompt prompts/00003 ('gh')" in message
    (status,) = (tmp_path / "results").rglob("status.json")
    recorded = json.loads(status.read_text())
    assert (recorded["status"], f"alignbench: {recorded['message']}") == ("failed", message)

    with (status.parent / ".lock").open("r+") as lock:  # an error of the main process, before the loop
        fcntl.flock(lock, fcntl.LOCK_EX)
        (message,) = messages(command)
    assert message.startswith(f"alignbench: {status.parent} is being written by process ")


def test_two_processes_stop_together_and_save(two: list[str], tmp_path: Path) -> None:
    log = (tmp_path / "log").open("w+")
    running = subprocess.Popen([*two, *reward("Red")], stdout=log, stderr=log, env=ENVIRONMENT)
    end = time.monotonic() + 300
    while not any((tmp_path / "results").rglob("metrics.jsonl")):
        assert running.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < end
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    running.wait(timeout=300)
    (status,) = (tmp_path / "results").rglob("status.json")
    assert json.loads(status.read_text())["status"] == "interrupted"
    rows = (status.parent / "metrics.jsonl").read_text().splitlines()
    last = status.parent / "checkpoints" / f"step_{len(rows)}"
    assert json.loads((last / "COMPLETE").read_text())["metrics_rows"] == len(rows)
    printed = (tmp_path / "log").read_text()
    assert printed.count("stopping as soon as the run can be continued") == 1
    assert "forcefully" not in printed  # what the launcher says of processes that it had to kill


def test_every_process_makes_the_same_number_of_rounds_and_covers_its_shard() -> None:
    for n, count, size in [(1, 1, 1), (8, 1, 3), (8, 3, 2), (7, 4, 64), (10, 3, 1), (3, 3, 5)]:
        rounds, covered = set(), []
        for rank in range(count):
            processes = object.__new__(Processes)
            processes.rank, processes.count = rank, count
            own = processes.shard(n)
            blocks = processes.rounds(n, size)
            rounds.add(len(blocks))
            assert max(map(len, blocks)) <= size
            covered += [own[place] for block in blocks for place in block]
        assert len(rounds) == 1
        assert covered == list(range(n))
