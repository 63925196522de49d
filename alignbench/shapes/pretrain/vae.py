"""The autoencoder of the generator: 32 x 32 pixels to 8 x 8 latents of 8 channels, in a few minutes on one core."""

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from alignbench.shapes.captions import records
from alignbench.shapes.pretrain.checkpoint import SECONDS_BETWEEN, load_state, save_state
from alignbench.shapes.render import render
from alignbench.shapes.scenes import SIZE, random_scene, sample_scene


@dataclass(frozen=True)
class AutoencoderRecipe:
    """Everything that decides the weights.

    Attributes:
        steps: optimizer steps.
        batch_size: images a step.
        learning_rate: peak, reached after ``warmup`` steps and annealed to 0 by a cosine.
        kl_weight: weight of the Kullback-Leibler divergence, in nats per latent number, against the squared error of
            pixels in [-1, 1]; it keeps the latents near a unit Gaussian.
        images: rendered images, half of arbitrary scenes and half of captions' scenes.
        seed: of weights, scenes and batches.
    """

    steps: int = 3200
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup: int = 100
    kl_weight: float = 1e-4
    images: int = 40_000
    seed: int = 0


def build_autoencoder(seed: int) -> AutoencoderKL:
    """A fresh autoencoder; SD3's has no quantisation layers either, and 64 latent pixels need no attention."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 16, 32),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=1.0,
        shift_factor=0.0,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def training_images(count: int, seed: int) -> NDArray[np.uint8]:
    """Rendered images [count, 32, 32, 3]: arbitrary scenes and scenes of captions in turn."""
    rng = np.random.default_rng([seed, 1])
    captions = records()
    scenes = [
        random_scene(rng) if k % 2 else sample_scene(captions[int(rng.integers(len(captions)))], rng)
        for k in range(count)
    ]
    return render(scenes)


def to_pixels(images: NDArray[np.uint8]) -> Tensor:
    """uint8 [n, H, W, 3] to float32 [n, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def train_autoencoder(recipe: AutoencoderRecipe, state_file: Path, stop_after: int | None = None) -> AutoencoderKL:
    """Trains, resuming from ``state_file`` where it exists, and sets the latents' scaling and shift factors.

    Args:
        recipe: what to train.
        state_file: where weights and optimizer are kept about once a minute.
        stop_after: leave after this many steps, with the state saved; for tests and for a machine that must be left.

    Raises:
        CheckpointError: the state file belongs to another recipe.
    """
    autoencoder = build_autoencoder(recipe.seed)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=recipe.learning_rate, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, recipe))
    done = 0
    state = load_state(state_file, asdict(recipe))
    if state is not None:
        autoencoder.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        done = state["step"]

    images = training_images(recipe.images, recipe.seed)
    last = recipe.steps if stop_after is None else min(recipe.steps, stop_after)
    saved = time.monotonic()
    progress = tqdm(range(done, last), initial=done, total=recipe.steps, desc="autoencoder", unit="step")
    for step in progress:
        rng = np.random.default_rng([recipe.seed, 2, step])
        batch = to_pixels(images[rng.integers(len(images), size=recipe.batch_size)])
        noise = torch.Generator().manual_seed(int(rng.integers(2**62)))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = autoencoder.encode(batch).latent_dist
            restored = autoencoder.decode(posterior.sample(noise)).sample
        error = F.mse_loss(restored.float(), batch)
        loss = error + recipe.kl_weight * posterior.kl().float().mean() / posterior.mean[0].numel()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(psnr=f"{10 * np.log10(4 / error.item()):.1f} dB")
        if time.monotonic() - saved > SECONDS_BETWEEN or step + 1 == last:
            save_state(
                state_file,
                {
                    "recipe": asdict(recipe),
                    "step": step + 1,
                    "weights": autoencoder.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(),
                },
            )
            saved = time.monotonic()
    _normalise_latents(autoencoder, images[:4096])
    return autoencoder.eval()


def encode(autoencoder: AutoencoderKL, images: NDArray[np.uint8], batch_size: int = 256) -> Tensor:
    """Latents as the transformer sees them: posterior means, shifted and scaled, float32 [n, 8, 8, 8]."""
    shift, scale = autoencoder.config.shift_factor, autoencoder.config.scaling_factor
    with torch.no_grad():
        means = [autoencoder.encode(to_pixels(part)).latent_dist.mean for part in _parts(images, batch_size)]
    latents: Tensor = (torch.cat(means) - shift) * scale
    return latents


def decode(autoencoder: AutoencoderKL, latents: Tensor, batch_size: int = 256) -> NDArray[np.uint8]:
    """The inverse of `encode`: uint8 [n, 32, 32, 3]."""
    shift, scale = autoencoder.config.shift_factor, autoencoder.config.scaling_factor
    with torch.no_grad():
        pixels = torch.cat(
            [autoencoder.decode(part / scale + shift).sample for part in torch.split(latents, batch_size)]
        )
    levels = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).contiguous().numpy()


def psnr(autoencoder: AutoencoderKL, images: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio of encoding and decoding, in dB, from the mean squared error over all images."""
    restored = decode(autoencoder, encode(autoencoder, images)).astype(np.float64)
    return float(10 * np.log10(255**2 / np.mean((restored - images) ** 2)))


def _normalise_latents(autoencoder: AutoencoderKL, images: NDArray[np.uint8]) -> None:
    """Sets the factors with which the latents of ``images`` have mean 0 and standard deviation 1 over all numbers."""
    autoencoder.register_to_config(shift_factor=0.0, scaling_factor=1.0)
    latents = encode(autoencoder, images)
    autoencoder.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def _cosine(step: int, recipe: AutoencoderRecipe) -> float:
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    return float(0.5 + 0.5 * np.cos(np.pi * (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)))


def _parts(images: NDArray[np.uint8], size: int) -> Iterator[NDArray[np.uint8]]:
    return (images[start : start + size] for start in range(0, len(images), size))


def main(command: str, arguments: Sequence[str]) -> None:
    """``python -m alignbench.shapes.pretrain vae``: trains the autoencoder and saves its folder."""
    parser = argparse.ArgumentParser(prog=f"python -m alignbench.shapes.pretrain {command}")
    parser.add_argument(
        "--output", type=Path, default=Path("pretraining/vae"), help="folder of the trained autoencoder"
    )
    parser.add_argument(
        "--state", type=Path, default=Path("pretraining/vae.pt"), help="state of an interrupted training"
    )
    parser.add_argument("--steps", type=int, default=AutoencoderRecipe.steps)
    parser.add_argument("--seed", type=int, default=AutoencoderRecipe.seed)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    autoencoder = train_autoencoder(AutoencoderRecipe(steps=options.steps, seed=options.seed), options.state)
    autoencoder.save_pretrained(options.output)
    unseen = training_images(3000, options.seed + 1)
    print(f"{options.output}: {psnr(autoencoder, unseen):.2f} dB on {len(unseen)} unseen images")
