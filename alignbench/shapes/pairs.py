"""Rendered preference pairs with the columns of Pick-a-Pic (Kirstain et al. 2023), for the preference methods.

The better picture is clean and shows its caption and nothing else. The worse one shows a near miss of the caption, or
is a degraded copy. Some pairs are ties, as in Pick-a-Pic: two right pictures. Pick-a-Pic stores JPEG files; here
``jpg_0`` and ``jpg_1`` are the pixels themselves, because JPEG would degrade both pictures of a 32-pixel pair.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignbench.prompts.prompt import Prompt
from alignbench.shapes.captions import near_miss
from alignbench.shapes.degrade import DEGRADATIONS, degrade
from alignbench.shapes.render import render
from alignbench.shapes.scenes import sample_scene

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
