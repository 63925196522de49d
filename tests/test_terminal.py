"""A terminal that is closed, full, plain or hostile ends nothing."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignbench.records import read_run
from alignbench.terminal import Lasting, lasting, printable, unwritten
from tests.conftest import Compose
from tests.report.synthetic import write_run

PLAN = "alignbench dry_run=true plan.flops_per_second=1e9"
SETTINGS = "alignbench --cfg job"  # the same way out, without torch
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # otherwise Python makes it UTF-8


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command of the shell in which `run` stands for the interpreter; its status is that of the first that failed."""
    script = f'set -o pipefail; run() {{ "{sys.executable}" -m "$@"; }}; {command}'
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, timeout=600, env=os.environ | environment
    )
    assert "Traceback" not in done.stderr, done.stderr
    assert "Error" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize("reader", ["head -1", "true"])
@pytest.mark.parametrize("command", [SETTINGS, "alignbench.status --help", "alignbench.status RESULTS"])
def test_a_reader_that_leaves_ends_nothing(tmp_path: Path, command: str, reader: str) -> None:
    write_run(tmp_path, grids=False)
    done = shell(f"run {command.replace('RESULTS', str(tmp_path))} | {reader}")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("where", ["> /dev/full", ">&-", "2> /dev/full", "2>&-", "> /dev/full 2>&1"])
def test_a_command_needs_no_terminal(where: str) -> None:
    assert shell(f"run {SETTINGS} {where}").returncode == 0


def test_a_plan_of_which_one_line_is_read() -> None:
    done = shell(f"run {PLAN} | head -1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "diffusion_nft on geneval" in done.stdout


@pytest.mark.parametrize("where", ["2> /dev/full", ">&- 2>&-", "2>&1 | true"])
def test_a_message_that_nobody_sees_keeps_its_exit_status(where: str) -> None:
    assert shell(f"run alignbench.status /nowhere {where}").returncode == 1
    assert shell(f"run alignbench method=nothing {where}").returncode == 1


def test_a_status_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    write_run(tmp_path, grids=False)
    done = shell(f"run alignbench.status {tmp_path} > /dev/full")
    assert (done.returncode, done.stderr) == (1, "error: the output cannot be written: No space left on device\n")


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, ASCII])
def test_a_report_on_a_terminal_without_a_minus_sign(tmp_path: Path, environment: dict[str, str]) -> None:
    write_run(tmp_path / "results", until=0.1, grids=False)
    command = f"run alignbench.report {tmp_path / 'results'} --output {tmp_path}"
    plain = shell(f"{command}/plain", **environment)
    assert plain.returncode == 0
    assert plain.stdout.isascii()
    assert "- base (final)" in plain.stdout
    assert "?" not in plain.stdout.replace("?\n", "")  # the question of the answer's heading
    assert shell(f"{command}/full > /dev/full").returncode == 0
    pages = [(tmp_path / name / "index.html").read_bytes() for name in ("plain", "full")]
    assert pages[0] == pages[1]


@pytest.mark.parametrize("columns", ["1", "nonsense"])
def test_a_narrow_terminal(tmp_path: Path, columns: str) -> None:
    write_run(tmp_path, status="failed", message="a long message " * 20, grids=False)
    assert shell(f"run alignbench.status {tmp_path}", COLUMNS=columns, PYTHONIOENCODING="ascii").returncode == 0


def test_training_goes_on_when_the_terminal_is_gone(
    tiny_run: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, with a pipe that nobody reads and a full device as its streams."""
    from alignbench.run import run

    config = tiny_run("progress=true")
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as pipe, open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", pipe)
        monkeypatch.setattr(sys, "stderr", full)
        with lasting():
            folder = run(config)
    assert read_run(folder).status["status"] == "done"


def test_what_an_encoding_lacks_is_written_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "terminal"
    with file.open("w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with lasting():
            print("−0.5 ± 0.1 ≥ 3 \N{MULTIPLICATION SIGN} é \ud800", end="")
            assert unwritten() is None
        assert sys.stdout is stream
    assert file.read_text() == "-0.5 +/- 0.1 >= 3 x ? ?"


def test_names_and_messages_send_nothing_to_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attack = "a\x1b]0;title\x07b\x1b[2Jc\x9b1;1Hd\x00\x7f\x08e\tf"
    assert printable(attack + "\x1b[31mred") == "abc1;1Hde\tfred"
    file = tmp_path / "terminal"
    with file.open("w", encoding="utf-8") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with lasting():
            print(f"\r\x1b[1;31mcolour\x1b[0m {attack}", end="")
    assert file.read_bytes() == b"\r\x1b[1;31mcolour\x1b[0m abc1;1Hde\tf"


def test_streams_without_a_descriptor_and_streams_that_last_already_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = io.StringIO()
    monkeypatch.setattr(sys, "stdout", memory)
    monkeypatch.setattr(sys, "stderr", None)
    with lasting():
        assert sys.stdout is memory
        print("to nowhere", file=sys.stderr)
    assert sys.stderr is None
    with open(os.devnull, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with lasting():
            first = sys.stdout
            assert isinstance(first, Lasting)
            with lasting():
                assert sys.stdout is first
            assert sys.stdout is first
