"""Tiny checkpoints of the models that score photographs: random weights, but told apart by what they see."""

import json
import string
from itertools import pairwise
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)

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


def tiny_clip(folder: Path) -> Path:
    """Saves an open_clip model of 32 x 32 pixels and 12 features."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY_CLIP)
    spread(model, 0.3)
    folder.mkdir(parents=True)
    settings = {"model_cfg": TINY_CLIP, "preprocess_cfg": {"mean": MEAN, "std": STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def tiny_pickscore(folder: Path) -> Path:
    """Saves a CLIPModel of transformers, of 32 x 32 pixels and 12 features, with a letter tokenizer."""
    pieces = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=24)
    text = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=24,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=12, logit_scale_init_value=3.0
    )
    model = CLIPModel(config)
    spread(model, 0.3)
    images = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=list(MEAN), image_std=list(STD)
    )
    model.save_pretrained(folder)
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def aesthetic_file(file: Path, features: int = 12) -> Path:
    """Writes a predictor of the published architecture, as torch writes it."""
    torch.manual_seed(2)
    weights = {}
    sizes = (features, 1024, 128, 64, 16, 1)
    for layer, (before, after) in zip((0, 2, 4, 6, 7), pairwise(sizes), strict=True):
        weights[f"layers.{layer}.weight"] = torch.randn(after, before) / before**0.5
        weights[f"layers.{layer}.bias"] = torch.randn(after)
    torch.save(weights, file)
    return file


def tiny_mask2former(folder: Path) -> Path:
    """Saves a Mask2Former of 12 queries and COCO's 80 classes, some of them with confidence."""
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
    model.save_pretrained(folder)
    return folder
