import math
from pathlib import Path

import pytest

from alignbench.report import across
from alignbench.report.data import load
from tests.report.synthetic import write_comparison, write_run


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    write_comparison(root)
    return root


def test_pairs_by_hand(compared: Path) -> None:
    table = across.pairs(load([compared]).studies[0])
    (record,) = table.records
    assert (record["first"], record["second"], record["tasks"]) == ("diffusion_nft", "flow_grpo", 2)
    assert record["improvement"] == 1.0  # every run of the first above every run of the second, on both tasks
    assert 0.5 < record["low"] < 1
    assert (record["seeds_won"], record["seeds_shared"], record["ties"]) == (6, 6, 0)
    assert record["speed_up_bound"] == "n/a"  # on exact_scene both miss in some runs
    (row,) = table.groups[0].rows
    assert row.cells[2].bold  # 2 of 400 orders of the runs are as extreme
    assert [cell.text for cell in row.cells[3:]] == ["6/6", "n/a", "2", "3"]


def test_three_runs_that_all_win_on_one_task_are_not_bold(tmp_path: Path) -> None:
    for method in ("diffusion_nft", "flow_grpo"):
        for seed in range(3):
            write_run(tmp_path, method, seed=seed, grids=False)
    (row,) = across.pairs(load([tmp_path]).studies[0]).groups[0].rows
    assert row.cells[2].text == "1.00"
    assert not row.cells[2].bold  # 2 of 20 orders


def test_methods_over_tasks_by_hand(compared: Path) -> None:
    table = across.methods(load([compared]).studies[0])
    nft, grpo = table.records
    # normalised by GenEval: (final - 0.3) / (1 - 0.3), gains 0.14 and 0.25
    assert nft["final_mean"] == pytest.approx((0.14 + 0.25) / 2 / 0.7)
    assert nft["area_mean"] == pytest.approx((0.14 + 0.25) / 4 / 0.7)  # straight lines
    assert grpo["final_low"] < grpo["final_mean"] < grpo["final_high"]
    # two targets: 0.45 on geneval is reached by the first method alone, on exact_scene by one run of three
    assert [nft[f"within_{factor:g}"] for factor in across.FACTORS] == [0.5] * 4
    assert [grpo[f"within_{factor:g}"] for factor in across.FACTORS] == [0.0] * 4


def test_a_method_that_did_not_finish_a_task_is_left_out(tmp_path: Path) -> None:
    write_comparison(tmp_path, seeds=2)
    write_run(tmp_path, "awm", "geneval", 0, grids=False)
    write_run(tmp_path, "awm", "exact_scene", 0, status="failed", until=0.5, grids=False)
    table = across.methods(load([tmp_path]).studies[0])
    assert table.notes == (
        "Tasks that every method here finished under one protocol: exact_scene, geneval.",
        "Left out: awm (no finished run on exact_scene).",
    )
    assert [record["method"] for record in table.records] == ["diffusion_nft", "flow_grpo"]


def test_disjoint_rewards_and_a_single_variant_leave_the_largest_block(compared: Path, tmp_path: Path) -> None:
    write_comparison(tmp_path)
    for seed in range(3):
        write_run(tmp_path, "srpo", "pickscore", seed, grids=False)
    elsewhere = {"final_protocol_hash": "another", "protocol_hash": "another"}
    write_run(tmp_path, "flow_grpo", "exact_scene", variant="clip=0", grids=False, run=elsewhere)
    table = across.methods(load([tmp_path]).studies[0])
    assert table.records == across.methods(load([compared]).studies[0]).records
    assert [row.cells[-1].text for row in table.groups[0].rows] == ["2", "2"]
    assert table.notes == (
        "Tasks that every method here finished under one protocol: exact_scene, geneval.",
        "Left out: flow_grpo@clip=0 (a variant); srpo (no finished run on exact_scene and geneval); "
        "task pickscore (no finished run of diffusion_nft and flow_grpo).",
    )


def test_a_task_under_several_protocols_is_left_out(tmp_path: Path) -> None:
    write_comparison(tmp_path, seeds=1)
    write_run(tmp_path, seed=5, grids=False, run={"final_protocol_hash": "another"})
    assert across.methods(load([tmp_path]).studies[0]).notes == (
        "Tasks that every method here finished under one protocol: exact_scene.",
        "Left out: task geneval (several protocols).",
    )


def test_no_table_over_tasks_without_two_methods_of_one_task(tmp_path: Path) -> None:
    write_run(tmp_path, grids=False)
    write_run(tmp_path, variant="beta=1", grids=False)
    write_run(tmp_path, "srpo", "pickscore", grids=False)
    table = across.methods(load([tmp_path]).studies[0])
    assert table.groups[0].rows == ()
    assert table.notes == ("No two methods, variants apart, finished a run of one task under one protocol.",)


@pytest.mark.parametrize(
    ("finished", "block"),
    [
        ({"a": "xy", "b": "xy", "c": "x"}, ("ab", "xy")),  # 4 against 3
        ({"a": "xyz", "b": "x", "c": "x", "d": "x"}, ("abcd", "x")),
        ({"a": "xy", "b": "xy", "c": "x", "d": "x"}, ("ab", "xy")),  # 4 each: more tasks
        ({"a": "xy", "b": "yz", "c": "zx"}, ("ac", "x")),  # 2 each: by name
        ({"a": "vxy", "b": "xyz", "c": "xyw"}, ("abc", "xy")),  # nobody finished these two alone
        ({"a": "x", "b": "y", "c": ""}, ("", "")),
        ({"a": "xyz"}, ("", "")),
    ],
)
def test_the_largest_block(finished: dict[str, str], block: tuple[str, str]) -> None:
    assert across.largest_block(finished) == tuple(map(list, block))


def test_no_pair_without_finished_runs(tmp_path: Path) -> None:
    write_run(tmp_path, grids=False)
    write_run(tmp_path, "flow_grpo", status="failed", until=0.5, grids=False)
    table = across.pairs(load([tmp_path]).studies[0])
    assert table.groups[0].rows == ()
    assert table.notes


def test_normalisation_never_looks_at_other_methods(tmp_path: Path) -> None:
    write_run(tmp_path, grids=False, run={"normalisation": {"geneval": 0.8}})
    (run,) = load([tmp_path]).runs
    metric, top = across.constant(run)
    assert (metric, top) == ("geneval", 0.8)
    assert across.normalised(0.55, 0.3, top) == pytest.approx(0.5)
    assert math.isnan(across.normalised(0.9, 0.8, top))


@pytest.mark.parametrize("stated", [None, {}, {"geneval": "much"}])
def test_a_task_without_a_constant_is_not_normalised(tmp_path: Path, stated: object) -> None:
    write_run(tmp_path, grids=False, run={"normalisation": stated})
    (run,) = load([tmp_path]).runs
    metric, top = across.constant(run)
    assert metric == ""
    assert math.isnan(top)
