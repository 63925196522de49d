"""GenEval on photographs is recorded as `geneval_hf`, without exact scenes: it takes GenEval's place everywhere."""

import json
from pathlib import Path

import pandas as pd
import pytest

from alignbench.report import across, claims, hacking, matched, tables, verdict
from alignbench.report.answer import answer
from alignbench.report.claims import Claim, Measure
from alignbench.report.data import Records, load
from alignbench.report.page import build
from alignbench.report.tables import Table
from alignbench.report.targets import reaching, stated
from tests.report.synthetic import BUDGET, TAGS, write_run

TITLE = "GenEval (hub detector)"


def photographed(folder: Path) -> None:
    """Turn a run of the embedded world into one on photographs, as its scorers would have recorded it."""
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    for row in rows:
        found = row["metrics"]
        row["metrics"] = {
            name.replace("geneval", "geneval_hf"): value
            for name, value in found.items()
            if name not in ("exact_scene", "judge")
        }
        row["standard_errors"] = {"geneval_hf": 0.012}
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    for method in ("diffusion_nft", "flow_grpo"):
        for seed in range(3):
            photographed(write_run(root, method, seed=seed, grids=seed == 0, run={"targets": {"geneval": 0.44}}))
    return root


@pytest.fixture(scope="module")
def records(root: Path) -> Records:
    return load([root])


def titles(table: Table) -> list[str]:
    return [column.title for column in table.columns]


def numbers(table: Table, method: str, metric: str) -> dict[str, float]:
    return next(row for row in table.records if (row["method"], row["metric"], row["guidance"]) == (method, metric, 1))


def test_the_task_s_target_and_constant_are_about_the_recorded_name(records: Records) -> None:
    runs = records.studies[0].comparisons[0].of("diffusion_nft")
    assert stated(runs[0]) == {"geneval_hf": 0.44}
    found = reaching(runs, "geneval_hf", 0.44)
    assert found is not None
    assert [time.time for time in found.times] == pytest.approx([0.6 * BUDGET] * 3)
    assert across.constant(runs[0]) == ("geneval_hf", 1.0)
    (row, _) = across.methods(records.studies[0]).records
    assert row["final_mean"] == pytest.approx(0.25 / 0.70)


def test_both_recorded_names_are_left_as_they_are(tmp_path: Path) -> None:
    (run,) = load([write_run(tmp_path, grids=False)]).runs
    assert run.measured("geneval") == "geneval"
    assert run.measured("unknown") == "unknown"


def test_the_headline_shows_it_in_geneval_s_place(records: Records) -> None:
    (study,) = records.studies
    for table in (
        *tables.headline(study, records.protocols),
        *tables.efficiency(study, records.protocols),
        *matched.matched(study, records.protocols),
    ):
        assert TITLE in titles(table)
        assert not {"GenEval (official)", "Exact scene"} & set(titles(table))
    (headline,) = tables.headline(study, records.protocols)
    found = numbers(headline, "diffusion_nft", "geneval_hf")
    assert found["mean"] == pytest.approx(0.55)
    assert found["difference"] == pytest.approx(0.25)
    (efficiency,) = tables.efficiency(study, records.protocols)
    assert f"{TITLE} ≥ 0.44" in titles(efficiency)
    assert efficiency.records[0]["geneval_hf_0.44_reached"] == 3


def test_it_has_its_tags(records: Records) -> None:
    (table,) = tables.geneval(records.studies[0], records.protocols)
    named = [tag.replace("_", " ") for tag in TAGS]
    assert titles(table)[3:11] == [TITLE, *named, "GenEval (hub detector, strict)"]
    assert {column.note for column in table.columns[4:10]} == {""}  # nothing is known about what was seen
    assert numbers(table, "flow_grpo", "geneval_hf/color_attr")["mean"] == pytest.approx(0.40 - 0.15)
    assert "geneval" not in {row["metric"] for row in table.records}


def test_the_verdict_and_the_opening_are_about_it(records: Records) -> None:
    (found,) = verdict.verdicts(records.studies[0], records.protocols)
    assert TITLE in titles(found.table)
    assert found.table.groups[0].title == f"trained on geneval, target {TITLE} ≥ 0.44"
    assert found.table.groups[0].rows[2].cells[6].text == "3/3"
    opening = answer(records)
    assert opening is not None
    assert opening.question == f"Which method for {TITLE} at 20 TFLOP, and what does it break?"
    assert opening.sentences[0].startswith("diffusion_nft: it ends at 0.550, +0.250")


def test_claims_about_geneval_are_measured_by_it(records: Records) -> None:
    for quantity, against, mean in (
        ("gain", "", 0.25),
        ("difference", "flow_grpo", 0.15),
        ("area", "flow_grpo", 0.075),
    ):
        measure = Measure(quantity, "diffusion_nft", against, metric="geneval")
        (found,) = claims.findings(records, [Claim("p", "s", "c", "x", "w", "n", measure)])
        assert found.ruling == "supported"
        assert found.measured.startswith(TITLE)
        assert found.interval is not None
        assert found.interval.mean == pytest.approx(mean)


def test_figures_and_captions_show_it(root: Path, records: Records, tmp_path: Path) -> None:
    metrics = [each.metric for each in hacking.figures(records.studies[0].comparisons[0])]
    assert metrics == ["geneval_hf", "pickscore", "diversity", "drift"]
    page = build([root], tmp_path, lambda _: None)
    plotted = pd.read_csv(tmp_path / "tables/curves.csv")
    assert set(plotted["metric"]) == {"reward", "geneval_hf"}
    assert "base, guidance 1, GenEval (hub detector) 0.300</figcaption>" in page.read_text()
