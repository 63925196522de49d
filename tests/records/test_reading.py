import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_run import CONFIG, RUN, scripted_run

from alignbench.errors import RecordError
from alignbench.records import RunDirectory, find_runs, read_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    scripted_run(folder)
    return folder


@pytest.fixture(scope="module")
def copy(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy that an example may damage if it restores the file."""
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("copy") / "run"))


def test_finished_run_reads_whole(finished: Path) -> None:
    run = read_run(finished)
    assert run.problems == ()
    assert run.config == CONFIG
    assert run.run["schema"] == 1
    assert run.run["config_hash"] == RUN["config_hash"]
    assert run.status["status"] == "done"
    assert [row["iteration"] for row in run.metrics] == [1, 2, 3]
    assert [row["evaluation"] for row in run.evaluations] == [1, 2]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_rows_cut_at_any_byte(finished: Path, copy: Path, data: st.DataObject) -> None:
    """A torn file gives the rows before the tear, without a word: it is what a crash leaves."""
    name = data.draw(st.sampled_from(["metrics.jsonl", "evaluations.jsonl"]))
    whole = (finished / name).read_bytes()
    size = data.draw(st.integers(0, len(whole)))
    (copy / name).write_bytes(whole[:size])
    run = read_run(copy)
    (copy / name).write_bytes(whole)
    rows = run.metrics if name == "metrics.jsonl" else run.evaluations
    assert rows == [json.loads(line) for line in whole.splitlines()[: whole[:size].count(b"\n")]]
    assert run.problems == ()


FILES = ["run.json", "config.yaml", "status.json", "metrics.jsonl", "evaluations.jsonl"]
YAML_TRAPS = [b"!!int ''", b"!!timestamp x", b"&a [*a]", b"? [1]\n: 2", b"a: 2024-99-99", b"- 1", b"1: 2", b"a: .nan"]
JSON_TRAPS = [b"[" * 5_000, b'{"a": NaN}', b'{"a": ' + b"9" * 5000 + b"}", b"[]", b"null", b"\xff\xfe", b"{}{}"]


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(FILES), content=st.binary() | st.sampled_from(YAML_TRAPS + JSON_TRAPS), end=st.booleans())
def test_any_bytes_are_read_or_told(finished: Path, copy: Path, name: str, content: bytes, end: bool) -> None:
    (copy / name).write_bytes(content + b"\n" * end)
    run = read_run(copy)
    shutil.copyfile(finished / name, copy / name)
    assert all(problem.startswith(name) for problem in run.problems)
    for value in (run.run, run.config, run.status, *run.metrics, *run.evaluations):
        assert isinstance(value, dict)


@pytest.mark.parametrize("name", FILES[:3])
@pytest.mark.parametrize("trap", JSON_TRAPS[:2] + YAML_TRAPS)
def test_damaged_file_is_a_problem(copy: Path, finished: Path, name: str, trap: bytes) -> None:
    (copy / name).write_bytes(trap)
    run = read_run(copy)
    shutil.copyfile(finished / name, copy / name)
    if (name, trap) != ("config.yaml", JSON_TRAPS[1]):  # {"a": NaN} is a string to YAML
        assert len(run.problems) == 1
        assert run.problems[0].startswith(f"{name} is damaged")


def test_damaged_line_in_the_middle_is_named_and_the_others_are_kept(copy: Path, finished: Path) -> None:
    lines = (finished / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_bytes(b"".join([lines[0], lines[1][:9] + b"\n", *lines[2:]]))
    run = read_run(copy)
    shutil.copyfile(finished / "metrics.jsonl", copy / "metrics.jsonl")
    assert [row["iteration"] for row in run.metrics] == [1, 3]
    assert len(run.problems) == 1
    assert "metrics.jsonl, line 2 is damaged" in run.problems[0]


def test_empty_folder_and_folders_in_place_of_files(tmp_path: Path) -> None:
    run = read_run(tmp_path)
    assert (run.run, run.config, run.status, run.metrics, run.evaluations) == ({}, {}, {}, [], [])
    assert [problem.split()[0] for problem in run.problems] == ["run.json", "config.yaml", "status.json"]
    for name in FILES:
        (tmp_path / name).mkdir()
    assert len(read_run(tmp_path).problems) == len(FILES)


def test_another_schema_is_a_problem(tmp_path: Path) -> None:
    scripted_run(tmp_path)
    (tmp_path / "run.json").write_text('{"schema": 2}')
    assert read_run(tmp_path).problems == ("run.json has schema 2, this version reads 1",)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None)
@given(config=st.dictionaries(st.text(), json_values, max_size=4))
def test_configuration_survives_yaml(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is written reads as the same, so that opening the run again is never refused."""
    folder = tmp_path_factory.mktemp("config")
    for _ in range(2):
        RunDirectory.open(folder, config=config, run={}).close()
    assert read_run(folder).config == config


def test_find_runs(tmp_path: Path) -> None:
    for name in ("b/geneval/nft/seed1", "b/geneval/nft/seed0", "a/seed0"):
        RunDirectory.open(tmp_path / name, config=CONFIG, run=RUN).close()
    (tmp_path / "report").mkdir()
    found = [path.relative_to(tmp_path).as_posix() for path in find_runs(tmp_path)]
    assert found == ["a/seed0", "b/geneval/nft/seed0", "b/geneval/nft/seed1"]
    assert find_runs(tmp_path / "a" / "seed0") == [tmp_path / "a" / "seed0"]
    with pytest.raises(RecordError, match="is not a folder"):
        find_runs(tmp_path / "typo")
