"""python interrupt.py KIND FOLDER: interrupts the scripted run at every primitive call in turn, and resumes it.

A program of its own, because it forks hundreds of times and a process that has loaded torch forks slowly. Weights are
NumPy arrays here, in the same safetensors files.
"""

import random
import resource
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import safetensors.numpy
from scripted_run import (
    DONE,
    KILLED,
    REFUSED,
    Fault,
    check_nothing_is_damaged,
    contents,
    in_child,
    injected,
    scripted_run,
)


class Array(np.ndarray):
    """The part of torch.Tensor that saving uses."""

    def detach(self) -> "Array":
        return self

    cpu = contiguous = detach


def array(values: list[float]) -> Array:
    return np.array(values, dtype=np.float32).view(Array)


def load(data: bytes) -> dict[str, Array]:
    return {name: value.view(Array) for name, value in safetensors.numpy.load(data).items()}


def run_with(fault: Fault, folder: Path, size_limit: int | None = None) -> int:
    def action() -> None:
        if size_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size_limit, resource.RLIM_INFINITY))
        with injected(fault):
            scripted_run(folder, array)

    status = in_child(action)
    check_nothing_is_damaged(folder)
    return status


def interrupt(kind: str, root: Path) -> None:
    with injected(Fault(0, kind)) as counter:
        scripted_run(root / "undisturbed", array)
    expected = contents(root / "undisturbed")
    if kind == "size limit":
        # 64 bytes hold no file of the run but an image; 1,000 hold each of them
        outcomes = [run_with(Fault(0, kind), root / f"{limit}", limit) for limit in range(0, 1000, 20)]
        assert outcomes[3] == REFUSED, outcomes
        assert outcomes[-1] == DONE, outcomes
        assert set(outcomes) == {REFUSED, DONE}, outcomes
        for limit in range(0, 1000, 20):
            resumed(root / f"{limit}", expected)
        return
    for at in range(1, counter.calls + 1):
        folder = root / f"{at}"
        status = run_with(Fault(at, kind), folder)
        assert status == (KILLED if kind in Fault.KILLS else REFUSED), f"call {at} ended with {status}"
        if kind == "killed half way":  # and the run that resumes is killed in its turn, somewhere
            second = random.Random(at).randrange(1, 50)
            status = run_with(Fault(second, kind), folder)
            assert status in (KILLED, DONE), f"call {at}, then {second}, ended with {status}"
        resumed(folder, expected)
    assert run_with(Fault(counter.calls + 1, kind), root / "whole") == DONE
    print(counter.calls)


def resumed(folder: Path, expected: dict[str, Any]) -> None:
    status = run_with(Fault(0, "none"), folder)
    assert status == DONE, f"resuming {folder} ended with {status}"
    found = contents(folder)
    differing = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    assert not differing, f"{folder}: {differing}"
    shutil.rmtree(folder)


if __name__ == "__main__":
    light = ModuleType("safetensors.torch")
    vars(light).update(save=safetensors.numpy.save, load=load)
    sys.modules["safetensors.torch"] = light
    interrupt(sys.argv[1], Path(sys.argv[2]))
