"""The loop end to end on a tiny checkpoint."""

import json
from pathlib import Path

import pytest

from alignbench.run import run
from tests.conftest import Compose


@pytest.mark.parametrize("method", ["diffusion_nft", "flow_grpo"])
def test_a_run_leaves_complete_records(tiny_run: Compose, method: str) -> None:
    folder = run(tiny_run(f"method={method}"))

    assert json.loads((folder / "status.json").read_text())["status"] == "done"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2]
    evaluations = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [(row["protocol"], row["weights"], row["guidance"]) for row in evaluations] == [
        ("curve", "base", 1.0),
        ("final", "base", 1.0),
        ("final", "base", 3.0),
        ("curve", "evaluation", 1.0),
        ("curve", "evaluation", 1.0),
        ("final", "evaluation", 1.0),
        ("final", "evaluation", 3.0),
        ("curve", "current", 1.0),
    ]
    assert evaluations[0]["metrics"]["drift"] == 0
    assert evaluations[-1]["metrics"]["drift"] > 0
    assert Path(folder / "lora" / "pytorch_lora_weights.safetensors").stat().st_size > 1000


def test_the_base_is_evaluated_once_for_runs_that_would_repeat_it(
    tiny_run: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alignbench.assembly._git", lambda: {"commit": "abc", "dirty": False})
    folders = [run(tiny_run(f"method={method}")) for method in ("diffusion_nft", "flow_grpo")]
    first, second = (
        [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()] for folder in folders
    )
    for ours, theirs in zip(second[:3], first[:3], strict=True):
        assert ours["volatile"]["reused_from"] == "red/diffusion_nft/seed0"
        assert [ours[key] for key in ("metrics", "cost", "guidance")] == [
            theirs[key] for key in ("metrics", "cost", "guidance")
        ]
        assert ours["ledger"]["phases"]["evaluation"] == theirs["ledger"]["phases"]["evaluation"]
        assert (folders[1] / ours["grid"]).read_bytes() == (folders[0] / theirs["grid"]).read_bytes()
    assert second[3]["volatile"]["reused_from"] is None

    (folders[0] / first[0]["scores"]).unlink()  # records are shared without some of their files
    (folders[1] / second[0]["grid"]).unlink()
    third = run(tiny_run("method=flow_grpo", "seed=1"))
    assert json.loads((third / "evaluations.jsonl").read_text().splitlines()[0])["volatile"]["reused_from"] is None


def test_tensorboard_shows_the_rows_and_the_grids(tiny_run: Compose) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run(tiny_run("tracker=tensorboard"))
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shown = [(event.step, event.value) for event in events.Scalars("train/reward")]
    assert shown == [(row["iteration"], pytest.approx(row["reward"])) for row in rows]
    assert len(events.Images("curve/evaluation_g1")) == 2
