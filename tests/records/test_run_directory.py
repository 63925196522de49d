import errno
import fcntl
import hashlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scripted_run import CONFIG, DONE, KILLED, RUN, contents, in_child, scripted_run

from alignbench import records
from alignbench.errors import CheckpointError, LockedError, RecordError
from alignbench.records import RunDirectory, atomic_write, config_hash, strip_volatile


def opened(folder: Path, config: dict[str, Any] = CONFIG, run: dict[str, Any] = RUN) -> RunDirectory:
    return RunDirectory.open(folder, config=config, run=run)


# Opening


def test_another_configuration_is_refused_key_by_key(tmp_path: Path) -> None:
    opened(tmp_path).close()
    other = {"method": {"name": "scripted", "beta": 1.0, "clip": None}, "steps": [1, 3]}
    with pytest.raises(RecordError) as caught:
        opened(tmp_path, config=other)
    assert str(caught.value).splitlines()[1:-1] == [
        "  method.beta: 0.1 -> 1.0",
        "  steps: [1, 2] -> [1, 3]",
        "  seed: 0 -> (absent)",
        "  method.clip: (absent) -> null",
    ]
    opened(tmp_path).close()  # the refusal changed nothing and released the lock


def test_another_protocol_is_refused_and_another_environment_told(tmp_path: Path) -> None:
    first = {**RUN, "protocol_hash": "aaaa", "git": {"commit": "1"}, "created": "monday"}
    opened(tmp_path, run=first).close()
    with pytest.raises(RecordError, match='protocol_hash: "aaaa" -> "bbbb"'):
        opened(tmp_path, run={**first, "protocol_hash": "bbbb"})
    with opened(tmp_path, run={**first, "git": {"commit": "2"}, "created": "tuesday", "threads": 2}) as directory:
        assert sorted(directory.changes) == ['git.commit: "1" -> "2"', "threads: 1 -> 2"]
    assert records.read_run(tmp_path).run == {"schema": 1, **first}


def test_an_integer_is_not_a_float_nor_a_boolean_an_integer(tmp_path: Path) -> None:
    opened(tmp_path, config={"a": 1, "b": True}).close()
    with pytest.raises(RecordError, match=r"a: 1 -> 1\.0\n  b: true -> 1"):
        opened(tmp_path, config={"a": 1.0, "b": 1})


def test_path_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for folder in (tmp_path / "file", tmp_path / "file" / "run" / "seed0"):
        with pytest.raises(RecordError, match=r"cannot write .*file.*choose a results folder"):
            opened(folder)
    assert (tmp_path / "file").read_text() == "kept"


def test_read_only_folder_is_refused() -> None:
    def as_ordinary_user(folder: Path) -> None:
        with (folder / "message").open("w") as file:
            if os.geteuid() == 0:
                os.setuid(65534)  # nobody: root may write everywhere
            with pytest.raises(RecordError) as caught:
                opened(folder / "locked" / "run")
            file.write(str(caught.value))

    with tempfile.TemporaryDirectory() as name:  # not below tmp_path, which is closed to other users
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "locked").mkdir(mode=0o555)
        assert in_child(lambda: as_ordinary_user(folder)) == DONE
        message = (folder / "message").read_text()
    assert re.search(r"cannot write .*locked/run: Permission denied; .*choose a results folder", message)


def test_read_only_file_system_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(records, "_mkdir", refuse)
    with pytest.raises(RecordError, match=r"Read-only file system.*choose a results folder"):
        opened(tmp_path / "run")


def test_too_little_space_is_refused_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10 * 2**20))
    with pytest.raises(RecordError, match=r"10 MB free, a run needs at least 256 MB"):
        opened(tmp_path)
    RunDirectory.open(tmp_path, config=CONFIG, run=RUN, minimum_free_bytes=10 * 2**20).close()


def test_the_lock_names_its_writer_and_goes_with_the_process(tmp_path: Path) -> None:
    assert records.writer(tmp_path) is None
    with opened(tmp_path):
        assert records.writer(tmp_path) == f"process {os.getpid()}"
        (tmp_path / ".lock").write_text("12 elsewhere\n")
        assert records.writer(tmp_path) == "process 12 on elsewhere"
        with pytest.raises(LockedError) as caught:
            opened(tmp_path)
        assert (caught.value.folder, caught.value.writer) == (tmp_path, "process 12 on elsewhere")
    assert records.writer(tmp_path) is None

    def die_with_the_lock() -> None:
        opened(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die_with_the_lock) == KILLED
    assert records.writer(tmp_path) is None  # although the file still names a process
    opened(tmp_path).close()


def test_looking_at_the_lock_keeps_no_writer_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(tmp_path).close()
    look = os.open(tmp_path / ".lock", os.O_RDONLY)
    fcntl.flock(look, fcntl.LOCK_SH)
    monkeypatch.setattr("time.sleep", lambda seconds: seconds and fcntl.flock(look, fcntl.LOCK_UN))
    opened(tmp_path).close()
    os.close(look)


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    before = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", refuse)
        with pytest.raises(RecordError, match=r"file system without locks \(No locks available\).*mount it with flock"):
            opened(tmp_path)
        assert records.writer(tmp_path) is None
    assert len(os.listdir("/proc/self/fd")) == before
    opened(tmp_path).close()


def test_two_writers_are_refused(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(RecordError, match=f"being written by process {os.getpid()}:"):
        opened(tmp_path)
    with opened(tmp_path):

        def second_process() -> None:
            with pytest.raises(RecordError, match=f"being written by process {os.getppid()}:"):
                opened(tmp_path)

        assert in_child(second_process) == DONE


def test_lock_of_a_dead_process_does_not_block(tmp_path: Path) -> None:
    def die_with_the_lock() -> None:
        opened(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(die_with_the_lock) == KILLED
    opened(tmp_path).close()


def test_files_of_something_else_are_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(RecordError, match=r"metrics\.jsonl but no config\.yaml"):
        opened(tmp_path)


@pytest.mark.parametrize("name", ["config.yaml", "run.json"])
def test_damaged_identity_is_refused(tmp_path: Path, name: str) -> None:
    opened(tmp_path).close()
    (tmp_path / name).write_text("{")
    with pytest.raises(RecordError, match=rf"{name} cannot be read .* restore it, or move"):
        opened(tmp_path)


# Rows


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_row_with_a_number_that_is_not_finite_is_refused(tmp_path: Path, value: float) -> None:
    with opened(tmp_path) as directory:
        with pytest.raises(RecordError, match=rf"metrics\.jsonl: ledger\.phases\[1\]\.flops is {value}"):
            directory.append_metrics({"iteration": 1, "ledger": {"phases": [{}, {"flops": value}]}})
        assert not (tmp_path / "metrics.jsonl").exists()


def test_row_with_a_tensor_or_a_key_that_is_no_string_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as directory:
        with pytest.raises(RecordError, match="loss is a Tensor; convert it"):
            directory.append_metrics({"loss": torch.zeros(())})
        with pytest.raises(RecordError, match="metrics has the key 3; keys must be strings"):
            directory.append_evaluation({"metrics": {3: 0.5}})


def test_torn_last_line_is_cut_off_before_appending(tmp_path: Path) -> None:
    with opened(tmp_path) as directory:
        directory.append_metrics({"iteration": 1, "text": "a\nb\u2028c"})
        with (tmp_path / "metrics.jsonl").open("ab") as file:
            file.write(b'{"iteration": 2, "loss": 0.123456789012345678901234567890')
        directory.append_metrics({"iteration": 2})
    rows = [{"iteration": 1, "text": "a\nb\u2028c"}, {"iteration": 2}]
    assert records.read_run(tmp_path).metrics == rows


def test_order_of_keys_is_kept(tmp_path: Path) -> None:
    with opened(tmp_path) as directory:
        directory.append_metrics({"z": 1, "a": 0.1})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"z": 1, "a": 0.1}\n'


def test_names_of_attachments_cannot_leave_the_run(tmp_path: Path) -> None:
    with opened(tmp_path) as directory:
        for name in ("../x", "a/b", ".hidden", ""):
            with pytest.raises(RecordError, match="cannot name a file"):
                directory.write_scores(name, {})
        assert directory.write_image("0002_evaluation_g1.5", b"png") == "images/0002_evaluation_g1.5.png"


# Checkpoints


def test_checkpoint_returns_what_was_saved(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(4, 3, generator=generator).T  # not contiguous
    tensors = {
        "policy": {"w": columns.to(torch.bfloat16), "b": torch.randn(2, generator=generator, requires_grad=True)},
        "optimizer": {"step": torch.tensor(2**40), "moment": columns.double()},
        "method": {},
    }
    state = {"iteration": 7, "clock": {"flops": 1.2e13}, "name": None}
    with opened(tmp_path) as directory:
        directory.save_checkpoint(7, tensors, state)
        checkpoint = directory.latest_checkpoint()
        assert checkpoint is not None
        assert (checkpoint.step, checkpoint.metrics_rows, checkpoint.evaluations_rows) == (7, 0, 0)
        loaded, loaded_state = directory.load_checkpoint(checkpoint)
    assert loaded_state == state
    assert {key: set(group) for key, group in loaded.items()} == {key: set(group) for key, group in tensors.items()}
    for key, group in tensors.items():
        for name, tensor in group.items():
            torch.testing.assert_close(loaded[key][name], tensor.detach(), rtol=0, atol=0)


def test_bad_state_leaves_no_trace(tmp_path: Path) -> None:
    with opened(tmp_path) as directory:
        with pytest.raises(RecordError, match=r"state\.json: loss is nan"):
            directory.save_checkpoint(1, {}, {"loss": math.nan})
        assert list((tmp_path / "checkpoints").iterdir()) == []


def truncate(folder: Path) -> None:
    with (folder / "policy.safetensors").open("rb+") as file:
        file.truncate(60)


def flip_a_bit(folder: Path) -> None:
    data = bytearray((folder / "policy.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "policy.safetensors").write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "has 60 bytes, expected": truncate,
    "does not have the SHA-256": flip_a_bit,
    r"policy\.safetensors is missing": lambda folder: (folder / "policy.safetensors").unlink(),
    "COMPLETE is missing": lambda folder: (folder / "COMPLETE").unlink(),
    "unreadable marker": lambda folder: (folder / "COMPLETE").write_text('{"step": 3}'),
    "unreadable marker or file": lambda folder: (folder / "COMPLETE").write_text('{"files": []}'),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_checkpoint_is_passed_over(tmp_path: Path, message: str) -> None:
    scripted_run(tmp_path)
    files = contents(tmp_path)
    DAMAGES[message](tmp_path / "checkpoints" / "step_3")
    with opened(tmp_path) as directory:
        checkpoint = directory.latest_checkpoint()
        assert checkpoint is not None
        assert (checkpoint.step, checkpoint.metrics_rows, checkpoint.evaluations_rows) == (2, 2, 1)
        (problem,) = directory.problems
        assert "step_3" in problem
        assert re.search(message, problem)
    scripted_run(tmp_path)
    assert contents(tmp_path) == files


def test_all_checkpoints_damaged_starts_over(tmp_path: Path) -> None:
    scripted_run(tmp_path)
    files = contents(tmp_path)
    for step in (2, 3):
        truncate(tmp_path / "checkpoints" / f"step_{step}")
    scripted_run(tmp_path)
    assert contents(tmp_path) == files


def test_checkpoint_whose_rows_were_lost_is_passed_over(tmp_path: Path) -> None:
    scripted_run(tmp_path)
    files = contents(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[2] = b"\0" * 20 + b"\n"
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(lines))
    with opened(tmp_path) as directory:
        checkpoint = directory.latest_checkpoint()
        assert checkpoint is not None
        assert checkpoint.step == 2
        assert "step_3 follows 3 rows of metrics.jsonl" in directory.problems[0]
    scripted_run(tmp_path)
    assert contents(tmp_path) == files


def test_restore_returns_the_rows_it_cuts_off(tmp_path: Path) -> None:
    scripted_run(tmp_path)
    with opened(tmp_path) as directory:
        shutil.rmtree(tmp_path / "checkpoints" / "step_3")
        cut = directory.restore(directory.latest_checkpoint())
    assert [row["iteration"] for row in cut["metrics.jsonl"]] == [3]
    assert [row["evaluation"] for row in cut["evaluations.jsonl"]] == [2]
    assert [row["iteration"] for row in records.read_run(tmp_path).metrics] == [1, 2]


def test_checkpoint_damaged_after_it_was_found_is_not_loaded(tmp_path: Path) -> None:
    scripted_run(tmp_path)
    with opened(tmp_path) as directory:
        checkpoint = directory.latest_checkpoint()
        assert checkpoint is not None
        truncate(checkpoint.folder)
        with pytest.raises(CheckpointError, match="step_3 cannot be loaded"):
            directory.load_checkpoint(checkpoint)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    with opened(tmp_path) as directory:
        for value in (1.0, 2.0):
            directory.save_checkpoint(3, {"policy": {"w": torch.tensor(value)}}, {})
        checkpoint = directory.latest_checkpoint()
        assert checkpoint is not None
        assert directory.load_checkpoint(checkpoint)[0]["policy"]["w"].item() == 2.0


# Artifacts


def test_artifact_is_written_once_and_found_again(tmp_path: Path) -> None:
    tensors = {"winner": torch.arange(6.0).reshape(2, 3).T, "text": torch.tensor([104, 105], dtype=torch.uint8)}
    with opened(tmp_path) as directory:
        path = directory.write_artifact("pairs", tensors)
        written = (tmp_path / path).stat().st_mtime_ns
        assert directory.write_artifact("pairs", tensors) == path
        assert (tmp_path / path).stat().st_mtime_ns == written
        assert directory.write_artifact("pairs", {"winner": torch.zeros(1)}) != path
    digest = hashlib.sha256((tmp_path / path).read_bytes()).hexdigest()
    assert path == f"artifacts/pairs-{digest}.safetensors"
    loaded = RunDirectory.load_artifact(tmp_path, path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(loaded[name], tensor, rtol=0, atol=0)


def test_artifact_that_is_missing_or_has_changed_is_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as directory:
        path = directory.write_artifact("pairs", {"winner": torch.zeros(3)})
    data = bytearray((tmp_path / path).read_bytes())
    data[-1] ^= 1
    (tmp_path / path).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"has changed: its SHA-256 .* restore the file, or delete"):
        RunDirectory.load_artifact(tmp_path, path)
    (tmp_path / path).unlink()
    with pytest.raises(CheckpointError, match=r"pairs-\w+\.safetensors is missing, .* restore the file, or delete"):
        RunDirectory.load_artifact(tmp_path, path)


def test_artifacts_stay_as_long_as_a_checkpoint_names_them(tmp_path: Path) -> None:
    with opened(tmp_path) as directory:
        paths = []
        for step in range(4):
            paths.append(directory.write_artifact("pairs", {"winner": torch.full((2,), float(step))}))
            directory.save_checkpoint(step, {}, {"artifact": paths[-1]})
            directory.prune_artifacts()
        (tmp_path / "checkpoints" / "step_2" / "state.json").unlink()  # damaged: it names nothing any more
        left = {f"artifacts/{path.name}" for path in (tmp_path / "artifacts").iterdir()}
        assert left == {paths[2], paths[3]}
        directory.prune_artifacts()
        assert [path.name for path in (tmp_path / "artifacts").iterdir()] == [Path(paths[3]).name]


# Small parts


def test_atomic_write_keeps_the_old_content_on_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "status.json"
    atomic_write(path, "old")

    def refuse(*_: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    for primitive in ("_open", "_write", "_fsync", "_replace"):
        with monkeypatch.context() as patch:
            patch.setattr(records, primitive, refuse)
            with pytest.raises(RecordError, match=r"status\.json.*quota is used up"):
                atomic_write(path, "new")
        assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("status.json", "old")]


def test_files_are_readable_by_others_as_the_umask_says(tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        atomic_write(tmp_path / "a", b"")
    finally:
        os.umask(previous)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_config_hash() -> None:
    # printf '{"a":{"b":[1,2.5]},"c":null}' | sha256sum
    assert config_hash({"c": None, "a": {"b": (1, 2.5)}}) == "d90f04692c13"
    assert config_hash({"a": 1}) != config_hash({"a": 1.0})


def test_strip_volatile_at_any_depth() -> None:
    row = {"loss": 1, "volatile": {"seconds": 2}, "ledger": {"flops": 3, "updated": 4}, "rows": [{"git": 5, "a": 6}]}
    assert strip_volatile(row) == {"loss": 1, "ledger": {"flops": 3}, "rows": [{"a": 6}]}
    assert row["volatile"] == {"seconds": 2}


def test_importing_records_does_not_import_torch() -> None:
    code = "import sys, alignbench.records; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(records.__file__).parents[1])
