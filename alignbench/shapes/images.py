"""Writes a folder of rendered images with captions: ``python -m alignbench.shapes.images FOLDER``.

Methods that learn from real images read it (``method.algorithm.images=FOLDER``); see ``alignbench.prompts.images``.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from alignbench.prompts.prompt import Prompt
from alignbench.shapes.captions import split
from alignbench.shapes.render import render
from alignbench.shapes.scenes import sample_scene
from alignbench.terminal import lasting


def write_images(folder: Path, prompts: Sequence[Prompt], per_prompt: int, seed: int) -> None:
    """Render ``per_prompt`` scenes of every prompt as PNG files, and the index ``images.jsonl``.

    Args:
        folder: is made; files of the same names are replaced.
        prompts: captions of the embedded world; their metadata is the GenEval record.
        per_prompt: images of each, 1 or more.
        seed: the images depend on it and on the prompts alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    lines: list[str] = []
    for prompt in prompts:
        images = render([sample_scene(prompt.metadata, rng) for _ in range(per_prompt)])
        for image in images:
            name = f"{len(lines):06d}.png"
            Image.fromarray(image).save(folder / name)
            lines.append(json.dumps({"prompt": prompt.text, "image": name}) + "\n")
    (folder / "images.jsonl").write_text("".join(lines))


@lasting()
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m alignbench.shapes.images", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--split", choices=("train", "tuning", "test", "all"), default="train")
    parser.add_argument("--per-prompt", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    prompts = split(arguments.split)
    write_images(arguments.folder, prompts, arguments.per_prompt, arguments.seed)
    print(f"{arguments.folder}: {len(prompts) * arguments.per_prompt:,} images of {len(prompts)} captions")


if __name__ == "__main__":
    main()
