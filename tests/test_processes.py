"""One and two processes take the same steps."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignbench.processes import Processes

LAUNCHER = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def launched(folder: Path, processes: int, method: str, micro_batch: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer moments after two iterations in float64, from the command line."""
    arguments = [
        f"method={method}",
        "overlay=none",
        "method.batch.prompts=3",
        "method.batch.images=5",
        "method.batch.updates=1",
        "method.rollout.steps=3",
        f"results={folder}",
        f"micro_batch={micro_batch}",
        "model.policy.dtype=float64",
        "budget.flops=null",
        "budget.iterations=2",
        "evaluation.fractions=[0,1]",
        "evaluation.curve.images_per_tag=1",
        "evaluation.final.images_per_tag=1",
        "evaluation.published=false",
        "device=cpu",
        "progress=false",
    ]
    command = [sys.executable, *(LAUNCHER if processes > 1 else []), "-m", "alignbench", *arguments]
    subprocess.run(command, check=True, timeout=600, capture_output=True, env=ENVIRONMENT)
    (checkpoint,) = folder.rglob("step_2")
    return load_file(checkpoint / "policy.safetensors") | load_file(checkpoint / "optimizer.safetensors")


def test_two_processes_and_uneven_micro_batches_give_the_same_gradients_and_weights(tmp_path: Path) -> None:
    for method in ("diffusion_nft", "flow_grpo"):
        one = launched(tmp_path / f"{method}1", 1, method, micro_batch=64)
        two = launched(tmp_path / f"{method}2", 2, method, micro_batch=7)
        assert one.keys() == two.keys()
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=0, atol=1e-9)
        moved = [name for name in one if name.endswith("exp_avg") and one[name].abs().max() > 0]
        assert moved


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
