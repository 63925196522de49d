"""Training of the tiny PickScore and of the second judge: contrastive, from rendered scenes alone.

A batch is made of groups of captions that differ in one attribute, count, relation or binding, each with a picture of
its own, so that every caption meets hard negatives among the pictures and every picture among the captions. To them
come degraded copies of the pictures, captions behind a control word, and arbitrary scenes drawn without a caption.
Which caption is true of which picture is computed from the scenes, not taken from the pairing: a red circle is also
"a circle", and counts as a positive of both.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from alignbench.rewards.geneval.rules import relations
from alignbench.rewards.text_image import PickScore
from alignbench.shapes.captions import (
    CONTROL_WORDS,
    TAGS,
    Record,
    colour_attribution,
    coloured,
    counting,
    near_miss,
    position,
    records,
    single_object,
    two_object,
)
from alignbench.shapes.degrade import DEGRADATIONS, WORDS, degrade
from alignbench.shapes.pretrain.checkpoint import SECONDS_BETWEEN, load_state, save_state
from alignbench.shapes.pretrain.preference_card import SCENES_PER_TAG, measure, report, write_card
from alignbench.shapes.render import render
from alignbench.shapes.scenes import SIZE, Scene, random_scene, sample_scene
from alignbench.shapes.tokenizer import MAX_LENGTH, build_tokenizer

TAG_WEIGHTS = {
    "single_object": 0.08,
    "two_object": 0.12,
    "counting": 0.15,
    "colors": 0.10,
    "position": 0.25,
    "color_attr": 0.30,
}
"""How often a tag's captions are drawn: bindings are the hardest to learn."""

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"

MAX_LOGIT_SCALE = float(np.log(100))  # CLIP's bound (Radford et al. 2021, section 2.5)


@dataclass(frozen=True)
class PreferenceRecipe:
    """Everything that decides the weights.

    Attributes:
        seed: of the weights.
        data_seed: of captions, scenes and degradations.
        width, layers, heads, patch: of the vision transformer; the patch is a square's side in pixels.
        text_width, text_layers: of the text transformer.
        projection: dimension in which pictures and captions meet.
        steps: optimizer steps.
        learning_rate: peak, reached after ``warmup`` steps and annealed to 0 by a cosine.
        groups: captions drawn a step, each with ``near_misses`` others that differ in one thing.
        degraded: degraded copies a step.
        arbitrary: pictures a step of scenes that were drawn without a caption.
        control: captions a step that are repeated behind a control word.
    """

    seed: int
    data_seed: int
    width: int
    layers: int
    heads: int
    patch: int
    text_width: int
    text_layers: int
    projection: int
    steps: int
    learning_rate: float
    warmup: int = 100
    groups: int = 24
    near_misses: int = 3
    degraded: int = 64
    arbitrary: int = 16
    control: int = 48


RECIPES = {
    "pickscore": PreferenceRecipe(
        seed=0,
        data_seed=100,
        width=128,
        layers=4,
        heads=4,
        patch=8,
        text_width=64,
        text_layers=2,
        projection=64,
        steps=2000,
        learning_rate=1.5e-3,
    ),
    "judge": PreferenceRecipe(
        seed=1,
        data_seed=200,
        width=64,
        layers=4,
        heads=2,
        patch=4,
        text_width=96,
        text_layers=2,
        projection=48,
        steps=2000,
        learning_rate=1.5e-3,
    ),
}
"""The reward that may be trained on, and the judge that never is: other weights, other data, another architecture."""


# ------------------------------------------------------------------------------------------------ models


def build_model(recipe: PreferenceRecipe, tokenizer: CLIPTokenizer) -> Any:
    """A fresh ``CLIPModel`` for 32 x 32 pictures; its plain attention is twice as fast as the fused one on a CPU."""
    torch.manual_seed(recipe.seed)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.text_width,
        intermediate_size=4 * recipe.text_width,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=recipe.text_width // 32,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=recipe.projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=recipe.width,
        intermediate_size=2 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        image_size=SIZE,
        patch_size=recipe.patch,
        projection_dim=recipe.projection,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=recipe.projection)
    return CLIPModel._from_config(config, attn_implementation="eager")


def build_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """The processor that goes with the models: 32 x 32 pixels, mean and deviation one half."""
    images = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


# ------------------------------------------------------------------------------------------------ data


@dataclass(frozen=True)
class Batch:
    """One step's pictures and captions, and who goes with whom.

    Attributes:
        images: uint8 ``[images, 32, 32, 3]``.
        texts: captions, some behind a control word.
        of_text: int8 ``[texts, images]``, for choosing a picture given a caption: 1 right, -1 wrong, 0 leave out.
        of_image: int8 ``[texts, images]``, the same for choosing a caption given a picture.
    """

    images: NDArray[np.uint8]
    texts: list[str]
    of_text: NDArray[np.int8]
    of_image: NDArray[np.int8]


def true_captions(scene: Scene) -> frozenset[str]:
    """The captions of the world that are right for a scene and leave nothing in it out.

    Relations are GenEval's. A scene of three or four objects of several shapes has no caption.
    """
    shapes = [thing.shape for thing in scene]
    if len(scene) == 1:
        (thing,) = scene
        return frozenset({single_object(thing.shape)["prompt"], coloured(thing.colour, thing.shape)["prompt"]})
    if len(set(shapes)) == 1:
        return frozenset({counting(shapes[0], len(scene))["prompt"]})
    if len(scene) > 2:
        return frozenset()
    a, b = scene
    there, back = tuple(sorted(relations(a.box, b.box))), tuple(sorted(relations(b.box, a.box)))
    first, second = (a.colour, a.shape), (b.colour, b.shape)
    return _captions_of_two(first, second, there) | _captions_of_two(second, first, back)


@cache
def _captions_of_two(first: tuple[str, str], second: tuple[str, str], found: tuple[str, ...]) -> frozenset[str]:
    """Captions that name ``first`` (colour, shape) before ``second``; ``found`` are its relations to it."""
    true = [two_object(first[1], second[1])]
    true.extend(position(first[1], relation, second[1]) for relation in found)
    if first[0] != second[0]:
        true.append(colour_attribution(first, second))
    return frozenset(record["prompt"] for record in true)


def draw_record(rng: np.random.Generator) -> Record:
    """A record of the world, by the weight of its tag."""
    tag = TAGS[int(rng.choice(len(TAGS), p=[TAG_WEIGHTS[tag] for tag in TAGS]))]
    members = _records_by_tag()[tag]
    return members[int(rng.integers(len(members)))]


@cache
def _records_by_tag() -> Mapping[str, Sequence[Record]]:
    return {tag: [record for record in records() if record["tag"] == tag] for tag in TAGS}


def draw_batch(recipe: PreferenceRecipe, step: int) -> Batch:
    """The batch of a step; it depends on the data seed and the step alone."""
    rng = np.random.default_rng([recipe.data_seed, step])
    drawn: list[Record] = []
    for _ in range(recipe.groups):
        record = draw_record(rng)
        drawn += [record] + [near_miss(record, rng) for _ in range(recipe.near_misses)]
    scenes = [sample_scene(record, rng) for record in drawn] + [random_scene(rng) for _ in range(recipe.arbitrary)]
    clean = render(scenes)

    copied = rng.choice(len(drawn), size=recipe.degraded, replace=False)
    how = [list(DEGRADATIONS)[k] for k in rng.integers(len(DEGRADATIONS), size=recipe.degraded)]
    images = np.concatenate([clean, degrade(clean[copied], how, rng)])
    word_of_image = [""] * len(clean) + [WORDS.get(name, "other") for name in how]
    scene_of_image = np.concatenate([np.arange(len(clean)), copied])

    captions = [record["prompt"] for record in drawn]
    words = [""] * len(captions)
    worded = [k for k, name in enumerate(how) if name in WORDS][: recipe.control // 2]
    for k in worded:
        captions.append(captions[copied[k]])
        words.append(WORDS[how[k]])
    for k in rng.choice(len(drawn), size=recipe.control - len(worded), replace=False):
        captions.append(captions[k])
        words.append(str(rng.choice(CONTROL_WORDS["positive"])))

    true_of = [true_captions(scene) for scene in scenes]
    true = np.array([[caption in true_of[k] for k in scene_of_image] for caption in captions])
    of_text, of_image = judgements(true, words, word_of_image)
    texts = [f"{word}. {caption}" if word else caption for word, caption in zip(words, captions, strict=True)]
    return Batch(images, texts, of_text, of_image)


def judgements(
    true: NDArray[np.bool_], words: Sequence[str], looks: Sequence[str]
) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Who goes with whom: 1 right, -1 wrong, 0 leave out.

    Given a plain caption or one with a positive word, a degraded picture is wrong, even of the right scene. Given a
    degraded picture, the plain caption of its scene is right, one with a positive word is wrong. A negative word is
    right for pictures with that degradation, wrong for clean ones and those of other words, and open for degradations
    without a word.

    Args:
        true: ``[texts, images]``, whether the caption is true of the picture's scene.
        words: control word of each text, or "".
        looks: "" for a clean picture, else the word of its degradation, or "other".

    Returns:
        The matrices ``of_text`` and ``of_image`` of `Batch`.
    """
    text_word, image_word = np.asarray(words)[:, None], np.asarray(looks)[None, :]
    negative = np.isin(text_word, CONTROL_WORDS["negative"])
    plain = text_word == ""
    clean = image_word == ""
    open_word = negative & (image_word == "other")
    fits = np.where(negative, text_word == image_word, clean)
    of_text = np.where(true & fits, 1, np.where(true & open_word, 0, -1))
    of_image = np.where(true & (fits | (plain & ~clean)), 1, np.where(true & open_word, 0, -1))
    return of_text.astype(np.int8), of_image.astype(np.int8)


# ------------------------------------------------------------------------------------------------ training


def contrastive_loss(logits: Tensor, judgement: Tensor) -> Tensor:
    """InfoNCE over the last dimension with any number of positives (van den Oord et al. 2018).

    Every positive stands alone against all negatives of its row: ``-log(e^p / (e^p + sum e^n))``, averaged over the
    positives of a row, then over the rows that have one.

    Args:
        logits: float ``[rows, columns]``.
        judgement: ``[rows, columns]``, 1 positive, -1 negative, 0 left out.
    """
    negatives = logits.masked_fill(judgement != -1, -torch.inf).logsumexp(dim=1, keepdim=True)
    positive = (judgement == 1).to(logits.dtype)
    count = positive.sum(dim=1)
    row = (F.softplus(negatives - logits) * positive).sum(dim=1) / count.clamp(min=1)
    return row.sum() / (count > 0).sum()


def to_pixels(images: NDArray[np.uint8]) -> Tensor:
    """uint8 ``[n, H, W, 3]`` to the processor's pixel values, float32 ``[n, 3, H, W]`` in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def batch_loss(model: Any, tokenizer: CLIPTokenizer, batch: Batch) -> Tensor:
    """Mean of the loss of choosing pictures for captions and that of choosing captions for pictures."""
    tokens = tokenizer(batch.texts, padding=True, return_tensors="pt")
    with torch.autocast("cpu", torch.bfloat16):
        image = model.get_image_features(pixel_values=to_pixels(batch.images)).pooler_output
        text = model.get_text_features(**tokens).pooler_output
    logits = model.logit_scale.exp() * F.normalize(text.float(), dim=-1) @ F.normalize(image.float(), dim=-1).T
    for_text = contrastive_loss(logits, torch.from_numpy(batch.of_text))
    for_image = contrastive_loss(logits.T, torch.from_numpy(batch.of_image).T)
    return (for_text + for_image) / 2


def train(recipe: PreferenceRecipe, state_file: Path, stop_after: int | None = None) -> Any:
    """Trains, resuming from ``state_file`` where it exists.

    Args:
        recipe: what to train.
        state_file: where weights and optimizer are kept about once a minute.
        stop_after: leave after this many steps, with the state saved; for tests and for a machine that must be left.

    Returns:
        The ``CLIPModel``, float32, in evaluation mode.

    Raises:
        CheckpointError: the state file belongs to another recipe.
    """
    tokenizer = build_tokenizer()
    model = build_model(recipe, tokenizer)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, recipe))
    done = 0
    state = load_state(state_file, asdict(recipe))
    if state is not None:
        model.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        done = state["step"]

    last = recipe.steps if stop_after is None else min(recipe.steps, stop_after)
    saved = time.monotonic()
    progress = tqdm(range(done, last), initial=done, total=recipe.steps, desc="preference model", unit="step")
    for step in progress:
        loss = batch_loss(model, tokenizer, draw_batch(recipe, step))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", scale=f"{model.logit_scale.exp().item():.1f}")
        if time.monotonic() - saved > SECONDS_BETWEEN or step + 1 == last:
            save_state(
                state_file,
                {
                    "recipe": asdict(recipe),
                    "step": step + 1,
                    "weights": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                },
            )
            saved = time.monotonic()
    return model.eval()


def _cosine(step: int, recipe: PreferenceRecipe) -> float:
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    return float(0.5 + 0.5 * np.cos(np.pi * (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)))


# ------------------------------------------------------------------------------------------------ command


def save(model: Any, folder: Path) -> None:
    """Write the model in float16, its processor and its tokenizer."""
    model.half().save_pretrained(folder)
    build_processor(build_tokenizer()).save_pretrained(folder)


def main(command: str, arguments: Sequence[str]) -> None:
    """``python -m alignbench.shapes.pretrain {pickscore,judge}``: train, save, measure and write the card.

    With ``--evaluate`` the model in the folder is measured, and nothing is written.
    """
    parser = argparse.ArgumentParser(prog=f"python -m alignbench.shapes.pretrain {command}")
    parser.add_argument("--output", type=Path, default=CHECKPOINTS / command, help="folder of the trained model")
    parser.add_argument(
        "--state", type=Path, default=Path(f"pretraining/{command}.pt"), help="state of an interrupted training"
    )
    parser.add_argument("--evaluate", action="store_true", help="measure the model in the folder, train nothing")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if not options.evaluate:
        save(train(RECIPES[command], options.state), options.output)
    reward = PickScore(options.output, name=command)
    accuracies = measure(reward, SCENES_PER_TAG)
    print(report(accuracies))
    if not options.evaluate:
        parameters = sum(parameter.numel() for parameter in reward.model.parameters())
        write_card(options.output, command, asdict(RECIPES[command]), parameters, accuracies)
