"""Preference data sets on disk: a caption, two images and which of them is better, with Pick-a-Pic's columns."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from alignbench import pictures
from alignbench.errors import ConfigError, DataError
from alignbench.outside import foreign
from alignbench.prompts.hub import faults, open_data
from alignbench.prompts.prompt import Prompt
from alignbench.seeding import generator


class PairFolder:
    """The pairs of a data set that have a winner; images are read when a pair is asked for.

    Args:
        path: a folder of Parquet files, as Pick-a-Pic is distributed, or one that ``Dataset.save_to_disk`` wrote.
        split: of a folder that has several.
        caption: the column of the prompts.
        images: the columns of the two images: encoded files, pictures (see ``pictures``) or arrays
            ``[height, width, 3]`` of whole numbers from 0 to 255.
        labels: the columns of the two labels; the larger one wins, and equal ones are a tie.
        has_label: the column that is False for ties and unlabelled pairs; None if there is none.
        resolution: side in pixels that larger images are brought to: the shorter side resized, the middle kept, as the
            official code does before its random flips; None takes images as they are.
        count: how many pairs to take, at random; None takes all.
        seed: of that choice.

    Raises:
        ConfigError: no path, or a count or resolution that is not positive.
        DataError: the folder cannot be read, lacks a column, or holds no pair with a winner.
    """

    def __init__(
        self,
        *,
        path: str | None,
        split: str,
        caption: str,
        images: tuple[str, str],
        labels: tuple[str, str],
        has_label: str | None,
        resolution: int | None,
        count: int | None,
        seed: int,
    ) -> None:
        if path is None:
            raise ConfigError(
                "pairs=dataset needs method.algorithm.dataset.path=FOLDER, a folder with Pick-a-Pic's columns "
                "(docs/methods/sdpo.md)"
            )
        for name, value in (("count", count), ("resolution", resolution)):
            if value is not None and value < 1:
                raise ConfigError(f"method.algorithm.dataset.{name} is {value}: it must be 1 or more, or null")
        self.path, self.resolution = Path(path), resolution
        self.caption, self.images = caption, tuple(images)
        if not os.path.isdir(path):
            raise DataError(f"{path}: no such folder; expected Parquet files or what Dataset.save_to_disk wrote")
        self.data = open_data(path, split)
        columns = [caption, *images, *labels, *([has_label] if has_label else [])]
        missing = [column for column in columns if column not in self.data.column_names]
        if missing:
            raise DataError(
                f"{path} has no column {missing[0]!r}; it has {', '.join(self.data.column_names)}. "
                "Name its columns under method.algorithm.dataset"
            )
        with foreign(path, f"expected numbers in {', '.join(columns[3:])}", *faults()):
            first, second = (_numbers(self.data[label][:]) for label in labels)
            decided = (first > second) | (first < second)  # false for a missing label too
            if has_label:
                decided &= np.nan_to_num(_numbers(self.data[has_label][:])) != 0
        self.rows = np.flatnonzero(decided)
        self.first_wins = first > second
        if not len(self.rows):
            raise DataError(
                f"{path} holds {len(self.data)} pairs, and none of them has a winner: nothing to learn from"
            )
        if count is not None:
            if count > len(self.rows):
                raise DataError(f"{path} holds {len(self.rows)} pairs with a winner, fewer than dataset.count={count}")
            self.rows = np.sort(generator("pairs of a data set", seed).choice(self.rows, count, replace=False))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts of the pairs, without reading an image.

        Raises:
            DataError: a caption is empty or no text.
        """
        with foreign(str(self.path), "its rows cannot be read", *faults()):
            captions = self.data.select_columns([self.caption]).select(self.rows)[self.caption][:]
        for row, caption in zip(self.rows, captions, strict=True):
            if not isinstance(caption, str) or not caption.strip():
                raise DataError(f"{self.path}, row {row}: expected a text in {self.caption!r}, got {caption!r:.80}")
        rows = zip(self.rows, captions, strict=True)
        return [Prompt(f"{self.path.name}/{row:07d}", caption) for row, caption in rows]

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Winner and loser of a pair, each ``[height, width, 3]``.

        Raises:
            DataError: an image that cannot be read, or two sizes in a pair.
        """
        row = int(self.rows[index])
        with foreign(f"{self.path}, row {row}", "cannot be read", *faults()):
            record = self.data[row]
        first, second = (self._pixels(record[column], f"{self.path}, row {row}, {column}") for column in self.images)
        if first.shape != second.shape:
            sizes = " and ".join(f"{image.shape[1]} x {image.shape[0]}" for image in (first, second))
            raise DataError(
                f"{self.path}, row {row}: the two images have {sizes} pixels; "
                "method.algorithm.dataset.resolution brings larger images to one size"
            )
        return (first, second) if self.first_wins[row] else (second, first)

    def _pixels(self, value: Any, where: str) -> NDArray[np.uint8]:
        if isinstance(value, bytes):
            image = pictures.decode(value, where)
        else:
            image = (pictures.as_rgb if isinstance(value, Image.Image) else pictures.from_array)(value, where)
        if self.resolution is not None:
            if min(image.size) < self.resolution:
                raise DataError(
                    f"{where}: {image.width} x {image.height} pixels, smaller than "
                    f"method.algorithm.dataset.resolution={self.resolution}; images are never enlarged"
                )
            image = ImageOps.fit(image, (self.resolution, self.resolution), Image.Resampling.BILINEAR)
        return np.asarray(image)


def _numbers(values: list[Any]) -> NDArray[np.float64]:
    """A column of numbers or truth values, NaN where one is missing."""
    if any(not isinstance(value, bool | int | float | None) for value in values):
        raise TypeError("another kind of value")
    return np.array([np.nan if value is None else value for value in values], dtype=float)
