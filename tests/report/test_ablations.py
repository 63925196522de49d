"""Ablations are compared with the runs that differ in nothing else, or said not to have been run."""

from pathlib import Path

import pytest
import yaml

from alignbench.report import ablations
from alignbench.report.ablations import Ablation
from alignbench.report.data import load
from tests.report.synthetic import write_run

PART = Ablation("flow_grpo", "geneval", "the part", {"part": False})


def records(root: Path) -> Path:
    """The whole method gains 0.10 on GenEval; the folders without the part are called diffusion_nft's, 0.25."""
    for seed in (0, 1, 2):
        write_run(root, "flow_grpo", seed=seed, config={"part": True})
        folder = write_run(root, "flow_grpo", seed=seed, variant="part=False", config={"part": False})
        rows = folder / "evaluations.jsonl"
        rows.write_text(rows.read_text().replace('"pickscore": 21.4', f'"pickscore": 2{seed}.0'))
    write_run(root, "flow_grpo", seed=0, variant="other=1,part=False", config={"part": False, "other": 1})
    return root


def test_only_runs_that_differ_in_the_part_and_the_seed_are_compared(tmp_path: Path) -> None:
    whole, without = ablations.compared(load([records(tmp_path)]), "first", PART)
    assert [run.seed for run in whole] == [0, 1, 2] == [run.seed for run in without]
    assert {run.variant for run in without} == {"part=False"}


def test_the_same_settings_count_under_any_name(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path, "sdpo", seed=seed, config={"part": True, "method": {"name": "sdpo", "tuned": True}})
        named = {"part": False, "method": {"name": "dmpo", "tuned": False}}
        write_run(tmp_path, "dmpo", seed=seed, config=named, experiment="parts")
    write_run(tmp_path, "dpo", seed=0, config={"part": False, "method": {"name": "dpo", "tuned": False, "beta": 2}})
    _, without = ablations.compared(load([tmp_path]), "first", Ablation("sdpo", "geneval", "the part", {"part": False}))
    assert [(run.experiment, run.method, run.seed) for run in without] == [("parts", "dmpo", 0), ("parts", "dmpo", 1)]
    untuned = Ablation("dmpo", "geneval", "nothing", {"part": True})
    whole, without = ablations.compared(load([tmp_path]), "parts", untuned)
    assert ([run.seed for run in whole], [run.method for run in without]) == ([0, 1], ["sdpo", "sdpo"])


def test_the_difference_is_paired_by_seed(tmp_path: Path) -> None:
    whole, without = ablations.compared(load([records(tmp_path)]), "first", PART)
    same = ablations.difference(whole, without, "geneval")
    assert (same.mean, same.half_width, same.n) == (0, 0, 3)
    moved = ablations.difference(whole, without, "pickscore")  # 20, 21, 22 against 21.4: -1.4, -0.4, 0.6
    assert moved.mean == pytest.approx(-0.4)
    assert moved.half_width == pytest.approx(4.302652729911275 / 3**0.5)  # t(0.975, 2) s / sqrt(3), s = 1
    fewer = ablations.difference(whole, without[:2], "pickscore")  # Welch
    assert (fewer.mean, fewer.n) == (pytest.approx(20.5 - 21.4), 2)


def test_the_page_says_what_was_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = Ablation("flow_grpo", "exact_scene", "another part", {"part": False})
    content = {"experiment": "first", "ablations": [vars(PART), vars(missing)]}
    (tmp_path / "parts.yaml").write_text(yaml.safe_dump(content))
    results = records(tmp_path / "results")
    assert ablations.main([str(tmp_path / "parts.yaml"), "--results", str(results)]) == 0
    rows = [line for line in (tmp_path / "parts.md").read_text().splitlines() if line.startswith("| flow_grpo")]
    assert "| the part | part false |" in rows[0]
    assert "-0.400 ± 2.484" in rows[0]
    assert "3 against 3" in rows[0]
    assert "flow_grpo@part=False/seed1" in rows[0]
    assert "| another part | part false | not run |" in rows[1]


def test_a_malformed_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "parts.yaml").write_text("experiment: first\nablations: [{method: m}]\n")
    assert ablations.main([str(tmp_path / "parts.yaml")]) == 1
    assert "parts.yaml: expected the keys experiment and ablations" in capsys.readouterr().err
