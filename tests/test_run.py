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
