"""Real images with captions in a folder, for methods that learn from images instead of samples."""

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from alignbench.errors import DataError
from alignbench.prompts.prompt import Prompt

INDEX = "images.jsonl"


class CaptionedImages:
    """A folder with an index ``images.jsonl``: an object a line, ``{"prompt": caption, "image": file}``.

    Several lines may have one caption. Files are named from the folder and read when they are asked for; all have one
    size.

    Args:
        folder: where the index is.

    Raises:
        DataError: the index cannot be read, or a line is no such object.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files: dict[str, list[str]] = {}
        self.size: tuple[int, int] | None = None
        try:
            lines = (self.folder / INDEX).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"{folder}: expected a folder with an index {INDEX} of lines "
                f'{{"prompt": caption, "image": file}} ({error})'
            ) from error
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                self.files.setdefault(str(record["prompt"]), []).append(str(record["image"]))
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f'{self.folder / INDEX}, line {number}: expected {{"prompt": caption, "image": file}}, '
                    f"got {line[:80]!r}"
                ) from error

    def draw(self, prompt: Prompt, rng: np.random.Generator) -> NDArray[np.uint8]:
        """One of the prompt's images, at random: uint8 ``[height, width, 3]``.

        Raises:
            DataError: no image has this caption, its file cannot be read, or it has another size than those before.
        """
        if prompt.text not in self.files:
            raise DataError(
                f"{self.folder / INDEX} has no image of {prompt.text!r}: every prompt of the run needs one; "
                "prompts=file prompts.path=FILE chooses other prompts"
            )
        files = self.files[prompt.text]
        file = self.folder / files[int(rng.integers(len(files)))]
        try:
            image = Image.open(file).convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"{file}: not an image that can be read ({error})") from error
        self.size = self.size or image.size
        if image.size != self.size:
            sizes = " x ".join(map(str, image.size)), " x ".join(map(str, self.size))
            raise DataError(f"{file}: {sizes[0]} pixels, but others have {sizes[1]}; resize the images to one size")
        return np.asarray(image)
