import io
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from alignbench.report import provenance, tables
from alignbench.report.data import load
from alignbench.report.tables import Cell, Column, Group, Row, Table
from tests.report.synthetic import HASHES, PROTOCOLS, write_comparison, write_run

HALF = 4.3026527297 * 0.01 / math.sqrt(3)  # of three seeds that differ by 0.01


def row(table: Table, reward: str, method: str, guidance: str = "1") -> dict[str, Cell]:
    """Cells of one line by the heading of their column; the n-th of a heading that repeats is "heading n"."""
    group = next(group for group in table.groups if group.title == f"trained on {reward}")
    cells = next(r.cells for r in group.rows if [c.text for c in r.cells[:2]] == [method, guidance])
    named: dict[str, Cell] = {}
    for column, cell in zip(table.columns, cells, strict=True):
        repeats = sum(name.split(" #")[0] == column.title for name in named)
        named[f"{column.title} #{repeats + 1}" if repeats else column.title] = cell
    return named


def headline(root: Path) -> list[Table]:
    records = load([root])
    return [table for study in records.studies for table in tables.headline(study, records.protocols)]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    for reward in ("geneval", "exact_scene"):
        for method in ("diffusion_nft", "flow_grpo"):
            for seed in range(3):
                write_run(root, method, reward, seed, grids=False)
    return root


MINUS_BASE = "\N{MINUS SIGN} base"


def test_headline_scores_and_differences_follow_the_closed_form(compared: Path) -> None:
    (table,) = headline(compared)
    found = row(table, "exact_scene", "diffusion_nft")
    assert (found["Exact scene"].text, found["Exact scene"].detail) == ("0.380", f"± {HALF:.3f}")
    assert (found[f"{MINUS_BASE} #3"].text, found[f"{MINUS_BASE} #3"].detail) == ("+0.180", f"± {HALF:.3f}")
    assert found["GenEval (official)"].text == "0.440"
    assert (found["Runs"].text, found["Runs"].detail) == ("3", "preview")
    guided = row(table, "exact_scene", "diffusion_nft", "3")  # 0.2 + 0.15 (1 - 0.8) + 0.18 against 0.35
    assert guided["Exact scene"].text == "0.410"
    assert guided[f"{MINUS_BASE} #3"].text == "+0.060"


def test_genevals_official_score_and_exact_scene_stand_side_by_side(compared: Path) -> None:
    records = load([compared])
    for table in (*headline(compared), *tables.geneval(records.studies[0], records.protocols)):
        titles = [column.title for column in table.columns]
        assert {"GenEval (official)", "Exact scene"} <= set(titles)


def test_the_base_is_named_with_guidance_and_its_cost(compared: Path) -> None:
    (table,) = headline(compared)
    plain, guided = row(table, "geneval", "base", "1"), row(table, "geneval", "base", "3")
    assert (plain["NFE"].text, guided["NFE"].text) == ("10", "20")
    assert (plain["GenEval (official)"].text, plain["GenEval (official)"].detail) == ("0.300", "se 0.012")
    assert guided["GenEval (official)"].text == "0.450"


def test_trained_on_and_evaluated_on_are_one_table(compared: Path) -> None:
    (table,) = headline(compared)
    assert table.title.startswith(f"first, shapes: trained on {tables.TIMES} evaluated on, under protocol final")
    metrics = ["Trained reward", "GenEval (official)", "Exact scene", "PickScore", "Second judge"]
    assert [column.title for column in table.columns[3:-1:2]] == metrics
    assert [group.title for group in table.groups] == ["trained on exact_scene", "trained on geneval"]
    found = row(table, "geneval", "diffusion_nft")
    assert (found["PickScore"].text, found[f"{MINUS_BASE} #4"].text) == ("21.400", "+0.400")
    assert (found["Second judge"].text, found[f"{MINUS_BASE} #5"].text) == ("0.600", "+0.000")
    for group in table.groups:
        assert [[cell.text for cell in each.cells[:2]] for each in group.rows] == [
            ["base", "1"], ["base", "3"],
            ["diffusion_nft", "1"], ["flow_grpo", "1"], ["diffusion_nft", "3"], ["flow_grpo", "3"],
        ]  # fmt: skip


def test_a_trained_reward_that_has_a_column_has_no_second_one(tmp_path: Path) -> None:
    write_run(tmp_path, reward="exact_scene", grids=False)
    (table,) = headline(tmp_path)
    titles = [column.title for column in table.columns[3:-1:2]]
    assert titles == ["GenEval (official)", "Exact scene", "PickScore", "Second judge"]
    assert row(table, "exact_scene", "diffusion_nft")[f"{MINUS_BASE} #2"].text == "+0.170"  # 0.18, the seed's offset


def test_single_runs_are_no_rivals_for_the_best(tmp_path: Path) -> None:
    for method, seeds in (("diffusion_nft", 5), ("flow_grpo", 5), ("unknown", 1)):
        for seed in range(seeds):
            write_run(tmp_path, method, seed=seed, grids=False)
    (table,) = headline(tmp_path)
    bold = {name: row(table, "geneval", name)["GenEval (official)"].bold for name in ("diffusion_nft", "unknown")}
    assert bold == {"diffusion_nft": True, "unknown": False}


def test_bold_needs_the_interval(compared: Path) -> None:
    (table,) = headline(compared)
    better = row(table, "geneval", "diffusion_nft")
    assert better["GenEval (official)"].bold  # 0.55 +- 0.025 against 0.40 and the base's 0.30 and 0.45
    assert better[MINUS_BASE].bold
    assert not row(table, "geneval", "flow_grpo")["GenEval (official)"].bold
    worse = row(table, "geneval", "diffusion_nft")
    assert worse[f"{MINUS_BASE} #3"].bold  # exact scenes fell, beyond the interval
    assert not worse["Exact scene"].bold
    slight = row(table, "geneval", "flow_grpo")
    assert slight[f"{MINUS_BASE} #3"].text == "\N{MINUS SIGN}0.020"
    assert not slight[f"{MINUS_BASE} #3"].bold  # 0.020 < 0.0248


def test_a_score_below_the_guided_base_is_not_bold(tmp_path: Path) -> None:
    for method, until in (("flow_grpo", "geneval"), ("unknown", "geneval")):
        for seed in range(3):
            write_run(tmp_path, method, until, seed, grids=False)
    (table,) = headline(tmp_path)  # both at 0.40, above the base's 0.30, below its 0.45 at guidance 3
    assert not any(cell.bold for cell in (row(table, "geneval", "flow_grpo")["GenEval (official)"],))


@pytest.mark.parametrize(("seeds", "detail"), [(1, "preview, one seed"), (2, "preview"), (4, "preview"), (5, "")])
def test_few_runs_are_labelled(tmp_path: Path, seeds: int, detail: str) -> None:
    for seed in range(seeds):
        write_run(tmp_path, seed=seed, grids=False)
    found = row(headline(tmp_path)[0], "geneval", "diffusion_nft")
    assert (found["Runs"].text, found["Runs"].detail) == (str(seeds), detail)
    assert (found["GenEval (official)"].detail == "") is (seeds == 1)
    assert seeds > 1 or not found[MINUS_BASE].bold


def test_protocols_are_never_mixed(tmp_path: Path) -> None:
    write_run(tmp_path, seed=0, grids=False)
    other = PROTOCOLS["final"] | {"steps": 40}
    write_run(tmp_path, seed=1, run={"final_protocol": other, "final_protocol_hash": "0ther0000003"}, grids=False)
    found = headline(tmp_path)
    assert len(found) == 2
    assert {row(table, "geneval", "diffusion_nft")["Runs"].text for table in found} == {"1"}
    assert {row(table, "geneval", "diffusion_nft")["NFE"].text for table in found} == {"10", "40"}
    for table in found:
        assert any("2 protocols" in note and "Do not compare" in note for note in table.notes)
    assert [HASHES["final"] in table.title for table in found].count(True) == 1


def test_differing_budgets_and_bases_are_noted(tmp_path: Path) -> None:
    write_run(tmp_path, seed=0, grids=False)
    folder = write_run(tmp_path, seed=1, run={"budget": {"flops": 1e13}}, grids=False)
    text = (folder / "evaluations.jsonl").read_text()
    first, rest = text.split("\n", 1)
    changed = json.loads(first)
    changed["metrics"]["geneval"] = 0.31
    (folder / "evaluations.jsonl").write_text(json.dumps(changed) + "\n" + rest)
    (table,) = headline(tmp_path)
    assert any("different budgets" in note for note in table.notes)
    assert any("differ between runs by up to 0.01" in note for note in table.notes)


def test_different_budgets_are_noted_wherever_a_number_depends_on_them(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path, "diffusion_nft", seed=seed, grids=False)
        write_run(tmp_path, "flow_grpo", seed=seed, run={"budget": {"iterations": 100}}, grids=False)
    records = load([tmp_path])
    (study,) = records.studies
    protocols = records.protocols
    note = (
        "Runs trained on geneval had different budgets (100 iterations: flow_grpo; 20 TFLOP: diffusion_nft): "
        "their numbers are not matched."
    )
    found = [*tables.headline(study, protocols), *tables.efficiency(study, protocols)]
    found += [*tables.geneval(study, protocols), tables.cost(study)]
    assert [note in table.notes for table in found] == [True] * 4
    best = row(found[0], "geneval", "diffusion_nft")["GenEval (official)"]
    assert not best.bold  # above flow_grpo, at another budget


def test_different_budgets_of_two_trained_rewards_are_noted(tmp_path: Path) -> None:
    write_run(tmp_path, grids=False)
    write_run(tmp_path, reward="exact_scene", run={"budget": {"flops": 1e13}}, grids=False)
    (table,) = headline(tmp_path)
    assert table.notes == (
        "Trained rewards had different budgets (exact_scene: 10 TFLOP; geneval: 20 TFLOP): "
        "across them, numbers are not matched.",
    )


def test_the_base_alone_has_no_budget_to_differ_in(tmp_path: Path) -> None:
    write_run(tmp_path, grids=False)
    folder = write_run(tmp_path, "base", run={"kind": "evaluated", "budget": None}, grids=False)
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    kept = [each for each in rows if each["weights"] == "base"]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(each) + "\n" for each in kept))
    (table,) = headline(tmp_path)
    assert table.notes == ()


def test_a_method_without_a_finished_run_keeps_its_row(tmp_path: Path) -> None:
    write_run(tmp_path, grids=False)
    write_run(tmp_path, "flow_grpo", status="failed", until=0.3, grids=False)
    (table,) = headline(tmp_path)
    rows = {r.cells[0].text: r.cells[-1] for r in table.groups[0].rows}
    assert rows["flow_grpo"] == Cell("0", "none finished", flag=True)


def test_a_model_without_exact_scenes_shows_a_dash(tmp_path: Path) -> None:
    folder = write_run(tmp_path, grids=False)
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    for each in rows:
        del each["metrics"]["exact_scene"]
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    found = row(headline(tmp_path)[0], "geneval", "diffusion_nft")
    assert (found["Exact scene"].text, found[f"{MINUS_BASE} #3"].text) == (tables.DASH, tables.DASH)


def test_the_csv_holds_the_numbers_of_the_table(compared: Path) -> None:
    (table,) = headline(compared)
    frame = pd.read_csv(io.StringIO(tables.csv(table.records)))
    chosen = frame.query("trained_on == 'exact_scene' and method == 'diffusion_nft' and guidance == 1")
    exact = chosen.set_index("metric").loc["exact_scene"]
    assert exact["mean"] == pytest.approx(0.38)
    assert exact["high"] - exact["mean"] == pytest.approx(HALF)
    assert exact["difference"] == pytest.approx(0.18)
    assert exact["difference_low"] == pytest.approx(0.18 - HALF)
    base = frame.query("method == 'base'")
    assert base["low"].isna().all()


def test_seen_tags_and_columns_of_geneval(compared: Path) -> None:
    records = load([compared])
    (table,) = tables.geneval(records.studies[0], records.protocols)
    notes = {column.title: column.note for column in table.columns}
    assert [title for title, note in notes.items() if note == "seen"] == ["single object", "counting"]
    assert list(notes)[10:] == [
        "GenEval (strict)", "Exact scene", "Objects an image", "Invalid share", "Diversity", "Drift", "Runs",
    ]  # fmt: skip
    found = row(table, "geneval", "diffusion_nft")
    assert found["single object"].text == "0.650"  # 0.55 + 0.05 * 2
    assert found["color attr"].text == "0.400"
    assert row(table, "geneval", "base", "3")["position"].text == "0.350"


def test_efficiency_by_hand(compared: Path) -> None:
    records = load([compared])
    (table,) = tables.efficiency(records.studies[0], records.protocols)
    cells = {r.label: r.cells for r in table.groups[1].rows}
    assert table.groups[1].title == "trained on geneval"
    nft, grpo = cells["diffusion_nft"], cells["flow_grpo"]
    assert nft[2].text == "0.425"  # straight line from 0.30 to 0.55
    assert (nft[4].text, grpo[4].text) == ("3/3", "0/3")
    # 0.45 is passed at f = 0.15 / (0.25 + offset): 0.625, 0.6 and 0.577, evaluated at 0.7, 0.6 (or 0.7) and 0.6
    assert nft[5].text in ("12.7 TFLOP", "13.3 TFLOP")
    assert grpo[5].text == "not reached"
    record = next(r for r in table.records if (r["trained_on"], r["method"]) == ("geneval", "flow_grpo"))
    assert record["geneval_0.45_mean"] == 2e13  # censored at the budget


def test_cost_is_the_mean_of_finished_runs(compared: Path) -> None:
    table = tables.cost(load([compared]).studies[0])
    cells = dict(zip([(c.title, c.note) for c in table.columns], table.groups[0].rows[1].cells, strict=True))
    assert cells["Method", ""].text == "flow_grpo"
    assert cells["FLOP", ""].text == "20 T"
    assert cells["NFE", ""].text == "240,000"
    assert cells["Optimizer steps", ""].text == "400"
    assert cells["FLOP", "evaluation"].text == "2 T"  # twenty evaluations, not in the total
    assert cells["Seconds", "rollout"].text == "240"
    assert cells["Seconds", "method's clock"].text == "420"
    assert cells["Peak memory", "MB"].text == "910"
    assert tables.OTHER_WORK in table.notes


def test_seconds_of_different_hardware_are_left_out(tmp_path: Path) -> None:
    write_run(tmp_path, seed=0, grids=False)
    write_run(tmp_path, seed=1, run={"threads": 2}, grids=False)
    table = tables.cost(load([tmp_path]).studies[0])
    assert not any(column.title == "Seconds" for column in table.columns)
    assert any("did not share one hardware" in note for note in table.notes)
    assert tables.OTHER_WORK not in table.notes


def differing(root: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for record in provenance.differences(load([root]).studies[0]).records:
        found.setdefault(str(record["setting"]), []).append(str(record["value"]))
    return found


def test_runs_that_differ_in_method_reward_and_seed_only(compared: Path) -> None:
    assert differing(compared) == {}


@pytest.mark.parametrize(
    ("changes", "setting", "values"),
    [
        ({"config": {"evaluation": {"steps": 12}}}, "evaluation.steps", ["10", "12"]),
        ({"config": {"new": True}}, "new", ["(absent)", "true"]),
        ({"run": {"git": {"commit": "fff", "dirty": False}}}, "git.commit", ["0123456789abcdef", "fff"]),
        ({"run": {"threads": 2}}, "threads", ["1", "2"]),
        ({"run": {"budget": {"flops": 1.0}}}, "budget.flops", ["1.0", "20000000000000.0"]),
        ({"run": {"targets": {"geneval": 0.1}}}, "targets.geneval (within geneval)", ["0.1", "0.45"]),
        (
            {"config": {"method": {"name": "diffusion_nft", "learning_rate": 1.0}}},
            "method.learning_rate (within diffusion_nft on geneval)",
            ["0.0003", "1.0"],
        ),
    ],
)
def test_a_difference_is_flagged(tmp_path: Path, changes: Mapping[str, Any], setting: str, values: list[str]) -> None:
    write_run(tmp_path, seed=0, grids=False)
    write_run(tmp_path, seed=1, grids=False, **changes)
    assert differing(tmp_path) == {setting: values}
    (group,) = provenance.differences(load([tmp_path]).studies[0]).groups
    assert all(each.cells[1].flag for each in group.rows)


def test_own_settings_stand_side_by_side(compared: Path) -> None:
    table = provenance.own_settings(load([compared]).studies[0])
    cells = {r.cells[0].text: [c.text for c in r.cells[1:]] for r in table.groups[0].rows}
    assert cells["method.learning_rate"] == ["0.0003", "0.0002"]


def test_every_run_is_listed_with_its_message(tmp_path: Path) -> None:
    write_comparison(tmp_path, seeds=1)
    write_run(tmp_path, seed=5, status="out_of_memory", message="needs 3 GB", until=0.2, grids=False)
    (write_run(tmp_path, seed=6, grids=False) / "run.json").write_text("nothing")
    table = provenance.runs(load([tmp_path]))
    cells = {r.cells[0].text: r.cells for r in table.groups[0].rows}
    assert len(cells) == 6
    failed = cells["first/shapes/geneval/diffusion_nft/seed5"]
    assert (failed[1], failed[2].text, failed[5].text) == (Cell("out_of_memory", flag=True), "20%", "needs 3 GB")
    assert cells["first/shapes/geneval/diffusion_nft/seed6"][1] == Cell("left out", flag=True)


def test_markdown() -> None:
    cells = (Cell("a|b\n<c>"), Cell("0.5", "± 0.1", bold=True))
    table = Table(
        "t", "A | title", (Column("Name", numeric=False), Column("x", "seen")), (Group("g", (Row(cells),)),), ("n",)
    )
    assert tables.markdown(table) == (
        "### A \\| title\n\n| Name | x (seen) |\n| --- | ---: |\n| *g* | |\n"
        "| a\\|b &lt;c&gt; | **0.5 ± 0.1** |\n\n* n\n"
    )


def test_latex() -> None:
    cells = (Cell(r"a_b&c\d<%>"), Cell("\N{MINUS SIGN}0.5", "± 0.1", bold=True))
    columns = (Column("Name", numeric=False), Column("≥ $x", "seen"))
    table = Table("t", "A\ntitle", columns, (Group("g_h", (Row(cells),)),), ("50%",))
    assert tables.latex(table).splitlines() == [
        "% A title",
        r"\begin{tabular}{lr}",
        r"\hline",
        r"Name & $\geq$ \$x (seen) \\",
        r"\hline",
        r"\multicolumn{2}{l}{\emph{g\_h}} \\",
        r"a\_b\&c\textbackslash{}d\textless{}\%\textgreater{} & \textbf{$-$0.5 $\pm$ 0.1} \\",
        r"\hline",
        r"\end{tabular}",
        "% 50%",
    ]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.12345, "0.123"), (-0.5, "\N{MINUS SIGN}0.500"), (123.456, "123.5"), (math.nan, tables.DASH)],
)
def test_number(value: float, text: str) -> None:
    assert tables.number(value) == text


def test_counts() -> None:
    assert tables.count(1234567) == "1,234,567"
    assert tables.flops(1.234e13) == "12.3 T"
    assert tables.passes({"steps": 10}, 1.0) == "10"
    assert tables.passes({"steps": 10}, 4.5) == "20"
    assert tables.passes({}, 4.5) == tables.DASH
