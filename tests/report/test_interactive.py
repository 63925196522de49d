import json
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignbench.report import curves, hacking, interactive
from alignbench.report.curves import styles
from alignbench.report.data import AXES, load
from alignbench.report.interactive import Chart
from tests.report.synthetic import FRACTIONS, write_run

NAME = "diffusion_nft@a=<b>&"


def drawn(root: Path, axis: int = 0) -> Chart:
    records = load([root])
    plot = curves.plot("name", "GenEval", "geneval", AXES[axis], records.studies[0].comparisons[0])
    assert plot is not None
    return interactive.curve(plot, styles(records.labels))


def of_kind(chart: Chart, kind: str) -> list[dict[str, Any]]:
    return [trace for trace in chart["traces"] if trace["meta"]["kind"] == kind]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for seed in range(3):
        write_run(tmp_path, seed=seed, variant="a=<b>&", grids=False)
    return tmp_path


def test_runs_band_and_mean_follow_the_closed_form(three: Path) -> None:
    chart = drawn(three)
    fractions = np.array(FRACTIONS)
    assert (chart["x"], chart["scale"]) == ("Compute (TFLOP)", 1e12)
    (mean,), (band,), (runs,) = (of_kind(chart, kind) for kind in ("mean", "band", "runs"))
    np.testing.assert_allclose(mean["x"], 20 * fractions)
    np.testing.assert_allclose(mean["y"], 0.30 + 0.25 * fractions)
    half = 4.3026527297 * 0.01 * fractions / np.sqrt(3)
    np.testing.assert_allclose(band["y"][:14], 0.30 + 0.25 * fractions + half)
    np.testing.assert_allclose(band["y"][14:][::-1], 0.30 + 0.25 * fractions - half)
    np.testing.assert_allclose(band["x"], [*(20 * fractions), *(20 * fractions)[::-1]])
    assert [i for i, x in enumerate(runs["x"]) if x is None] == [14, 29, 44]
    assert runs["customdata"][::15] == [0, 1, 2]
    assert runs["y"][13] == pytest.approx(0.54)
    assert mean["customdata"][-1] == "[0.5252, 0.5748]"
    assert mean["meta"]["who"] == "mean of 3 runs"


def test_names_are_escaped_for_plotly(three: Path) -> None:
    (mean,) = of_kind(drawn(three), "mean")
    assert "<b>&" not in mean["name"]
    assert unescape(mean["name"]) == NAME
    assert "<b>&" not in mean["hovertemplate"]


def test_every_method_and_base_is_in_the_legend_once(three: Path) -> None:
    write_run(three, "flow_grpo", status="failed", until=0.5, grids=False)
    chart = drawn(three)
    named = [trace["name"] for trace in chart["traces"] if trace["showlegend"]]
    assert len(named) == len(set(named)) == 4
    (unfinished,) = (trace for trace in of_kind(chart, "runs") if trace["name"] == "flow_grpo")
    assert unfinished["line"]["dash"] == "dot"


def test_one_run_has_no_band(tmp_path: Path) -> None:
    write_run(tmp_path, grids=False)
    chart = drawn(tmp_path)
    assert of_kind(chart, "band") == []
    (mean,) = of_kind(chart, "mean")
    assert mean["meta"]["who"] == "one run"
    assert set(mean["customdata"]) == {""}


def test_base_lines_stand_at_the_score_of_the_base(three: Path) -> None:
    plain, guided = of_kind(drawn(three), "base")
    assert plain["y"] == pytest.approx([0.30, 0.30])
    assert guided["y"] == pytest.approx([0.45, 0.45])
    assert (plain["meta"]["who"], guided["meta"]["who"]) == ("protocol of the curves", "final protocol")


def test_paths_start_at_the_base_and_end_at_the_end(three: Path) -> None:
    records = load([three])
    plot = hacking.figures(records.studies[0].comparisons[0])[0]
    chart = interactive.paths(plot, styles(records.labels))
    (start,), (end,), (runs,) = (of_kind(chart, kind) for kind in ("start", "end", "runs"))
    assert start["x"] == pytest.approx([0.28] * 3)
    assert end["x"] == pytest.approx([0.52, 0.53, 0.54])
    assert end["y"] == pytest.approx([0.20 - 0.13, 0.20 - 0.12, 0.20 - 0.11])
    assert end["customdata"] == [0, 1, 2]
    assert sum(x is not None for x in runs["x"]) == 3 * len(FRACTIONS)


def whole(embedded: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Traces as the page's script puts them together."""
    traces = embedded["charts"][key]["traces"]
    return [t if "name" in t else {**embedded["shared"][i], **t} for i, t in enumerate(traces)]


def test_what_charts_share_is_written_once_and_comes_back(three: Path) -> None:
    charts = {axis.key: drawn(three, number) for number, axis in enumerate(AXES)}
    embedded = interactive.embedded(charts)
    for key, chart in charts.items():
        assert whole(embedded, key) == chart["traces"]
    assert len(json.dumps(embedded)) < 0.6 * len(json.dumps(charts))


def test_charts_of_other_traces_stand_in_full(three: Path) -> None:
    charts = {"flops": drawn(three), "nfe": drawn(three, 1)}
    charts["nfe"]["traces"].pop(1)
    embedded = interactive.embedded(charts)
    assert embedded["charts"]["nfe"] == charts["nfe"]
    assert whole(embedded, "nfe") == charts["nfe"]["traces"]
