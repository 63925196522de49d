"""Names of variants: short, canonical, and different for different settings."""

from collections.abc import Iterator
from typing import get_type_hints

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from alignbench import assembly, plan
from alignbench.configuration import CONF, composed, identity, plain, run_folder, variant
from alignbench.errors import ConfigError
from alignbench.ledger import Budget
from alignbench.policies.diffusers_policy import Options


def test_only_what_changes_numbers_names_the_variant() -> None:
    overrides = [
        "method=flow_grpo",
        "seed=3",
        "results=/tmp/x",
        "progress=false",
        "method.algorithm.beta=0.1",
        "budget.nfe=5",
    ]
    assert variant(overrides) == "beta=0.1,nfe=5"
    assert variant(overrides[:4]) == ""


def test_order_does_not_matter_and_equal_endings_keep_their_keys() -> None:
    one = ["reward.parts.a.weight=0.5", "reward.parts.b.weight=0.2"]
    other = ["reward.parts.a.weight=0.2", "reward.parts.b.weight=0.5"]
    assert variant(one) == variant(one[::-1]) != variant(other)


def test_long_and_odd_names_become_safe_folders() -> None:
    name = variant([f"method.algorithm.x{i}=[1, 2, {i}/../]" for i in range(30)])
    assert len(name) <= 80
    assert "/" not in name


def test_what_a_reward_is_for_other_models_is_not_part_of_a_runs_identity() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        whole = identity(compose("config", ["reward=pickscore"]))
    assert set(whole["reward"]["parts"]["pickscore"]) == {"weight", "shapes"}
    assert set(whole["evaluation"]["scorers"]["pickscore"]) == {"shapes"}


@pytest.fixture
def forgotten() -> Iterator[None]:
    """No command has composed anything, before or after."""
    HydraConfig.instance().cfg = None
    yield
    HydraConfig.instance().cfg = None


@pytest.mark.usefixtures("forgotten")
def test_an_overlay_that_was_named_must_exist() -> None:
    with pytest.raises(ConfigError, match=r"unknown overlay 'shape_flow_grpo'\. Did you mean 'shapes_flow_grpo'\?"):
        composed(["overlay=shape_flow_grpo"])
    with pytest.raises(ConfigError, match=r"unknown overlay 'TYPO'\. overlay=none takes the published"):
        composed(["overlay=TYPO"])
    composed(["model=flux_dev", "method=dpo"])  # the automatic one may be absent
    assert "hydra" not in composed([])


@pytest.mark.usefixtures("forgotten")
def test_the_plan_says_which_overlay_acts() -> None:
    assert plan.overlay() == []
    for overrides, told in (
        (["method=flow_grpo"], "shapes_flow_grpo"),
        (["overlay=none"], "none: the published settings"),
        (["experiment=as_published"], "none: the published settings"),
        (["model=flux_dev", "method=dpo"], "none: the published settings"),
        (["method=dpo", "overlay=shapes_sdpo"], "shapes_sdpo"),
    ):
        composed(overrides)
        assert plan.overlay() == [("overlay", told)]


@pytest.mark.parametrize(
    ("overrides", "limits"),
    [
        ([], {"flops": 1e13}),
        (["budget=demo"], {"flops": 2e12}),
        (["budget.flops=null", "budget.iterations=5"], {"iterations": 5}),
        (["experiment=reference"], {"flops": 6e12}),
        (["model=sd15"], {"iterations": 1000}),
        (["model=flux_dev", "budget.iterations=30"], {"iterations": 30}),
        (["model=sdxl", "budget.flops=1e17"], {"flops": 1e17, "iterations": 1000}),
        (["model=sdxl", "budget.flops=1e17", "budget.iterations=null"], {"flops": 1e17}),
        (["experiment=flow_grpo_geneval_sd35"], {"iterations": 5600}),
        (["experiment=srpo_hpsv2_flux"], {"iterations": 20}),
    ],
)
def test_a_budget_fits_the_models_domain(overrides: list[str], limits: dict[str, float]) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides)
    assert Budget(config.budget).limits == Budget(plain(config)["budget"]).limits == limits


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "model").glob("*.yaml") if path.stem != "shapes"))
def test_every_option_of_a_real_model_can_be_set_by_its_name(name: str) -> None:
    policy = OmegaConf.load(CONF / "model" / f"{name}.yaml").policy
    given_elsewhere = {"device", "seed"}  # the run's own
    assert set(get_type_hints(Options)) - given_elsewhere <= set(policy)


def test_an_old_name_of_a_reward_is_the_same_run_and_says_so() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        old, new = (compose("config", [f"reward={name}"]) for name in ("geneval_soft", "geneval"))
    assert identity(old) == identity(new)
    assert run_folder(old, []) == run_folder(new, [])
    told = []
    for config in (old, new):
        checked = assembly.check(config, 1)
        flops = {"denoiser": 1, "denoiser_backward": 2, "decode": 1}
        outline = plan.Outline(checked.method, checked.budget, flops, processes=1, micro_batch=64)
        told.append(plan.table(config, outline, run_folder(config, [])))
    assert "warning" in told[0]
    assert "geneval_soft is called geneval now; the old name goes with the next release" in told[0]
    assert "geneval_soft" not in told[1]
