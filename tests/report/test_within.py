import json
from pathlib import Path

import numpy as np
import pytest

from alignbench.report import within
from alignbench.report.data import load
from tests.report.synthetic import write_run

TAGS = ["a"] * 20 + ["b"] * 20


def with_scores(folder: Path, shift: float, images: int = 2) -> None:
    """Write per-image scores of the base and of the final weights at guidance 1: final = base + shift."""
    base = np.random.default_rng(0).normal(0.4, 0.2, len(TAGS) * images)
    (folder / "scores").mkdir(exist_ok=True)
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    for row in rows:
        if row["protocol"] == "final" and row["guidance"] == 1.0 and row["weights"] in ("base", "evaluation"):
            values = base + (shift if row["weights"] == "evaluation" else 0.0)
            row["scores"] = f"scores/{row['weights']}.json"
            content = {"prompt_ids": list(range(40)), "tags": TAGS, "images": [images] * 40}
            (folder / row["scores"]).write_text(json.dumps(content | {"metrics": {"reward": list(values)}}))
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_with_scores_has_an_interval_over_its_prompts(tmp_path: Path) -> None:
    with_scores(write_run(tmp_path, grids=False), shift=0.25)
    write_run(tmp_path, seed=1, grids=False)  # without scores
    table = within.table(load([tmp_path]))
    (record,) = table.records
    assert record["run"].endswith("seed0")
    assert record["low"] < record["reward"] < record["high"]
    assert record["difference"] == pytest.approx(0.25)
    assert (record["difference_low"], record["difference_high"]) == pytest.approx((0.25, 0.25))  # prompt by prompt
    assert record["prompts"] == 40


def test_the_width_is_that_of_a_mean_over_prompts(tmp_path: Path) -> None:
    with_scores(write_run(tmp_path, grids=False), shift=0.0, images=1)
    (record,) = within.table(load([tmp_path])).records
    values = np.random.default_rng(0).normal(0.4, 0.2, 40)
    error = np.sqrt((values[:20].var() + values[20:].var()) / 20) / 2
    assert (record["high"] - record["low"]) / 2 == pytest.approx(1.96 * error, rel=0.12)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"prompt_ids": [1], "tags": ["a"], "images": [2]}'])
def test_damaged_scores_are_left_out(tmp_path: Path, content: str) -> None:
    folder = write_run(tmp_path, grids=False)
    with_scores(folder, shift=0.1)
    (folder / "scores" / "evaluation.json").write_text(content)
    table = within.table(load([tmp_path]))
    assert table.records == ()
    assert table.notes


def test_scores_of_other_prompts_give_no_difference(tmp_path: Path) -> None:
    folder = write_run(tmp_path, grids=False)
    with_scores(folder, shift=0.1)
    content = json.loads((folder / "scores" / "base.json").read_text())
    (folder / "scores" / "base.json").write_text(json.dumps(content | {"prompt_ids": list(range(1, 41))}))
    (record,) = within.table(load([tmp_path])).records
    assert "difference" not in record
