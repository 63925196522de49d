"""A composed configuration over a tiny checkpoint: the real loop in seconds."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict

from tests import input_cases
from tests.tiny import FAMILIES, tiny_sd3

CONF = Path(__file__).parent.parent / "conf"
Compose = Callable[..., DictConfig]


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion 3 pipeline of one-layer components, 16 x 16 pixels, without T5."""
    return tiny_sd3(tmp_path_factory.mktemp("checkpoints") / "sd3")


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small inputs that users have; of the folder ALIGNBENCH_CASES, if that is set."""
    given = os.environ.get("ALIGNBENCH_CASES")
    if given:
        return Path(given)
    folder = tmp_path_factory.mktemp("cases")
    input_cases.write(folder)
    input_cases.write_loras(folder / "lora")
    return folder


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved pipeline for each model of conf/model but the embedded one: one-layer components, 16 x 16 pixels."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {model: build(folder / model) for model, build in FAMILIES.items()}


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an open_clip model of 32 x 32 pixels."""
    from tests import tiny_rewards  # imports open_clip, which takes a second

    return tiny_rewards.tiny_clip(tmp_path_factory.mktemp("open_clip") / "tiny")


@pytest.fixture(scope="session")
def tiny_pickscore(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random CLIPModel of 32 x 32 pixels and its processor, as PickScore takes them."""
    from tests import tiny_rewards

    return tiny_rewards.tiny_pickscore(tmp_path_factory.mktemp("pickscore"))


@pytest.fixture(scope="session")
def tiny_mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Mask2Former of COCO's 80 classes, some of them with confidence."""
    from tests import tiny_rewards

    return tiny_rewards.tiny_mask2former(tmp_path_factory.mktemp("mask2former"))


@pytest.fixture
def tiny_run(tmp_path: Path, tiny_checkpoint: Path) -> Compose:
    """Composes a run of two iterations on the tiny checkpoint with the reward ``red``; overrides come last."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("ab", "cd", "ef", "gh")))

    def composed(*overrides: str, reward: str = "tests.stand_ins.Red") -> DictConfig:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose(
                "config",
                [
                    f"results={tmp_path / 'results'}",
                    f"model.policy.source={tiny_checkpoint}",
                    "model.policy.rank=4",
                    "prompts=file",
                    f"prompts.path={prompts}",
                    "method.batch.prompts=2",
                    "method.batch.images=4",
                    "method.rollout.steps=3",
                    "evaluation.features=null",
                    "evaluation.published=false",
                    "evaluation.fractions=[0,0.5,1]",
                    "evaluation.curve.images_per_tag=8",
                    "evaluation.curve.steps=2",
                    "evaluation.final.images_per_tag=8",
                    "evaluation.final.steps=2",
                    "budget.flops=null",
                    "budget.iterations=2",
                    "checkpoint_every=0.4",
                    "progress=false",
                    "device=cpu",
                    *overrides,
                ],
            )
        with open_dict(config):
            config.evaluation.scorers = {}
            config.reward = {
                "parts": {"red": {"weight": 1.0, "shapes": {"_target_": reward}}},
                "targets": {},
                "normalisation": {},
            }
        return config

    return composed
