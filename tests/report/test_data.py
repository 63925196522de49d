import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from alignbench.report.curves import styles
from alignbench.report.data import NothingToReport, flatten, load
from alignbench.report.statistics import mean_over_budget
from alignbench.report.targets import reaching
from tests.report.synthetic import BUDGET, FRACTIONS, HASHES, write_comparison, write_run


def append(folder: Path, text: str) -> None:
    with (folder / "evaluations.jsonl").open("a") as file:
        file.write(text)


def test_runs_are_grouped_by_experiment_model_and_reward(tmp_path: Path) -> None:
    write_comparison(tmp_path, seeds=2)
    write_run(tmp_path, "diffusion_nft", "geneval", 0, experiment="other")
    records = load([tmp_path])
    assert [(study.experiment, study.model) for study in records.studies] == [("first", "shapes"), ("other", "shapes")]
    first = records.studies[0]
    assert [comparison.reward for comparison in first.comparisons] == ["exact_scene", "geneval"]
    assert [comparison.labels for comparison in first.comparisons] == [["diffusion_nft", "flow_grpo"]] * 2
    assert [run.seed for run in first.comparisons[0].of("flow_grpo")] == [0, 1]


def test_the_final_score_is_the_last_one_of_the_evaluation_average(tmp_path: Path) -> None:
    folder = write_run(tmp_path, grids=False)
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    template = next(row for row in rows if row["weights"] == "evaluation" and row["protocol"] == "final")
    better_before = template | {"fraction": 0.5, "guidance": 1.0, "metrics": {"geneval": 0.99}}
    current = template | {"weights": "current", "guidance": 1.0, "metrics": {"geneval": 0.98}}
    append(folder, json.dumps(better_before) + "\n" + json.dumps(current) + "\n")
    (run,) = load([tmp_path]).runs
    final = run.final(HASHES["final"], 1.0)
    assert final is not None
    assert final.metrics["geneval"] == pytest.approx(0.30 + 0.24)  # seed 0: gain 0.25 - 0.01


def test_an_unfinished_run_has_no_final_score(tmp_path: Path) -> None:
    write_run(tmp_path, status="interrupted", until=0.6, grids=False)
    (run,) = load([tmp_path]).runs
    assert run.final(run.final_hash, 1.0) is None
    assert run.final_hash == HASHES["final"]  # the base was scored under it


def test_the_curve_protocol_stands_in_where_no_final_one_was_run(tmp_path: Path) -> None:
    write_run(tmp_path, run={"final_protocol_hash": None, "final_protocol": None}, grids=False)
    (run,) = load([tmp_path]).runs
    assert run.final_hash == HASHES["curve"]


def test_a_run_that_failed_at_once_stands_with_its_declared_protocol(tmp_path: Path) -> None:
    folder = write_run(tmp_path, status="failed", until=0.0, grids=False)
    (folder / "evaluations.jsonl").unlink()
    (run,) = load([tmp_path]).runs
    assert run.final_hash == HASHES["final"]


def test_a_curve_starts_at_the_base_and_holds_one_protocol(tmp_path: Path) -> None:
    write_run(tmp_path, seed=1, grids=False)
    (run,) = load([tmp_path]).runs
    x, y = run.curve("geneval", "flops")
    np.testing.assert_allclose(x, BUDGET * np.array(FRACTIONS))
    np.testing.assert_allclose(y, 0.30 + 0.25 * np.array(FRACTIONS))
    assert run.budget() == ("flops", BUDGET)


def test_seconds_are_the_clock_of_the_method(tmp_path: Path) -> None:
    folder = write_run(tmp_path, grids=False)
    x, _ = load([tmp_path]).runs[0].curve("geneval", "seconds")
    assert x[-1] == pytest.approx(380)  # rollout 200 and training 180; reward is inside, evaluation outside
    text = (folder / "evaluations.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    for row in rows:
        del row["volatile"]["seconds"]["total"]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert load([tmp_path]).runs[0].curve("geneval", "seconds")[0][-1] == pytest.approx(380)


def test_a_budget_in_gpu_seconds_is_read_on_the_axis_of_seconds(tmp_path: Path) -> None:
    write_run(tmp_path, run={"budget": {"gpu_seconds": 300}}, grids=False)
    write_run(tmp_path, seed=1, run={"budget": {"iterations": 100}}, grids=False)
    by_seconds, by_iterations = load([tmp_path]).runs
    assert by_seconds.budget() == ("seconds", 300)
    assert by_iterations.budget() == ("flops", BUDGET)


def test_gpu_seconds_of_several_processes_are_divided_by_them(tmp_path: Path) -> None:
    """Two processes that spend 380 s each have spent 760 GPU seconds, which ends both of them at 380 s."""
    write_run(tmp_path, run={"budget": {"gpu_seconds": 760}, "processes": 2}, grids=False)
    (run,) = load([tmp_path]).runs
    assert run.budget() == ("seconds", 380)
    found = reaching([run], "geneval", target=0.9)
    assert found is not None
    assert (found.hits, found.horizon, found.times[0].time) == (0, 380, 380)
    x, y = run.curve("geneval", "seconds")
    assert mean_over_budget(x, y, run.budget()[1]) == pytest.approx(0.30 + 0.24 / 2)


@pytest.mark.parametrize(
    ("budget", "processes", "ended"),
    [
        ({"flops": 2 * BUDGET, "nfe": 240_000}, 1, ("nfe", 240_000)),
        ({"nfe": 480_000, "flops": BUDGET}, 1, ("flops", BUDGET)),
        ({"flops": 2 * BUDGET, "gpu_seconds": 700}, 2, ("seconds", 350)),  # 760 of 700
        ({"flops": BUDGET, "gpu_seconds": 770}, 2, ("flops", BUDGET)),
        ({"gpu_seconds": 300, "iterations": 50}, 1, ("flops", BUDGET)),  # 380 of 300, 100 of 50
        ({"iterations": 200, "gpu_seconds": 300}, 1, ("seconds", 300)),
    ],
)
def test_of_several_limits_the_one_of_which_most_was_used_is_the_budget(
    tmp_path: Path, budget: dict[str, float], processes: int, ended: tuple[str, float]
) -> None:
    write_run(tmp_path, run={"budget": budget, "processes": processes}, grids=False)
    assert load([tmp_path]).runs[0].budget() == ended


def test_rows_that_cannot_be_compared_are_left_out_and_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path, grids=False)
    count = len(load([tmp_path]).runs[0].evaluations)
    append(folder, '{"fraction": 1.0, "iteration": 100, "weights": "evaluation"}\n{"torn": ')
    (run,) = load([tmp_path]).runs
    assert len(run.evaluations) == count
    assert any(f"row {count + 1} is left out" in problem for problem in run.problems)


def test_a_damaged_run_is_listed(tmp_path: Path) -> None:
    write_run(tmp_path, grids=False)
    broken = write_run(tmp_path, seed=1, grids=False)
    (broken / "run.json").write_text('{"schema": 1, "expe')
    records = load([tmp_path])
    assert len(records.runs) == 1
    (unreadable,) = records.unreadable
    assert unreadable.name == "first/shapes/geneval/diffusion_nft/seed1"
    assert any("run.json" in problem for problem in unreadable.problems)


def test_a_copy_of_a_run_is_no_second_replication(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", grids=False)
    shutil.copytree(folder, tmp_path / "b" / "copy")
    records = load([tmp_path])
    assert len(records.runs) == 1
    assert "no second replication" in records.unreadable[0].problems[-1]


def test_a_folder_given_twice_is_read_once(tmp_path: Path) -> None:
    write_run(tmp_path, grids=False)
    records = load([tmp_path, tmp_path / "first"])
    assert (len(records.runs), len(records.unreadable)) == (1, 0)


def test_nothing_to_report_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(NothingToReport, match=f"no run found below {tmp_path}"):
        load([tmp_path])
    with pytest.raises(NothingToReport, match="missing is not a folder"):
        load([tmp_path / "missing"])


def test_flatten() -> None:
    assert flatten({"a": {"b": 1, "c": {}}, "d": [1, {"e": 2}]}) == {"a.b": 1, "a.c": {}, "d": [1, {"e": 2}]}


def test_a_method_that_nobody_tuned_is_marked(tmp_path: Path) -> None:
    for method, tuned in (("diffusion_nft", {}), ("flow_grpo", {"tuned": False}), ("awm", {"tuned": True})):
        write_run(tmp_path, method, grids=False, config={"method": {"name": method} | tuned})
    (study,) = load([tmp_path]).studies
    assert study.comparisons[0].labels == ["awm", "diffusion_nft", "flow_grpo (untuned)"]
    looks = styles(study.comparisons[0].labels)
    assert looks["flow_grpo (untuned)"] == styles(["flow_grpo"])["flow_grpo"]  # the mark changes no colour


def test_training_metrics_are_means_over_the_last_tenth(tmp_path: Path) -> None:
    folder = write_run(tmp_path, grids=False)
    rows = [{"iteration": i, "error": float(i), "name": "text"} for i in range(1, 31)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run,) = load([tmp_path]).runs
    assert run.late["error"] == 29.0  # 28, 29, 30
    assert "name" not in run.late
