from pathlib import Path

import numpy as np

from alignbench.report import curves, hacking
from alignbench.report.data import Comparison, load
from tests.report.synthetic import FRACTIONS, write_run


def comparison(root: Path) -> Comparison:
    return load([root]).studies[0].comparisons[0]


def test_a_path_goes_from_the_base_to_the_end(tmp_path: Path) -> None:
    write_run(tmp_path, seed=1, grids=False)
    (run,) = load([tmp_path]).runs
    path = hacking.path(run, "exact_scene")
    assert path is not None
    np.testing.assert_allclose(path.trained, 0.28 + 0.25 * np.array(FRACTIONS))
    np.testing.assert_allclose(path.other, 0.20 - 0.12 * np.array(FRACTIONS))
    assert hacking.path(run, "unknown") is None


def test_the_trained_reward_is_not_drawn_against_itself(tmp_path: Path) -> None:
    write_run(tmp_path, reward="exact_scene", grids=False)
    metrics = [each.metric for each in hacking.figures(comparison(tmp_path))]
    assert metrics == ["geneval", "pickscore", "judge", "diversity", "drift"]


def test_no_figure_without_two_evaluations(tmp_path: Path) -> None:
    write_run(tmp_path, status="failed", until=0.0, grids=False)
    assert hacking.figures(comparison(tmp_path)) == []


def test_the_text_alternative_gives_starts_and_ends(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path, seed=seed, grids=False)
    write_run(tmp_path, "flow_grpo", status="failed", until=0.5, grids=False)
    (plot,) = (each for each in hacking.figures(comparison(tmp_path)) if each.metric == "exact_scene")
    said = hacking.describe(plot)
    assert "diffusion_nft, mean of 3 runs: trained reward from 0.280 to 0.530, Exact scene from 0.200 to 0.080." in said
    assert "flow_grpo, one run, 1 unfinished: trained reward from 0.280 to" in said


def test_every_run_is_drawn_and_listed(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path, seed=seed, grids=False)
    write_run(tmp_path, "flow_grpo", status="failed", until=0.5, grids=False)
    plot = hacking.figures(comparison(tmp_path))[0]
    figure = hacking.draw(plot, curves.styles(["diffusion_nft", "flow_grpo"]))
    (axes,) = figure.axes
    paths, starts, ends = axes.lines[::3], axes.lines[1::3], axes.lines[2::3]  # of each method
    assert [line.get_linestyle() for line in paths] == ["-", "--"]
    assert [int(np.isnan(np.asarray(line.get_xdata())).sum()) for line in paths] == [2, 1]  # a gap behind every run
    assert [len(np.asarray(line.get_xdata())) for line in starts] == [2, 1]
    np.testing.assert_allclose(np.asarray(starts[0].get_xdata()), [0.28, 0.28])
    np.testing.assert_allclose(np.asarray(ends[0].get_xdata()), [0.28 + 0.24, 0.28 + 0.25])
    listed = list(hacking.rows(plot, {"experiment": "first"}))
    assert {(row["method"], row["seed"]) for row in listed} == {
        ("diffusion_nft", 0), ("diffusion_nft", 1), ("flow_grpo", 0),
    }  # fmt: skip
    assert len(listed) == 2 * len(FRACTIONS) + sum(fraction <= 0.5 for fraction in FRACTIONS)
