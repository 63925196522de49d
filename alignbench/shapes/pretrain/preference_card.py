"""How well a preference model prefers, on scenes that it was not trained on, and the card that says so."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignbench.rewards.text_image import PickScore
from alignbench.shapes.captions import CONTROL_WORDS, TAGS, near_miss, records
from alignbench.shapes.degrade import DEGRADATIONS, WORDS, degrade
from alignbench.shapes.render import render
from alignbench.shapes.scenes import sample_scene

SEED = 7_000_000
"""Held-out scenes: trainings draw theirs from (data seed, step), which is never this one."""
SCENES_PER_TAG = 300

TITLES = {"pickscore": "Tiny PickScore", "judge": "Second judge"}
PURPOSES = {
    "pickscore": "The differentiable preference reward of the embedded world; it may be trained on.",
    "judge": (
        "Judges what was trained on another reward and is never trained on: other weights, data and architecture than "
        "the tiny PickScore."
    ),
}


@dataclass(frozen=True)
class Accuracies:
    """Shares of held-out comparisons that a model decides rightly; every tag has equally many scenes.

    Attributes:
        captions: by tag; a picture prefers its caption to a near miss.
        pictures: by tag; a caption prefers its picture to that of a near miss.
        degraded: by tag; a caption prefers the clean picture to a degraded copy, all degradations equally often.
        degradations: the same by degradation, over all tags.
        words: by negative word; the clean picture prefers the opposite positive word before its caption, its degraded
            copy the negative one, and each of the two worded captions its own picture of the two (mean of the four).
    """

    captions: dict[str, float]
    pictures: dict[str, float]
    degraded: dict[str, float]
    degradations: dict[str, float]
    words: dict[str, float]

    def means(self) -> dict[str, float]:
        """The mean of each table."""
        return {name: float(np.mean(list(table.values()))) for name, table in asdict(self).items()}


def measure(reward: PickScore, scenes_per_tag: int = SCENES_PER_TAG, seed: int = SEED) -> Accuracies:
    """Draw scenes for every tag and let the model decide about them."""
    captions, pictures, degraded = {}, {}, {}
    by_degradation: dict[str, list[float]] = {name: [] for name in DEGRADATIONS}
    by_word: dict[str, list[float]] = {word: [] for word in WORDS.values()}
    for index, tag in enumerate(TAGS):
        rng = np.random.default_rng([seed, index])
        members = [record for record in records() if record["tag"] == tag]
        drawn = [members[int(rng.integers(len(members)))] for _ in range(scenes_per_tag)]
        missed = [near_miss(record, rng) for record in drawn]
        right, wrong = [record["prompt"] for record in drawn], [record["prompt"] for record in missed]
        pixels = render([sample_scene(record, rng) for record in drawn])
        clean = _embed(reward, pixels)
        other = _embed(reward, render([sample_scene(record, rng) for record in missed]))
        matched = _similarity(reward, clean, right)
        captions[tag] = _share(matched > _similarity(reward, clean, wrong))
        pictures[tag] = _share(matched > _similarity(reward, other, right))
        for name, accuracies in by_degradation.items():
            worse = _embed(reward, degrade(pixels, [name] * len(pixels), rng))
            accuracies.append(_share(matched > _similarity(reward, worse, right)))
            if name in WORDS:
                by_word[WORDS[name]].append(_word_accuracy(reward, clean, worse, right, WORDS[name]))
        degraded[tag] = float(np.mean([accuracies[-1] for accuracies in by_degradation.values()]))
    return Accuracies(
        captions,
        pictures,
        degraded,
        {name: float(np.mean(values)) for name, values in by_degradation.items()},
        {word: float(np.mean(values)) for word, values in by_word.items()},
    )


def _word_accuracy(reward: PickScore, clean: Tensor, worse: Tensor, captions: Sequence[str], word: str) -> float:
    opposite = CONTROL_WORDS["positive"][CONTROL_WORDS["negative"].index(word)]
    positive = [f"{opposite}. {caption}" for caption in captions]
    negative = [f"{word}. {caption}" for caption in captions]
    clean_positive, clean_negative = (_similarity(reward, clean, texts) for texts in (positive, negative))
    worse_positive, worse_negative = (_similarity(reward, worse, texts) for texts in (positive, negative))
    decisions = (
        clean_positive > clean_negative,
        worse_negative > worse_positive,
        clean_positive > worse_positive,
        worse_negative > clean_negative,
    )
    return float(np.mean([_share(decision) for decision in decisions]))


def _embed(reward: PickScore, images: NDArray[np.uint8]) -> Tensor:
    with torch.no_grad():
        return reward.embed_images(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)


def _similarity(reward: PickScore, images: Tensor, texts: Sequence[str]) -> Tensor:
    """Cosines of embedded images and texts: they rank as the scores do."""
    return (images * reward.embed_texts(texts)).sum(dim=-1)


def _share(right: Tensor) -> float:
    return float(right.double().mean())


def report(accuracies: Accuracies) -> str:
    """Markdown tables of the accuracies."""
    means = accuracies.means()
    lines = [
        "| tag | caption against near miss | picture against near miss | clean against degraded |",
        "|---|---|---|---|",
    ]
    tables = (accuracies.captions, accuracies.pictures, accuracies.degraded)
    rows = {tag: [table[tag] for table in tables] for tag in TAGS}
    rows["**mean**"] = [means[name] for name in ("captions", "pictures", "degraded")]
    lines += [f"| {tag} | " + " | ".join(f"{value:.3f}" for value in values) + " |" for tag, values in rows.items()]
    lines += ["", "| degradation | clean against degraded |", "|---|---|"]
    lines += [f"| {name} | {value:.3f} |" for name, value in accuracies.degradations.items()]
    lines += ["", "| control word | accuracy against its opposite |", "|---|---|"]
    lines += [f"| {word} | {value:.3f} |" for word, value in accuracies.words.items()]
    return "\n".join(lines)


def write_card(folder: Path, name: str, recipe: Mapping[str, Any], parameters: int, accuracies: Accuracies) -> None:
    """Write ``README.md`` beside the weights: what it is, how it was made, how good it is, and the weights' hash."""
    weights = folder / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    rows = "\n".join(f"| {key} | {value} |" for key, value in recipe.items())
    (folder / "README.md").write_text(
        f"""---
library_name: transformers
pipeline_tag: zero-shot-image-classification
license: apache-2.0
---
# {TITLES[name]}

{PURPOSES[name]}
A `CLIPModel` of {parameters:,} parameters for 32 x 32 pixels, stored in float16 ({weights.stat().st_size:,} bytes). The
score is `exp(logit_scale) * cos(image, text)`, on the raw scale, as PickScore's.

```python
from alignbench.rewards.text_image import PickScore
reward = PickScore("alignbench/shapes/checkpoints/{name}", name="{name}")
```

## Data

Rendered scenes of the embedded world, drawn afresh at every step; no other data. Every caption of the world is in it,
also those held out of reinforcement learning, since a reward has to judge them. Next to a caption and its picture stand
near misses (one shape, colour, count, relation or binding changed) with pictures of their own; degraded copies
({", ".join(DEGRADATIONS)}); scenes drawn without a caption; and captions behind a control word
({", ".join(CONTROL_WORDS["positive"])}; {", ".join(CONTROL_WORDS["negative"])}), as in "sharp. a photo of a circle".

## Recipe

Symmetric InfoNCE with several positives (`alignbench/shapes/pretrain/preference.py`), AdamW (betas 0.9, 0.98; weight
decay 0.05 on matrices), gradient norm clipped at 1, bfloat16 autocast, one thread.

| setting | value |
|---|---|
{rows}

    python -m alignbench.shapes.pretrain {name}

torch {version("torch")}, transformers {version("transformers")}.

## Scores

Shares of right decisions on {SCENES_PER_TAG} held-out scenes a tag (seed {SEED}); chance is 0.5.

{report(accuracies)}

    python -m alignbench.shapes.pretrain {name} --evaluate

## Limits

It knows nothing but this world. It is a learnt reward: a high score on pictures unlike those it was trained on proves
nothing, so read it beside the exact detector and the other preference model. Relations are its weakest tag.

SHA-256 of `model.safetensors`: `{digest}`
"""
    )
