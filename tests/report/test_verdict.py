import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from alignbench.report import verdict
from alignbench.report.data import load
from alignbench.report.statistics import Interval, SpeedUp
from alignbench.report.tables import TIMES, Cell, Row, Table
from tests.report.synthetic import HASHES, PROTOCOLS, write_comparison, write_run

HALF = 4.3026527297 * 0.01 / math.sqrt(3)  # of three seeds that differ by 0.01


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change every evaluation of a run."""
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    for row in rows:
        change(row)
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def only(root: Path) -> verdict.Verdict:
    records = load([root])
    (found,) = verdict.verdicts(records.studies[0], records.protocols)
    return found


def line(table: Table, group: int, name: str, guidance: str = "1") -> Row:
    return next(row for row in table.groups[group].rows if [c.text for c in row.cells[:2]] == [name, guidance])


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    write_comparison(root)
    return root


def test_the_table_follows_the_closed_form(compared: Path) -> None:
    table = only(compared).table
    titles = [(column.title, column.note) for column in table.columns]
    assert table.groups[1].title == "trained on geneval, target GenEval (official) ≥ 0.45"
    cells = dict(zip(titles, line(table, 1, "diffusion_nft").cells, strict=True))
    assert cells["Trained reward", ""].text == "0.530"  # strict: 0.30 + 0.25 - 0.02
    assert cells["\N{MINUS SIGN} base", ""] == Cell("+0.250", f"± {HALF:.3f}", bold=True)
    assert cells["Exact scene", "\N{MINUS SIGN} base"] == Cell("\N{MINUS SIGN}0.120", f"± {HALF:.3f}", bold=True)
    assert cells["Second judge", "\N{MINUS SIGN} base"] == Cell("+0.000", "± 0.000")
    assert cells["Target", "reached"].text == "3/3"
    assert cells["Drift", ""].text == "0.020"
    assert cells["Diversity", "\N{MINUS SIGN} base"].text == "\N{MINUS SIGN}0.100"
    assert not cells["Diversity", "\N{MINUS SIGN} base"].bold  # the same in every run: no spread, no evidence
    assert cells["Runs", ""] == Cell("3", "preview")


def test_the_trained_reward_is_not_held_out(compared: Path) -> None:
    table = only(compared).table
    assert table.groups[0].title.startswith("trained on exact_scene")
    cells = line(table, 0, "diffusion_nft").cells
    titles = [column.title for column in table.columns]
    assert cells[titles.index("Exact scene")].text == "trained"
    assert cells[titles.index("GenEval (official)")].text == "+0.140"


def test_the_speed_up_is_a_bound_where_only_the_slower_method_missed(compared: Path) -> None:
    table = only(compared).table
    titles = [column.title for column in table.columns]
    fast, slow = (line(table, 1, method).cells[titles.index("Speed-up")] for method in ("diffusion_nft", "flow_grpo"))
    assert slow == Cell("slowest", "reference")
    # 0.45 is passed at f = 0.15 / (0.25 + offset), evaluated at 0.7, 0.6 (or 0.7) and 0.6 of the budget
    assert fast.text in (f"≥ 1.50{TIMES}", f"≥ 1.58{TIMES}")
    assert fast.bold
    record = next(r for r in table.records if (r["trained_on"], r["method"]) == ("geneval", "diffusion_nft"))
    assert (record["speed_up_bound"], record["reference"]) == ("≥", "flow_grpo")
    assert record["speed_up_low"] > 1
    # trained on exact scenes: 0.44 at the end, 0.45 with the best seed alone
    assert line(table, 0, "diffusion_nft").cells[titles.index("Speed-up")].text in ("n/a", "slowest")


@pytest.mark.parametrize(
    ("bound", "low", "text", "bold"),
    [
        ("", 1.1, f"2.00{TIMES}", True),
        ("", 0.9, f"2.00{TIMES}", False),
        ("≥", 1.1, f"≥ 2.00{TIMES}", True),
        ("≤", 1.1, f"≤ 2.00{TIMES}", False),
    ],
)
def test_a_speed_up_is_bold_where_interval_and_bound_allow(bound: str, low: float, text: str, bold: bool) -> None:
    cell = verdict.speed_cell(SpeedUp(Interval(2.0, low, 3.0, 5), bound, (5, 5, 5, 5)))
    assert (cell.text, cell.detail, cell.bold) == (text, f"[{low:.2f}, 3.00]", bold)


def test_words_where_everything_is_clear(compared: Path) -> None:
    said = only(compared).sentences
    assert any(
        "Trained on geneval: diffusion_nft (+0.250 ± 0.025) and flow_grpo (+0.100 ± 0.025) raise the trained reward "
        "above the base (n = 3, a preview)." in sentence
        for sentence in said
    )
    assert "diffusion_nft ends above the other method, beyond the 95% interval of the difference." in said
    assert "The untrained base at guidance 3 scores 0.430: only diffusion_nft is shown to be above that." in said


def noisy(root: Path, gains: Mapping[str, tuple[float, ...]]) -> Path:
    """Runs whose trained reward at the end is 0.3 plus a gain for each seed."""
    for method, by_seed in gains.items():
        for seed, gain in enumerate(by_seed):
            folder = write_run(root, method, seed=seed, grids=False)

            def change(row: dict[str, Any], gain: float = gain) -> None:
                row["metrics"]["reward"] = 0.3 + gain * row["fraction"] + (0.1 if row["guidance"] > 1 else 0)

            rewrite(folder, change)
    return root


def test_words_where_nothing_can_be_told(tmp_path: Path) -> None:
    gains = {"diffusion_nft": (0.3, -0.1, 0.1), "flow_grpo": (0.1, -0.2, 0.2)}
    said = only(noisy(tmp_path, gains)).sentences
    assert said == (
        "Trained on geneval: for diffusion_nft and flow_grpo a change from the base cannot be told from none "
        "(n = 3, a preview).",
        "diffusion_nft has the highest mean, but with n = 3 it cannot be told apart from the other method.",
        "The untrained base at guidance 3 scores 0.400: no method at guidance 1 is shown to be above that.",
    )


def test_words_of_three_methods(tmp_path: Path) -> None:
    gains = {"awm": (0.30, 0.31, 0.32), "diffusion_nft": (0.31, 0.32, 0.33), "flow_grpo": (-0.1, -0.12, -0.11)}
    first, second, third = only(noisy(tmp_path, gains)).sentences
    assert "awm (+0.310 ± 0.025) and diffusion_nft (+0.320 ± 0.025) raise the trained reward above the base" in first
    assert "flow_grpo (\N{MINUS SIGN}0.110 ± 0.025) lowers it (n = 3, a preview)." in first
    assert second == "diffusion_nft has the highest mean; with n = 3 it cannot be told apart from awm."
    assert third.endswith("only awm and diffusion_nft are shown to be above that.")


def test_single_runs_and_no_runs_give_no_verdict(tmp_path: Path) -> None:
    write_run(tmp_path / "one", grids=False)
    assert only(tmp_path / "one").sentences == (
        "Trained on geneval: not decided: diffusion_nft has the highest mean, but one run has no interval: a preview.",
        "The untrained base at guidance 3 scores 0.430: no method at guidance 1 is shown to be above that.",
    )
    write_run(tmp_path / "none", status="failed", until=0.3, grids=False)
    found = only(tmp_path / "none")
    assert found.sentences == ("Trained on geneval: no finished run, no verdict.",)
    assert found.table.groups[0].rows[-1].cells[-1] == Cell("0", "none finished", flag=True)


def test_a_single_run_is_named_apart_and_spoils_nothing(tmp_path: Path) -> None:
    gains = {
        "diffusion_nft": (0.30, 0.31, 0.32, 0.33, 0.34),
        "flow_grpo": (0.05, 0.06, 0.07, 0.08, 0.09),
        "awm": (0.9,),
    }
    found = only(noisy(tmp_path, gains))
    half = 2.7764451052 * math.sqrt(2.5e-4 / 5)
    assert found.sentences == (
        f"Trained on geneval: diffusion_nft (+0.320 ± {half:.3f}) and flow_grpo (+0.070 ± {half:.3f}) raise the "
        "trained reward above the base (n = 5).",
        "diffusion_nft ends above the other method, beyond the 95% interval of the difference.",
        "Not in the choice, for single runs have no interval: awm.",
        "The untrained base at guidance 3 scores 0.400: only diffusion_nft is shown to be above that.",
    )
    scores = {name: line(found.table, 0, name).cells for name in gains}
    assert {name: cells[2].bold for name, cells in scores.items()} == {
        "diffusion_nft": True, "flow_grpo": False, "awm": False,
    }  # fmt: skip
    assert scores["awm"][-1] == Cell("1", "preview, one seed")


def test_a_single_run_is_no_reference_for_speed(tmp_path: Path) -> None:
    for method, seeds in (("awm", 1), ("diffusion_nft", 3), ("flow_grpo", 3)):  # awm and flow_grpo miss the target
        for seed in range(seeds):
            write_run(tmp_path, method, seed=seed, grids=False)
    table = only(tmp_path).table
    place = [column.title for column in table.columns].index("Speed-up")
    assert line(table, 0, "flow_grpo").cells[place] == Cell("slowest", "reference")
    assert line(table, 0, "diffusion_nft").cells[place].bold


def test_single_runs_of_several_methods_have_a_highest_mean_and_no_winner(tmp_path: Path) -> None:
    first, *_ = only(noisy(tmp_path, {"diffusion_nft": (0.1,), "flow_grpo": (0.3,)})).sentences
    assert first == (
        "Trained on geneval: not decided: flow_grpo has the highest mean, but one run each has no interval: a preview."
    )


def test_different_budgets_decide_nothing(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path, "diffusion_nft", seed=seed, grids=False)
        write_run(tmp_path, "flow_grpo", seed=seed, grids=False, run={"budget": {"flops": 1e13}})
    found = only(tmp_path)
    budgets = "10 TFLOP: flow_grpo; 20 TFLOP: diffusion_nft"
    assert found.sentences[1] == (
        f"Not decided: the budgets differ ({budgets}), so final scores are not matched and nothing is bold."
    )
    assert not any("ends above" in sentence for sentence in found.sentences)
    assert not any(cell.bold for row in found.table.groups[0].rows for cell in row.cells)
    assert found.table.notes == (
        f"Runs trained on geneval had different budgets ({budgets}): their numbers are not matched.",
    )


def test_protocols_stand_apart(tmp_path: Path) -> None:
    write_run(tmp_path, seed=0, grids=False)
    other = PROTOCOLS["final"] | {"steps": 40}
    write_run(tmp_path, seed=1, run={"final_protocol": other, "final_protocol_hash": "0ther0000003"}, grids=False)
    records = load([tmp_path])
    found = verdict.verdicts(records.studies[0], records.protocols)
    assert [HASHES["final"] in each.table.title for each in found].count(True) == 1
    assert all("Do not compare" in each.table.notes[0] for each in found)
