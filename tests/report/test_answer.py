import json
import math
from pathlib import Path

import pytest

from alignbench.report.answer import Answer, answer, budget_text
from alignbench.report.data import load
from tests.report.synthetic import BUDGET, GAINS, write_comparison, write_run

HALF = 4.3026527297 * 0.01 / math.sqrt(3)  # of three seeds that differ by 0.01
MINUS = "\N{MINUS SIGN}"


def asked(root: Path) -> Answer:
    found = answer(load([root]))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    write_comparison(root)
    return root


def test_geneval_opens_the_page_at_its_budget(compared: Path) -> None:
    found = asked(compared)
    assert found.question == "Which method for GenEval (official) at 20 TFLOP, and what does it break?"
    assert found.table.title == "first, shapes: trained on geneval"


def test_the_words_name_the_method_its_gain_and_what_it_breaks(compared: Path) -> None:
    choice, broken, guided = asked(compared).sentences
    assert choice == (
        f"diffusion_nft: it ends at 0.550, +0.250 ± {HALF:.3f} from the base, above the other method beyond the 95% "
        "interval (n = 3 runs a method, a preview)."
    )
    guided_too = f"at guidance 3 exact scene {MINUS}0.240 ± {HALF:.3f}"  # less of the 0.15 that guidance brings
    assert broken == f"What diffusion_nft breaks: exact scene {MINUS}0.120 ± {HALF:.3f}; {guided_too}."
    assert guided.endswith("only diffusion_nft is shown to be above that.")  # 0.525 to 0.575 against 0.450


def test_the_table_has_the_base_first_then_methods_by_their_mean(compared: Path) -> None:
    (group,) = asked(compared).table.groups
    assert [row.cells[0].text for row in group.rows] == ["base", "base", "diffusion_nft", "flow_grpo"]
    _, final, change, quarter, half, broken, drift, runs = group.rows[2].cells
    assert (final.text, final.detail, final.bold) == ("0.550", f"± {HALF:.3f}", True)
    assert (change.text, change.bold) == ("+0.250", True)
    assert quarter.text == "+0.050"  # evaluated at 20%, the last before 25%
    assert (half.text, half.detail) == ("+0.125", f"± {HALF / 2:.3f}")
    assert broken.flag
    assert (drift.text, drift.detail) == ("0.020", "± 0.000")
    assert group.rows[0].cells[6].text == "0.000"
    assert runs.detail == "preview"
    assert group.rows[3].cells[5].text == f"at guidance 3 exact scene {MINUS}0.140 ± {HALF:.3f}"  # at 1: -0.020 ± 0.025


def test_what_breaks_has_tags_and_the_task_itself_at_other_guidances(tmp_path: Path) -> None:
    for seed in range(3):
        folder = write_run(tmp_path, "flow_grpo", seed=seed, grids=False)
        rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
        for row in (row for row in rows if row["weights"] != "base"):
            row["metrics"]["geneval/counting"] = 0.2 + 0.01 * seed  # of 0.30 at guidance 1, 0.45 at 3
            row["metrics"]["geneval"] -= 0.05
        (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (row,) = (row for row in asked(tmp_path).table.groups[0].rows if row.label)
    at_one, at_three = row.cells[5].text.split("; at guidance 3 ")
    assert at_one.startswith(f"counting {MINUS}0.")
    assert [part.split(f" {MINUS}")[0] for part in at_three.split(", ")] == [
        "exact scene", "geneval (official)", "counting",
    ]  # fmt: skip


def test_methods_that_cannot_be_told_apart_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GAINS, ("close", "geneval"), {"geneval": 0.24, "exact_scene": 0.05})
    for method in ("diffusion_nft", "close", "flow_grpo"):
        for seed in range(3):
            write_run(tmp_path, method, seed=seed, grids=False)
    assert "diffusion_nft, with the highest mean of those shown to raise it" in asked(tmp_path).sentences[0]
    assert "it cannot be told apart from close (n = 3" in asked(tmp_path).sentences[0]


def test_nothing_is_recommended_that_is_not_shown_to_help(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GAINS, ("flow_grpo", "geneval"), {"geneval": 0.01, "exact_scene": 0.0})
    for seed in range(3):
        write_run(tmp_path, "flow_grpo", seed=seed, grids=False)
    first, guided = asked(tmp_path).sentences
    assert first == "None: no method is shown to raise it above the base (n = 3 runs a method, a preview)."
    assert guided.startswith("The untrained base at guidance 3 scores 0.450: no method at guidance 1")


def test_single_runs_decide_nothing(tmp_path: Path) -> None:
    write_run(tmp_path, grids=False)
    sentence = "Not decided: diffusion_nft has the highest mean, but one run{} no interval: a preview."
    assert asked(tmp_path).sentences[0] == sentence.format(" has")
    write_run(tmp_path, "flow_grpo", grids=False)
    found = asked(tmp_path)
    assert found.sentences[0] == sentence.format(" each has")
    runs = [row.cells[-1] for row in found.table.groups[0].rows if row.label]
    assert [(cell.text, cell.detail) for cell in runs] == [("1", "preview, one seed")] * 2


def test_a_single_run_beside_several_is_left_out_of_the_choice(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path, "flow_grpo", seed=seed, grids=False)
    write_run(tmp_path, "diffusion_nft", grids=False)
    first, *_, left_out, _ = asked(tmp_path).sentences
    assert first.startswith("flow_grpo is the only one with several finished runs")
    assert left_out == "Not in the choice, for single runs have no interval: diffusion_nft."


def test_a_single_run_does_not_hide_the_best_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GAINS, ("lucky", "geneval"), {"geneval": 0.5, "exact_scene": 0.0})
    for method, seeds in (("diffusion_nft", 5), ("flow_grpo", 5), ("lucky", 1)):
        for seed in range(seeds):
            write_run(tmp_path, method, seed=seed, grids=False)
    found = asked(tmp_path)
    first, _, left_out, guided = found.sentences
    assert first.startswith("diffusion_nft: it ends at 0.560")
    assert "above the other method" in first
    assert first.endswith("(n = 5 runs a method).")
    assert left_out == "Not in the choice, for single runs have no interval: lucky."
    assert guided.endswith("only diffusion_nft is shown to be above that.")
    bold = {row.label: row.cells[1].bold for row in found.table.groups[0].rows if row.label}
    assert bold == {"lucky": False, "diffusion_nft": True, "flow_grpo": False}


def test_no_answer_without_a_finished_run(tmp_path: Path) -> None:
    write_run(tmp_path, status="failed", until=0.5, grids=False)
    assert answer(load([tmp_path])) is None


def test_without_geneval_the_comparison_of_most_runs_opens(tmp_path: Path) -> None:
    write_run(tmp_path, reward="pickscore", seed=0, grids=False, run={"targets": {}})
    for seed in range(2):
        write_run(tmp_path, reward="exact_scene", seed=seed, grids=False, run={"targets": {"exact_scene": 0.4}})
    assert asked(tmp_path).question.startswith("Which method for Exact scene at 20 TFLOP")


@pytest.mark.parametrize("targets", [{}, {"never_measured": 0.5}])
def test_a_task_without_a_measured_target_is_asked_by_its_reward(tmp_path: Path, targets: dict[str, float]) -> None:
    write_run(tmp_path, reward="pickscore", grids=False, run={"targets": targets})
    assert asked(tmp_path).question.startswith("Which method for pickscore at 20 TFLOP")


@pytest.mark.parametrize(
    ("budget", "share", "text"),
    [({"flops": BUDGET}, 0.25, "5 TFLOP"), ({"nfe": 240_000}, 1.0, "240,000 denoiser passes")],
)
def test_budgets_have_units(tmp_path: Path, budget: dict[str, float], share: float, text: str) -> None:
    write_run(tmp_path, grids=False, run={"budget": budget})
    assert budget_text(load([tmp_path]).runs, share) == text


def test_different_budgets_are_not_named(tmp_path: Path) -> None:
    for seed, flops in enumerate((1e13, 2e13)):
        write_run(tmp_path, seed=seed, grids=False, run={"budget": {"flops": flops}})
    assert asked(tmp_path).question == "Which method for GenEval (official), and what does it break?"


def test_different_budgets_decide_nothing(tmp_path: Path) -> None:
    for seed in range(3):
        write_run(tmp_path, "diffusion_nft", seed=seed, grids=False)
        write_run(tmp_path, "flow_grpo", seed=seed, grids=False, run={"budget": {"flops": 1e13}})
    found = asked(tmp_path)
    budgets = "10 TFLOP: flow_grpo; 20 TFLOP: diffusion_nft"
    assert found.sentences[0] == (
        f"Not decided: the budgets differ ({budgets}), so final scores are not matched and nothing is bold."
    )
    assert not any("above the other" in sentence or "breaks" in sentence for sentence in found.sentences)
    assert not any(cell.bold for row in found.table.groups[0].rows for cell in row.cells)
    assert found.table.notes[1:] == (
        "Used by the checkpoints at a share of the budget: 20% at 25%, 50% at 50%.",
        f"Runs trained on geneval had different budgets ({budgets}): their numbers are not matched.",
    )


def test_a_run_that_did_not_finish_has_no_say_about_the_budget(tmp_path: Path) -> None:
    write_run(tmp_path, grids=False)
    write_run(tmp_path, seed=1, status="failed", until=0.2, grids=False, run={"budget": {"flops": 1e12}})
    found = asked(tmp_path)
    assert found.question.startswith("Which method for GenEval (official) at 20 TFLOP")
    assert "budgets differ" not in found.sentences[0]


def test_the_numbers_are_tidy(compared: Path) -> None:
    first, second = asked(compared).table.records
    assert (first["method"], second["method"]) == ("diffusion_nft", "flow_grpo")
    assert first["difference"] == pytest.approx(0.25)
    assert first["difference_at_0.5"] == pytest.approx(0.125)
    assert json.dumps(first["broken"])
