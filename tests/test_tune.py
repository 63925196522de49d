"""Equal tuning: the design is balanced, trials are found again in the records, and what is read from them is right."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignbench import tune
from alignbench.errors import ConfigError
from alignbench.report import data, tuning
from alignbench.tune import Space
from tests.report.synthetic import write_run

LEVELS: dict[str, list[Any]] = {
    "method.optimizer.lr": [1e-4, 3e-4, 1e-3, 3e-3],
    "method.algorithm.beta": [0.1, 1.0],
    "method.k": [None, 1],
}


def written(folder: Path, **changes: Any) -> Path:
    methods = {name: {"reward": "geneval", "knobs": LEVELS} for name in ("diffusion_nft", "flow_grpo")}
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({"experiment": "first", "trials": 8, "seed": 0, "methods": methods} | changes))
    return path


def test_every_level_is_tried_equally_often_and_no_setting_twice(tmp_path: Path) -> None:
    design = Space.read(written(tmp_path)).design("flow_grpo")
    assert len(design) == 8 == len({tuple(setting.values()) for setting in design})
    for knob, levels in LEVELS.items():
        assert Counter(setting[knob] for setting in design) == dict.fromkeys(levels, 8 // len(levels))
    assert design == Space.read(written(tmp_path)).design("diffusion_nft")  # the same for every method


def test_a_space_too_small_for_its_trials_is_refused(tmp_path: Path) -> None:
    space = Space.read(written(tmp_path, methods={"m": {"reward": "geneval", "knobs": {"lr": [1, 2]}}}))
    with pytest.raises(ConfigError, match="two of 8 trials are the same"):
        space.design("m")


@pytest.mark.parametrize(
    "changes",
    [
        {"trials": 0},
        {"methods": {"m": {"knobs": {"lr": [1, 2]}}}},
        {"methods": {"m": {"reward": "r", "knobs": {"a": [1]}}}},
        {"surprise": 1},
        {"second": {"experiment": "long"}},
        {"second": {"experiment": "long", "best": 9}},
        {"second": {"experiment": "long", "best": 0}},
        {"methods": {}},
    ],
)
def test_a_malformed_space_is_refused_by_name(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"space\.yaml"):
        Space.read(written(tmp_path, **changes))


def test_a_trial_is_an_ordinary_run(tmp_path: Path) -> None:
    setting = {"method.optimizer.lr": 1e-3, "method.k": None}
    command = Space.read(written(tmp_path)).command("first", "flow_grpo", setting, tmp_path)
    assert command[:3] == [sys.executable, "-m", "alignbench"]
    assert command[3:] == [
        "experiment=first", "method=flow_grpo", "reward=geneval", f"results={tmp_path}", "progress=false",
        "method.optimizer.lr=0.001", "method.k=null",
    ]  # fmt: skip


def test_a_failed_trial_stops_no_other_and_one_that_another_process_is_at_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    endings = iter([(0, ""), (os.EX_TEMPFAIL, "being written by process 12"), (1, "diverged"), (0, "")])

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        status, message = next(endings)
        return subprocess.CompletedProcess(command, status, stderr=message)

    monkeypatch.setattr(subprocess, "run", run)
    space = str(written(tmp_path, trials=4))
    assert tune.main([space, "--methods", "flow_grpo", "--results", str(tmp_path)]) == 1
    told = [line.rsplit(": ", 1)[-1] for line in capsys.readouterr().out.splitlines()]
    assert told[:4] == ["done", "left to another process", "diverged", "done"]
    assert told[-2:] == [
        "1 trials failed; the same command tries them again",
        "1 trials are left to another process; the same command goes on when they have ended",
    ]


def trial(gain: float | None, **setting: Any) -> tuning.Trial:
    return tuning.Trial("m", "r", setting, "done", score=None if gain is None else 0.25 + gain, base=0.25)


def test_best_so_far_winner_and_boundary_by_hand() -> None:
    trials = [trial(None, a=1), trial(-0.125, a=2), trial(0.25, a=2), trial(0.125, a=3), trial(0.25, a=3)]
    best = tuning.best_so_far(trials)
    assert str(best[0]) == "nan"
    assert best[1:] == [-0.125, 0.25, 0.25, 0.25]
    assert tuning.winner(trials) is trials[2]
    assert tuning.winner(trials[:1]) is None
    assert tuning.boundary_hits(trials[2], {"a": [1, 2, 3]}) == []
    assert tuning.boundary_hits(trials[3], {"a": [1, 2, 3]}) == ["a"]


def test_the_summary_reads_the_trials_from_their_records(tmp_path: Path) -> None:
    space = Space.read(written(tmp_path))
    for number, setting in enumerate(space.design("diffusion_nft")[:3]):
        config = {key: value for key, value in setting.items() if "." in key} | {"method.k": setting["method.k"]}
        write_run(
            tmp_path / "results",
            seed=0,
            variant=f"v{number}",
            config=config,
            status="failed" if number == 2 else "done",
            message="diverged" if number == 2 else "",
        )
    tune.summarise(space, ["diffusion_nft"], tmp_path / "results", tmp_path)
    lines = (tmp_path / "trials.md").read_text().splitlines()
    rows = {line.split(" | ")[0]: line for line in lines if line.startswith("| ")}
    assert rows["| diffusion_nft"].startswith("| diffusion_nft | geneval | 2/8 |")
    assert " | +0.240 | " in rows["| 1"]  # trained on geneval, seed 0: strict gain 0.25 - 0.01
    assert rows["| 3"].endswith("| failed: diverged |")
    assert rows["| 4"].endswith("| not run |")
    assert (tmp_path / "trials.png").read_bytes().startswith(b"\x89PNG")


def test_find_wants_every_knob_to_agree(tmp_path: Path) -> None:
    write_run(tmp_path, config={"knob": 1, "other": 2})
    records = data.load([tmp_path])
    assert tuning.find(records, "first", "diffusion_nft", "geneval", {"knob": 1}).status == "done"
    assert tuning.find(records, "first", "diffusion_nft", "geneval", {"knob": 1, "other": 3}).status == "not run"
    assert tuning.find(records, "first", "flow_grpo", "geneval", {"knob": 1}).status == "not run"


def test_an_unknown_method_is_an_error_before_any_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([str(written(tmp_path)), "--methods", "ddpo"]) == 1
    assert "has no method 'ddpo'; it has: diffusion_nft, flow_grpo" in capsys.readouterr().err


def test_the_second_round_runs_the_best_again_and_decides(tmp_path: Path) -> None:
    space = Space.read(written(tmp_path, second={"experiment": "long", "best": 2}))
    gains = [0.1, 0.5, 0.2, 0.4, 0.3, 0.0, -0.1, -0.2]

    def record(experiment: str, number: int, gain: float) -> None:
        setting = space.design("diffusion_nft")[number]
        folder = write_run(tmp_path / "results", variant=f"v{number}", experiment=experiment, config=setting)
        rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
        for row in rows:
            row["metrics"]["reward"] = 0.0 if row["weights"] == "base" else gain
        (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    for number, gain in enumerate(gains[:-1]):
        record("first", number, gain)
    assert tune.found(space, ["diffusion_nft"], tmp_path / "results")[1] == {}  # one trial is missing
    record("first", 7, gains[7])
    record("long", 3, 0.9)
    first, second = tune.found(space, ["diffusion_nft"], tmp_path / "results")
    assert [trial.gain for trial in first["diffusion_nft"]] == gains
    again = second["diffusion_nft"]
    assert [index for index, trial in enumerate(again) if trial] == [1, 3]  # the two best
    assert [trial.gain for trial in again if trial] == [None, 0.9]
    best = tuning.winner(first["diffusion_nft"], again)
    assert best is not None
    assert best.gain == 0.9
    assert best.setting == space.design("diffusion_nft")[3]  # not the winner of the first round
    tune.summarise(space, ["diffusion_nft"], tmp_path / "results", tmp_path)
    lines = (tmp_path / "trials.md").read_text().splitlines()
    assert any(line.startswith("| diffusion_nft | geneval | 8/8, 1/2 again |") and "+0.900" in line for line in lines)
    assert any(line.startswith("| 4 again |") for line in lines)
    assert any(line.startswith("| 2 again |") and line.endswith("| not run |") for line in lines)
