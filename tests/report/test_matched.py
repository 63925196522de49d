import json
import math
from pathlib import Path

import pytest

from alignbench.report import matched
from alignbench.report.data import TRAINED, load
from alignbench.report.tables import Cell
from tests.report.synthetic import write_comparison, write_run

HALF = 4.3026527297 * 0.01 / math.sqrt(3)


def test_the_checkpoint_is_the_last_at_the_share_never_the_best(tmp_path: Path) -> None:
    write_run(tmp_path, grids=False)
    (run,) = load([tmp_path]).runs
    found = {share: matched.checkpoint(run, share) for share in (0.01, 0.25, 0.5, 1.0)}
    assert found[0.01] is None
    assert [row.fraction for row in found.values() if row] == [0.2, 0.5, 1.0]  # evaluated at 0.2 and 0.3
    assert {(row.protocol_hash, row.weights) for row in found.values() if row} == {(run.curve_hash, TRAINED)}


def test_the_iteration_that_uses_up_a_share_counts(tmp_path: Path) -> None:
    folder = write_run(tmp_path, grids=False)
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    for row in rows:
        if row["fraction"] == 0.5:
            row |= {"fraction": 0.53, "iteration": 10}  # iterations of 5.3%: the tenth began at 47.7%
        elif row["fraction"] == 0.3:
            row["iteration"] = 5  # the fifth began at 24%
        elif row["fraction"] == 1.0:
            row |= {"fraction": 1.03, "iteration": 100}  # the last was a large one
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run,) = load([tmp_path]).runs
    found = {share: matched.checkpoint(run, share) for share in (0.23, 0.25, 0.47, 0.5, 1.0)}
    expected = {0.23: 0.2, 0.25: 0.3, 0.47: 0.4, 0.5: 0.53, 1.0: 1.03}
    assert {share: row.fraction for share, row in found.items() if row} == expected
    assert matched.used_at([run], 0.5) == 0.53


def test_an_unfinished_run_has_no_matched_score(tmp_path: Path) -> None:
    write_run(tmp_path, status="failed", until=0.6, grids=False)
    (run,) = load([tmp_path]).runs
    assert matched.checkpoint(run, 0.25) is None


def test_different_budgets_are_noted(tmp_path: Path) -> None:
    write_run(tmp_path, grids=False)
    write_run(tmp_path, "flow_grpo", grids=False, run={"budget": {"nfe": 240_000}})
    records = load([tmp_path])
    (table,) = matched.matched(records.studies[0], records.protocols)
    assert table.notes == (
        "Runs trained on geneval had different budgets (20 TFLOP: diffusion_nft; 240,000 denoiser passes: flow_grpo): "
        "their numbers are not matched.",
    )


def test_the_table_follows_the_closed_form(tmp_path: Path) -> None:
    write_comparison(tmp_path)
    records = load([tmp_path])
    (table,) = matched.matched(records.studies[0], records.protocols)
    rows = table.groups[1].rows
    assert [cell.text for cell in rows[0].cells[:4]] == ["base", "0%", "", "0.280"]
    assert [(row.label, row.cells[1].text) for row in rows[1:4]] == [
        ("diffusion_nft", "25%"), ("diffusion_nft", "50%"), ("diffusion_nft", "100%"),
    ]  # fmt: skip
    quarter = rows[1].cells
    assert quarter[2].text == "20%"
    assert quarter[3] == Cell("0.330", f"± {0.2 * HALF:.3f}")  # 0.28 + 0.25 * 0.2
    assert quarter[4] == Cell("+0.050", f"± {0.2 * HALF:.3f}", bold=True)
    record = next(r for r in table.records if (r["method"], r["trained_on"]) == ("flow_grpo", "geneval"))
    assert record["budget_share"] == 0.25
    assert record["exact_scene_difference"] == pytest.approx(-0.004)
    assert record["n"] == 3
