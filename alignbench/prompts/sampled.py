"""Folders of sampled images with their prompts: GenEval's official layout, or files with an index.

``<index>/metadata.jsonl`` holds the record of one prompt, ``<index>/samples/<number>.png`` its images (or ``.jpg``,
``.jpeg``, ``.webp``), as GenEval's scorer reads them. Without such sub-folders the folder needs ``images.jsonl``; see
``images.read_index``.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alignbench import pictures
from alignbench.errors import DataError
from alignbench.outside import foreign, read_json
from alignbench.prompts import record
from alignbench.prompts.images import INDEX, Entry, read_index
from alignbench.prompts.prompt import Prompt

RECORD = "metadata.jsonl"


@dataclass(frozen=True)
class SampledImages:
    """The images of a folder.

    Attributes:
        folder: where they are.
        prompts: in the order of the layout, with ids ``images/00000``, ``images/00001``, ...
        files: of each prompt's images.
        size: width and height in pixels, of all images.
    """

    folder: Path
    prompts: list[Prompt]
    files: list[list[Path]]
    size: tuple[int, int]

    @classmethod
    def read(cls, folder: Path) -> "SampledImages":
        """Read a folder; of the images only the headers. Images of equal prompts, after stripping, are of one prompt.

        Raises:
            DataError: no such folder, no prompts in it, a prompt without images or with two records, a file that is no
                image, two sizes, or prompts of one tag with different numbers of images.
        """
        if not os.path.isdir(folder):
            raise DataError(f"{folder}: no such folder of images")
        found = _by_prompt(read_index(folder) if os.path.exists(folder / INDEX) else _geneval(folder))
        size = pictures.size(found[0][1][0])
        for file in (file for _, files in found for file in files):
            _check_size(file, pictures.size(file), size)
        first: dict[str, int] = {}
        for prompt, own in found:
            tag = str(prompt.metadata.get("tag", "prompt"))
            count = first.setdefault(tag, len(own))
            if len(own) != count:
                raise DataError(
                    f"{folder}: {len(own)} images of {prompt.text!r}, but {count} of the first prompt of its tag "
                    f"({tag}); every prompt of a tag needs as many"
                )
        return cls(folder, [prompt for prompt, _ in found], [files for _, files in found], size)

    def pixels(self, prompt: int, image: int) -> NDArray[np.uint8]:
        """An image, ``[height, width, 3]``.

        Raises:
            DataError: the file is damaged, or has changed.
        """
        file = self.files[prompt][image]
        picture = pictures.read(file)
        _check_size(file, picture.size, self.size)
        return np.asarray(picture)


def samples(part: Path) -> list[Path]:
    """The images of one prompt in GenEval's layout, in the order of their numbers.

    Files whose name is no number are skipped.

    Raises:
        DataError: there are none, or two have one number.
    """
    found: dict[int, Path] = {}
    for path in sorted((part / "samples").glob("*")):
        if path.stem.isdecimal() and path.suffix.lower() in pictures.SUFFIXES:
            other = found.setdefault(int(path.stem), path)
            if other != path:
                raise DataError(f"{path} and {other.name} have one number: every image once")
    if not found:
        raise DataError(f"{part / 'samples'}: no image of this prompt; expected names such as 0000.png")
    return [found[number] for number in sorted(found)]


def numbered(folder: Path) -> list[Path]:
    """The sub-folders of GenEval's layout, whose names are numbers, in their order.

    Raises:
        DataError: the folder cannot be read.
    """
    with foreign(str(folder), "cannot be read as a folder"):
        parts = [path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()]
    return sorted(parts, key=lambda path: (int(path.name), path.name))


def _geneval(folder: Path) -> Iterator[Entry]:
    parts = numbered(folder)
    if not parts:
        raise DataError(
            f"{folder}: images without prompts; expected GenEval's layout (00000/{RECORD}, 00000/samples/0000.png) or "
            f'an index {INDEX} with {{"prompt": text, "image": file}} per line'
        )
    for part in parts:
        text, metadata = record.read(read_json(part / RECORD), str(part / RECORD))
        for file in samples(part):
            yield Entry(str(part / RECORD), text, metadata, file)


def _by_prompt(entries: Iterable[Entry]) -> list[tuple[Prompt, list[Path]]]:
    found: dict[str, tuple[Prompt, list[Path]]] = {}
    for entry in entries:
        prompt = Prompt(f"images/{len(found):05d}", entry.text, entry.metadata)
        first, files = found.setdefault(entry.text, (prompt, []))
        if first.metadata != entry.metadata:
            raise DataError(f"{entry.where}: other metadata than the earlier images of {entry.text!r} have")
        files.append(entry.file)
    return list(found.values())


def _check_size(file: Path, size: tuple[int, int], expected: tuple[int, int]) -> None:
    if size != expected:
        sizes = " x ".join(map(str, size)), " x ".join(map(str, expected))
        raise DataError(f"{file}: {sizes[0]} pixels, but the images before have {sizes[1]}")


def write(folder: Path, number: int, prompt: Prompt, image: int, pixels: NDArray[np.uint8]) -> None:
    """Write one image of one prompt, ``[height, width, 3]``, in GenEval's layout. Links are replaced, not followed."""
    directory = folder / f"{number:05d}" / "samples"
    directory.mkdir(parents=True, exist_ok=True)
    about, file = directory.parent / RECORD, directory / f"{image:04d}.png"
    for path in (about, file):
        path.unlink(missing_ok=True)
    about.write_text(json.dumps(dict(prompt.metadata) | {"prompt": prompt.text}), encoding="utf-8")
    Image.fromarray(pixels).save(file)
