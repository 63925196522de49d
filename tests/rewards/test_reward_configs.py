"""Every reward's configuration names settings that its class has, on every domain where it exists."""

import inspect
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from alignbench.configuration import target
from alignbench.settings import construct

CONF = Path(__file__).parent.parent.parent / "conf"
PARTS = [
    (path.stem, name, domain, settings)
    for path in sorted((CONF / "reward").glob("*.yaml"))
    for name, part in OmegaConf.to_container(OmegaConf.load(path)).get("parts", {}).items()  # type: ignore[union-attr]
    for domain, settings in part.items()
    if domain != "weight"
]
DIFFERENTIABLE = {"aesthetic", "clipscore", "hpsv2", "pickscore"}
ON_PHOTOGRAPHS = DIFFERENTIABLE | {"geneval", "geneval_strict", "jpeg_compressibility", "ocr"}


def check_settings(settings: dict[str, Any], where: str) -> type:
    """Constructs nothing: the class is called in name only, with the checks that a run makes."""
    made = target(settings, where)
    seen: dict[str, Any] = {}

    def stand_in(**given: Any) -> None:
        seen.update(given)

    stand_in.__signature__ = inspect.signature(made, eval_str=True)  # type: ignore[attr-defined]
    construct(stand_in, {key: value for key, value in settings.items() if key != "_target_"}, where, device="cpu")
    assert seen.keys() >= settings.keys() - {"_target_"}
    return made  # type: ignore[return-value]


@pytest.mark.parametrize(("reward", "name", "domain", "settings"), PARTS, ids=lambda each: str(each)[:20])
def test_settings_fit_the_class(reward: str, name: str, domain: str, settings: dict[str, Any]) -> None:
    made = check_settings(settings, f"reward.parts.{name}.{domain}")
    assert made.differentiable is (reward in DIFFERENTIABLE)  # type: ignore[attr-defined]


@pytest.mark.parametrize("domain", ["shapes", "photo"])
@pytest.mark.parametrize(
    ("name", "mode"), [("geneval", "soft"), ("geneval_strict", "strict"), ("geneval_soft", "soft")]
)
def test_geneval_is_partial_credit(name: str, mode: str, domain: str) -> None:
    """What Flow-GRPO (section 4.1) and DiffusionNFT train on; ``geneval_soft`` is its old name."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        reward = compose("config", [f"reward={name}"]).reward
    ((part, node),) = reward.parts.items()
    assert part == name.removesuffix("_soft")
    assert node[domain].mode == mode
    assert reward.get("renamed") == (
        "geneval_soft is called geneval now; the old name goes with the next release"
        if name == "geneval_soft"
        else None
    )


def test_rewards_on_photographs() -> None:
    assert {reward for reward, _, domain, _ in PARTS if domain == "photo"} == ON_PHOTOGRAPHS


def test_the_benchmarks_own_thresholds_are_the_settings() -> None:
    for reward, _, domain, settings in PARTS:
        if reward.startswith("geneval") and domain == "photo":
            values = [settings[key] for key in ("threshold", "counting_threshold", "max_objects", "max_overlap")]
            assert values == [0.3, 0.9, 16, 1.0]


def test_the_evaluation_on_photographs_adds_geneval_and_changes_nothing_else() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        default, photo = (
            OmegaConf.to_container(compose("config", [f"evaluation={name}"]).evaluation)
            for name in ("default", "photo")
        )
    assert isinstance(photo, dict)
    assert isinstance(default, dict)
    added = photo["scorers"].pop("geneval_hf")
    assert photo == default
    check_settings(added["photo"], "evaluation.scorers.geneval_hf.photo")
    assert added["photo"]["mode"] == "official"
