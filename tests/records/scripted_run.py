"""A small deterministic run that records everything a real one does, and faults to interrupt it with."""

import contextlib
import errno
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from alignbench import records
from alignbench.errors import RecordError
from alignbench.records import Checkpoint, RunDirectory, read_run, strip_volatile

CONFIG = {"method": {"name": "scripted", "beta": 0.1}, "steps": [1, 2], "seed": 0}
RUN = {"experiment": "faults", "config_hash": records.config_hash(CONFIG), "threads": 1}
EVALUATED = {"protocol_hash": "c0ffee000001", "weights": "evaluation", "guidance": 1.0, "metrics": {"reward": 0.5}}
PRIMITIVES = ("_mkdir", "_open", "_write", "_fsync", "_truncate", "_replace", "_rmtree")
DONE, REFUSED, KILLED = 0, 3, -signal.SIGKILL


def scripted_run(folder: Path, tensor: Callable[[list[float]], Any] | None = None, iterations: int = 3) -> None:
    """w <- w / 2 + iteration, from w = 0; saved at every iteration, evaluated at odd ones.

    `tensor` makes the weights: torch.tensor, unless the caller has something lighter.
    """
    if tensor is None:
        import torch

        tensor = torch.tensor
    run = {**RUN, "created": time.time(), "git": {"commit": str(os.getpid())}}
    with RunDirectory.open(folder, config=CONFIG, run=run) as directory:
        checkpoint = directory.latest_checkpoint()
        directory.restore(checkpoint)
        weights, done, evaluations = tensor([0.0, 0.0]), 0, 0
        if checkpoint:
            tensors, state = directory.load_checkpoint(checkpoint)
            weights, done, evaluations = tensors["policy"]["w"], state["iteration"], state["evaluations"]
        directory.set_status("running", fraction=done / iterations)
        for iteration in range(done + 1, iterations + 1):
            weights = weights / 2 + iteration
            volatile = {"seconds": {"training": time.perf_counter()}}
            directory.append_metrics({"iteration": iteration, "w": weights[0].item(), "volatile": volatile})
            if iteration % 2:
                evaluations += 1
                scores = directory.write_scores(f"{evaluations:04}_evaluation", {"w": weights.tolist()})
                grid = directory.write_image(f"{evaluations:04}_evaluation", bytes([iteration]) * 40)
                row = {"evaluation": evaluations, "fraction": iteration / iterations, "scores": scores, "grid": grid}
                directory.append_evaluation(row | EVALUATED)
            state = {"iteration": iteration, "evaluations": evaluations}
            directory.save_checkpoint(iteration, {"policy": {"w": weights}}, state)
        directory.set_status("done", fraction=1.0)


def contents(folder: Path) -> dict[str, Any]:
    """Every file of the run but the lock, volatile fields left out."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock":
            data: Any = path.read_bytes()
            if path.suffix == ".json":
                data = strip_volatile(json.loads(data))
            elif path.suffix == ".jsonl":
                data = [strip_volatile(json.loads(line)) for line in data.splitlines()]
            found[path.relative_to(folder).as_posix()] = data
    return found


def check_nothing_is_damaged(folder: Path) -> None:
    """Whatever stands under a final name is whole: files may be missing, never broken."""
    assert [problem for problem in read_run(folder).problems if "No such file" not in problem] == []
    for checkpoint in folder.glob("checkpoints/step_*"):
        Checkpoint.verify(checkpoint)
    for scores in folder.glob("scores/*.json"):
        json.loads(scores.read_bytes())
    for image in folder.glob("images/*.png"):
        assert image.stat().st_size == 40


class Fault:
    """Counts the primitive calls and interrupts the n-th (from 1): see `kind`. fsync is counted, not made."""

    KILLS = ("killed before", "killed half way")  # killed after a call is killed before the next
    ERRORS = ("disk full half way", "disk full from then on")

    def __init__(self, at: int, kind: str) -> None:
        self.at, self.kind, self.calls = at, kind, 0

    def wrap(self, name: str, primitive: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            due = self.calls == self.at or (self.kind == "disk full from then on" and self.calls > self.at > 0)
            if due and "half way" in self.kind:
                if name == "_write":
                    primitive(arguments[0], arguments[1][: len(arguments[1]) // 2])
                elif name == "_rmtree":
                    next(arguments[0].iterdir()).unlink()
            if due and self.kind in self.KILLS:
                os.kill(os.getpid(), signal.SIGKILL)
            if due:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return None if name == "_fsync" else primitive(*arguments, **options)

        return call


@contextlib.contextmanager
def injected(fault: Fault) -> Iterator[Fault]:
    originals = {name: getattr(records, name) for name in PRIMITIVES}
    try:
        for name, primitive in originals.items():
            setattr(records, name, fault.wrap(name, primitive))
        yield fault
    finally:
        for name, primitive in originals.items():
            setattr(records, name, primitive)


def in_child(action: Callable[[], object]) -> int:
    """Run `action` in a forked process; its exit status, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            signal.alarm(60)
            action()
            status = DONE
        except RecordError:
            status = REFUSED
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
