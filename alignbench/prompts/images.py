"""Real images with captions in a folder, for methods that learn from images instead of samples."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alignbench import pictures
from alignbench.errors import DataError
from alignbench.outside import read_json_lines, shown
from alignbench.prompts import record
from alignbench.prompts.prompt import Prompt

INDEX = "images.jsonl"
PER_LINE = '{"prompt": text, "image": file}'


class Entry(NamedTuple):
    """A line of an index: where it stands, the prompt's text and metadata, and the image's file."""

    where: str
    text: str
    metadata: dict[str, Any]
    file: Path


def read_index(folder: Path) -> Iterator[Entry]:
    """The lines of a folder's index ``images.jsonl``: an object per line, ``{"prompt": text, "image": file}``.

    Files are named from the folder; other keys, such as GenEval's ``tag`` and ``include``, become the metadata.

    Raises:
        DataError: the index cannot be read, or a line is no such object; it is named.
    """
    path = folder / INDEX
    for number, value in read_json_lines(path, PER_LINE):
        where = f"{path}, line {number}"
        if not isinstance(value, dict) or not isinstance(value.get("image"), str) or not value["image"]:
            raise DataError(f"{where}: expected {PER_LINE}, got {shown(value)}")
        file = folder / value.pop("image")
        yield Entry(where, *record.read(value, where), file)


class CaptionedImages:
    """A folder with an index, see ``read_index``.

    Several lines may have one caption. All images have one size; see ``pictures`` for what is an image.

    Args:
        folder: where the index is.

    Raises:
        DataError: the index cannot be read, a line is no such object, a file is no image by its header, or two sizes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not os.path.exists(self.folder / INDEX):
            raise DataError(f"{folder}: expected a folder with an index {INDEX} of lines {PER_LINE}")
        entries = list(read_index(self.folder))
        self.size = pictures.size(entries[0].file)
        self.files: dict[str, list[Path]] = {}
        for entry in entries:
            self.files.setdefault(entry.text, []).append(entry.file)
            self._check_size(entry.file, pictures.size(entry.file))

    def draw(self, prompt: Prompt, rng: np.random.Generator) -> NDArray[np.uint8]:
        """One of the prompt's images, at random: uint8 ``[height, width, 3]``.

        Raises:
            DataError: no image has this caption, or its file is damaged or has changed.
        """
        if prompt.text not in self.files:
            raise DataError(
                f"{self.folder / INDEX} has no image of {prompt.text!r}: every prompt of the run needs one; "
                "prompts=file prompts.path=FILE chooses other prompts"
            )
        files = self.files[prompt.text]
        file = files[int(rng.integers(len(files)))]
        image = pictures.read(file)
        self._check_size(file, image.size)
        return np.asarray(image)

    def _check_size(self, file: Path, size: tuple[int, int]) -> None:
        if size != self.size:
            sizes = " x ".join(map(str, size)), " x ".join(map(str, self.size))
            raise DataError(f"{file}: {sizes[0]} pixels, but others have {sizes[1]}; resize the images to one size")
