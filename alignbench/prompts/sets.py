"""Prompt sets and how an iteration draws from one."""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from alignbench.errors import ConfigError, DataError
from alignbench.outside import read_json_lines, read_lines
from alignbench.prompts import record
from alignbench.prompts.prompt import Prompt
from alignbench.seeding import generator
from alignbench.settings import construct

Split = Literal["train", "tuning", "test", "all"]
Balance = Literal["tag", "none"] | Mapping[str, float]
PER_LINE = 'an object with a "prompt"'


def load(
    source: str, split: Split = "train", path: str | None = None, dataset: Mapping[str, Any] | None = None
) -> list[Prompt]:
    """Load a prompt set.

    Args:
        source: ``"shapes"`` (captions of the embedded world), ``"geneval"``, ``"file"`` or ``"dataset"``.
        split: ``"train"``, ``"tuning"``, ``"test"`` or ``"all"``, for sources that have splits.
        path: of a ``.txt`` (a prompt per line) or ``.jsonl`` file (an object per line with the key ``prompt``; the
            other keys, for example GenEval's ``tag`` and ``include``, become the metadata); or a data set's hub id or
            folder.
        dataset: where a data set has its prompts, see ``hub.PromptColumns``.

    Raises:
        ConfigError: unknown source, or a split that it does not have.
        DataError: unreadable file, blank line before the last, invalid JSON, over-long prompt, a GenEval record that
            is none, a repeat with other metadata; the line is named. A data set that cannot be read or lacks a column.
    """
    if source == "shapes":
        from alignbench.shapes.captions import split as captions

        return captions(split)
    if source == "file":
        if path is None:
            raise ConfigError(
                "prompts=file needs prompts.path=FILE (.txt: a prompt per line; .jsonl: objects with a prompt)"
            )
        return read_file(Path(path))
    if source == "geneval":
        from alignbench.prompts.geneval import split as geneval

        return geneval(split)
    if source == "dataset":
        from alignbench.prompts.hub import PromptColumns

        if path is None or dataset is None:
            raise ConfigError("prompts.source=dataset needs prompts.path (hub id or folder) and prompts.dataset")
        return construct(PromptColumns, dataset, "prompts.dataset").load(path, split)
    raise ConfigError(f"prompts.source {source!r} is not known; choose shapes, geneval, file or dataset")


def read_file(path: Path) -> list[Prompt]:
    """Read a ``.txt`` or ``.jsonl`` prompt file; see ``load``. Repeats are left out, and their number told once."""
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"{path}: expected a .txt or .jsonl prompt file, got {path.suffix or 'no suffix'}")
    prompts: dict[str, Prompt] = {}
    repeats = 0
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        text, metadata = record.read(line, where)
        first = prompts.setdefault(text, Prompt(f"{path.stem}/{number - 1:05d}", text, metadata))
        if first.metadata != metadata:
            raise DataError(f"{where}: the prompt {text!r} was already given as {first.id}, with other metadata")
        repeats += first.id != f"{path.stem}/{number - 1:05d}"
    if repeats:
        left_out = "1 line that repeats one is" if repeats == 1 else f"{repeats:,} lines that repeat one are"
        tell(f"{path}: {len(prompts):,} prompt{'s' * (len(prompts) > 1)}; {left_out} left out")
    return list(prompts.values())


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    if path.suffix == ".jsonl":
        yield from read_json_lines(path, PER_LINE)
    else:
        for number, line in read_lines(path, "a prompt"):
            yield number, {"prompt": line}


@cache
def tell(note: str) -> None:
    """Say something on standard error once, on the first process of a run alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {note}", file=sys.stderr)


def draw(prompts: Sequence[Prompt], count: int, seed: int, iteration: int, balance: Balance = "tag") -> list[Prompt]:
    """Draw an iteration's distinct prompts, the same for any number of processes.

    Args:
        balance: see ``probabilities``.

    Raises:
        ConfigError: more prompts asked for than can be drawn, or a balance that does not fit them.
    """
    rng = generator("prompts", seed, iteration)
    chosen = rng.choice(len(prompts), count, replace=False, p=probabilities(prompts, count, balance))
    return [prompts[index] for index in chosen]


def probabilities(prompts: Sequence[Prompt], count: int, balance: Balance) -> NDArray[np.float64]:
    """The probability of each prompt to be drawn first, [prompts].

    Args:
        count: how many distinct prompts are to be drawn.
        balance: ``"tag"`` gives every tag the same probability, however many prompts it has; ``"none"`` draws
            uniformly; weights by tag give each tag its share of their sum.

    Raises:
        ConfigError: fewer prompts can be drawn than are asked for; weights that leave a tag out, name one that no
            prompt has, or are negative or all zero.
    """
    tags = [str(prompt.metadata.get("tag")) for prompt in prompts]
    sizes = Counter(tags)
    if isinstance(balance, Mapping):
        missing = [tag for tag in sizes if tag not in balance]
        foreign = [tag for tag, weight in balance.items() if weight > 0 and tag not in sizes]
        if missing or foreign or min(balance.values()) < 0 or not any(balance.values()):
            raise ConfigError(
                f"prompts.balance is {dict(balance)}: it must give a weight of 0 or more for every tag of the prompts "
                f"({', '.join(sizes)}), and more than 0 for none but these"
            )
        weights = np.array([balance[tag] / sizes[tag] for tag in tags])
    else:
        weights = np.array([1 / sizes[tag] for tag in tags]) if balance == "tag" else np.ones(len(prompts))
    if count > (possible := int((weights > 0).sum())):
        raise ConfigError(
            f"an iteration needs {count} distinct prompts but the set has {possible}; "
            f"method.batch.prompts={possible} is the most"
        )
    chances: NDArray[np.float64] = weights / weights.sum()
    return chances
