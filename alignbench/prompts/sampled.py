"""Folders of sampled images with their prompts: GenEval's official layout, or files with an index.

``<index>/metadata.jsonl`` holds the record of one prompt, ``<index>/samples/<number>.png`` its images, as GenEval's
scorer reads them. Without such sub-folders the folder needs ``images.jsonl``: an object an image,
``{"prompt": text, "image": file}``; other keys, such as GenEval's ``tag`` and ``include``, become the metadata.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from alignbench.errors import DataError
from alignbench.prompts.images import INDEX
from alignbench.prompts.prompt import Prompt


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
        """Read a folder; of the images only the headers.

        Raises:
            DataError: no such folder, no prompts in it, a prompt without images, a file that is no image, two sizes, or
                prompts of one tag with different numbers of images.
        """
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder of images")
        found = _index(folder) if (folder / INDEX).exists() else _geneval(folder)
        prompts = [prompt for prompt, _ in found]
        files = [files for _, files in found]
        size: tuple[int, int] | None = None
        for file in (file for files in files for file in files):
            try:
                with Image.open(file) as image:
                    now = image.size
            except (OSError, UnidentifiedImageError) as error:
                raise DataError(f"{file}: not an image that can be read ({error})") from error
            if size is not None and now != size:
                raise DataError(f"{file}: {now[0]} x {now[1]} pixels, but the images before have {size[0]} x {size[1]}")
            size = now
        assert size is not None
        first: dict[str, int] = {}
        for prompt, own in found:
            tag = str(prompt.metadata.get("tag", "prompt"))
            count = first.setdefault(tag, len(own))
            if len(own) != count:
                raise DataError(
                    f"{folder}: {len(own)} images of {prompt.text!r}, but {count} of the first prompt of its tag "
                    f"({tag}); every prompt of a tag needs as many"
                )
        return cls(folder, prompts, files, size)

    def pixels(self, prompt: int, image: int) -> NDArray[np.uint8]:
        """An image, ``[height, width, 3]``.

        Raises:
            DataError: the file is damaged.
        """
        file = self.files[prompt][image]
        try:
            return np.asarray(Image.open(file).convert("RGB"))
        except OSError as error:
            raise DataError(f"{file}: not an image that can be read ({error})") from error


def _geneval(folder: Path) -> list[tuple[Prompt, list[Path]]]:
    numbered = [path for path in folder.iterdir() if path.is_dir() and path.name.isdigit()]
    if not numbered:
        raise DataError(
            f"{folder}: images without prompts; expected GenEval's layout (00000/metadata.jsonl, "
            f'00000/samples/0000.png) or an index {INDEX} with a line {{"prompt": text, "image": file}} an image'
        )
    parts = sorted(numbered, key=lambda path: int(path.name))
    return [(_prompt(number, part / "metadata.jsonl"), _samples(part)) for number, part in enumerate(parts)]


def _prompt(number: int, path: Path) -> Prompt:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        text = record["prompt"]
        if not text.strip():
            raise ValueError("an empty prompt")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f'{path}: expected one object with a "prompt" ({type(error).__name__}: {error})') from error
    return Prompt(f"images/{number:05d}", text, {} if set(record) == {"prompt"} else record)


def _samples(part: Path) -> list[Path]:
    numbered = [path for path in (part / "samples").glob("*.png") if path.stem.isdigit()]
    if not numbered:
        raise DataError(f"{part / 'samples'}: no image of this prompt; expected names such as 0000.png")
    return sorted(numbered, key=lambda path: int(path.stem))


def _index(folder: Path) -> list[tuple[Prompt, list[Path]]]:
    path = folder / INDEX
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a UTF-8 text ({error})") from error
    found: dict[str, tuple[Prompt, list[Path]]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            text, file = record["prompt"], folder / record.pop("image")
            if not text.strip():
                raise ValueError("an empty prompt")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f'{path}, line {number}: expected {{"prompt": text, "image": file}}, got {line[:80]!r}'
            ) from error
        metadata = {} if set(record) == {"prompt"} else record
        prompt, files = found.setdefault(text, (Prompt(f"images/{len(found):05d}", text, metadata), []))
        if prompt.metadata != metadata:
            raise DataError(f"{path}, line {number}: other metadata than the earlier images of {text!r} have")
        files.append(file)
    if not found:
        raise DataError(f"{path}: no images in this index")
    return list(found.values())


def write(folder: Path, number: int, prompt: Prompt, image: int, pixels: NDArray[np.uint8]) -> None:
    """Write one image of one prompt, ``[height, width, 3]``, in GenEval's layout."""
    samples = folder / f"{number:05d}" / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    record = dict(prompt.metadata) | {"prompt": prompt.text}
    files = samples.parent / "metadata.jsonl", samples / f"{image:04d}.png"
    for file in files:
        if file.is_symlink():  # it may lead to a file of the user's
            file.unlink()
    files[0].write_text(json.dumps(record), encoding="utf-8")
    Image.fromarray(pixels).save(files[1])
