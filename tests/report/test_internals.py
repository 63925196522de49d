"""What is drawn of the inside of training is what the runs logged."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignbench.errors import AlignbenchError
from alignbench.report import data, internals
from tests.report.synthetic import write_run


def logged(root: Path, rows: list[dict[str, Any]], method: str = "flow_grpo") -> Path:
    folder = write_run(root, method, grids=False)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def row(iteration: int, **metrics: Any) -> dict[str, Any]:
    return {"iteration": iteration, "ledger": {"flops": 1e12 * iteration}, **metrics}


def test_a_series_is_the_mean_over_the_last_tenth_of_the_iterations(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=40)
    logged(tmp_path, [row(number + 1, reward=float(value)) for number, value in enumerate(values)])
    spent, smooth = internals.series(data.load([tmp_path]).runs[0], "reward")
    assert spent.tolist() == list(range(1, 41))
    expected = [values[max(0, end - 4) : end].mean() for end in range(1, 41)]
    np.testing.assert_allclose(smooth, expected)


def test_rows_without_the_metric_or_without_a_number_are_left_out(tmp_path: Path) -> None:
    rows = [
        row(1, kl=0.5),
        row(2),
        row(3, kl=float("nan")),
        row(4, kl="?"),
        row(5, kl=1.5) | {"ledger": None},
        row(6, kl=2),
    ]
    logged(tmp_path, rows)
    spent, values = internals.series(data.load([tmp_path]).runs[0], "kl")
    assert (spent.tolist(), values.tolist()) == ([1, 6], [0.5, 2])


def test_a_panel_for_every_metric_that_some_run_logged(tmp_path: Path) -> None:
    logged(tmp_path, [row(1, reward=0.1, kl=0.0), row(2, reward=0.2, kl=0.1)])
    logged(tmp_path, [row(1, reward=0.3), row(2, reward=0.4)], method="diffusion_nft")
    figure = internals.draw(data.load([tmp_path]).runs, ["reward", "kl", "hinge_active"])
    shown = {
        axes.get_title(): [np.asarray(line.get_ydata()).tolist() for line in axes.get_lines()] for axes in figure.axes
    }
    assert shown == {"reward of the rollout": [[0.3, 0.4], [0.1, 0.2]], "KL to the reference": [[0.0, 0.1]]}


def test_nothing_to_draw_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logged(tmp_path, [row(1, reward=0.1)])
    with pytest.raises(AlignbenchError, match="none of the 1 runs logged any of: kl"):
        internals.draw(data.load([tmp_path]).runs, ["kl"])
    assert internals.main([str(tmp_path), "--metrics", "kl"]) == 1
    assert "error: none of" in capsys.readouterr().err
    assert internals.main([str(tmp_path), "--methods", "sdpo"]) == 1


def test_the_command_writes_the_picture(tmp_path: Path) -> None:
    logged(tmp_path, [row(1, reward=0.1), row(2, reward=0.2)])
    assert internals.main([str(tmp_path), "--output", str(tmp_path / "inside.png")]) == 0
    assert (tmp_path / "inside.png").read_bytes().startswith(b"\x89PNG")
