"""Real pipelines with one-layer components and random weights, built on the spot."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

TEXT_TOKENS = 10


def tiny_sd3(
    folder: Path,
    *,
    t5: bool = False,
    width: int = 16,
    layers: int = 2,
    dual_attention: bool = False,
    seed: int = 0,
) -> Path:
    """Saves a Stable Diffusion 3 pipeline with random weights and gives back its folder.

    Images are 16 x 16, latents 4 x 8 x 8 (factor 2), 16 image tokens; texts have 10 tokens, one a character. Weights
    are drawn large enough that texts, times and layers all matter. The second attention of SD3.5-Medium, ``attn2``, is
    there with `dual_attention`. Without `t5` use ``max_sequence_length=0``.
    """
    torch.manual_seed(seed)
    text_config = CLIPTextConfig(
        vocab_size=len(_clip_vocabulary()),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_TOKENS,
        projection_dim=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    text_encoders = [CLIPTextModelWithProjection(text_config) for _ in range(2)]
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=width // 2,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=width,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
        dual_attention_layers=(0,) if dual_attention else (),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.1,
        scaling_factor=1.5,
    )
    t5_config = T5Config(
        vocab_size=len(_t5_vocabulary()), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0
    )
    t5_encoder = T5EncoderModel(t5_config) if t5 else None
    generator = torch.Generator().manual_seed(seed)
    for module in [transformer, vae, *text_encoders, *([t5_encoder] if t5_encoder else [])]:
        for parameter in module.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.data = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=text_encoders[0],
        tokenizer=_clip_tokenizer(),
        text_encoder_2=text_encoders[1],
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=t5_encoder,
        tokenizer_3=T5TokenizerFast(vocab=_t5_vocabulary(), extra_ids=0) if t5 else None,
    )
    pipeline.save_pretrained(folder)
    return folder


def tiny_flux(folder: Path, *, guidance_embeds: bool = True, seed: int = 0) -> Path:
    """Saves a FLUX pipeline with random weights: as `tiny_sd3`, with one block of each kind and a T5."""
    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=8,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(2, 2, 4),
    )
    vae, text_encoder = _vae(shift_factor=0.1, quant=False), CLIPTextModel(_text_config())
    t5_config = T5Config(
        vocab_size=len(_t5_vocabulary()), d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0
    )
    t5_encoder = T5EncoderModel(t5_config)
    _draw_weights([transformer, vae, text_encoder, t5_encoder], seed)
    FluxPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0,
            use_dynamic_shifting=True,
            base_image_seq_len=4,
            max_image_seq_len=64,
            base_shift=0.5,
            max_shift=1.15,
        ),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=_clip_tokenizer(),
        text_encoder_2=t5_encoder,
        tokenizer_2=T5TokenizerFast(vocab=_t5_vocabulary(), extra_ids=0),
    ).save_pretrained(folder)
    return folder


def tiny_sd15(folder: Path, *, seed: int = 0, **scheduler: object) -> Path:
    """Saves a Stable Diffusion 1 pipeline with random weights; images and latents as those of `tiny_sd3`.

    Args:
        scheduler: settings of its DDIM scheduler otherwise than Stable Diffusion 1.5 has them.
    """
    torch.manual_seed(seed)
    unet, vae, text_encoder = _unet(), _vae(), CLIPTextModel(_text_config())
    _draw_weights([unet, vae, text_encoder], seed)
    StableDiffusionPipeline(
        unet=unet,
        scheduler=DDIMScheduler(**{**_SCHEDULE, "clip_sample": False, "set_alpha_to_one": True, **scheduler}),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=_clip_tokenizer(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def tiny_sdxl(folder: Path, *, seed: int = 0, force_zeros_for_empty_prompt: bool = True) -> Path:
    """Saves a Stable Diffusion XL pipeline with random weights and SDXL's own scheduler."""
    torch.manual_seed(seed)
    unet = _unet(
        cross_attention_dim=16,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 6 * 4,
    )
    vae = _vae()
    text_encoders = CLIPTextModel(_text_config()), CLIPTextModelWithProjection(_text_config())
    _draw_weights([unet, vae, *text_encoders], seed)
    StableDiffusionXLPipeline(
        unet=unet,
        scheduler=EulerDiscreteScheduler(**_SCHEDULE, timestep_spacing="leading"),
        vae=vae,
        text_encoder=text_encoders[0],
        tokenizer=_clip_tokenizer(),
        text_encoder_2=text_encoders[1],
        tokenizer_2=_clip_tokenizer(),
        force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
        add_watermarker=False,
    ).save_pretrained(folder)
    return folder


# Saves a pipeline of the family of each model in conf/model, but the embedded one.
FAMILIES: dict[str, Callable[[Path], Path]] = {
    "flux_dev": tiny_flux,
    "sd15": tiny_sd15,
    "sd35_medium": partial(tiny_sd3, t5=True, dual_attention=True),
    "sdxl": tiny_sdxl,
}

# The schedule of Stable Diffusion 1.5 and XL.
_SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def _text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(_clip_vocabulary()),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_TOKENS,
        projection_dim=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )


def _vae(*, shift_factor: float | None = None, quant: bool = True) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        shift_factor=shift_factor,
        scaling_factor=1.5,
    )


def _unet(**settings: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **{
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 8,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            **settings,
        }
    )


def _draw_weights(modules: list[nn.Module], seed: int) -> None:
    """Draws weights large enough that texts, times and layers all matter."""
    generator = torch.Generator().manual_seed(seed)
    for module in modules:
        for parameter in module.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.data = torch.randn(parameter.shape, generator=generator) / fan_in**0.5


def _clip_vocabulary() -> dict[str, int]:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789.,"
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    return {token: index for index, token in enumerate(tokens)}


def _clip_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(vocab=_clip_vocabulary(), merges=[], model_max_length=TEXT_TOKENS)


def _t5_vocabulary() -> list[tuple[str, float]]:
    return [(token, 0.0) for token in ("<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz.,")]
