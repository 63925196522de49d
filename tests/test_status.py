"""The status command: what it says of each cell, from records in any condition."""

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from alignbench import status
from alignbench.records import LOCK, RunDirectory
from alignbench.run import run
from alignbench.status import Cell, grid, main, read_cell, seconds_left
from tests.conftest import Compose
from tests.report.synthetic import write_run


def states(cells: list[Cell]) -> dict[tuple[str, str, int], str]:
    return {(cell.reward, cell.method, cell.seed): cell.state for cell in cells}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """One cell in each state, and a run of another experiment."""
    write_run(tmp_path, "diffusion_nft", "geneval", 0)
    write_run(tmp_path, "diffusion_nft", "geneval", 10, status="failed", message="diverged [at 3]")
    write_run(tmp_path, "flow_grpo", "geneval", 0, status="interrupted", until=0.5)
    killed = write_run(tmp_path, "flow_grpo", "geneval", 2, status="running")  # nobody writes it
    with (killed / "metrics.jsonl").open("a") as rows:
        rows.write('{"fraction": 0.3}\n')
    write_run(tmp_path, "flow_grpo", "exact_scene", 0, status="out_of_memory")
    write_run(tmp_path, "base", "geneval", 7, run={"kind": "evaluated"})
    write_run(tmp_path, "awm", "geneval", 0, experiment="second")
    return tmp_path


def note(results: Path, number: int, cell: str, outcome: str = "done", sweep: str = "one", **more: Any) -> None:
    """Write what a sweep notes of a cell, "experiment/model/reward/method/seed0"."""
    folder = results / ".sweep" / sweep
    folder.mkdir(parents=True, exist_ok=True)
    told = {"overrides": [], "folder": f"../../{cell}", "outcome": outcome, "message": ""} | more
    (folder / f"{number}.json").write_text(json.dumps(told))


def test_every_cell_of_the_grid_is_there(results: Path) -> None:
    found = grid(results)
    first = states([cell for cell in found if cell.experiment == "first"])
    assert first == {
        ("exact_scene", "flow_grpo", 0): "failed",  # nobody asked for diffusion_nft there
        ("geneval", "diffusion_nft", 0): "done",
        ("geneval", "diffusion_nft", 2): "missing",  # flow_grpo has it
        ("geneval", "diffusion_nft", 10): "failed",
        ("geneval", "flow_grpo", 0): "stopped",
        ("geneval", "flow_grpo", 2): "stopped",
        ("geneval", "flow_grpo", 10): "missing",
    }
    assert list(first) == sorted(first)
    assert [(cell.experiment, cell.state) for cell in found[7:]] == [("second", "done")]
    assert grid(results / "second" / "shapes") == found[7:]  # from any folder above a run


def test_a_method_is_missing_where_a_sweep_was_asked_for_it(results: Path) -> None:
    before = grid(results)
    note(results, 0, "first/shapes/exact_scene/diffusion_nft/seed3", outcome="failed")
    note(results, 1, "first/shapes/exact_scene/flow_grpo/seed0")  # has a folder
    note(results, 0, "second/shapes/geneval/awm@beta=1/seed4", outcome="left", sweep="two")
    note(results, 1, "first/shapes/geneval/dpo/seed0", outcome="planned", sweep="two")
    note(results, 2, "anywhere", sweep="two")
    note(results, 3, "", sweep="two", folder=None)  # the configuration was wrong
    (results / ".sweep" / "two" / "4.json").write_text('{"overrides": ')
    (results / ".sweep" / "two" / "5.json").write_text("[]")
    found = grid(results)
    assert set(before) < set(found)
    assert {cell for cell in found if cell not in before} == {
        Cell("first", "shapes", "exact_scene", "diffusion_nft", 3, "missing"),
        Cell("second", "shapes", "geneval", "awm@beta=1", 4, "missing"),
    }
    assert [cell.place for cell in found] == sorted(cell.place for cell in found)
    assert grid(results / "second") == [cell for cell in found if cell.experiment == "second"]  # notes lie above it


def test_a_variant_needs_no_seeds_that_it_was_not_run_with(tmp_path: Path) -> None:
    for seed in range(2):
        write_run(tmp_path, "sdpo", "exact_scene", seed, until=0.0, grids=False)
    write_run(tmp_path, "sdpo", "exact_scene", 7, variant="safeguard=none", until=0.0, grids=False)
    write_run(tmp_path, "srpo", "pickscore", 2, until=0.0, grids=False)
    assert [cell.state for cell in grid(tmp_path)] == ["done"] * 4


def test_who_holds_the_lock_is_running_whatever_the_status_says(results: Path) -> None:
    for seed, method in ((10, "diffusion_nft"), (0, "diffusion_nft")):
        folder = results / "first" / "shapes" / "geneval" / method / f"seed{seed}"
        with (folder / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            cell = read_cell(folder)
        assert cell is not None
        assert cell.state == ("done" if seed == 0 else "running")


def test_the_table_and_its_totals(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(results)]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "first"
    assert lines[1].split("  ")[0] == "reward"
    assert lines[1].split()[-6:] == ["seed", "0", "seed", "2", "seed", "10"]
    assert lines[2].split() == ["exact_scene", "flow_grpo", "failed"]
    assert lines[4].split() == ["geneval", "flow_grpo", "stopped", "stopped", "30%", "missing"]
    assert "shapes/geneval/diffusion_nft/seed10: diverged [at 3]" in lines
    assert lines[-1] == "8 cells: 2 done, 2 failed, 2 stopped, 2 missing"


def test_the_table_of_a_grid_that_is_at_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished, a running, a failed and a missing cell, and a place that nobody asked for."""
    write_run(tmp_path, "awm", "geneval", 0, grids=False)
    running = write_run(tmp_path, "awm", "geneval", 1, status="running", until=0.0, grids=False)
    with (running / "metrics.jsonl").open("a") as rows:
        rows.write('{"fraction": 0.4}\n')
    write_run(tmp_path, "dpo", "geneval", 0, status="failed", message="out of luck", until=0.0, grids=False)
    note(tmp_path, 0, "first/shapes/pickscore/srpo/seed0", outcome="stopped")
    with (running / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main([str(tmp_path)]) == 0
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "first",
        "reward     method  seed 0   seed 1",
        "geneval    awm     done     running 40%",
        "geneval    dpo     failed   missing",
        "pickscore  srpo    missing",
        "shapes/geneval/dpo/seed0: out of luck",
        "",
        "5 cells: 1 done, 1 running, 1 failed, 2 missing",
    ]


def test_json(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(results), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [Cell(**cell) for cell in told["cells"]] == grid(results)
    assert told["totals"] == {"done": 2, "running": 0, "failed": 2, "stopped": 2, "missing": 2}


@pytest.mark.parametrize("name", ["run.json", "status.json", "config.yaml", "metrics.jsonl", "evaluations.jsonl"])
@pytest.mark.parametrize("content", [b"", b'{"status": "ru', b"\xff\xfe\x00", b"[1, 2]\n", b'{"fraction": []}\n', None])
def test_damaged_records_are_told_and_stop_nothing(
    results: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None
) -> None:
    damaged = results / "first" / "shapes" / "geneval" / "flow_grpo" / "seed0" / name
    if content is None:
        damaged.unlink()
    else:
        damaged.write_bytes(content)
    assert main([str(results)]) == 0
    assert states(grid(results))["geneval", "flow_grpo", 0] == "stopped"
    assert capsys.readouterr().out.splitlines()[-1].startswith("8 cells: 2 done, 2 failed, 2 stopped, 2 missing")


def test_only_a_missing_folder_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "nowhere is not a folder" in capsys.readouterr().err
    (tmp_path / ".sweep").mkdir()
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == "no runs here\n"


def evaluated(
    protocol: str, weights: str, guidance: float, nfe: int, seconds: float, **volatile: Any
) -> dict[str, Any]:
    clock = {"seconds": {"evaluation": seconds}, "reused_from": None, **volatile}
    return {"protocol": protocol, "weights": weights, "guidance": guidance, "cost": {"nfe": nfe}, "volatile": clock}


def test_seconds_left_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After 40% of the budget in 80 s there are 120 s to train. An evaluation takes 0.5 s a pass: 20 passes in 10 s.

    Due: the curve at 0.5 and 1 (10 passes each), the final scores (100 and 200) and the current weights (10): 330.
    """
    folder = write_run(tmp_path, config={"evaluation": {"fractions": [0, 0.25, 0.5, 1]}})
    base = [evaluated("c", "base", 1, 10, 5), evaluated("f", "base", 1, 100, 5, reused_from="x")]
    base.append(evaluated("f", "base", 3, 200, 5, reused_from="x"))
    rows = [*base, evaluated("c", "evaluation", 1, 10, 10)]
    last = {"fraction": 0.4, "ledger": {"nfe": 1000}, "volatile": {"seconds": {"total": 80.0}}}
    now = time.time()

    def left(evaluations: list[dict[str, Any]], last: dict[str, Any], ago: float = 0) -> float | None:
        for name, content in (("evaluations.jsonl", evaluations), ("metrics.jsonl", [last])):
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in content))
        for name in ("evaluations.jsonl", "metrics.jsonl", "status.json"):
            os.utime(folder / name, (now - ago, now - ago))
        monkeypatch.setattr(time, "time", lambda: now)
        return seconds_left(status.read_run(folder))

    assert left(rows, last) == pytest.approx(120 + 330 * 0.5, abs=0.1)
    assert left(rows, last, ago=100) == pytest.approx(20 + 330 * 0.5, abs=0.1)
    assert left(rows, last, ago=1e6) == 0
    ended = [*rows, evaluated("c", "evaluation", 1, 10, 15), evaluated("f", "evaluation", 1, 100, 65)]
    assert left(ended, last | {"fraction": 1.2}) == pytest.approx((200 + 10) * 65 / 130, abs=0.1)
    unmeasured = [row | {"volatile": row["volatile"] | {"reused_from": "x"}} for row in base]
    assert left(unmeasured, last) == pytest.approx(120 + 330 * 0.08, abs=0.1)  # 1000 passes in 80 s
    assert left(rows, last | {"fraction": 0.0}) is None
    assert left([], last) is None


def test_a_run_is_running_while_it_runs(tiny_run: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    append, seen = RunDirectory.append_metrics, []

    def looked(self: RunDirectory, row: dict[str, Any]) -> None:
        append(self, row)
        seen.append(read_cell(self.folder))

    monkeypatch.setattr(RunDirectory, "append_metrics", looked)
    folder = run(tiny_run())
    assert [(cell.state, cell.fraction) for cell in seen if cell] == [("running", 0.5), ("running", 1.0)]
    assert all(cell.seconds_left is not None and cell.seconds_left > 0 for cell in seen if cell)
    assert (done := read_cell(folder)) is not None
    assert (done.experiment, done.model, done.reward, done.method, done.seed) == (
        "default",
        "shapes",
        "red",
        "diffusion_nft",
        0,
    )
    assert (done.state, done.seconds_left) == ("done", None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (91, "2 min"), (3599, "60 min"), (5401, "1.5 h"), (48 * 3600, "2.0 days")],
)
def test_durations(seconds: float, text: str) -> None:
    assert status.duration(seconds) == text


def test_damage_of_a_finished_run_is_told_without_control_characters(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Infinities are no shares of a budget; a name of rich's markup and a message that clears the screen are text."""
    done = write_run(tmp_path, "awm", grids=False, experiment="[/b]")
    with (done / "metrics.jsonl").open("a") as rows:
        rows.write('{"fraction": 1e999}\n{"fraction": \n')
    write_run(tmp_path, "dpo", status="failed", message="a\x1b[2Jb\x07c", until=0.0, grids=False, experiment="[/b]")
    assert main([str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert "shapes/geneval/dpo/seed0: abc" in told
    assert "metrics.jsonl, line 16 is damaged" in told
    assert main([str(tmp_path), "--json"]) == 0
    assert "Infinity" not in capsys.readouterr().out
