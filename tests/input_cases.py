"""Small inputs that users have: prompt files, GenEval records, images, LoRA files, each written below a folder.

``ALIGNBENCH_CASES=FOLDER`` makes the tests read such a folder instead.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"

SQUARE: dict[str, Any] = {"class": "square", "count": 1}
RECORD: dict[str, Any] = {"tag": "single_object", "prompt": "a photo of a square", "include": [SQUARE]}

INCLUDES: dict[str, Any] = {
    "count_missing": [{"class": "square"}],
    "count_zero": [SQUARE | {"count": 0}],
    "count_text": [SQUARE | {"count": "2"}],
    "count_null": [SQUARE | {"count": None}],
    "count_real": [SQUARE | {"count": 1.5}],
    "class_missing": [{"count": 1}],
    "clause_null": [None],
    "include_text": "square",
    "include_mapping": SQUARE,
    "include_number": 3,
    "position_nothing": [SQUARE | {"position": ["above", 4]}],
    "position_itself": [SQUARE | {"position": ["above", 0]}],
    "position_text": [SQUARE, {"class": "circle", "count": 1, "position": "above"}],
    "plural": [{"class": "squares", "count": 2}],
    "colour_unknown": [SQUARE | {"color": "grey"}],
}
EXCLUDES: dict[str, Any] = {
    "exclude_null": None, "exclude_text": "square", "exclude_no_count": [{"class": "square"}]
}  # fmt: skip


def photo() -> NDArray[np.uint8]:
    """The pixels of every image."""
    return np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)


def write(folder: Path) -> None:
    """Write all of them."""

    def lines(name: str, *records: Any) -> None:
        (folder / name).write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")

    red, blue = "a photo of a red circle", "a photo of a blue square"
    (folder / "repeats.txt").write_text(f"{red}\n{blue}\n{red} \n", encoding="utf-8")
    lines("repeats.jsonl", RECORD, RECORD | {"prompt": f"{RECORD['prompt']} "}, RECORD)
    (folder / "bom_crlf.txt").write_bytes(f"\ufeff{red}\r\n{blue}\r\n\r\n".encode())
    separated = json.dumps({"prompt": "a red circle\u2028and a cross"}, ensure_ascii=False)
    (folder / "line_separator.jsonl").write_text(f"{separated}\n", encoding="utf-8")
    for name, include in INCLUDES.items():
        lines(f"record_{name}.jsonl", RECORD | {"include": include})
    for name, exclude in EXCLUDES.items():
        lines(f"record_{name}.jsonl", RECORD | {"exclude": exclude})
    deep = "[" * 100_000 + "]" * 100_000
    (folder / "record_deep.jsonl").write_text(f'{{"prompt": "x", "include": {deep}}}\n')
    (folder / "record_surrogate.jsonl").write_text('{"prompt": "\\ud800 a square"}\n')
    (folder / "record_huge_integer.jsonl").write_text(f'{{"prompt": "a square", "seed": {"9" * 5000}}}\n')
    _write_images(folder / "images")


def _write_images(folder: Path) -> None:
    pixels = photo()
    exif = Image.Exif()
    exif[0x0112] = 6
    images: dict[str, tuple[str, Image.Image, dict[str, Any]]] = {
        "rgb_png": ("rgb.png", Image.fromarray(pixels), {}),
        "photo_jpg": ("photo.jpg", Image.fromarray(pixels), {}),
        "photo_webp": ("photo.webp", Image.fromarray(pixels), {}),
        "alpha_png": ("alpha.png", Image.fromarray(np.dstack([pixels, np.full((32, 32), 128, np.uint8)])), {}),
        "deep_png": ("deep.png", Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), {}),
        "grey_png": ("grey.png", Image.fromarray(pixels[..., 0]), {}),
        "palette_png": ("palette.png", Image.fromarray(pixels).quantize(8), {}),
        "exif_rotated": ("rotated.jpg", Image.fromarray(pixels), {"exif": exif}),
    }
    for name, (file, image, options) in images.items():
        (folder / name).mkdir(parents=True)
        image.save(folder / name / file, **options)
        index = json.dumps({"prompt": RECORD["prompt"], "image": file})
        (folder / name / "images.jsonl").write_text(f"{index}\n")


LORA_LAYERS = [f"transformer_blocks.{block}.attn.to_{kind}" for block in range(4) for kind in "qkv"]
LORA_CONFIG: dict[str, Any] = {
    "r": 4, "lora_alpha": 16, "target_modules": ["attn.to_q", "attn.to_k", "attn.to_v"], "use_rslora": False,
    "use_dora": False, "alpha_pattern": {}, "rank_pattern": {},
}  # fmt: skip
LORA_CHANGES: dict[str, dict[str, Any]] = {
    "pipeline_metadata": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "alpha_text": {"lora_alpha": "abc"},
    "alpha_null": {"lora_alpha": None},
    "rank_zero": {"r": 0},
    "pattern_text": {"rank_pattern": "x"},
    "pattern_endless": {"alpha_pattern": {"(a+)+$": 8}},
}


def lora_tensors() -> dict[str, Tensor]:
    """One LoRA of the embedded generator, rank 4, without prefix or scale."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (4, 128), "B": (128, 4)}
    return {
        f"{layer}.lora_{matrix}.weight": torch.randn(shapes[matrix], generator=generator) * 0.15
        for layer in LORA_LAYERS
        for matrix in "AB"
    }


def write_loras(folder: Path) -> None:
    """Write it as its many writers do."""

    def save(name: str, rename: Callable[[str], str], config: Any = None, file: str = DIFFUSERS_LORA) -> None:
        (folder / name).mkdir(parents=True)
        header = {"format": "pt"} | ({} if config is None else {"lora_adapter_metadata": json.dumps(config)})
        save_file({rename(key): tensor for key, tensor in lora_tensors().items()}, folder / name / file, header)

    def prefixed(prefix: str) -> Callable[[str], str]:
        return lambda key: prefix + key

    for name, changes in LORA_CHANGES.items():
        config = {f"transformer.{key}": value for key, value in (LORA_CONFIG | changes).items()}
        save(name, prefixed("transformer."), config)
    save("adapter_metadata", prefixed(""), LORA_CONFIG)
    save("diffusion_model_prefix", prefixed("diffusion_model."))
    save("module_prefix", prefixed("transformer.module."))
    save("peft_prefix", prefixed("base_model.model."))
    save("default_0", lambda key: "transformer." + key.replace(".weight", ".default_0.weight"))
    save("checkpoint-100/lora", prefixed("base_model.model."), file="adapter_model.safetensors")
    settings = {"peft_type": "LORA", **LORA_CONFIG}
    (folder / "checkpoint-100" / "lora" / "adapter_config.json").write_text(json.dumps(settings))
