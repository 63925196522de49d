"""Visual text: is what the prompt quotes written in the image?

Source: Flow-GRPO (Liu et al. 2025, arXiv 2505.05470), text rendering. Which engine reads the image changes the numbers;
theirs was PaddleOCR.
"""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignbench.errors import ConfigError, DataError
from alignbench.prompts.prompt import Prompt
from alignbench.rewards.reward import Reward, as_shown


class Reader(Protocol):
    """Reads pictures."""

    def __call__(self, picture: NDArray[np.uint8]) -> str:
        """All text in a picture, uint8 RGB [h, w, 3], in reading order; empty where there is none."""


class RapidOcr:
    """PaddleOCR's models run by ONNX Runtime (package ``rapidocr``).

    Raises:
        ConfigError: the package is not installed.
    """

    def __init__(self) -> None:
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise ConfigError(
                f"reward=ocr needs rapidocr, which cannot be imported ({error}): pip install 'alignbench[ocr]'"
            ) from error
        self._engine: Any = RapidOCR(params={"Global.log_level": "error"})  # it warns of every image without text

    def __call__(self, picture: NDArray[np.uint8]) -> str:
        """See `Reader`."""
        lines = self._engine(np.ascontiguousarray(picture[..., ::-1])).txts  # the engine reads BGR
        return "".join(lines or ())


class OcrScore(Reward):
    """``1 - min(distance, n) / n`` for a quoted text of n characters, in [0, 1].

    The distance is Levenshtein's between what was read and what was asked for, both in lower case without white space;
    it is 0 if the text asked for stands anywhere in what was read. An image with a pixel that is not finite has NaN.

    Args:
        engine: what reads the images.

    Raises:
        ConfigError: the engine's package is not installed.
    """

    name = "ocr"
    differentiable = False

    def __init__(self, engine: Literal["rapidocr"] | Reader) -> None:
        self._read: Reader = RapidOcr() if isinstance(engine, str) else engine

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Every prompt needs a quoted text; see ``quoted``."""
        for prompt in prompts:
            quoted(prompt)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Score images as a user would see them, rounded to uint8.

        Raises:
            DataError: a prompt quotes no text.
        """
        wanted = [quoted(prompt) for prompt in prompts]
        pixels, finite = as_shown(images)
        scores = [likeness(self._read(picture), text) for picture, text in zip(pixels, wanted, strict=True)]
        return {"reward": torch.tensor(scores, dtype=torch.float32, device=images.device).where(finite, torch.nan)}


# Letters before which an apostrophe is none that opens a quotation: not those of scripts without spaces between words.
LETTER = "[^\\W\\u2e80-\\u9fff\\uac00-\\ud7af\\uf900-\\uffdc]"
MARKS = (
    re.compile("“([^”]*)”|„([^“”]*)[“”]|«([^»]*)»|»([^«]*)«|「([^」]*)」|『([^』]*)』|＂([^＂]*)＂"),
    re.compile(rf"(?<!{LETTER})['‘](?=\S)((?:(?!\s['‘]).)+?)(?<=\S)['’](?!{LETTER})", re.DOTALL),
)
"""Quotation marks other than ", by precedence: typographic ones, then single ones."""


def quoted(prompt: Prompt) -> str:
    """The text that a prompt asks for: the first one in double quotes, ``"OPEN"``, as in the released code.

    A prompt without a pair of those asks for its first text in typographic marks: “ ”, „ “, « », » «, 「 」, 『 』 or
    ＂ ＂. One without these either asks for its first text in single ones, 'OPEN' or ‘OPEN’; an apostrophe in a word is
    none.

    Raises:
        DataError: there is none, or it is empty.
    """
    parts = prompt.text.split('"')
    found = parts[1] if len(parts) > 2 else next(filter(None, (_first(marks, prompt.text) for marks in MARKS)), "")
    if not plain(found):
        raise DataError(
            f'prompt {prompt.id} ({prompt.text!r}) quotes no text: expected one such as a sign that says "OPEN"'
        )
    return found


def _first(marks: re.Pattern[str], text: str) -> str:
    """The first text in marks that is not blank; empty if there is none."""
    return next((found for match in marks.finditer(text) if (found := match[match.lastindex or 0]).strip()), "")


def plain(text: str) -> str:
    """Lower case, without white space, in Unicode's composed form."""
    return "".join(unicodedata.normalize("NFC", text).split()).lower()


def likeness(read: str, wanted: str) -> float:
    """How much of a text was read, in [0, 1]; see `OcrScore`."""
    read, wanted = plain(read), plain(wanted)
    if wanted in read:
        return 1.0
    return 1 - min(levenshtein(read, wanted), len(wanted)) / len(wanted)


def levenshtein(a: str, b: str) -> int:
    """The fewest insertions, deletions and replacements of characters that make one text the other."""
    distances = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        above, distances[0] = distances[0], i
        for j, right in enumerate(b, start=1):
            above, distances[j] = (
                distances[j],
                min(distances[j] + 1, distances[j - 1] + 1, above + (left != right)),
            )
    return distances[-1]
