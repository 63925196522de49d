"""What a run reads from outside identifies it: changed between stop and resume, it is refused by name."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from omegaconf import DictConfig

from alignbench import assembly, base_evaluation, inputs, records
from alignbench.errors import DataError, RecordError
from alignbench.prompts.prompt import Prompt
from alignbench.run import run
from tests.conftest import Compose
from tests.stopping import stopped


def sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


# Hashes


def test_a_file_is_its_content_and_a_folder_its_files_with_their_names(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.bin").write_bytes(b"two")
    (tmp_path / "sub" / "a.bin").write_bytes(b"one")
    one, two = (hashlib.sha256(content).digest() for content in (b"one", b"two"))
    assert inputs.digest(str(tmp_path / "b.bin")) == sha256(b".\0", two)
    assert inputs.digest(str(tmp_path)) == sha256(b"b.bin\0", two, b"sub/a.bin\0", one)
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "time").write_text("now")
    assert inputs.digest(str(tmp_path)) == sha256(b"b.bin\0", two, b"sub/a.bin\0", one)
    assert inputs.digest(str(tmp_path / "nothing")) is None


def test_linked_folders_count_once(tmp_path: Path) -> None:
    weights, model = tmp_path / "elsewhere", tmp_path / "model"
    weights.mkdir()
    model.mkdir()
    (weights / "w.bin").write_bytes(b"one")
    (model / "transformer").symlink_to(weights)
    (weights / "again").symlink_to(model)
    before = inputs.digest(str(model))
    (weights / "w.bin").write_bytes(b"other")
    assert inputs.digest(str(model)) != before


def test_images_that_an_index_names_outside_its_folder_count(tmp_path: Path) -> None:
    folder, outside = tmp_path / "folder", tmp_path / "outside.png"
    folder.mkdir()
    outside.write_bytes(b"one")
    lines = [json.dumps({"prompt": "a", "image": "../outside.png"}), "{", "[]", '{"image": 3}', '{"image": "no.png"}']
    (folder / "images.jsonl").write_text("\n".join(lines))
    before = inputs.digest(str(folder))
    outside.write_bytes(b"two")
    assert inputs.digest(str(folder)) != before


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        inputs.digest(str(tmp_path / "pipe"))


def test_a_repository_is_the_commit_of_its_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refs = tmp_path / "models--owner--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("a" * 40)
    (refs / "v2").write_text("b" * 40)
    assert inputs.identified("owner/name") == f"commit:{'a' * 40}"
    assert inputs.identified("owner/name/weights.pt") == f"commit:{'a' * 40}"
    assert inputs.identified("owner/name", "v2") == f"commit:{'b' * 40}"
    assert inputs.identified("owner/name", "c" * 40) == f"commit:{'c' * 40}"
    for place in ("owner/other", "/owner/name", "owner/--name..", "owner//name", "name"):
        assert inputs.identified(place) is None


def test_settings_that_name_no_file_are_no_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("pretrained", "pickscore", "sd3"):
        (tmp_path / name).mkdir()
    node = {"_target_": "a.B", "weights": "pretrained", "name": "pickscore", "source": "sd3", "mode": None, "rank": 4}
    assert list(inputs.places(node, "model.policy")) == [("model.policy.source", "sd3", None)]
    nested = {"clips": ["local-dir:x/y", "ViT-L-14"], "revision": "v2"}
    assert list(inputs.places(nested, "r")) == [("r.clips.0", "x/y", "v2")]


def test_ids_texts_metadata_and_order_of_prompts_count() -> None:
    a, b = Prompt("p/0", "a cat"), Prompt("p/1", "a dog")
    found = {
        inputs.fingerprint(prompts)
        for prompts in ([a, b], [b, a], [a], [a, Prompt("p/1", "a dog", {"tag": "x"})], [a, Prompt("p/2", "a dog")])
    }
    assert len(found) == 5


# Runs


@pytest.fixture
def config(tiny_run: Compose, tiny_checkpoint: Path, tmp_path: Path) -> DictConfig:
    """A run on a copy of the tiny checkpoint, which a test may change."""
    shutil.copytree(tiny_checkpoint, tmp_path / "model")
    return tiny_run(f"model.policy.source={tmp_path / 'model'}", "evaluation.final.guidance=[1.0]", "method=flow_grpo")


def other_weights(folder: Path) -> None:
    file = next((folder / "transformer").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(data)


def test_a_run_that_was_stopped_does_not_continue_with_other_inputs(
    config: DictConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, file = stopped(config, monkeypatch), tmp_path / "prompts.jsonl"
    recorded = json.loads((folder / "run.json").read_text())["inputs"]
    assert set(recorded) == {"prompts", "evaluation.prompts", "model.policy.source"}
    before = (folder / "metrics.jsonl").read_text()

    with monkeypatch.context() as patch:
        patch.setattr(assembly, "pretrained", lambda *_, **__: pytest.fail("weights are loaded"))
        text = file.read_text()
        file.write_text(text.replace('"ef"}', '"ef", "tag": "x"}'))  # what the protocol's own hash does not see
        with pytest.raises(RecordError, match=rf"other inputs.*\n  prompts \({file}\): sha256:\w+ -> sha256:\w+\n"):
            run(config)
        file.write_text(text)
        kept = tmp_path / "kept"
        shutil.copytree(tmp_path / "model", kept)
        other_weights(tmp_path / "model")
        told = rf"model\.policy\.source \({tmp_path / 'model'}\): sha256:\w+ -> sha256:\w+\nPut back"
        with pytest.raises(RecordError, match=told):
            run(config)
    assert (folder / "metrics.jsonl").read_text() == before

    shutil.rmtree(tmp_path / "model")
    shutil.copytree(kept, tmp_path / "model")
    run(config)
    assert json.loads((folder / "status.json").read_text())["status"] == "done"


def test_a_finished_run_is_skipped_and_names_what_has_changed(
    config: DictConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(config)
    other_weights(tmp_path / "model")
    (folder / "scores" / "0000_curve_base_g1.json").unlink()
    (folder / "status.json").unlink()
    capsys.readouterr()
    run(config)
    printed = capsys.readouterr().out
    assert "already done, skipped; " in printed
    assert f"warning: other content now: model.policy.source ({tmp_path / 'model'}): sha256:" in printed
    assert "1 files that its evaluations name are missing (scores/0000_curve_base_g1.json)" in printed
    assert "status.json was lost and is written again" in printed
    assert json.loads((folder / "status.json").read_text())["status"] == "done"
    content = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({key: content[key] for key in content if key != "inputs"}))
    run(config)  # of an earlier version
    assert "other content" not in capsys.readouterr().out


# Base scores of other runs


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def seeded(config: DictConfig, seed: int, **settings: Any) -> DictConfig:
    copy = config.copy()
    copy.seed = seed
    for key, value in settings.items():
        copy[key] = value
    return copy


@pytest.fixture
def committed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignbench.assembly._git", lambda: {"commit": "abc", "dirty": False})


def test_replaced_weights_do_not_reuse_the_scores_of_the_old_ones(
    config: DictConfig, tmp_path: Path, committed: None
) -> None:
    run(config)
    other_weights(tmp_path / "model")
    (first, *_) = rows_of(run(seeded(config, 1)))
    assert first["volatile"]["reused_from"] is None
    (first, *_) = rows_of(run(seeded(config, 2)))
    assert first["volatile"]["reused_from"] == "red/flow_grpo/seed1"


def test_taking_scores_over_changes_no_ledger(config: DictConfig, tmp_path: Path, committed: None) -> None:
    """The same run once with and once without a donor; its reward reads texts."""
    config.reward.parts.red.shapes._target_ = "tests.test_ledger.Similarity"
    alone = run(seeded(config, 1, results=str(tmp_path / "alone")))
    run(config)
    taking = run(seeded(config, 1))
    reused = [row["volatile"]["reused_from"] for row in rows_of(taking)]
    assert reused[:2] == ["red/flow_grpo/seed0"] * 2
    assert set(reused[2:]) == {None}
    for ours, theirs in zip(rows_of(taking), rows_of(alone), strict=True):
        assert records.strip_volatile(ours) == records.strip_volatile(theirs)


def test_a_bad_donor_is_passed_over_and_named(config: DictConfig, committed: None) -> None:
    donor = run(config)
    mine = donor.parents[1] / "other" / "seed0"
    shutil.copytree(donor, mine)
    row = rows_of(donor)[0]
    key = (row["protocol_hash"], row["guidance"], 0)
    found, problems = base_evaluation.recorded(mine, *key)
    assert found is not None
    assert (found.measured["metrics"], problems) == (row["metrics"], [])
    scores, grid = donor / row["scores"], donor / row["grid"]
    table = json.loads(scores.read_text())

    def values(change: Any) -> bytes:
        return json.dumps(table | {"metrics": {"reward": change(table["metrics"]["reward"])}}).encode()

    damages = {
        "cannot be read": b"[" * 100_000,
        "expected 8 images": json.dumps(table | {"images": [1] * len(table["images"])}).encode(),
        "metrics.reward is no list of 8 finite numbers": values(lambda old: old[1:]),
        "is no list of 8 finite": values(lambda old: ["1", *old[1:]]),
        "its reward has another mean than the row": values(lambda old: [old[0] + 0.5, *old[1:]]),
        "expected lists prompt_ids, tags and images": json.dumps(table | {"tags": "prompt"}).encode(),
    }
    before = scores.read_bytes()
    for told, content in damages.items():
        scores.write_bytes(content)
        found, problems = base_evaluation.recorded(mine, *key)
        assert found is None
        assert len(problems) == 1
        assert problems[0].startswith(f"the base scores of {donor} are not taken over: ")
        assert told in problems[0]
    scores.write_bytes(before)

    for content in (b"", b"GIF89a", grid.read_bytes()[:-40]):
        picture = grid.read_bytes()
        grid.write_bytes(content)
        found, problems = base_evaluation.recorded(mine, *key)
        grid.write_bytes(picture)
        assert found is None
        assert "is no picture" in problems[0]

    lines = (donor / "evaluations.jsonl").read_text().splitlines(keepends=True)
    for change, told in (
        ({"metrics": row["metrics"] | {"drift": 1.0}}, "is not the row that"),
        ({"cost": {"nfe": 3}}, "cost is"),
        ({"metrics": {"reward": "high"}}, "metrics.reward is 'high', expected a finite number"),
        ({"images": "8"}, "images is '8'"),
    ):
        (donor / "evaluations.jsonl").write_text(json.dumps(row | change) + "\n" + "".join(lines[1:]))
        found, problems = base_evaluation.recorded(mine, *key)
        assert found is None
        assert told in problems[0]
        shutil.rmtree(donor / "checkpoints", ignore_errors=True)  # whose hashes would be told first
