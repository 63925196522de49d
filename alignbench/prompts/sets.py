"""Prompt sets and how an iteration draws from one."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from alignbench.errors import ConfigError, DataError
from alignbench.prompts.prompt import Prompt
from alignbench.seeding import generator
from alignbench.settings import construct

Split = Literal["train", "tuning", "test", "all"]
Balance = Literal["tag", "none"] | Mapping[str, float]
LONGEST_PROMPT = 2_000  # characters; the longest text encoders read 512 tokens


def load(
    source: str, split: Split = "train", path: str | None = None, dataset: Mapping[str, Any] | None = None
) -> list[Prompt]:
    """Load a prompt set.

    Args:
        source: ``"shapes"`` (captions of the embedded world), ``"geneval"``, ``"file"`` or ``"dataset"``.
        split: ``"train"``, ``"tuning"``, ``"test"`` or ``"all"``, for sources that have splits.
        path: of a ``.txt`` (a prompt a line) or ``.jsonl`` file (an object a line with the key ``prompt``; the other
            keys, for example GenEval's ``tag`` and ``include``, become the metadata); or a data set's hub id or folder.
        dataset: where a data set has its prompts, see ``hub.PromptColumns``.

    Raises:
        ConfigError: unknown source, or a split that it does not have.
        DataError: unreadable file, empty line, invalid JSON, over-long or repeated prompt; the line is named. A data
            set that cannot be read or lacks a column.
    """
    if source == "shapes":
        from alignbench.shapes.captions import split as captions

        return captions(split)
    if source == "file":
        if path is None:
            raise ConfigError(
                "prompts=file needs prompts.path=FILE (.txt: a prompt a line; .jsonl: objects with a prompt)"
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
    """Read a ``.txt`` or ``.jsonl`` prompt file; see ``load``."""
    if path.suffix not in (".txt", ".jsonl"):
        raise DataError(f"{path}: expected a .txt or .jsonl prompt file, got {path.suffix or 'no suffix'}")
    try:
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a UTF-8 prompt file ({error})") from error
    if lines == [""]:
        raise DataError(f"{path}: no prompts in this file")
    prompts: dict[str, Prompt] = {}
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            raise DataError(f"{where}: empty; every line must hold a prompt, delete it")
        record = _record(line, where) if path.suffix == ".jsonl" else {"prompt": line.strip()}
        text = record["prompt"]
        if len(text) > LONGEST_PROMPT:
            raise DataError(f"{where}: the prompt has {len(text)} characters; at most {LONGEST_PROMPT} are accepted")
        if text in prompts:
            raise DataError(f"{where}: the prompt {text!r} was already given as {prompts[text].id}; every prompt once")
        prompts[text] = Prompt(f"{path.stem}/{number - 1:05d}", text, {} if set(record) == {"prompt"} else record)
    return list(prompts.values())


def _record(line: str, where: str) -> dict[str, str]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"].strip():
        raise DataError(f'{where}: expected an object with a non-empty "prompt", got {line[:80]!r}')
    return record


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
