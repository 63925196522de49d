"""The tables of the reference benchmark say what its records say, worked out here a second time from the files."""

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy import stats

from alignbench.report import ablations
from alignbench.report.data import load

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "results" / "reference" / "shapes"
TITLES = {"exact scene": "exact_scene", "PickScore": "pickscore", "GenEval (strict)": "geneval_strict"}


def gains() -> ModuleType:
    """``experiments/reference/gains.py``, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("gains", ROOT / "experiments" / "reference" / "gains.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gains"] = module
    spec.loader.exec_module(module)
    return module


GAINS = gains()
PAGES = [page for page in GAINS.PAGES if GAINS.BLOCK.search(page.read_text(encoding="utf-8"))]
METHODS = {name: method for method, name in GAINS.NAMES.items()}


def rows(page: Path) -> Iterator[tuple[float, dict[str, str]]]:
    """(guidance, cell by column) of every method in a page's tables."""
    for block in GAINS.BLOCK.finditer(page.read_text(encoding="utf-8")):
        table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block["table"].splitlines() if line]
        header, _, *lines, below = table
        assert below == []  # a line of text
        for cells in (each for each in lines if each[0]):
            yield float(block["guidance"]), dict(zip(header, cells, strict=True))


def scores(folder: Path, guidance: float) -> tuple[dict[str, float], dict[str, float]]:
    """A run's (final scores, scores of the base) under its final protocol."""
    run: dict[str, Any] = json.loads((folder / "run.json").read_text())
    found = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    found = [each for each in found if each["protocol_hash"] == run["final_protocol_hash"]]
    found = [each for each in found if each["guidance"] == guidance]
    (base,) = (each["metrics"] for each in found if each["weights"] == "base")
    (final,) = (each["metrics"] for each in found if each["weights"] == "evaluation")
    return final, base


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_number_of_a_table_is_that_of_the_records(page: Path) -> None:
    checked = 0
    for guidance, cells in rows(page):
        seeds = sorted((RUNS / TITLES[cells["trained on"]] / METHODS[cells["method"]]).iterdir())
        both = [scores(folder, guidance) for folder in seeds]
        assert cells["seeds"] == f"{len(seeds)}{' (preview)' if len(seeds) < 5 else ''}"
        for metric, (title, decimals) in GAINS.METRICS.items():
            changes = np.array([final[metric] - base[metric] for final, base in both])
            half = float(stats.sem(changes) * stats.t.ppf(0.975, len(changes) - 1))
            text = f"{changes.mean():+.{decimals}f} ± {half:.{decimals}f}"
            assert cells[title] == (f"**{text}**" if abs(changes.mean()) > half else text)
            checked += 1
        assert float(cells["drift"]) == pytest.approx(np.mean([final["drift"] for final, _ in both]), rel=0.05)
    expected = 0
    for block in GAINS.BLOCK.finditer(page.read_text(encoding="utf-8")):
        asked = block["methods"].split() or METHODS.values()
        expected += sum(folder.name in asked for folder in RUNS.glob("*/*"))
    assert checked == len(GAINS.METRICS) * expected


def test_the_tables_are_those_of_the_report() -> None:
    written = GAINS.TABLES.read_text(encoding="utf-8")
    assert written == GAINS.page(load([ROOT / "results" / "reference"])), "run python experiments/reference/gains.py"


def test_the_ablations_are_those_of_the_records() -> None:
    listed = ROOT / "experiments" / "ablations" / "ablations.yaml"
    table = ablations.page(load([ROOT / "results"]), *ablations.read(listed))
    written = listed.with_suffix(".md").read_text(encoding="utf-8")
    assert written.endswith(f"\n{table}"), f"run python -m alignbench.report.ablations {listed.relative_to(ROOT)}"


def test_a_number_is_found_in_the_files_as_documented(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "records.md").read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(code, {})
    (row,) = (
        cells
        for guidance, cells in rows(ROOT / "experiments" / "reference" / "README.md")
        if (guidance, cells["trained on"], cells["method"]) == (1, "GenEval (strict)", "DiffusionNFT")
    )
    printed = capsys.readouterr().out.strip()
    assert code.rstrip().endswith(f"# {printed}")
    assert row["GenEval"].startswith(f"**{printed} ")


def test_the_base_is_the_one_of_every_run() -> None:
    shown = [line for page in PAGES for line in page.read_text(encoding="utf-8").splitlines() if "| base at" in line]
    for line in shown:
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        guidance = float(cells[1].removeprefix("base at guidance "))
        for record in RUNS.rglob("run.json"):
            _, base = scores(record.parent, guidance)
            expected = [f"{base[metric]:.{decimals}f}" for metric, (_, decimals) in GAINS.METRICS.items()]
            assert cells[3:-1] == expected
    assert len(PAGES) == 9
    assert len(shown) >= 2 * len(PAGES)
