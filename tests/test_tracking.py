"""Mirrors of the records: Weights & Biases, by a stand-in that keeps what it is told, and the package itself."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from alignbench.errors import ConfigError
from alignbench.run import run
from tests.conftest import Compose


class StandIn(ModuleType):
    """Takes the place of the package ``wandb``."""

    class Error(Exception):
        """As the package's own base class."""

    def __init__(self, refuse: bool = False) -> None:
        super().__init__("wandb")
        self.refuse = refuse
        self.started: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.calls: list[str] = []

    def init(self, **settings: Any) -> Any:
        if self.refuse:
            raise self.Error("not logged in")
        self.started.append(settings)
        return SimpleNamespace(
            log=self.rows.append,
            define_metric=lambda name, step_metric: self.calls.append(f"{name} over {step_metric}"),
            finish=lambda: self.calls.append("finish"),
        )

    def Image(self, path: str) -> str:
        assert Path(path).read_bytes().startswith(b"\x89PNG")
        return f"image {Path(path).name}"


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_rows_and_grids_are_shown_on_the_iterations_of_one_run(tiny_run: Compose, wandb: StandIn) -> None:
    folder = run(tiny_run("tracker=wandb", "tracker.project=mine"))
    (started,) = wandb.started
    assert (started["project"], started["mode"], started["dir"]) == ("mine", "offline", str(folder))
    assert started["name"] == "red/diffusion_nft/seed0"
    assert started["config"]["method"]["algorithm"]["beta"] == 1.0
    assert "tracker" not in started["config"]
    assert wandb.calls == ["* over iteration", "finish"]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    shown = [(row["iteration"], row["train/reward"]) for row in wandb.rows if "train/reward" in row]
    assert shown == [(row["iteration"], row["reward"]) for row in rows]
    grids = [(row["iteration"], row["curve/evaluation_g1"]) for row in wandb.rows if "curve/evaluation_g1" in row]
    assert grids == [(1, "image 0003_curve_evaluation_g1.png"), (2, "image 0004_curve_evaluation_g1.png")]
    scores = [row for row in wandb.rows if "final/evaluation_g3/reward" in row]
    assert [row["iteration"] for row in scores] == [2]


def test_a_run_keeps_its_id_and_another_has_its_own(wandb: StandIn, tmp_path: Path) -> None:
    from alignbench.tracking import WeightsAndBiases

    for name in ("a", "a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        WeightsAndBiases(tmp_path / name, project="p", entity=None, mode="offline")
    first, again, other = (started["id"] for started in wandb.started)
    assert first == again != other
    assert all(started["resume"] == "allow" for started in wandb.started)


def test_what_is_missing_is_said(tiny_run: Compose, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"needs the extra: pip install 'alignbench\[tracking\]'"):
        run(tiny_run("tracker=wandb"))
    monkeypatch.setitem(sys.modules, "wandb", StandIn(refuse=True))
    with pytest.raises(ConfigError, match=r"cannot start \(not logged in\); tracker.mode=offline needs no account"):
        run(tiny_run("tracker=wandb", "tracker.mode=online"))
    with pytest.raises(ConfigError, match=r"tracker.mode is 'later': choose offline or online"):
        run(tiny_run("tracker=wandb", "tracker.mode=later"))


def test_the_package_itself_writes_offline_files(tiny_run: Compose) -> None:
    pytest.importorskip("wandb")
    folder = run(tiny_run("tracker=wandb"))
    assert list(folder.glob("wandb/offline-run-*/*.wandb"))
