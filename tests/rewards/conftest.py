"""Tiny checkpoints of the models that score photographs: random weights, but told apart by what they see."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

TINY_CLIP = {
    "embed_dim": 12,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


def spread(model: nn.Module, std: float) -> None:
    """Weights so large that inputs make a difference."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an open_clip model of 32 x 32 pixels."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY_CLIP)
    spread(model, 0.3)
    folder = tmp_path_factory.mktemp("open_clip")
    settings = {"model_cfg": TINY_CLIP, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def tiny_mask2former(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Mask2Former of 12 queries and COCO's 80 classes, some of them with confidence."""
    torch.manual_seed(1)
    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=12,
        num_labels=80,
    )
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.normal_(std=1.0)
        for name, parameter in model.named_parameters():
            if "mask_embedder" in name and parameter.ndim > 1:
                parameter.normal_(std=0.6)
    folder = tmp_path_factory.mktemp("mask2former")
    model.save_pretrained(folder)
    return folder
