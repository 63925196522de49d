"""Records that were changed, copied, lost or put in place of something else: told, and nothing of a user's is lost."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_run import CONFIG, RUN, contents, scripted_run

from alignbench import record_fields
from alignbench.errors import RecordError
from alignbench.records import RunDirectory, missing_files, read_run, rebuild_status, writer

NAMES = [*record_fields.METRICS, *record_fields.EVALUATION, "prompt_ids", "tags", "status", "nfe", "phases"]


def opened(folder: Path, run: dict[str, Any] = RUN) -> RunDirectory:
    return RunDirectory.open(folder, config=CONFIG, run=run)


def write_rows(folder: Path) -> None:
    with opened(folder) as directory:
        directory.append_metrics({"iteration": 1})
        directory.append_evaluation({"evaluation": 1})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A scripted run that ended after its third iteration: 3 rows of metrics, 2 of evaluations."""
    scripted_run(tmp_path / "run")
    return tmp_path / "run"


# Rows


def edited(lines: list[bytes]) -> list[bytes]:
    return [lines[0], lines[1].replace(b"2.5", b"2.6"), lines[2]]


REARRANGED: dict[str, tuple[Callable[[list[bytes]], list[bytes]], int]] = {  # name: (change, the first other line)
    "doubled": (lambda lines: [lines[0], lines[0], *lines[1:]], 2),
    "swapped": (lambda lines: [lines[1], lines[0], lines[2]], 1),
    "edited": (edited, 2),
    "left out": (lambda lines: [lines[0], lines[2], lines[2]], 2),
}


@pytest.mark.parametrize("name", REARRANGED)
def test_rows_that_are_not_those_of_the_run_are_found_at_the_start(run: Path, name: str) -> None:
    change, line = REARRANGED[name]
    file = run / "metrics.jsonl"
    before = file.read_bytes()
    file.write_bytes(b"".join(change(before.splitlines(keepends=True))))
    told = f"metrics.jsonl, line {line} is not the row that step_3 was saved after"
    assert read_run(run).problems == (told,)
    with opened(run) as directory, pytest.raises(RecordError, match=f"{told}.*Put the file back as it was; or delete"):
        directory.latest_checkpoint()
    assert (run / "checkpoints" / "step_3" / "COMPLETE").exists()  # nothing was thrown away
    file.write_bytes(before)
    with opened(run) as directory:
        assert directory.latest_checkpoint() is not None


def test_the_rows_of_another_run_are_found(run: Path) -> None:
    rows = (run / "evaluations.jsonl").read_text()
    (run / "evaluations.jsonl").write_text(rows.replace("0.5", "0.25"))
    with opened(run) as directory, pytest.raises(RecordError, match=r"evaluations\.jsonl, line 1 is not the row"):
        directory.latest_checkpoint()


def test_deleting_the_lines_that_are_told_lets_the_run_go_on_to_the_same_records(run: Path) -> None:
    expected = contents(run)
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:2]))  # step_2 is whole
    scripted_run(run)
    assert contents(run) == expected


def test_times_do_not_identify_a_row(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["volatile"]["seconds"]["training"] += 1.0
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_run(run).problems == ()


def test_a_checkpoint_of_an_earlier_version_continues(run: Path) -> None:
    expected = contents(run)
    for marker in (run / "checkpoints").glob("*/COMPLETE"):
        content = json.loads(marker.read_text())
        del content["run"], content["row_hashes"]
        marker.write_text(json.dumps(content))
    with opened(run) as directory:
        checkpoint = directory.latest_checkpoint()
        assert checkpoint is not None
        assert (checkpoint.step, directory.problems) == (3, [])
    shutil.rmtree(run / "checkpoints" / "step_3")
    scripted_run(run)
    found = contents(run)
    assert {name: found[name] for name in found if "checkpoints" not in name} == {
        name: expected[name] for name in expected if "checkpoints" not in name
    }


# Checkpoints


def test_a_copied_checkpoint_is_told_from_the_one_that_it_is_a_copy_of(run: Path) -> None:
    shutil.copytree(run / "checkpoints" / "step_2", run / "checkpoints" / "step_9")
    with opened(run) as directory:
        checkpoint = directory.latest_checkpoint()
        assert checkpoint is not None
        assert checkpoint.step == 3
        assert "step_9 is a copy of step_2, as its marker says" in directory.problems[0]


def test_a_checkpoint_of_another_run_is_passed_over(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    scripted_run(other)
    content = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps(content | {"seed": 7}))
    shutil.rmtree(other / "checkpoints")
    with RunDirectory.open(other, config=CONFIG, run=RUN | {"seed": 7}) as directory:
        directory.save_checkpoint(3, {"policy": {"w": torch.zeros(2)}}, {})
    shutil.rmtree(run / "checkpoints" / "step_3")
    shutil.copytree(other / "checkpoints" / "step_3", run / "checkpoints" / "step_3")
    with opened(run) as directory:
        checkpoint = directory.latest_checkpoint()
        assert checkpoint is not None
        assert checkpoint.step == 2
        assert "step_3 is a checkpoint of another run" in directory.problems[0]


def test_a_marker_without_files_is_passed_over(run: Path) -> None:
    marker = run / "checkpoints" / "step_3" / "COMPLETE"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"files": {}}))
    with opened(run) as directory:
        checkpoint = directory.latest_checkpoint()
        assert checkpoint is not None
        assert checkpoint.step == 2
        assert "a marker that does not list policy.safetensors, state.json" in directory.problems[0]


# Status and files that rows name


@pytest.mark.parametrize("content", [None, b"{", b"[]", b'{"status": "happy"}', b'{"status": "done", "fraction": "1"}'])
def test_a_lost_status_is_told_by_the_rows_and_written_again(tmp_path: Path, content: bytes | None) -> None:
    with opened(tmp_path) as directory:
        directory.append_metrics({"iteration": 1, "fraction": 0.5})
        directory.set_status("running", fraction=0.5)
        (tmp_path / "status.json").unlink()
        if content is not None:
            (tmp_path / "status.json").write_bytes(content)
        assert directory.status["status"] == "interrupted"
        assert directory.status["fraction"] == 0.5
        row = {"evaluation": 0, "fraction": 1.0, "protocol_hash": "a", "guidance": 1.0, "metrics": {}}
        directory.append_evaluation(row | {"weights": "current"})
        directory.append_metrics({"iteration": 2, "fraction": 1.0})
        assert directory.status == {"status": "done", "message": "", "fraction": 1.0}
    assert rebuild_status(tmp_path)
    assert json.loads((tmp_path / "status.json").read_text())["status"] == "done"
    assert not rebuild_status(tmp_path)


def test_scores_and_pictures_that_are_gone_are_named(run: Path) -> None:
    assert missing_files(read_run(run)) == []
    (run / "scores" / "0001_evaluation.json").unlink()
    (run / "images" / "0002_evaluation.png").unlink()
    assert missing_files(read_run(run)) == ["scores/0001_evaluation.json", "images/0002_evaluation.png"]


# Links, pipes and other people's files


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "evaluations.jsonl"])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str) -> None:
    mine, folder = tmp_path / "mine.txt", tmp_path / "run"
    mine.write_text("a thousand words\n")
    opened(folder).close()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(mine)
    with pytest.raises(RecordError, match=rf"{name}: it is a link, .*remove the link"):
        write_rows(folder)
    assert mine.read_text() == "a thousand words\n"
    assert writer(folder) is None


def test_attachments_and_status_replace_a_link_and_leave_what_it_leads_to(tmp_path: Path) -> None:
    mine, folder = tmp_path / "mine.png", tmp_path / "run"
    mine.write_bytes(b"my picture")
    with opened(folder) as directory:
        for name in ("images/0000.png", "scores/0000.json", "status.json"):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).symlink_to(mine)
        directory.write_image("0000", b"png")
        directory.write_scores("0000", {})
        directory.set_status("running")
    assert mine.read_bytes() == b"my picture"
    assert (folder / "images" / "0000.png").read_bytes() == b"png"


def test_a_linked_folder_is_unlinked_not_emptied(run: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    shutil.move(run / "checkpoints" / "step_3", kept)
    (run / "checkpoints" / "step_3").symlink_to(kept)
    (run / ".scores.building").symlink_to(kept)
    with opened(run) as directory:
        directory.save_checkpoint(3, {"policy": {"w": torch.zeros(2)}}, {})
    assert (kept / "policy.safetensors").exists()
    assert not (run / "checkpoints" / "step_3").is_symlink()


def test_hidden_files_and_artifacts_of_a_user_stay(run: Path) -> None:
    (run / "artifacts").mkdir()
    for name in (".notes.tmp", ".old.building.txt", "artifacts/mine.safetensors"):
        (run / name).write_text("mine")
    with opened(run) as directory:
        directory.prune_artifacts()
    assert all((run / name).exists() for name in (".notes.tmp", ".old.building.txt", "artifacts/mine.safetensors"))


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "status.json", "metrics.jsonl", "evaluations.jsonl"])
def test_a_pipe_in_place_of_a_file_is_refused_at_once(run: Path, name: str) -> None:
    (run / name).unlink()
    os.mkfifo(run / name)
    assert any(
        problem.startswith(f"{name} cannot be read (it is no regular file") for problem in read_run(run).problems
    )
    if name != "status.json":
        with pytest.raises(RecordError, match=rf"{name}.*(it is no regular file|it is a pipe, no file; .*remove it)"):
            write_rows(run)


def test_a_pipe_in_a_checkpoint_is_passed_over(run: Path) -> None:
    for step, name in ((3, "COMPLETE"), (2, "policy.safetensors")):
        (run / "checkpoints" / f"step_{step}" / name).unlink()
        os.mkfifo(run / "checkpoints" / f"step_{step}" / name)
    with opened(run) as directory:
        assert directory.latest_checkpoint() is None
        assert len(directory.problems) == 2


# Types


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("metrics.jsonl", {"iteration": "2"}, "line 2: iteration is '2', expected a whole number"),
        ("metrics.jsonl", {"iteration": True}, "line 2: iteration is True, expected a whole number"),
        ("metrics.jsonl", {"iteration": None}, "line 2: iteration is None, expected a whole number"),
        ("metrics.jsonl", {"reward": [1]}, "line 2: reward is [1], expected a finite number"),
        ("metrics.jsonl", {"volatile": 3}, "line 2: volatile is 3, expected an object"),
        ("metrics.jsonl", {"ledger": {"nfe": "many"}}, "line 2: ledger.nfe is 'many', expected a finite number"),
        ("evaluations.jsonl", {"metrics": []}, "line 2: metrics is [], expected an object"),
        ("evaluations.jsonl", {"guidance": "one"}, "line 2: guidance is 'one', expected a finite number"),
        ("evaluations.jsonl", {"metrics": {"reward": None}}, "line 2: metrics.reward is None, expected a finite"),
        ("evaluations.jsonl", {"grid": "../../mine.png"}, "line 2: grid is '../../mine.png', expected images/"),
        ("run.json", {"seed": "0"}, "is damaged (seed is '0', expected a whole number)"),
        ("run.json", {"inputs": {"prompts": 1}}, "is damaged (inputs.prompts is 1, expected text)"),
        ("status.json", {"volatile": {"wasted_nfe": "3"}}, "is damaged (volatile.wasted_nfe is '3', expected a whole"),
    ],
)
def test_a_value_of_another_type_is_a_problem(run: Path, name: str, change: dict[str, Any], told: str) -> None:
    text = (run / name).read_text()
    if name.endswith("l"):
        lines = text.splitlines()
        lines[1] = json.dumps(json.loads(lines[1]) | change)
        text = "\n".join(lines)
    else:
        text = json.dumps(json.loads(text) | change)
    (run / name).write_text(text + "\n")
    problems = [problem for problem in read_run(run).problems if "is not the row" not in problem]
    assert len(problems) == 1
    assert problems[0].startswith(name)
    assert told in problems[0]


def test_a_missing_field_is_a_problem(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    del lines[1]["metrics"]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "evaluations.jsonl, line 2: it has no 'metrics'" in read_run(run).problems


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(row=st.dictionaries(st.sampled_from(NAMES) | st.text(), json_values, max_size=8), images=st.integers(0, 4))
def test_any_object_is_told_in_words_or_accepted(row: dict[str, Any], images: int) -> None:
    for kind in record_fields.REQUIRED:
        told = record_fields.wrong(kind, row)
        assert told is None or isinstance(told, str)
    if record_fields.wrong_scores(row, images) is None:
        assert all(math.isfinite(mean) for mean in record_fields.tag_means(row).values()) or not images
    assert record_fields.wrong_cost(row) is not None or len(row) == 5


# Inputs


def test_other_inputs_are_refused_by_name_and_those_of_one_side_are_not_compared(tmp_path: Path) -> None:
    first = RUN | {"inputs": {"prompts": "sha256:aaaa", "model.policy.source": "sha256:cccc"}}
    opened(tmp_path, first).close()
    with pytest.raises(RecordError, match=r"inputs\.prompts: sha256:aaaa -> sha256:bbbb"):
        opened(tmp_path, RUN | {"inputs": {"prompts": "sha256:bbbb", "model.policy.source": "sha256:cccc"}})
    opened(tmp_path, RUN | {"inputs": {"prompts": "sha256:aaaa", "reward": "sha256:dddd"}}).close()


def test_a_run_without_inputs_on_record_continues(tmp_path: Path) -> None:
    opened(tmp_path).close()
    opened(tmp_path, RUN | {"inputs": {"prompts": "sha256:aaaa"}}).close()
