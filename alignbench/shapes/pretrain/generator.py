"""The generator: a tiny Stable Diffusion 3, trained from scratch on latents of rendered scenes.

Three phases, each from the weights of the one before. *capacity* trains on true captions and shows what the
architecture can do. *corrupted* trains on captions that are wrong at stated rates, until the model is as imperfect as a
base model for reinforcement learning has to be: the ability stays in the weights, as guidance shows. *base* distils
guidance into the tag that would have next to no right pictures without it.
"""

import argparse
import copy
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from alignbench.errors import ConfigError
from alignbench.shapes.captions import CONTROL_WORDS, records
from alignbench.shapes.pretrain.checkpoint import SECONDS_BETWEEN, load_state, save_state
from alignbench.shapes.pretrain.data import TAG_WEIGHTS, Corruption, depicted_scene, draw_record
from alignbench.shapes.pretrain.evaluation import Scores, embed, generate, score, test_records
from alignbench.shapes.pretrain.vae import encode
from alignbench.shapes.render import render
from alignbench.shapes.tokenizer import MAX_LENGTH, build_tokenizer

SHIFT = 3.0  # of SD3's scheduler


@dataclass(frozen=True)
class Architecture:
    """Sizes of the transformer and of each of the two text encoders."""

    width: int = 128
    heads: int = 4
    layers: int = 4
    text_width: int = 64
    text_layers: int = 3
    latent_channels: int = 8
    latent_side: int = 8


@dataclass(frozen=True)
class GeneratorRecipe:
    """Everything that decides the weights, beside the autoencoder and the weights that a phase starts from.

    Attributes:
        steps: optimizer steps.
        captions: captions a step; each is encoded once for all its images.
        images_per_caption: images a caption.
        learning_rate: peak, reached after ``warmup`` steps and annealed by a cosine to a twentieth of it.
        average: decay of the exponential moving average, which is what is evaluated and kept; it warms up as
            ``(1 + step) / (10 + step)``.
        dropout: share of captions replaced by the empty prompt, for guidance.
        control: share of captions after a positive control word; the pictures are clean either way.
        pool: captions with their images, rendered and encoded beforehand.
        tag_weights: how often a caption of a tag is drawn.
        corruption: how often the picture is wrong.
        guidance: by tag, the scale of guidance that is distilled into the unguided model; the teacher is the phase's
            first weights.
        seed: of weights, scenes and batches.
    """

    steps: int
    corruption: Corruption = field(default_factory=Corruption)
    tag_weights: dict[str, float] = field(default_factory=lambda: dict(TAG_WEIGHTS))
    guidance: dict[str, float] = field(default_factory=dict)
    architecture: Architecture = field(default_factory=Architecture)
    captions: int = 32
    images_per_caption: int = 4
    learning_rate: float = 1.2e-3
    warmup: int = 200
    average: float = 0.999
    dropout: float = 0.1
    control: float = 0.05
    pool: int = 40_000
    seed: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


CORRUPTION = Corruption(
    mismatch=0.10, shape=0.15, colour=0.15, missing=0.15, count=0.35, relation=0.30, swap=0.15, extra=0.15, binding=0.3
)

RECIPES = {
    "capacity": GeneratorRecipe(steps=5500),
    "corrupted": GeneratorRecipe(
        steps=2600,
        corruption=CORRUPTION,
        tag_weights=TAG_WEIGHTS | {"color_attr": 6.0, "position": 5.0},
        learning_rate=1e-3,
        warmup=50,
        pool=24_000,
    ),
    "base": GeneratorRecipe(
        steps=500,
        corruption=CORRUPTION,
        tag_weights=TAG_WEIGHTS | {"color_attr": 6.0, "position": 5.0},
        guidance={"color_attr": 3.0},
        learning_rate=4e-4,
        warmup=50,
        pool=24_000,
    ),
}
"""The phases of the shipped weights, in their order."""


class Generator(nn.Module):
    """What is trained: the transformer and its two text encoders."""

    def __init__(self, architecture: Architecture, vocabulary: int) -> None:
        super().__init__()
        text = CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=architecture.text_width,
            intermediate_size=4 * architecture.text_width,
            projection_dim=architecture.text_width,
            num_hidden_layers=architecture.text_layers,
            num_attention_heads=architecture.text_width // 16,
            max_position_embeddings=MAX_LENGTH,
            hidden_act="gelu",
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        self.text_encoder = CLIPTextModelWithProjection(text)
        self.text_encoder_2 = CLIPTextModelWithProjection(text)
        self.transformer = SD3Transformer2DModel(
            sample_size=architecture.latent_side,
            patch_size=2,
            in_channels=architecture.latent_channels,
            out_channels=architecture.latent_channels,
            num_layers=architecture.layers,
            attention_head_dim=architecture.width // architecture.heads,
            num_attention_heads=architecture.heads,
            caption_projection_dim=architecture.width,
            joint_attention_dim=2 * architecture.text_width,
            pooled_projection_dim=2 * architecture.text_width,
            pos_embed_max_size=architecture.latent_side // 2,
            qk_norm="rms_norm",
        )

    @property
    def encoders(self) -> tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]:
        return self.text_encoder, self.text_encoder_2

    def forward(self, latents: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
        """Velocity of latents [n, C, h, w] at sigma [n]; ids [m, 16] of m captions, each for n / m images in a row."""
        text, pooled = embed(self.encoders, ids)
        repeats = len(latents) // len(ids)
        velocity: Tensor = self.transformer(
            hidden_states=latents,
            encoder_hidden_states=text.repeat_interleave(repeats, dim=0),
            pooled_projections=pooled.repeat_interleave(repeats, dim=0),
            timestep=1000 * sigma,
            return_dict=False,
        )[0]
        return velocity


def build_generator(recipe: GeneratorRecipe, vocabulary: int) -> Generator:
    """A fresh generator, its weights drawn from the recipe's seed.

    Blocks begin as the identity (adaLN-Zero: Peebles and Xie 2023, section 3.2). Token and position embeddings begin
    25 times larger than CLIP's, since SD3 reads a layer of the text encoder that no normalisation follows.
    """
    torch.manual_seed(recipe.seed)
    generator = Generator(recipe.architecture, vocabulary)
    transformer = generator.transformer
    modulations = [transformer.norm_out.linear, transformer.proj_out]
    for block in transformer.transformer_blocks:
        modulations += [block.norm1.linear, block.norm1_context.linear]
    for layer in modulations:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for encoder in generator.encoders:
        embeddings = encoder.get_input_embeddings()
        nn.init.normal_(embeddings.weight, std=0.5)
        nn.init.normal_(_position_embedding(encoder).weight, std=0.5)
    return generator


def _position_embedding(encoder: CLIPTextModelWithProjection) -> nn.Embedding:
    (layer,) = [module for name, module in encoder.named_modules() if name.endswith("position_embedding")]
    assert isinstance(layer, nn.Embedding)
    return layer


# ------------------------------------------------------------------------------------------------ data


@dataclass(frozen=True)
class Pool:
    """Captions and the latents of their pictures.

    Attributes:
        captions: int64 [pool], indices into `records`.
        latents: float16 [pool, images_per_caption, C, h, w].
    """

    captions: Tensor
    latents: Tensor


def make_pool(recipe: GeneratorRecipe, autoencoder: AutoencoderKL) -> Pool:
    """Renders and encodes the pool."""
    rng = np.random.default_rng([recipe.seed, 3])
    index = {record["prompt"]: k for k, record in enumerate(records())}
    captions, latents = [], []
    chunk = 500
    for start in tqdm(range(0, recipe.pool, chunk), desc="pool", unit="chunk"):
        drawn = [draw_record(rng, recipe.tag_weights) for _ in range(min(chunk, recipe.pool - start))]
        captions += [index[record["prompt"]] for record in drawn]
        scenes = [
            depicted_scene(record, recipe.corruption, rng) for record in drawn for _ in range(recipe.images_per_caption)
        ]
        with torch.autocast("cpu", torch.bfloat16):
            encoded = encode(autoencoder, render(scenes)).half()
        latents.append(encoded.reshape(len(drawn), recipe.images_per_caption, *encoded.shape[1:]))
    return Pool(torch.tensor(captions), torch.cat(latents))


def cached_pool(recipe: GeneratorRecipe, autoencoder: AutoencoderKL, file: Path) -> Pool:
    """The pool of a recipe, made only once.

    Raises:
        CheckpointError: the file holds the pool of another recipe.
    """
    settings = {
        "seed": recipe.seed,
        "pool": recipe.pool,
        "images_per_caption": recipe.images_per_caption,
        "tag_weights": recipe.tag_weights,
        "corruption": recipe.corruption.as_dict(),
    }
    if _rank_and_size()[0] == 0 and load_state(file, settings) is None:
        pool = make_pool(recipe, autoencoder)
        save_state(file, {"recipe": settings, "captions": pool.captions, "latents": pool.latents})
    if distributed.is_initialized():
        distributed.barrier()
    state = load_state(file, settings)
    assert state is not None
    return Pool(state["captions"], state["latents"])


@dataclass(frozen=True)
class CaptionTable:
    """Token ids of all captions, plain and after each positive control word, and of the empty prompt.

    Attributes:
        ids: int64 [captions, 1 + control words, 16].
        empty: int64 [1, 16].
    """

    ids: Tensor
    empty: Tensor

    @classmethod
    def of(cls, tokenizer: CLIPTokenizer) -> "CaptionTable":
        prefixes = ["", *(f"{word}. " for word in CONTROL_WORDS["positive"])]
        texts = [prefix + record["prompt"] for record in records() for prefix in prefixes]
        return cls(tokenize(tokenizer, texts).reshape(-1, len(prefixes), MAX_LENGTH), tokenize(tokenizer, [""]))


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids int64 [n, 16]."""
    ids: Tensor = tokenizer(
        list(texts), padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


@cache
def empty_prompt() -> Tensor:
    """Token ids of the empty prompt, int64 [1, 16]."""
    return tokenize(build_tokenizer(), [""])


@dataclass(frozen=True)
class Batch:
    """One step.

    Attributes:
        clean, noise: latents [n, C, h, w].
        sigma: [n].
        ids: token ids [m, 16] of m captions, each of n / m images in a row.
        guidance: [m], the scale that is distilled; 1 is none.
    """

    clean: Tensor
    noise: Tensor
    sigma: Tensor
    ids: Tensor
    guidance: Tensor

    def share(self, rank: int, size: int) -> "Batch":
        """The ``rank``-th of ``size`` equal parts, each of whole captions."""
        parts = (tensor.tensor_split(size)[rank] for tensor in (getattr(self, field.name) for field in fields(self)))
        return Batch(*parts)


def draw_batch(recipe: GeneratorRecipe, pool: Pool, table: CaptionTable, step: int) -> Batch:
    """The batch of a step, from the seed and the step's number alone.

    sigma is uniform on the scheduler's shifted time (one draw in each of n equal strata), so that training sees noise
    levels as often as the sampler does.
    """
    rng = np.random.default_rng([recipe.seed, 4, step])
    chosen = torch.from_numpy(rng.integers(len(pool.captions), size=recipe.captions))
    clean = pool.latents[chosen].flatten(0, 1).float()
    time_ = torch.from_numpy((rng.permutation(len(clean)) + rng.random(len(clean))) / len(clean)).float()
    prefix = np.where(
        rng.random(recipe.captions) < recipe.control, rng.integers(1, table.ids.shape[1], size=recipe.captions), 0
    )
    ids = table.ids[pool.captions[chosen], torch.from_numpy(prefix)]
    dropped = torch.from_numpy(rng.random(recipe.captions) < recipe.dropout)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**62))))
    return Batch(
        clean=clean,
        noise=noise,
        sigma=SHIFT * time_ / (1 + (SHIFT - 1) * time_),
        ids=torch.where(dropped[:, None], table.empty, ids),
        guidance=torch.tensor([recipe.guidance.get(record["tag"], 1.0) for record in records()])[pool.captions[chosen]],
    )


# ------------------------------------------------------------------------------------------------ training


def flow_matching_loss(generator: nn.Module, batch: Batch, teacher: nn.Module | None = None) -> Tensor:
    """Mean squared error of the velocity, x_sigma = (1 - sigma) x_0 + sigma noise, v = noise - x_0 (SD3, section 2).

    Where the batch asks for guidance, the frozen teacher's guidance is added to the velocity, so that the unguided
    model learns what the guided teacher does (Meng et al. 2023, "On distillation of guided diffusion models").
    """
    sigma = batch.sigma[:, None, None, None]
    noisy = (1 - sigma) * batch.clean + sigma * batch.noise
    target = batch.noise - batch.clean
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        if teacher is not None:
            target = target + teacher_guidance(teacher, noisy, batch)
        velocity = generator(noisy, batch.sigma, batch.ids)
    return F.mse_loss(velocity.float(), target)


@torch.no_grad()
def teacher_guidance(teacher: nn.Module, noisy: Tensor, batch: Batch) -> Tensor:
    """(guidance - 1) (v_caption - v_empty) of the teacher, [n, C, h, w]; 0 for captions without guidance."""
    guidance = torch.zeros_like(noisy)
    captions = batch.guidance > 1
    if not captions.any():
        return guidance
    images = captions.repeat_interleave(len(noisy) // len(captions))
    difference = teacher(noisy[images], batch.sigma[images], batch.ids[captions]) - teacher(
        noisy[images], batch.sigma[images], empty_prompt()
    )
    scale = batch.guidance[captions].repeat_interleave(int(images.sum()) // int(captions.sum())) - 1
    guidance[images] = scale[:, None, None, None] * difference.float()
    return guidance


@dataclass
class Training:
    """A generator, its moving average and its optimizer, at some step."""

    recipe: GeneratorRecipe
    generator: Generator
    average: Generator
    optimizer: torch.optim.Optimizer
    teacher: Generator | None
    step: int = 0

    @classmethod
    def begin(cls, recipe: GeneratorRecipe, vocabulary: int, start: dict[str, Tensor] | None) -> "Training":
        """A training at step 0, from fresh weights or from those of an earlier phase."""
        generator, average = build_generator(recipe, vocabulary), build_generator(recipe, vocabulary)
        if start is not None:
            generator.load_state_dict(start)
            average.load_state_dict(start)
        average.requires_grad_(False).eval()
        optimizer = torch.optim.AdamW(
            generator.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        teacher = copy.deepcopy(average) if recipe.guidance else None
        return cls(recipe, generator, average, optimizer, teacher)

    def take_step(self, batch: Batch) -> float:
        """One optimizer step, of this process's share of the batch; gives the share's loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * learning_rate_factor(self.recipe, self.step)
        loss = flow_matching_loss(self.generator, batch.share(*_rank_and_size()), self.teacher)
        torch.autograd.backward(loss)
        average_gradients(self.generator)
        nn.utils.clip_grad_norm_(self.generator.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(self.recipe.average, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(
            list(self.average.parameters()), [weight.detach() for weight in self.generator.parameters()], 1 - decay
        )
        self.step += 1
        return loss.item()

    def state(self) -> dict[str, Any]:
        return {
            "recipe": self.recipe.as_dict(),
            "step": self.step,
            "generator": self.generator.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.generator.load_state_dict(state["generator"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]


def average_gradients(module: nn.Module) -> None:
    """Averages the gradients over the processes; one process per core is much faster than one with many threads."""
    size = _rank_and_size()[1]
    if size == 1:
        return
    gradients = [weight.grad for weight in module.parameters() if weight.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    parts = torch.split(flat / size, [gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)])


def _rank_and_size() -> tuple[int, int]:
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def learning_rate_factor(recipe: GeneratorRecipe, step: int) -> float:
    """Linear warm-up to 1, then a cosine to 0.05."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return float(0.05 + 0.95 * (0.5 + 0.5 * np.cos(np.pi * progress)))


def train_generator(
    recipe: GeneratorRecipe,
    autoencoder: AutoencoderKL,
    state_file: Path,
    *,
    start: dict[str, Tensor] | None = None,
    stop_after: int | None = None,
    evaluate_every: int | None = None,
) -> Generator:
    """Trains, resuming from ``state_file`` where it exists; gives the moving average.

    Args:
        recipe: what to train.
        autoencoder: frozen.
        state_file: where everything is kept about once a minute.
        start: weights of an earlier phase.
        stop_after: leave after this many steps, with the state saved.
        evaluate_every: steps between two evaluations of 100 images a tag, printed; None for none.

    Raises:
        CheckpointError: the state file belongs to another recipe.
    """
    tokenizer = build_tokenizer()
    training = Training.begin(recipe, len(tokenizer), start)
    state = load_state(state_file, recipe.as_dict())
    if state is not None:
        training.restore(state)
    pool, table = cached_pool(recipe, autoencoder, state_file.with_suffix(".pool.pt")), CaptionTable.of(tokenizer)
    last = recipe.steps if stop_after is None else min(recipe.steps, stop_after)
    first_process = _rank_and_size()[0] == 0
    saved, losses = time.monotonic(), []
    progress = tqdm(
        range(training.step, last),
        initial=training.step,
        total=recipe.steps,
        desc="generator",
        unit="step",
        disable=not first_process,
    )
    for step in progress:
        losses.append(training.take_step(draw_batch(recipe, pool, table, step)))
        if not first_process:
            continue
        if (step + 1) % 100 == 0:
            progress.set_postfix(loss=f"{np.mean(losses):.4f}")
            losses.clear()
        if time.monotonic() - saved > SECONDS_BETWEEN or training.step == last:
            save_state(state_file, training.state())
            saved = time.monotonic()
        if evaluate_every is not None and training.step % evaluate_every == 0:
            for guidance in (1.0, 3.0):
                scores = evaluate(training.average, autoencoder, guidance, images_per_tag=100)
                tqdm.write(f"step {training.step}: {scores.line()}")
    return training.average


def evaluate(
    generator: Generator,
    autoencoder: AutoencoderKL,
    guidance: float,
    images_per_tag: int,
    seed: int = 1,
) -> Scores:
    """Scores on the test captions, float32 throughout."""
    tokenizer = build_tokenizer()
    captions = test_records(images_per_tag)
    ids = tokenize(tokenizer, [record["prompt"] for record in captions])
    images = generate(
        generator.transformer,
        generator.encoders,
        autoencoder,
        build_scheduler(),
        ids,
        tokenize(tokenizer, [""]),
        guidance,
        seed,
    )
    return score(captions, images, guidance)


# ------------------------------------------------------------------------------------------------ the folder


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """SD3's scheduler."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def save_pipeline(folder: Path, generator: Generator, autoencoder: AutoencoderKL, recipes: Mapping[str, Any]) -> None:
    """Writes a `StableDiffusion3Pipeline` in float16, put in place of an earlier folder in one step.

    ``recipes``, of the phases by name, goes into ``training.json``.
    """
    weights = {name: tensor.half() for name, tensor in generator.state_dict().items()}
    stored = Generator(_architecture(generator), len(build_tokenizer())).half()
    stored.load_state_dict(weights)
    stored_autoencoder = AutoencoderKL.from_config(autoencoder.config)
    stored_autoencoder.load_state_dict(autoencoder.state_dict())
    pipeline = StableDiffusion3Pipeline(
        transformer=stored.transformer,
        scheduler=build_scheduler(),
        vae=stored_autoencoder.half(),
        text_encoder=stored.text_encoder,
        tokenizer=build_tokenizer(),
        text_encoder_2=stored.text_encoder_2,
        tokenizer_2=build_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    shutil.rmtree(new, ignore_errors=True)
    pipeline.save_pretrained(new)
    for encoder in ("text_encoder", "text_encoder_2"):
        _load_as_float32(new / encoder / "config.json")
    (new / "training.json").write_text(json.dumps(recipes, indent=2) + "\n")
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def _load_as_float32(config: Path) -> None:
    """Makes transformers load float16 weights as float32, as diffusers does without being told."""
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"dtype": "float32"}, indent=2) + "\n")


def load_generator(folder: Path) -> tuple[Generator, AutoencoderKL]:
    """The generator and the autoencoder of a pipeline's folder, in float32."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    transformer = pipeline.transformer
    generator = Generator(
        Architecture(
            width=transformer.config.caption_projection_dim,
            heads=transformer.config.num_attention_heads,
            layers=transformer.config.num_layers,
            text_width=pipeline.text_encoder.config.hidden_size,
            text_layers=pipeline.text_encoder.config.num_hidden_layers,
            latent_channels=transformer.config.in_channels,
            latent_side=transformer.config.sample_size,
        ),
        len(pipeline.tokenizer),
    )
    for name in ("transformer", "text_encoder", "text_encoder_2"):
        getattr(generator, name).load_state_dict(getattr(pipeline, name).state_dict())
    return generator.eval(), pipeline.vae.eval()


def _architecture(generator: Generator) -> Architecture:
    config, text = generator.transformer.config, generator.text_encoder.config
    return Architecture(
        width=config.caption_projection_dim,
        heads=config.num_attention_heads,
        layers=config.num_layers,
        text_width=text.hidden_size,
        text_layers=text.num_hidden_layers,
        latent_channels=config.in_channels,
        latent_side=config.sample_size,
    )


def main(command: str, arguments: Sequence[str]) -> None:
    """``python -m alignbench.shapes.pretrain generator``: trains one phase and saves its pipeline's folder."""
    parser = argparse.ArgumentParser(prog=f"python -m alignbench.shapes.pretrain {command}")
    parser.add_argument("--phase", choices=RECIPES, required=True, help="what to train")
    parser.add_argument("--vae", type=Path, default=Path("pretraining/vae"), help="folder of the trained autoencoder")
    parser.add_argument("--from", dest="start", type=Path, help="folder of the phase before")
    parser.add_argument("--output", type=Path, help="folder of the pipeline; default pretraining/PHASE")
    parser.add_argument("--state", type=Path, help="state of an interrupted training; default pretraining/PHASE.pt")
    parser.add_argument("--steps", type=int, help="optimizer steps; default that of the recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--evaluate-every", type=int, default=1000, help="steps between two evaluations")
    options = parser.parse_args(arguments)
    if (options.phase == "capacity") == (options.start is not None):
        raise ConfigError("expected --from with every phase but capacity: it names the folder of the phase before")
    torch.set_num_threads(options.threads)
    if "RANK" in os.environ:  # started by torchrun
        distributed.init_process_group("gloo")
    recipe = replace(RECIPES[options.phase], seed=options.seed)
    if options.steps is not None:
        recipe = replace(recipe, steps=options.steps)
    autoencoder = AutoencoderKL.from_pretrained(options.vae).eval()
    generator = train_generator(
        recipe,
        autoencoder,
        options.state or Path("pretraining") / f"{options.phase}.pt",
        start=None if options.start is None else load_generator(options.start)[0].state_dict(),
        evaluate_every=options.evaluate_every,
    )
    if _rank_and_size()[0] == 0:
        earlier = {} if options.start is None else json.loads((options.start / "training.json").read_text())
        save_pipeline(
            options.output or Path("pretraining") / options.phase,
            generator,
            autoencoder,
            earlier | {options.phase: recipe.as_dict()},
        )
    if distributed.is_initialized():
        distributed.destroy_process_group()
