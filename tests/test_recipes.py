"""The experiments on real models: their configurations can be run, and their pages say what a dry run says."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

from alignbench import assembly, plan, schema
from alignbench.architecture import Costs
from alignbench.configuration import CONF, identity, variant
from alignbench.errors import ConfigError
from alignbench.ledger import Budget
from tests.conftest import Compose

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


def plans() -> ModuleType:
    """``experiments/plans.py``, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("plans", EXPERIMENTS / "plans.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plans"] = module
    spec.loader.exec_module(module)
    return module


PLANS = plans()
LARGE = ("srpo_hpsv2_flux", "diffusion_sdpo_sdxl")  # their architectures take longer
KNOWN: dict[str, Costs] = {}  # recipes of one model share what it costs


def readme(recipe: str) -> str:
    return (EXPERIMENTS / recipe / "README.md").read_text(encoding="utf-8")


def rows(recipe: str) -> dict[str, str]:
    """The plan in a recipe's README, by row."""
    (block,) = PLANS.BLOCK.findall(readme(recipe))
    return {name.strip(): content for name, content in re.findall(r"^  (.{2,30}?)\s\s+(.+)$", block, re.MULTILINE)}


def test_every_experiment_on_a_real_model_has_a_page() -> None:
    written = {path.stem for path in (CONF / "experiment").glob("*.yaml") if "override /model:" in path.read_text()}
    assert written == set(PLANS.RECIPES)
    for recipe in PLANS.RECIPES:
        assert "**Not run.**" in readme(recipe)
        assert f"conf/experiment/{recipe}.yaml" in readme(recipe)
        assert f"-m alignbench experiment={recipe}" in readme(recipe)


@pytest.mark.parametrize("recipe", PLANS.RECIPES)
def test_a_recipe_passes_the_checks_of_a_run(recipe: str, tmp_path: Path) -> None:
    config = PLANS.on_stand_ins(recipe, tmp_path)
    assert config.name == recipe
    checked = assembly.check(config, 8)
    assembly.check_models(config)
    assert len(assembly.evaluated_prompts(config)) >= 500
    assert checked.method.batch.total % 8 == 0  # equal shares of 8 GPUs
    assert config.evaluation.published


@pytest.mark.parametrize("recipe", PLANS.RECIPES)
def test_a_recipe_becomes_a_run(recipe: str, tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """On a tiny checkpoint of the model's family and with another reward: the parts that need weights."""
    config = PLANS.on_stand_ins(recipe, tmp_path)
    with open_dict(config):
        config.dry_run = False
        config.evaluation.scorers, config.evaluation.features = {}, None
        red = {"weight": 1.0, "photo": {"_target_": "tests.stand_ins.Red"}}
        config.reward = {"parts": {"red": red}, "targets": {}, "normalisation": {}}
        tiny: dict[str, Any] = {"source": str(checkpoints[config.model.name]), "resolution": 16}
        if "max_sequence_length" in config.model.policy:
            tiny["max_sequence_length"] = 10
        config.model.policy = OmegaConf.merge(config.model.policy, tiny)
    parts = assembly.assemble(config)
    assert parts.policy.dtype == torch.bfloat16
    trained = parts.policy.trainable_parameters()
    assert any("lora" in name for name in trained) == (config.model.policy.trainable == "lora")


@pytest.mark.parametrize(
    "recipe", [pytest.param(each, marks=pytest.mark.soak if each in LARGE else ()) for each in PLANS.RECIPES]
)
def test_the_page_says_what_the_dry_run_says(recipe: str, tmp_path: Path) -> None:
    (block,) = PLANS.BLOCK.findall(readme(recipe))
    assert PLANS.planned(recipe, tmp_path, KNOWN) == block, "run python experiments/plans.py"


@pytest.mark.parametrize(
    ("recipe", "sample", "train", "backward"),
    [
        # 48 prompts x 24 images; 10 steps; 9 times x (old, current, reference)
        ("diffusion_nft_geneval_sd35", 1152 * 10, 1152 * 9 * 3, 1152 * 9),
        # guidance takes two passes; 9 steps x (current, reference); both passes have a gradient
        ("flow_grpo_geneval_sd35", 1152 * 10 * 2, 1152 * 9 * 2 * 2, 1152 * 9 * 2),
        # 192 trunks of 9 steps, 6 branches at each of them that walk 9 + ... + 1 steps; as Flow-GRPO
        ("tempflow_grpo_geneval_sd35", 192 * (9 + 6 * 45) * 2, 192 * 54 * 2 * 2, 192 * 54 * 2),
        ("srpo_hpsv2_flux", 32 * 25, 32 * 2, 32 * 2),
        # pairs are read; winner and loser x (current, reference)
        ("diffusion_sdpo_sd15", 0, 2048 * 2 * 2, 2048 * 2),
        ("diffusion_sdpo_sdxl", 0, 2048 * 2 * 2, 2048 * 2),
    ],
)
def test_passes_and_hours_by_hand(recipe: str, sample: int, train: int, backward: int) -> None:
    told = rows(recipe)
    assert told["passes an iteration"] == f"{sample:,} to sample, {train:,} to train, {backward:,} backward"
    flops, iterations = float(told["FLOPs an iteration"].split()[0]), float(told["budget"].split()[1])
    hours = flops * iterations / 3.0e14 / 3600  # of a GPU at the rate that is assumed
    number, unit = re.search(r"device time: ([\d,.]+) (hours|minutes) to train", told["time"]).groups()  # type: ignore[union-attr]
    assert float(number.replace(",", "")) * (1 if unit == "hours" else 1 / 60) == pytest.approx(hours, rel=0.01)


@pytest.mark.parametrize("models", [PLANS.MODELS[1:2], pytest.param(PLANS.MODELS, marks=pytest.mark.soak)])
def test_the_guide_says_what_models_need(models: tuple[tuple[str, str], ...]) -> None:
    guide = (EXPERIMENTS.parent / "docs" / "real_models.md").read_text(encoding="utf-8")
    (table,) = PLANS.TABLE.findall(guide)
    for line in PLANS.memory_table(models).splitlines():
        assert line in table.splitlines(), "run python experiments/plans.py models"


# The plan itself


def outline(processes: int = 1) -> plan.Outline:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", ["overlay=none"])
    method = assembly.check(config, processes).method
    flops = {"denoiser": 10, "denoiser_backward": 20, "decode": 3}
    return plan.Outline(method, Budget({"iterations": 100.0}), flops, processes, 64)


def planned(*overrides: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", ["overlay=none", *overrides])


def test_memory_by_hand() -> None:
    """Models 4 GB; 1 GB trained, held six times more by one process and seven times by several; a sample 2 GB."""
    gigabyte = 10**9
    found = Costs(
        flops={},
        weights={"transformer": 3 * gigabyte, "vae": gigabyte},
        trained=gigabyte,
        sample=2 * gigabyte,
        call=0,
        decode=gigabyte,
        decode_gradient=0,
    )
    config = planned("plan.memory=3e10")
    one, several = (dict(plan.memory(config, outline(count), found)) for count in (1, 8))
    assert one["memory, models"] == "transformer 3.0 GB, vae 1.0 GB"
    assert one["memory, trained weights"].startswith("1.0 GB x 6: 3 further views")
    assert one["memory, a process"].startswith("at least 12.0 GB")
    assert "room for 10 samples with a gradient at once: smaller micro-batches" in one["memory, a process"]
    assert several["memory, a process"].startswith("at least 13.0 GB")
    small = planned("plan.memory=1.1e10")
    assert "does not fit in 11 GB" in dict(plan.memory(small, outline(), found))["memory, a process"]


def test_time_is_work_over_the_rate_of_all_processes() -> None:
    """An iteration is 1,152 x (10 + 27) passes of 10, 10,368 backward of 20, 1,152 decodings of 3 FLOPs."""
    work = 1152 * 37 * 10 + 10_368 * 20 + 1152 * 3
    config = planned(f"plan.flops_per_second={work / 36}")  # 36 seconds an iteration
    told = dict(plan.hours(config, assembly.launched(config), outline(8), of_evaluation=work * 100))
    assert told["time"].startswith("about 15.0 minutes; device time: 1.0 hours to train and 1.0 hours to evaluate")


def test_without_weights_and_rate_the_time_is_unknown() -> None:
    config = planned("model=sd15")
    assert "plan.flops_per_second" in dict(plan.hours(config, assembly.launched(config), outline(), 0))["time"]


def test_shares() -> None:
    assert plan.shares(1152, 8) == "144"
    assert plan.shares(10, 4) == "2 or 3"


def test_what_a_plan_assumes_is_no_part_of_a_run() -> None:
    overrides = ["plan.processes=8", "plan.flops_per_second=1e12"]
    assert variant(overrides) == ""
    assert identity(planned(*overrides)) == identity(planned())


@pytest.mark.parametrize("wrong", ["plan.processes=0", "plan.flops_per_second=-1", "plan.memory=0"])
def test_impossible_machines_are_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=wrong.split("=")[0]):
        schema.check(planned(wrong))


def test_a_dry_run_loads_no_weights(
    tiny_run: Compose, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignbench.run import run

    def refused(*arguments: object, **options: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(assembly, "pretrained", refused)
    monkeypatch.setattr(assembly, "trained_reward", refused)
    run(tiny_run("dry_run=true", "plan.flops_per_second=1e9", "plan.processes=4"))
    told = capsys.readouterr().out
    assert "4 process(es) x 2 images" in told
    assert "1e+09 FLOP/s of a process, assumed" in told
