"""``python experiments/partial_credit/runs.py``: write what the trials scored into README.md, as recorded."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignbench.records import find_runs, read_run

HERE = Path(__file__).parent
PAGE = HERE / "README.md"
BLOCK = re.compile(r"(?<=<!-- runs -->\n).*?(?=\n<!-- end of runs -->)", re.DOTALL)
METRICS = {
    "geneval": "GenEval",
    "geneval_soft": "partial credit",
    "exact_scene": "exact scene",
    "pickscore": "PickScore",
}
COLUMNS = ("run", "weights", "TFLOP", "guidance", *METRICS.values(), "diversity", "drift")


def rows(folder: Path) -> Iterator[list[str]]:
    """A run's evaluations by the budget that was spent; the base once."""
    run = read_run(folder)
    name = "@".join(filter(None, (run.run["method"], run.run["variant"])))
    final = run.run["final_protocol_hash"]
    for row in run.evaluations:
        shown = row["weights"] != "current" and (row["protocol_hash"] != final or row["guidance"] > 1)
        if shown:
            yield [name, row["weights"], f"{spent(row):.1f}", f"{row['guidance']:g}", *scores(row["metrics"])]


def spent(row: dict[str, Any]) -> float:
    """TFLOP of rollout and training."""
    return float(row["ledger"]["flops"]) / 1e12


def scores(metrics: dict[str, float]) -> list[str]:
    """The columns of the scores."""
    return [*(f"{metrics[name]:.3f}" for name in METRICS), f"{metrics['diversity']:.3f}", f"{metrics['drift']:.2g}"]


def table(trials: Path) -> str:
    """Every run's evaluations as one table."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for folder in sorted(find_runs(trials)):
        lines += [f"| {' | '.join(cells)} |" for cells in rows(folder)]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(BLOCK.sub(lambda _: table(HERE / "trials"), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
