"""A method that inherits its settings says so wherever it is named."""

from pathlib import Path

import pandas as pd
import pytest

from alignbench.report.answer import answer
from alignbench.report.data import load
from alignbench.report.page import build
from alignbench.report.verdict import verdicts
from tests.report.synthetic import write_run

NAME = "flow_grpo (untuned)"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    for seed in range(2):
        write_run(root, "diffusion_nft", seed=seed, grids=False)
        method = {"name": "flow_grpo", "tuned": False, "learning_rate": 1e-4}
        write_run(root, "flow_grpo", seed=seed, grids=seed == 0, config={"method": method})
    return root


@pytest.fixture(scope="module")
def report(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build([root], tmp_path_factory.mktemp("report"), lambda _: None).parent


def test_tables_of_methods_name_it(report: Path) -> None:
    for path in sorted((report / "tables").glob("*.csv")):
        if not path.read_text().strip():
            continue  # nothing to list
        frame = pd.read_csv(path)
        for column in ("method", "first", "second"):
            if column in frame:
                assert "flow_grpo" not in set(frame[column]), path.name
        if "method" in frame:
            assert NAME in set(frame["method"]), path.name
    settings = pd.read_csv(report / "tables/settings_first_shapes.csv")
    assert list(settings.columns) == ["setting", "diffusion_nft", NAME]


def test_figures_and_galleries_name_it(report: Path) -> None:
    for path in sorted((report / "figures").glob("*.svg")):
        assert f">{NAME}<" in path.read_text(), path.name
    page = (report / "index.html").read_text()
    assert f"Sample grids of {NAME}, first, shapes: trained on geneval" in page
    assert f'"name": "{NAME}"' in page  # of the traces


def test_words_name_it(root: Path) -> None:
    records = load([root])
    (found,) = verdicts(records.studies[0], records.protocols)
    assert any(NAME in sentence for sentence in found.sentences)
    opening = answer(records)
    assert opening is not None
    assert NAME in {row.label for row in opening.table.groups[0].rows}
