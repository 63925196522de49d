"""Prompts of data sets: on the hub, or on disk in a form that ``datasets`` reads."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignbench.errors import ConfigError, DataError
from alignbench.hub import refusal
from alignbench.outside import FAULTS, foreign
from alignbench.prompts.prompt import Prompt
from alignbench.prompts.record import LONGEST_PROMPT

SAVED = ("dataset_dict.json", "state.json")  # one of them is in what Dataset.save_to_disk wrote
ORDER = ("test", "tuning", "train")  # a text that several splits have stays in the first of these


@dataclass(frozen=True)
class PromptColumns:
    """Where a data set has its prompts.

    Attributes:
        column: the texts.
        tag: a column whose value becomes the prompt's tag (scores are reported by tag); None for none.
        splits: train, tuning and test -> the data set's split of that purpose; a purpose that is absent has none.
        files: the data set's split -> its file, for repositories that hold more than prompts; None reads them all.
        revision: of a hub data set: commit, tag or branch.
    """

    column: str
    tag: str | None
    splits: Mapping[str, str]
    files: Mapping[str, str] | None
    revision: str | None

    def __post_init__(self) -> None:
        unknown = [name for name in self.splits if name not in ORDER]
        if unknown or not self.splits:
            raise ConfigError(f"prompts.dataset.splits has {unknown or 'nothing'}: give some of train, tuning and test")
        without = [split for split in self.splits.values() if self.files and split not in self.files]
        if without:
            raise ConfigError(
                f"prompts.dataset.files names no file of the split {without[0]!r}: add it, or set files=null"
            )

    def load(self, path: str, split: str) -> list[Prompt]:
        """The distinct prompts of a split, in the data set's order, with ids such as ``"drawbench/test/0000012"``.

        Empty and over-long texts are left out, and so are those that a split for evaluation has too.

        Args:
            path: hub id, or a folder that ``Dataset.save_to_disk`` wrote or that holds data files.
            split: ``train``, ``tuning``, ``test`` or ``all``.

        Raises:
            ConfigError: the data set has no such split.
            DataError: it cannot be read, lacks a column, or has no prompts left.
        """
        if split != "all" and split not in self.splits:
            raise ConfigError(
                f"{path} has no prompts for {split}, only for {', '.join(self.splits)}; choose other prompts, or name "
                f"the split under prompts.dataset.splits.{split}"
            )
        wanted = [name for name in ORDER if name in self.splits]
        if split != "all":
            wanted = wanted[: wanted.index(split) + 1]
        seen: set[str] = set()
        prompts: dict[str, list[Prompt]] = {}
        for name in wanted:
            prompts[name] = []
            for row, text, metadata in self._rows(path, name):
                if text and len(text) <= LONGEST_PROMPT and text not in seen:
                    seen.add(text)
                    prompts[name].append(Prompt(f"{Path(path).name}/{name}/{row:07d}", text, metadata))
        chosen = [prompt for name in (wanted if split == "all" else [split]) for prompt in prompts[name]]
        if not chosen:
            raise DataError(f"{path}: no prompts in the column {self.column!r} of its split for {split}")
        return chosen

    def _rows(self, path: str, name: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
        split = self.splits[name]
        files = {split: self.files[split]} if self.files else None
        data = open_data(path, split, files, self.revision)
        columns = [self.column, *([self.tag] if self.tag else [])]
        missing = [column for column in columns if column not in data.column_names]
        if missing:
            raise DataError(
                f"{path} has no column {missing[0]!r}; it has {', '.join(data.column_names)}. "
                "Name its columns under prompts.dataset"
            )
        with foreign(path, "its rows cannot be read", *faults()):
            values = data.select_columns(columns)
            texts, tags = values[self.column][:], values[self.tag][:] if self.tag else None
        for row, text in enumerate(texts):
            if text is not None and not isinstance(text, str):
                kind = type(text).__name__
                raise DataError(f"{path}, row {row}: the column {self.column!r} holds a {kind}, expected text")
            yield row, (text or "").strip(), {"tag": str(tags[row])} if tags else {}


def faults() -> tuple[type[BaseException], ...]:
    """What ``datasets`` raises beside errors of the built-in kinds."""
    import datasets  # takes a second, and only this needs it
    import pyarrow

    return datasets.exceptions.DatasetsError, pyarrow.ArrowException


def open_data(path: str, split: str, files: Mapping[str, str] | None = None, revision: str | None = None) -> Any:
    """A split of a data set on the hub or on disk, memory-mapped.

    Args:
        path: hub id, or a folder that ``Dataset.save_to_disk`` wrote or that holds data files.
        files: split -> its file; None reads them all.
        revision: of a hub data set.

    Raises:
        DataError: it cannot be read; the folder and, where it can be told, the file are named.
    """
    import datasets

    datasets.disable_progress_bars()
    folder = Path(path)
    _check_local(folder)
    try:
        if any(os.path.exists(folder / name) for name in SAVED):
            saved = datasets.load_from_disk(path)
            return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
        return datasets.load_dataset(
            path, split=split, data_files=files, revision=None if os.path.exists(path) else revision
        )
    except (*FAULTS, *faults()) as error:
        wrapped = isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__
        raise DataError(
            f"{_damaged(folder) or path}: cannot be read as a data set with the split {split!r} "
            f"({refusal(wrapped or error)[:300]}); give a folder with data files, or a hub id that is in the local "
            "cache or can be downloaded"
        ) from error


def _check_local(path: Path) -> None:
    """Refuse what would run code or never end."""
    is_folder = os.path.isdir(path)
    script = path / f"{path.resolve().name}.py" if is_folder else path
    if script.suffix == ".py" and os.path.exists(script):
        raise DataError(f"{script}: a data-set script is never run; give a folder with its data files instead")
    for each in path.rglob("*") if is_folder else ():
        if os.path.exists(each) and not (os.path.isfile(each) or os.path.isdir(each)):
            raise DataError(f"{each}: expected a regular file, not a pipe, socket or device")


def _damaged(folder: Path) -> Path | None:
    """The first Parquet file of a folder whose footer cannot be read."""
    from pyarrow import parquet

    for file in sorted(folder.rglob("*.parquet")) if os.path.isdir(folder) else ():
        try:
            parquet.read_schema(file)
        except (*FAULTS, *faults()):
            return file
    return None
