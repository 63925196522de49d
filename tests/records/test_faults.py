"""A run that is killed, or refused space, at any write, sync or rename ends in the files of an undisturbed one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from scripted_run import CONFIG, RUN, Fault, contents, injected, scripted_run

from alignbench import records
from alignbench.errors import RecordError
from alignbench.records import RunDirectory


@pytest.mark.parametrize("kind", [*Fault.KILLS, *Fault.ERRORS, "size limit"])
def test_interrupted_at_every_call(kind: str, tmp_path: Path) -> None:
    program = Path(__file__).with_name("interrupt.py")
    environment = {**os.environ, "PYTHONPATH": str(Path(records.__file__).parents[1])}
    command = [sys.executable, str(program), kind, str(tmp_path)]
    outcome = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert outcome.returncode == 0, outcome.stderr
    if kind != "size limit":
        assert int(outcome.stdout) > 80  # calls at which the run was interrupted


def test_undisturbed_run_holds_what_was_recorded(tmp_path: Path) -> None:
    scripted_run(tmp_path)
    files = contents(tmp_path)
    # w_i = w_(i-1) / 2 + i, by hand
    assert [row["w"] for row in files["metrics.jsonl"]] == [1.0, 2.5, 4.25]
    assert [row["scores"] for row in files["evaluations.jsonl"]] == [
        "scores/0001_evaluation.json",
        "scores/0002_evaluation.json",
    ]
    assert files["scores/0002_evaluation.json"] == {"w": [4.25, 4.25]}
    assert {name.split("/")[1] for name in files if name.startswith("checkpoints/")} == {"step_2", "step_3"}
    assert files["checkpoints/step_2/state.json"] == {"iteration": 2, "evaluations": 1}
    assert files["status.json"] == {"status": "done", "message": "", "fraction": 1.0}


def test_message_of_a_full_disk_names_file_and_remedy(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path, config=CONFIG, run=RUN) as directory:
        directory.append_metrics({"iteration": 1})
        with (
            injected(Fault(at=2, kind="disk full half way")),  # open, then write
            pytest.raises(RecordError, match=r"metrics\.jsonl: the disk is full.*free some space.*same command again"),
        ):
            directory.append_metrics({"iteration": 2})
        directory.append_metrics({"iteration": 2})  # the half row is gone: once there is space, it goes on
    assert (tmp_path / "metrics.jsonl").read_text() == '{"iteration": 1}\n{"iteration": 2}\n'


def test_ctrl_c_in_the_middle_of_a_row_leaves_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    with RunDirectory.open(tmp_path, config=CONFIG, run=RUN) as directory:
        directory.append_metrics({"iteration": 1})
        with monkeypatch.context() as patch:
            patch.setattr("alignbench.records._fsync", interrupt)
            with pytest.raises(KeyboardInterrupt):
                directory.append_metrics({"iteration": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"iteration": 1}\n'


def test_finished_run_is_not_changed_by_opening_it_again(tmp_path: Path) -> None:
    scripted_run(tmp_path)
    files = contents(tmp_path)
    scripted_run(tmp_path)
    assert contents(tmp_path) == files
