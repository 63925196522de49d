import json
import re
from pathlib import Path

import numpy as np
import pytest

from alignbench.report import curves
from alignbench.report.curves import DARK, LIGHT, Plot, styles
from alignbench.report.data import AXES, Comparison, load
from tests.report.synthetic import BUDGET, FRACTIONS, HASHES, write_run

FLOPS = AXES[0]


def comparison(root: Path) -> Comparison:
    return load([root]).studies[0].comparisons[0]


def drawn(root: Path, metric: str = "geneval") -> Plot:
    plot = curves.plot("name", "GenEval", metric, FLOPS, comparison(root))
    assert plot is not None
    return plot


@pytest.fixture
def three(tmp_path: Path) -> Path:
    for seed in range(3):
        write_run(tmp_path, seed=seed, grids=False)
    return tmp_path


def test_mean_and_band_follow_the_closed_form(three: Path) -> None:
    (curve,) = drawn(three).curves
    band = curve.band
    assert band is not None
    fractions = np.array(FRACTIONS)
    np.testing.assert_allclose(band.x, BUDGET * fractions)
    np.testing.assert_allclose(band.mean, 0.30 + 0.25 * fractions)
    half = 4.3026527297 * 0.01 * fractions / np.sqrt(3)  # seeds differ by 0.01 at the whole budget
    np.testing.assert_allclose(band.high - band.mean, half, atol=1e-12)
    np.testing.assert_allclose(band.mean - band.low, half, atol=1e-12)


def test_the_band_ends_where_the_first_run_ends() -> None:
    long = np.array([0.0, 2.0, 4.0]), np.array([0.0, 2.0, 4.0])
    short = np.array([0.0, 3.0]), np.array([0.0, 6.0])
    band = curves.band([long, short])
    assert band is not None
    np.testing.assert_allclose(band.x, [0.0, 2.0, 3.0])
    np.testing.assert_allclose(band.mean, [0.0, 3.0, 4.5])
    assert curves.band([]) is None
    assert curves.band([long, (np.array([5.0, 6.0]), np.array([0.0, 0.0]))]) is None


def test_an_unfinished_run_is_drawn_but_enters_no_mean(three: Path) -> None:
    write_run(three, seed=9, status="failed", until=0.4, grids=False)
    (curve,) = drawn(three).curves
    assert curve.band is not None
    assert (curve.band.n, len(curve.finished), len(curve.unfinished)) == (3, 3, 1)
    assert curve.band.x[-1] == BUDGET


def test_only_unfinished_runs_still_give_a_figure(tmp_path: Path) -> None:
    write_run(tmp_path, status="running", until=0.4, grids=False)
    plot = drawn(tmp_path)
    assert plot.curves[0].band is None
    assert "diffusion_nft" in curves.svg(curves.draw(plot, styles(["diffusion_nft"])), "name")
    assert "no finished run, 1 unfinished" in curves.describe(plot)


def test_no_figure_without_two_evaluations_or_the_metric(tmp_path: Path) -> None:
    write_run(tmp_path, status="failed", until=0.0, grids=False)
    assert curves.plot("name", "GenEval", "geneval", FLOPS, comparison(tmp_path)) is None
    assert curves.plot("name", "?", "unknown", FLOPS, comparison(tmp_path)) is None


def test_the_base_has_a_line_at_every_guidance_and_the_curves_protocol_comes_first(three: Path) -> None:
    for path in three.rglob("evaluations.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            if row["weights"] == "base" and row["protocol"] == "final":
                row["metrics"]["geneval"] += 0.01  # other prompts
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves_own, only_final = drawn(three).base
    assert (curves_own.guidance, curves_own.score, curves_own.final) == (1.0, pytest.approx(0.30), "")
    assert (only_final.guidance, only_final.score, only_final.final) == (3.0, pytest.approx(0.46), HASHES["final"])
    figure = curves.draw(drawn(three), styles(["diffusion_nft"]))
    levels = {line.get_label(): line.get_ydata()[0] for line in figure.axes[0].lines}
    assert levels["base, guidance 1"] == pytest.approx(0.30)
    assert levels["base, guidance 3"] == pytest.approx(0.46)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["diffusion_nft", "base, guidance 1", "base, guidance 3"]


def test_final_protocols_that_differ_give_no_common_base_line(three: Path) -> None:
    write_run(three, seed=7, grids=False, run={"final_protocol_hash": "another"})
    assert [line.guidance for line in drawn(three).base] == [1.0]


def test_no_base_line_without_a_base(tmp_path: Path) -> None:
    folder = write_run(tmp_path, grids=False)
    rows = (folder / "evaluations.jsonl").read_text().splitlines(keepends=True)
    (folder / "evaluations.jsonl").write_text("".join(row for row in rows if '"weights": "base"' not in row))
    assert drawn(tmp_path).base == ()


def test_the_text_alternative_gives_the_numbers(three: Path) -> None:
    text = curves.describe(drawn(three))
    assert "diffusion_nft, mean of 3 runs: from 0.300 to 0.550 (95% interval 0.525 to 0.575) at 2e+13 FLOP." in text
    assert "Base at guidance 1: 0.300." in text
    assert "Base at guidance 3 (final protocol): 0.450." in text


def test_the_rows_are_what_is_drawn(three: Path) -> None:
    rows = list(curves.rows(drawn(three), {"trained_on": "geneval", "protocol_hash": HASHES["curve"]}))
    rows, base = rows[: len(FRACTIONS)], rows[len(FRACTIONS) :]
    assert [(row["method"], row["protocol_hash"], "cost" in row) for row in base] == [
        ("base, guidance 1", HASHES["curve"], False),
        ("base, guidance 3", HASHES["final"], False),
    ]
    assert [row["mean"] for row in base] == [pytest.approx(0.30), pytest.approx(0.45)]
    assert rows[-1]["mean"] == pytest.approx(0.55)
    assert {row["n"] for row in rows} == {3}


def test_the_same_numbers_give_the_same_bytes_and_names_stay_text(tmp_path: Path) -> None:
    write_run(tmp_path, variant="a=$x_1$<b>", grids=False)
    plot, style = drawn(tmp_path), styles(["diffusion_nft@a=$x_1$<b>"])
    first, second = (curves.svg(curves.draw(plot, style), "name") for _ in range(2))
    assert first == second
    assert "diffusion_nft@a=$x_1$&lt;b&gt;" in first
    assert curves.png(curves.draw(plot, style), 60) == curves.png(curves.draw(plot, style), 60)


def test_the_inline_figure_takes_the_colours_of_the_page(three: Path) -> None:
    element = curves.inline(curves.svg(curves.draw(drawn(three), styles(["diffusion_nft"])), "name"))
    assert element.startswith("<svg ")
    assert "var(--series-0)" in element
    assert "var(--ink)" in element
    assert not re.search(r"#[0-9a-f]{6}\b", element.replace("#000000", ""))
    assert not re.search(r'<g id=|<metadata|<svg[^>]* width="', element)
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", element)


@pytest.mark.parametrize(
    ("axis", "largest", "expected"),
    [
        (AXES[0], 2e13, (1e12, "Compute (TFLOP)")),
        (AXES[0], 3e18, (1e18, "Compute (EFLOP)")),
        (AXES[1], 5e6, (1e6, "NFE (million)")),
        (AXES[1], 24_000.0, (1e3, "NFE (thousand)")),
        (AXES[4], 400.0, (1.0, "Optimizer steps")),
        (AXES[5], 50_000.0, (1.0, "Seconds (method's clock)")),
    ],
)
def test_axis_scale(axis: curves.Axis, largest: float, expected: tuple[float, str]) -> None:
    assert curves.axis_scale(axis, largest) == expected


def test_known_methods_keep_their_colour_and_every_label_has_one() -> None:
    alone = styles(["flow_grpo"])["flow_grpo"]
    among = styles(["another", "diffusion_nft", "flow_grpo", "flow_grpo@kl=0"])
    assert among["flow_grpo"] == alone
    assert len({style.slot for style in among.values()}) == 4
    many = styles([f"method{index}" for index in range(20)])
    assert len({(style.slot, style.marker) for style in many.values()}) == 20
    crowded = styles([*curves.KNOWN, *(f"method{index}" for index in range(13))])
    assert [crowded[name].slot for name in curves.KNOWN] == list(range(7))
    assert len({(style.slot, style.marker) for style in crowded.values()}) == 20


def linear(colour: str) -> np.ndarray:
    channels = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    return np.array([c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels])


@pytest.mark.parametrize(("colours", "paper"), [(LIGHT, "#ffffff"), (DARK, "#14171b")])
def test_lines_contrast_with_the_page(colours: tuple[str, ...], paper: str) -> None:
    for colour in colours:  # WCAG 2.2, 1.4.11: graphics need 3:1
        luminances = (float(linear(each) @ [0.2126, 0.7152, 0.0722]) for each in (colour, paper))
        dim, bright = sorted(luminances)
        assert (bright + 0.05) / (dim + 0.05) >= 3, colour


# Linear RGB as seen without red, green or blue cones: Machado, Oliveira and Fernandes (2009), severity 1.
VISION = {
    "common": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB of linear RGB (D65): distances of 2.3 are just noticeable side by side."""
    x, y, z = np.cbrt(XYZ @ np.clip(rgb, 0, 1) / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("colours", [LIGHT, DARK])
def test_methods_are_told_apart_with_any_colour_vision(colours: tuple[str, ...], vision: str) -> None:
    seen = [lab(np.array(VISION[vision]) @ linear(colour)) for colour in colours]
    distances = [np.linalg.norm(a - b) for index, a in enumerate(seen) for b in seen[:index]]
    assert min(distances) > 10
