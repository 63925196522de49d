"""The examples of CONTRIBUTING.md and of docs/your_method.md run as they stand there."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

import alignbench.methods
import alignbench.rewards
from alignbench.report.page import build
from alignbench.run import run
from tests.conftest import CONF, Compose

ROOT = CONF.parent
BLOCK = re.compile(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
GUIDE, PAGE = ((ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "docs/your_method.md"))
EXAMPLES = dict(BLOCK.findall(GUIDE) + BLOCK.findall(PAGE))
SMALL = ("evaluation.curve.images_per_tag=2", "evaluation.final.images_per_tag=2", "evaluation.published=false")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the examples where they belong: importable, and beside a copy of the configuration."""
    folder = tmp_path / "checkout"
    shutil.copytree(CONF, folder / "conf")
    for name, text in EXAMPLES.items():
        path = folder / name
        assert not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    added = []
    for package in (alignbench.methods, alignbench.rewards):
        own = folder / Path(*package.__name__.split("."))
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(own)])
        added += [f"{package.__name__}.{path.stem}" for path in own.glob("*.py")]
    monkeypatch.setattr("tests.conftest.CONF", folder / "conf")
    importlib.invalidate_caches()
    yield folder
    for name in added:
        sys.modules.pop(name, None)


@pytest.fixture
def composed(checkout: Path, tiny_run: Compose) -> Callable[..., DictConfig]:
    """Composes a run of two iterations on the tiny checkpoint with the example reward."""

    def configured(*overrides: str) -> DictConfig:
        config = tiny_run(*overrides)
        with initialize_config_dir(str(checkout / "conf"), version_base="1.3"):
            config.reward = compose("config", ["reward=colourfulness"]).reward
        return config

    return configured


def rows(folder: Path) -> list[dict[str, float]]:
    """An iteration's metrics each, of a run that ended well."""
    assert json.loads((folder / "status.json").read_text())["status"] == "done"
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def module(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_there_is_an_example_of_everything() -> None:
    assert sorted(EXAMPLES) == [
        "alignbench/methods/advantage_weighted.py",
        "alignbench/rewards/colourfulness.py",
        "conf/method/advantage_weighted.yaml",
        "conf/model/my_sd3.yaml",
        "conf/overlay/shapes_advantage_weighted.yaml",
        "conf/reward/colourfulness.yaml",
    ]


def test_the_method_trains(composed: Callable[..., DictConfig]) -> None:
    folder = run(composed("method=advantage_weighted"))
    assert folder.parent.name == "advantage_weighted"
    first, second = rows(folder)
    assert first["loss"] > 0
    assert first["gradient_norm"] > 0
    spent = second["ledger"]
    # 2 iterations of 2 prompts x 4 images: 3 passes each to sample, 1 to learn from
    assert (spent["nfe"], spent["backward"], spent["images"]) == (2 * 8 * (3 + 1), 2 * 8, 2 * 8)  # type: ignore[index]


def test_the_method_stands_in_the_report_beside_another(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    for method in ("advantage_weighted", "diffusion_nft"):
        folder = run(composed(f"method={method}"))
    build([folder.parents[4]], tmp_path / "report")
    page = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert re.search(r"<t[dh][^>]*>\s*advantage_weighted", page)
    assert re.search(r"<t[dh][^>]*>\s*diffusion_nft", page)


@pytest.mark.soak
def test_the_commands_of_the_page_run(tmp_path: Path) -> None:
    """Literally, in a checkout with the three files, but for the size of the evaluations, the budget and the seeds."""
    folder = tmp_path / "checkout"
    for part in ("alignbench", "conf", "docs", "tests"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name, text in BLOCK.findall(PAGE):
        (folder / name).write_text(text, encoding="utf-8")
    index = folder / "docs" / "methods" / "README.md"
    index.write_text(index.read_text(encoding="utf-8") + "\n| `advantage_weighted` | its row |\n", encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(folder)}
    for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            words = [sys.executable, *(["-m", "pytest"] if line.startswith("pytest") else []), *line.split()[1:]]
            if "alignbench" in words:
                words = [word.replace("2e12", "2e11").replace("seed=0,1,2", "seed=0") for word in words] + [*SMALL]
            done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, (line, done.stdout, done.stderr)
    assert (folder / "results" / "mine" / "report" / "index.html").exists()


@pytest.mark.usefixtures("checkout")
def test_the_method_learns_from_better_images_alone() -> None:
    weighted_loss = module("alignbench.methods.advantage_weighted").weighted_loss
    v, target = torch.tensor([[1.0, 3.0], [5.0, 5.0]]), torch.zeros(2, 2)
    assert weighted_loss(v, target, torch.tensor([2.0, -1.0])).tolist() == [2 * (1 + 9) / 2, 0]


def test_the_reward_is_trained_on(composed: Callable[..., DictConfig]) -> None:
    folder = run(composed("method=diffusion_nft"))
    assert folder.parent.parent.name == "colourfulness"
    assert all(0 < row["reward"] < 1 for row in rows(folder))


@pytest.mark.usefixtures("checkout")
def test_the_reward_is_zero_for_grey_and_a_known_number_for_red() -> None:
    reward = module("alignbench.rewards.colourfulness").Colourfulness()
    images = torch.full((2, 3, 4, 4), 0.5)
    images[1] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    # red: |1 - 1/3| + 2 |0 - 1/3| over three channels
    torch.testing.assert_close(reward.score(images, [])["reward"], torch.tensor([0.0, 4 / 9]))


def test_the_model_trains(composed: Callable[..., DictConfig]) -> None:
    folder = run(composed("model=my_sd3"))
    assert folder.parents[2].name == "my_sd3"
    assert rows(folder)[-1]["gradient_norm"] > 0
    assert (folder / "lora" / "pytorch_lora_weights.safetensors").stat().st_size > 1000
