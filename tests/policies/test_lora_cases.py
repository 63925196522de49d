"""LoRA files that users have, for the embedded generator: read with the right scale, or refused in one sentence."""

from pathlib import Path

import pytest
import torch

from alignbench.configuration import embedded
from alignbench.errors import CheckpointError
from alignbench.policies.lora import Lora, read_lora
from alignbench.policies.stable_diffusion_3 import StableDiffusion3Policy
from tests import input_cases

REFUSED = {
    "peft_prefix": "adapter_config.json: there is none beside it, so its scale is not known",
    "diffusion_model_prefix": "diffusion_model.",
    "module_prefix": "module.",
    "default_0": "default_0",
    "dora": "DoRA",
    "alpha_text": "abc",
    "alpha_null": "lora_alpha",
    "rank_zero": "r",
    "pattern_text": "rank_pattern",
    "pattern_endless": "(a+)+$",
}


def read(folder: Path) -> Lora:
    return read_lora(str(folder), StableDiffusion3Policy, embedded("embedded:generator"))


@pytest.mark.parametrize(
    ("name", "scale"),
    [("pipeline_metadata", 4.0), ("adapter_metadata", 4.0), ("checkpoint-100", 4.0), ("rslora", 8.0)],
)
def test_the_scale_is_alpha_over_the_rank_or_its_root(cases: Path, name: str, scale: float) -> None:
    """Rank 4, alpha 16: B A times 4; rank-stabilised times 16 / sqrt(4)."""
    found, plain = read(cases / "lora" / name), read(cases / "lora" / "pipeline_metadata")
    assert len(found.layers) == 12
    for layer, (a, b) in found.layers.items():
        torch.testing.assert_close(b @ a, plain.layers[layer][1] @ plain.layers[layer][0] * (scale / 4))
    raw = input_cases.lora_tensors()
    layer = "transformer_blocks.0.attn.to_q"
    expected = raw[f"{layer}.lora_B.weight"] @ raw[f"{layer}.lora_A.weight"] * scale
    torch.testing.assert_close(found.layers[layer][1] @ found.layers[layer][0], expected)


@pytest.mark.parametrize("name", REFUSED)
def test_what_nobody_can_load_is_refused_in_a_sentence(cases: Path, name: str) -> None:
    with pytest.raises(CheckpointError) as raised:
        read(cases / "lora" / name)
    message = str(raised.value)
    assert str(cases / "lora" / name) in message
    assert REFUSED[name] in message
    assert "\n" not in message
