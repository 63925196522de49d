"""``python experiments/released_code/differences.py``: how much each difference to the released code changes.

Writes differences.md. Everything is measured on the embedded model at its base weights, in float64, with the published
settings and fewer prompts; ten minutes on one core.
"""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from PIL import Image
from torch import Tensor

from alignbench import assembly, gradients
from alignbench.assembly import Parts
from alignbench.configuration import CONF
from alignbench.methods import direct_align
from alignbench.methods.flow_grpo import FlowGRPO
from alignbench.methods.method import Method
from alignbench.methods.tempflow_grpo import TempFlowGRPO
from alignbench.prompts.sets import draw
from alignbench.sampling.flow import pipeline_grid
from alignbench.seeding import seeds_of

PAGE = Path(__file__).parent / "differences.md"
HEAD = """# What the differences to the released code change

Written by `python experiments/released_code/differences.py`: the embedded model at its base weights, float64,
published settings (`overlay=none`) with fewer prompts. Gradients are those of one iteration, both ways from the same
images; "size" is the ratio of the norms, theirs over ours. These are numbers of a small world: they say which
differences matter, not how much they matter on SD3.5 or FLUX. Every setting:
[released configurations](../../docs/methods/released_settings.md).

| difference | ours | theirs | measured |
|---|---|---|---|
"""
EXACT = ("model.policy.dtype=float64", "overlay=none", "progress=false", "method.batch.updates=1", "threads=1")


def assembled(*overrides: str) -> tuple[Any, Parts]:
    """A configuration and its parts, in float64."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", [*EXACT, *overrides])
    return config, assembly.assemble(config)


def gradient(*overrides: str) -> Tensor:
    """The gradient of one iteration, [parameters]."""
    config, parts = assembled(*overrides)
    (found,) = gradients.collected(parts, config, 1)
    return found


def compared(ours: Tensor, released: Tensor) -> str:
    """Ratio of norms, cosine and distance, as text."""
    ours, released = ours.double(), released.double()
    cosine = float(ours @ released / (ours.norm() * released.norm()))
    apart = float((released - ours).norm() / ours.norm())
    return f"size {float(released.norm() / ours.norm()):.3g}, cosine {cosine:.3g}, distance {apart:.2g} of its size"


@contextmanager
def whole_thousandths(parts: Parts) -> Iterator[None]:
    """The network's time input cut to whole thousandths, in float32 as in the released samplers."""
    exact = parts.policy.predict

    def cut(latents: Tensor, sigma: Tensor, *rest: Any, **named: Any) -> Tensor:
        return exact(latents, ((sigma.float() * 1000).floor() / 1000).to(sigma), *rest, **named)

    with patch.object(parts.policy, "predict", cut):
        yield


def rollouts(*overrides: str) -> str:
    """How far latents end from each other when the network's time is cut."""
    config, parts = assembled(*overrides)
    prompts = draw(parts.prompts, 48, 0, 0, config.prompts.balance)
    seeds = seeds_of("initial noise", 0, 0, ids=range(48))
    options: dict[str, Any] = {"score": False}
    if parts.method.sampler.stochastic is not None:
        options["step_seeds"] = lambda row, step: int(seeds[row]) + step + 1
    ours = parts.stack.sample(prompts, parts.method.sampler, seeds, **options).latents
    with whole_thousandths(parts):
        released = parts.stack.sample(prompts, parts.method.sampler, seeds, **options).latents
    apart = (released - ours).square().mean().sqrt() / ours.square().mean().sqrt()
    most = float((released - ours).abs().max())
    return f"latents differ by {float(apart):.2g} of their size (root mean square), at most by {most:.2g}"


def released_endpoints(u: Tensor, inverted: Tensor, position: Tensor, longest_step: int) -> tuple[Tensor, Tensor]:
    """SRPO's endpoints with the released code's inversion branch, which never starts below position 1."""
    j = direct_align.step_length(u, longest_step)
    begin = (u - j).clamp(min=1)
    start, arrival = 1000 - u - j, 1000 - u
    start = torch.where(inverted, 1000 - begin, start)
    return position[start], position[torch.where(inverted, 1000 - (begin + j).clamp(max=1000), arrival)]


def jpeg(images: Tensor) -> Tensor:
    """Images [n, 3, H, W] in [0, 1] through a JPEG file of Pillow's default quality."""
    pixels = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    decoded = []
    for each in pixels:
        file = io.BytesIO()
        Image.fromarray(each).save(file, format="JPEG")
        decoded.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2) / 255


def through_jpeg() -> str:
    """What a JPEG changes of partial credit."""
    config, parts = assembled("method=flow_grpo", "reward=geneval", "method.rollout.guidance=4.5")
    prompts = draw(parts.prompts, 96, 0, 0, config.prompts.balance)
    seeds = seeds_of("initial noise", 0, 0, ids=range(96))
    sampler = assembly.Sampler(steps=10, guidance=4.5)
    images = parts.stack.sample(prompts, sampler, seeds, keep_images=True).images
    assert images is not None
    ours, released = (parts.stack.score(each, prompts)["reward"] for each in (images.float(), jpeg(images.float())))
    changed = float((ours != released).float().mean())
    return (
        f"{100 * changed:.0f}% of 96 images get another reward, their mean is {float(released.mean()):.3f} for "
        f"{float(ours.mean()):.3f}; these pictures have 32 x 32 pixels, which JPEG hurts far more than 512 x 512"
    )


def dropped(reward: str) -> str:
    """Whole branches against every (branch, step) on its own."""
    options = ("method=tempflow_grpo", f"reward={reward}", "method.batch.prompts=4")
    ours = gradient(*options)
    with patch.object(TempFlowGRPO, "kept", FlowGRPO.kept), patch.object(TempFlowGRPO, "together", Method.together):
        each = gradient(*options)
    return compared(ours, each)


def filled(kept: int, batches: int = 4) -> float:
    """Share of a process's batches that are images with an advantage, when the rest is filled in."""
    return kept / (-(-kept // batches) * batches)


def rows() -> Iterator[tuple[str, str, str, str]]:
    """(difference, ours, released, measured)."""
    grpo = ("method=flow_grpo", "reward=geneval", "method.batch.prompts=8")
    detached = compared(gradient(*grpo), gradient(*grpo, "method.algorithm.detach_uncond=true"))
    yield "Flow-GRPO: the unconditional branch of guidance 4.5", "with gradient", "without, in one snapshot", detached
    for name, options in {
        "DiffusionNFT: time in rollouts": ("method=diffusion_nft", "reward=geneval"),
        "SRPO: time in rollouts": ("method=srpo", "reward=pickscore"),
        "DanceGRPO: time in rollouts": ("method=dance_grpo", "reward=geneval"),
        "MixGRPO: time in rollouts": ("method=mix_grpo", "reward=geneval"),
    }.items():
        yield name, "1000 s", "int(1000 s)", rollouts(*options)
    srpo = ("method=srpo", "reward=pickscore", "method.batch.prompts=96")
    ours = gradient(*srpo)
    with patch.object(direct_align, "endpoints", released_endpoints):
        released = gradient(*srpo)
    yield "SRPO: arrival of the inversion branch at u <= 100", "p[1000 - u]", "p[999 - u]", compared(ours, released)
    for reward in ("geneval", "geneval_strict"):
        yield (
            f"TempFlow-GRPO on {reward}: what is dropped",
            "a branch that no step tells apart, as released",
            "every branch of a step by itself, as the reference was run",
            dropped(reward),
        )
    s = pipeline_grid(10, shift=3.0).double()[-2]
    noise = float(0.7 * torch.sqrt(s / (1 - s)) * torch.sqrt(s))
    yield "Flow-GRPO: last step", "ODE", "stochastic, not trained", f"its noise has a standard deviation of {noise:.2g}"
    shares = ", ".join(f"{filled(kept):.2f} at {kept}" for kept in (13, 21, 25, 33, 36))
    yield (
        "Flow-GRPO: batches filled with images of no advantage",
        "never",
        "to a multiple of 4 for each of 32 GPUs with 36 images",
        f"factor of the gradient by the images that a GPU keeps: {shares}",
    )
    yield "Flow-GRPO: what GenEval's scorer sees", "8 bits", "JPEG", through_jpeg()
    yield (
        "PickScore of Flow-GRPO's code",
        "as it is",
        "divided by 26",
        "a weight w in a sum of rewards there is w / 26 here",
    )


def page(found: Sequence[tuple[str, str, str, str]]) -> str:
    """The table as a document."""
    return HEAD + "".join(f"| {' | '.join(row)} |\n" for row in found)


def main(write: Callable[[str], object] = lambda text: PAGE.write_text(text, encoding="utf-8")) -> None:
    """Measure and write."""
    write(page(list(rows())))


if __name__ == "__main__":
    main()
