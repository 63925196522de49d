"""The prompts of GenEval: vocabulary, grammar, generator, and the files that the benchmark's scorer reads.

A record is the metadata of one prompt: ``tag``, ``include`` (clauses that must all hold), ``exclude`` (clauses none
of which may hold; counting only) and ``prompt``. A clause names a ``class`` and a ``count``, with an optional ``color``
and an optional ``position``, ``[relation, k]``, relative to the objects of the earlier include clause ``k``.

    python -m alignbench.rewards.geneval.suite --seed 43 -n 100 --output DIR

writes the benchmark's own 553 prompts.
"""

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alignbench.errors import DataError
from alignbench.rewards.geneval.rules import Record
from alignbench.terminal import lasting

METADATA_FILE = "evaluation_metadata.jsonl"
PROMPTS_FILE = "generation_prompts.txt"

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

# Index = class index of a detector trained on COCO.
OBJECTS = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed",
    "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)  # fmt: skip

# Index = index of the colour classifier's largest logit.
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

RELATIONS = ("left of", "right of", "above", "below")

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


# ------------------------------------------------------------------------------------------------ grammar


def with_article(words: str) -> str:
    """``"an apple"``, ``"a dog"``: the article follows the first letter alone."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plural(name: str) -> str:
    """The benchmark's plural: ``es`` after ``s``, otherwise ``s``, without exceptions ("persons", "toothbrushs")."""
    return f"{name}es" if name.endswith("s") else f"{name}s"


def clause(name: str, count: int = 1, *, colour: str | None = None, position: tuple[str, int] | None = None) -> Record:
    """One clause, keys in the order of the benchmark's file."""
    result: dict[str, Any] = {"class": name, "count": count}
    if colour is not None:
        result["color"] = colour
    if position is not None:
        result["position"] = list(position)
    return result


def single_object(name: str) -> Record:
    return {"tag": "single_object", "include": [clause(name)], "prompt": f"a photo of {with_article(name)}"}


def two_object(first: str, second: str) -> Record:
    prompt = f"a photo of {with_article(first)} and {with_article(second)}"
    return {"tag": "two_object", "include": [clause(first), clause(second)], "prompt": prompt}


def counting(name: str, count: int) -> Record:
    """Exactly ``count`` objects: the exclude clause forbids one more."""
    return {
        "tag": "counting",
        "include": [clause(name, count)],
        "exclude": [clause(name, count + 1)],
        "prompt": f"a photo of {NUMBERS[count]} {plural(name)}",
    }


def colors(name: str, colour: str) -> Record:
    prompt = f"a photo of {with_article(colour)} {name}"
    return {"tag": "colors", "include": [clause(name, colour=colour)], "prompt": prompt}


def position(first: str, relation: str, second: str) -> Record:
    """``first`` has the relation to ``second``; the reference object is the first clause."""
    prompt = f"a photo of {with_article(first)} {relation} {with_article(second)}"
    return {"tag": "position", "include": [clause(second), clause(first, position=(relation, 0))], "prompt": prompt}


def color_attr(first: str, first_colour: str, second: str, second_colour: str) -> Record:
    prompt = f"a photo of {with_article(first_colour)} {first} and {with_article(second_colour)} {second}"
    include = [clause(first, colour=first_colour), clause(second, colour=second_colour)]
    return {"tag": "color_attr", "include": include, "prompt": prompt}


# ------------------------------------------------------------------------------------------------ generator


def generate(seed: int, n: int) -> list[Record]:
    """The benchmark's records for a seed: every object once, then ``n`` draws of each other tag, without repetitions.

    The order of the draws is the benchmark's, so that seed 43 with ``n = 100`` gives its 553 prompts.
    """
    rng = np.random.default_rng(seed)
    records = [single_object(OBJECTS[index]) for index in rng.choice(80, size=80, replace=False)]
    records += [_draw_two_object(rng) for _ in range(n)]
    records += [_draw_counting(rng) for _ in range(n)]
    records += [_draw_colors(rng) for _ in range(n)]
    records += [_draw_position(rng) for _ in range(n)]
    records += [_draw_color_attr(rng) for _ in range(n)]
    return list({json.dumps(record): record for record in records}.values())


def _draw_two_object(rng: np.random.Generator) -> Record:
    first, second = rng.choice(80, 2, replace=False)
    return two_object(OBJECTS[first], OBJECTS[second])


def _draw_counting(rng: np.random.Generator) -> Record:
    name = OBJECTS[rng.choice(80)]
    return counting(name, int(rng.integers(2, 4, endpoint=True)))


def _draw_colors(rng: np.random.Generator) -> Record:
    name = OBJECTS[rng.choice(79) + 1]  # never a person
    return colors(name, COLOURS[rng.choice(10)])


def _draw_position(rng: np.random.Generator) -> Record:
    first, second = rng.choice(80, 2, replace=False)
    return position(OBJECTS[first], RELATIONS[rng.choice(4)], OBJECTS[second])


def _draw_color_attr(rng: np.random.Generator) -> Record:
    first, second = rng.choice(79, 2, replace=False) + 1  # never a person
    first_colour, second_colour = rng.choice(10, 2, replace=False)
    return color_attr(OBJECTS[first], COLOURS[first_colour], OBJECTS[second], COLOURS[second_colour])


# ------------------------------------------------------------------------------------------------ prompt files


def write_prompts(folder: Path, records: Iterable[Record]) -> None:
    """Writes ``evaluation_metadata.jsonl`` (a record a line) and ``generation_prompts.txt`` (a prompt a line)."""
    records = list(records)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METADATA_FILE).write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    (folder / PROMPTS_FILE).write_text("".join(f"{record['prompt']}\n" for record in records), encoding="utf-8")


def read_records(path: Path) -> list[Record]:
    """Reads a file of records, one JSON object a line.

    Raises:
        DataError: the file is missing or empty, or a line is not a record; the line is named.
    """
    try:
        with path.open(encoding="utf-8") as file:
            lines = [line.rstrip("\n") for line in file]
    except OSError as error:
        raise DataError(f"cannot read GenEval records from {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a text file in UTF-8: {error}") from error
    if not lines:
        raise DataError(f"{path} is empty: expected one GenEval record (a JSON object) a line")
    return [_parse_record(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1)]


def _parse_record(text: str, place: str) -> Record:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: expected a GenEval record as JSON, got {text[:80]!r} ({error})") from error
    fault = _fault(record)
    if fault is not None:
        raise DataError(f"{place}: not a GenEval record: {fault}")
    return dict(record)


def _fault(record: object) -> str | None:
    """What keeps an object from being a record; None if it is one."""
    if not isinstance(record, Mapping):
        return f"expected an object with tag, include and prompt, got {json.dumps(record)[:80]}"
    for key in ("tag", "prompt"):
        if not isinstance(record.get(key), str):
            return f"expected a text under {key!r}, got {record.get(key)!r}"
    if not isinstance(record.get("include"), list) or not record["include"]:
        return f"expected a list of clauses under 'include', got {record.get('include')!r}"
    if not isinstance(record.get("exclude", []), list):
        return f"expected a list of clauses under 'exclude', got {record['exclude']!r}"
    clauses = [("include", index, item) for index, item in enumerate(record["include"])]
    clauses += [("exclude", index, item) for index, item in enumerate(record.get("exclude", []))]
    for key, index, item in clauses:
        fault = _clause_fault(item, index)
        if fault is not None:
            return f"{key}[{index}]: {fault}"
    return None


def _clause_fault(item: object, index: int) -> str | None:
    if not isinstance(item, Mapping) or not isinstance(item.get("class"), str):
        return f"expected an object with class and count, got {json.dumps(item)[:80]}"
    if type(item.get("count")) is not int or item["count"] < 1:
        return f"expected a count of 1 or more, got {item.get('count')!r}"
    if "color" in item and not isinstance(item["color"], str):
        return f"expected the name of a colour, got {item['color']!r}"
    if "position" in item:
        match item["position"]:
            case [str(relation), int(reference)] if relation in RELATIONS and 0 <= reference < index:
                return None
        return (
            f"expected a position [relation, k] with a relation of {', '.join(RELATIONS)} and k the index of an "
            f"earlier clause, got {item['position']!r}"
        )
    return None


# ------------------------------------------------------------------------------------------------ image folders


@dataclass(frozen=True)
class PromptImages:
    """The images of one prompt in the benchmark's folder layout."""

    index: int
    record: Record
    images: tuple[Path, ...]


def write_images(folder: Path, index: int, record: Record, images: Sequence[NDArray[np.uint8]]) -> PromptImages:
    """Writes ``<index>/metadata.jsonl`` and ``<index>/samples/<number>.png``, as the benchmark's scorer expects them.

    Args:
        folder: the root of the layout.
        index: the prompt's line in ``evaluation_metadata.jsonl``, from 0.
        record: its record.
        images: uint8 RGB, each [H, W, 3].
    """
    prompt_folder = folder / f"{index:05d}"
    samples = prompt_folder / "samples"
    samples.mkdir(parents=True, exist_ok=True)
    (prompt_folder / "metadata.jsonl").write_text(json.dumps(record), encoding="utf-8")
    paths = tuple(samples / f"{number:04d}.png" for number in range(len(images)))
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return PromptImages(index, record, paths)


def read_images(folder: Path) -> list[PromptImages]:
    """Reads a folder in the benchmark's layout, prompts and images in numerical order.

    Sub-folders whose name is not a number are skipped, and so are samples whose name does not begin with a number
    followed by ``.png``.

    Raises:
        DataError: the folder is missing, holds no prompt, or a prompt lacks its record or its images.
    """
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder: expected <index>/metadata.jsonl and <index>/samples/<number>.png in it"
        )
    prompt_folders = sorted(
        (path for path in folder.iterdir() if path.is_dir() and re.fullmatch(r"\d+", path.name)),
        key=lambda path: int(path.name),
    )
    if not prompt_folders:
        raise DataError(f"{folder} holds no prompt: expected sub-folders named by number, such as 00000")
    return [_read_prompt_folder(path) for path in prompt_folders]


def _read_prompt_folder(folder: Path) -> PromptImages:
    metadata = folder / "metadata.jsonl"
    records = read_records(metadata)
    if len(records) != 1:
        raise DataError(f"{metadata} has {len(records)} lines: expected the record of one prompt")
    numbered: list[tuple[int, Path]] = []
    for path in folder.glob("samples/*"):
        match = re.match(r"(\d+)\.png", path.name)
        if match:
            numbered.append((int(match[1]), path))
    if not numbered:
        raise DataError(f"{folder / 'samples'} holds no image: expected names such as 0000.png")
    return PromptImages(int(folder.name), records[0], tuple(path for _, path in sorted(numbered)))


# ------------------------------------------------------------------------------------------------ command


@lasting()
def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the prompt files of a seed."""
    parser = argparse.ArgumentParser(prog="python -m alignbench.rewards.geneval.suite", description=main.__doc__)
    parser.add_argument("--seed", type=int, default=43, help="43 is the benchmark's own")
    parser.add_argument("-n", "--number", type=int, default=100, help="draws of each tag after single_object")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    options = parser.parse_args(arguments)
    if options.seed < 0 or options.number < 0:
        parser.error(f"--seed and -n must be 0 or more, got {options.seed} and {options.number}")
    records = generate(options.seed, options.number)
    try:
        write_prompts(options.output, records)
    except OSError as error:
        parser.error(f"cannot write to {options.output}: {error.strerror}")
    print(f"{len(records)} prompts in {options.output / METADATA_FILE} and {options.output / PROMPTS_FILE}")


if __name__ == "__main__":
    main()
