"""Measures a generator's folder and writes its model card: figures, recipe and hashes."""

import argparse
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from alignbench.shapes.captions import TAGS
from alignbench.shapes.pretrain.evaluation import STEPS, Scores
from alignbench.shapes.pretrain.generator import evaluate, load_generator
from alignbench.shapes.pretrain.vae import AutoencoderRecipe, psnr, training_images

GUIDANCES = (1.0, 1.5, 2.0, 3.0, 4.5, 6.0)


def measure(folder: Path, guidances: Sequence[float], images_per_tag: int) -> list[Scores]:
    """Scores of a folder's pipeline on the test captions, one for each guidance scale."""
    generator, autoencoder = load_generator(folder)
    scores = []
    for guidance in guidances:
        scores.append(evaluate(generator, autoencoder, guidance, images_per_tag))
        print(scores[-1].line(), flush=True)
    return scores


def table(scores: Sequence[Scores]) -> str:
    """GenEval by guidance and tag, with exact scenes, objects and invalid images beside it, in Markdown."""
    columns = ["guidance", "GenEval", *TAGS, "strict", "exact scene", "objects per image", "images with invalid blobs"]
    rows = [columns, ["---:"] * len(columns)]
    for entry in scores:
        values = [entry.geneval, *entry.tags.values(), entry.strict, entry.exact_scene]
        values += [entry.objects_per_image, entry.invalid_share]
        rows.append([f"{entry.guidance:g}", *(f"{value:.3f}" for value in values)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every weight file, by its path in the folder."""
    files = sorted(folder.rglob("*.safetensors"))
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def write_card(
    folder: Path, earlier: Mapping[str, Sequence[Scores]], base: Sequence[Scores], decibel: float, remark: str
) -> None:
    """Writes ``README.md`` and the figures as ``scores.json``; ``remark`` is a paragraph about how the run went."""
    training = json.loads((folder / "training.json").read_text())
    scores: dict[str, Any] = {
        **{name: [entry.as_dict() for entry in entries] for name, entries in earlier.items()},
        "base": [entry.as_dict() for entry in base],
        "autoencoder_psnr": decibel,
        "sha256": hashes(folder),
    }
    (folder / "scores.json").write_text(json.dumps(scores, indent=2) + "\n")
    (folder / "README.md").write_text(_card(folder, training, earlier, base, decibel, remark))


_CARD = """# The embedded world's base generator

A Stable Diffusion 3 of {megabytes:.1f} MB that draws 32 x 32 pictures of coloured shapes, **imperfect on purpose**: it
is what reinforcement learning starts from. Plain diffusers loads it; there is no T5.

```python
from diffusers import StableDiffusion3Pipeline

pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
pipeline("a photo of a red circle", num_inference_steps=10, guidance_scale=3.0, max_sequence_length=0).images[0]
```

`max_sequence_length=0` belongs to the model: it was trained on the 16 tokens of the two CLIP encoders and no zero
embeddings in T5's place. The weights are stored in float16 and load as float32.

## Scores

GenEval (official rule, overall = mean over the tags) on the captions of the test split, {images} images a tag,
{sampling_steps} Euler steps of the scheduler's own grid, float32, exact detector. Without guidance the score is
{unguided:.3f}; the best guidance, {best_guidance:g}, gives {best:.3f}.

{base_table}

Exact scenes by tag without guidance: {exact_tags}.

The phases before it, on the same captions. *capacity* is the capacity check: the same architecture on true captions.

{earlier_tables}

The autoencoder restores rendered scenes that it was not trained on with {decibel:.2f} dB (3,000 images, as stored).

## Model

`AutoencoderKL` (factor 4, 8 latent channels), `SD3Transformer2DModel` ({layers} blocks of width {width}, patch 2, 16
image tokens), two `CLIPTextModelWithProjection` trained with it, `FlowMatchEulerDiscreteScheduler` with shift 3.
Parameters: {parameters}.

## Data

Rendered scenes under the captions of all splits (`alignbench/shapes/`); no outside data. From the second phase on,
pictures are wrong at these rates, which `Corruption` in `alignbench/shapes/pretrain/data.py` explains: {rates}.
A tenth of the captions is replaced by the empty prompt.

## Recipe

```bash
python -m alignbench.shapes.pretrain vae
train="torchrun --nproc_per_node 2 -m alignbench.shapes.pretrain generator --threads 1"
$train --phase capacity
$train --phase corrupted --from pretraining/capacity
$train --phase base --from pretraining/corrupted
python -m alignbench.shapes.pretrain card --earlier pretraining/capacity pretraining/corrupted
```

The autoencoder takes {autoencoder_steps:,} steps of {autoencoder_batch} images; the phases take {phase_steps} steps of
{captions} captions with {images_per_caption} images each, all with seed {seed}: bfloat16 autocast, AdamW, a moving
average of the weights. The last phase distils guidance into the unguided model for the tag that is weakest without it
({distilled}), so that no tag is dead. The last command makes the figures above.
Every setting is in `training.json`, every digit in `scores.json`.
{remark}
## Weights (SHA-256)

{hashes}
"""


def _card(
    folder: Path,
    training: dict[str, Any],
    earlier: Mapping[str, Sequence[Scores]],
    base: Sequence[Scores],
    decibel: float,
    remark: str,
) -> str:
    generator, autoencoder = load_generator(folder)
    parts = {
        "transformer": generator.transformer,
        "text encoders": torch.nn.ModuleList(generator.encoders),
        "autoencoder": autoencoder,
    }
    counts = {name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()}
    best = max(base, key=lambda entry: entry.geneval)
    phase = training["base"]
    return _CARD.format(
        megabytes=sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e6,
        images=base[0].images,
        sampling_steps=STEPS,
        unguided=base[0].geneval,
        best_guidance=best.guidance,
        best=best.geneval,
        base_table=table(base),
        exact_tags=", ".join(f"{tag} {share:.3f}" for tag, share in base[0].exact_tags.items()),
        earlier_tables="\n\n".join(f"*{name}*\n\n{table(scores)}" for name, scores in earlier.items()),
        decibel=decibel,
        layers=generator.transformer.config.num_layers,
        width=generator.transformer.config.caption_projection_dim,
        parameters=", ".join(f"{name} {count:,}" for name, count in counts.items()),
        rates=", ".join(f"{name} {rate:g}" for name, rate in phase["corruption"].items()),
        autoencoder_steps=AutoencoderRecipe.steps,
        autoencoder_batch=AutoencoderRecipe.batch_size,
        phase_steps=", ".join(f"{settings['steps']:,} ({name})" for name, settings in training.items()),
        distilled=", ".join(f"{tag}, scale {scale:g}" for tag, scale in phase["guidance"].items()),
        captions=phase["captions"],
        images_per_caption=phase["images_per_caption"],
        seed=phase["seed"],
        remark=f"\n{remark}\n" if remark else "",
        hashes="\n".join(f"* `{name}`: `{digest}`" for name, digest in hashes(folder).items()),
    )


def main(command: str, arguments: Sequence[str]) -> None:
    """``python -m alignbench.shapes.pretrain card``: measures all phases, writes the card into the base's folder."""
    parser = argparse.ArgumentParser(prog=f"python -m alignbench.shapes.pretrain {command}")
    parser.add_argument("--folder", type=Path, default=Path("pretraining/base"), help="pipeline of the base phase")
    parser.add_argument("--earlier", type=Path, nargs="*", default=[], help="folders of the phases before, named alike")
    parser.add_argument("--images", type=int, default=480, help="images a tag")
    parser.add_argument("--remark", default="", help="a paragraph about how the training went")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    earlier = {phase.name: measure(phase, (1.0, 3.0), options.images) for phase in options.earlier}
    base = measure(options.folder, GUIDANCES, options.images)
    _, autoencoder = load_generator(options.folder)
    decibel = psnr(autoencoder, training_images(3000, AutoencoderRecipe.seed + 1))
    write_card(options.folder, earlier, base, decibel, options.remark)
    print(f"{options.folder / 'README.md'}: written; autoencoder {decibel:.2f} dB")
