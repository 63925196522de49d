"""Rendered preference pairs with the columns of Pick-a-Pic (Kirstain et al. 2023), for the preference methods.

The better picture is clean and shows its caption and nothing else. The worse one shows a near miss of the caption, or
is a degraded copy. Some pairs are ties, as in Pick-a-Pic: two right pictures. Pick-a-Pic stores JPEG files; here
``jpg_0`` and ``jpg_1`` are the pixels themselves, because JPEG would degrade both pictures of a 32-pixel pair.

``python -m alignbench.shapes.pairs --output FOLDER --count N`` writes a data set of them, pictures as PNG files.
"""

import argparse
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alignbench.prompts.prompt import Prompt
from alignbench.shapes.captions import near_miss, split
from alignbench.shapes.degrade import DEGRADATIONS, degrade
from alignbench.shapes.render import render
from alignbench.shapes.scenes import sample_scene
from alignbench.terminal import lasting

KINDS = ("near_miss", "degraded", "tie")


def preference_pairs(
    prompts: Sequence[Prompt], count: int, seed: int, shares: tuple[float, float, float] = (0.5, 0.4, 0.1)
) -> dict[str, NDArray[Any]]:
    """Draw preference pairs.

    Args:
        prompts: captions to draw from, uniformly; their metadata is the GenEval record.
        count: number of pairs.
        seed: the pairs depend on it alone.
        shares: probabilities of the ``KINDS``: a near miss, a degraded copy, a tie.

    Returns:
        Columns of length ``count``: ``caption``; ``jpg_0`` and ``jpg_1``, uint8 ``[count, 32, 32, 3]``; ``label_0``
        and ``label_1``, float32, 1 for the better picture, 0 for the worse, 0.5 each for a tie; ``has_label``, False
        for a tie; ``image_0_uid``, ``image_1_uid`` and ``best_image_uid`` ("tie" for ties); ``kind``, the only column
        that Pick-a-Pic does not have.
    """
    rng = np.random.default_rng(seed)
    drawn = [prompts[int(k)] for k in rng.integers(len(prompts), size=count)]
    kind = np.array(KINDS)[rng.choice(len(KINDS), size=count, p=shares)]
    better = render([sample_scene(prompt.metadata, rng) for prompt in drawn])
    shown = [
        near_miss(prompt.metadata, rng) if what == "near_miss" else prompt.metadata
        for prompt, what in zip(drawn, kind, strict=True)
    ]
    other = render([sample_scene(record, rng) for record in shown])
    copied = kind == "degraded"
    how = [list(DEGRADATIONS)[k] for k in rng.integers(len(DEGRADATIONS), size=int(copied.sum()))]
    other[copied] = degrade(better[copied], how, rng)

    swap = rng.random(count) < 0.5
    tie = kind == "tie"
    uid = np.array([[f"{seed}-{k}-{side}" for side in (0, 1)] for k in range(count)])
    label_0 = np.where(tie, 0.5, np.where(swap, 0, 1)).astype(np.float32)
    return {
        "caption": np.array([prompt.text for prompt in drawn]),
        "jpg_0": np.where(swap[:, None, None, None], other, better),
        "jpg_1": np.where(swap[:, None, None, None], better, other),
        "label_0": label_0,
        "label_1": 1 - label_0,
        "has_label": ~tie,
        "image_0_uid": uid[:, 0],
        "image_1_uid": uid[:, 1],
        "best_image_uid": np.where(tie, "tie", np.where(swap, uid[:, 1], uid[:, 0])),
        "kind": kind,
    }


def write_pairs(folder: Path, columns: Mapping[str, NDArray[Any]]) -> None:
    """Write pairs as Pick-a-Pic is distributed: ``folder/train.parquet``, pictures as the bytes of encoded files."""
    from datasets import Dataset  # takes a second, and only this needs it

    def png(pixels: NDArray[np.uint8]) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "png")
        return file.getvalue()

    plain = {
        name: [png(each) for each in column] if name in ("jpg_0", "jpg_1") else column.tolist()
        for name, column in columns.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(plain).to_parquet(folder / "train.parquet")


@lasting()
def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m alignbench.shapes.pairs", description="Write rendered pairs.")
    parser.add_argument("--output", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--count", type=int, required=True, help="pairs, ties included")
    parser.add_argument("--split", choices=("train", "tuning", "test"), default="train", help="captions to draw from")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write_pairs(arguments.output, preference_pairs(split(arguments.split), arguments.count, arguments.seed))


if __name__ == "__main__":
    main()
