"""Every reward on every model family, and with every method: it scores what the family samples, or says what fits.

Configurations are those of conf/; checkpoints are tiny, of the classes that the published ones have.
"""

import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf

from alignbench import assembly
from alignbench.configuration import target
from alignbench.errors import ConfigError
from alignbench.processes import Processes
from alignbench.prompts.prompt import Prompt
from alignbench.sampling.rollout import Sampler
from alignbench.stack import Stack
from tests.conftest import CONF
from tests.contracts.test_families import MODELS, TINY
from tests.contracts.test_methods import METHODS, published
from tests.tiny import FAMILIES

FILES = {path.stem: OmegaConf.load(path) for path in sorted((CONF / "reward").glob("*.yaml"))}
REWARDS = {name: reward for name, reward in FILES.items() if "parts" in reward}  # the others are old names
DIFFERENTIABLE = {"photo": ["aesthetic", "clipscore", "hpsv2", "pickscore"], "shapes": ["pickscore"]}
GRADIENT_METHODS = ["direct_align", "draft", "refl", "srpo"]
PROMPTS = [  # quoted texts for OCR, GenEval records, and letters that the tiny text encoders can tell apart
    Prompt("0", '"ab" a dog', {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}]}),
    Prompt("1", '"cd" two', {"tag": "counting", "include": [{"class": "cat", "count": 2}]}),
    Prompt("2", '"ef" cup', {"tag": "single_object", "include": [{"class": "cup", "count": 1}]}),
]


def domains(reward: str) -> set[str]:
    """The domains on which every part of a reward exists."""
    return set.intersection(*({key for key in part if key != "weight"} for part in REWARDS[reward].parts.values()))


@pytest.fixture(scope="session")
def tiny_sources(
    tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path, tiny_pickscore: Path, tiny_mask2former: Path
) -> dict[str, dict[str, Any]]:
    """Settings that put a tiny checkpoint in the place of each published one, by class of the reward."""
    from tests.tiny_rewards import aesthetic_file

    clip = f"local-dir:{tiny_clip}"
    predictor = aesthetic_file(tmp_path_factory.mktemp("aesthetic") / "predictor.pth")
    return {
        "PickScore": {"model": str(tiny_pickscore), "processor": None},
        "ClipScore": {"model": clip, "weights": None},
        "AestheticScore": {"weights": str(predictor), "clip": clip, "clip_weights": None},
        "PhotoGenevalReward": {"detector": str(tiny_mask2former), "clip": clip, "clip_weights": None},
    }


class Engine(ModuleType):
    """Takes the place of rapidocr: reads ``ab`` in every picture."""

    def __init__(self) -> None:
        super().__init__("rapidocr")

    def RapidOCR(self, params: Any) -> Any:
        def read(picture: NDArray[np.uint8]) -> SimpleNamespace:
            assert picture.shape == (16, 16, 3)
            return SimpleNamespace(txts=("ab",))

        return read


@cache
def composed(model: str, method: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", [f"model={model}", f"method={method}", "device=cpu"])


def configured(model: str, reward: str, method: str) -> DictConfig:
    """A run whose weights and prompts are nowhere."""
    config = composed(model, method).copy()
    config.reward = REWARDS[reward]
    config.model.policy.source = "/nowhere"
    config.prompts.update(source="file", path="/nowhere.txt")
    return config


@pytest.fixture(scope="session")
def policies(checkpoints: dict[str, Path]) -> dict[str, Any]:
    """A policy of each family, from its saved folder."""
    made = {}
    for model, folder in checkpoints.items():
        with initialize_config_dir(str(CONF), version_base="1.3"):
            overrides = [f"model={model}", f"model.policy.source={folder}", "model.policy.resolution=16"]
            config = compose("config", [*overrides, "model.policy.rank=4", *TINY.get(model, [])])
        made[model] = assembly.pretrained(config, Processes("cpu"))
    return made


@pytest.fixture(scope="session")
def rewards(tiny_sources: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Every reward on photographs, from saved folders."""
    made = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "rapidocr", Engine())
        for reward in REWARDS:
            if "photo" in domains(reward):
                config = configured("sd15", reward, "sdpo")
                for part in config.reward.parts.values():
                    part.photo.update(tiny_sources.get(part.photo._target_.rpartition(".")[2], {}))
                made[reward] = assembly.trained_reward(config, Processes("cpu"))
    return made


PHOTO = [reward for reward in REWARDS if "photo" in domains(reward)]


@pytest.mark.parametrize("reward", PHOTO)
@pytest.mark.parametrize("model", FAMILIES)
def test_a_familys_images_are_scored_and_gradients_reach_the_latents(
    policies: dict[str, Any], rewards: dict[str, Any], model: str, reward: str
) -> None:
    processes = Processes("cpu")
    stack = Stack(policies[model], rewards[reward], assembly.new_ledger(processes), processes, micro_batch=2)
    stack.reward.check(PROMPTS)
    rollout = stack.sample(PROMPTS, Sampler(2), seeds=[0, 1, 2], keep_images=True)
    assert rollout.images is not None
    assert rollout.images.shape == (3, 3, 16, 16)
    assert next(iter(rollout.scores)) == "reward"
    for scores in rollout.scores.values():
        assert scores.shape == (3,)
        assert scores.dtype == torch.float32
        assert scores.isfinite().all()
    assert stack.ledger.row()["reward_calls"] == 3

    assert stack.reward.differentiable == (reward in DIFFERENTIABLE["photo"])
    if stack.reward.differentiable:
        assert rollout.scores["reward"].std() > 0
        latents = rollout.latents.requires_grad_()
        stack.score(stack.decode(latents), PROMPTS)["reward"][1].backward()
        assert latents.grad is not None
        assert latents.grad[1].isfinite().all()
        assert latents.grad[1].abs().max() > 0
        assert not latents.grad[[0, 2]].any()


@pytest.mark.parametrize("method", GRADIENT_METHODS)
@pytest.mark.parametrize("model", ["shapes", "flux_dev"])
def test_methods_that_need_a_gradient_refuse_the_rewards_without_before_anything_is_loaded(
    model: str, method: str
) -> None:
    domain = MODELS[model].domain
    without = [each for each in REWARDS if domain in domains(each) and each not in DIFFERENTIABLE[domain]]
    assert len(without) == 4
    for reward in without:
        with pytest.raises(ConfigError) as raised:
            assembly.assemble(configured(model, reward, method))
        assert str(raised.value) == (
            f"{method} takes gradients through the reward, but {reward} has none; "
            f"differentiable here: {', '.join(DIFFERENTIABLE[domain])}"
        )


def test_the_methods_that_need_a_gradient_are_those() -> None:
    algorithms = {method: target(published(method).algorithm, "method.algorithm") for method in METHODS}
    needing = [method for method, made in algorithms.items() if made.needs.differentiable_reward]  # type: ignore[attr-defined]
    assert needing == GRADIENT_METHODS


def test_rewards_of_another_domain_are_refused_before_weights_are_loaded(tmp_path: Path) -> None:
    prompts = [{"prompt": prompt.text} | dict(prompt.metadata) for prompt in PROMPTS]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    refused = []
    for model, domain, other in (("shapes", "shapes", "photo"), ("sdxl", "photo", "shapes")):
        for reward in REWARDS:
            if domain not in domains(reward):
                config = configured(model, reward, "sdpo")
                config.prompts.path = str(tmp_path / "prompts.jsonl")
                config.method.batch.prompts = 3
                with pytest.raises(ConfigError) as raised:
                    assembly.assemble(config)
                message = f"reward {reward} does not exist for {domain} models; it does for: {other}"
                assert str(raised.value) == message
                refused.append(reward)
    assert refused == ["aesthetic", "clipscore", "hpsv2", "ocr", "exact_scene"]
