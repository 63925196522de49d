"""The prompts of GenEval: vocabulary, grammar, generator, and the files that the benchmark's scorer reads.

A record is the metadata of one prompt: ``tag``, ``include``, ``exclude`` (counting only) and ``prompt``; see
``alignbench.prompts.record``.

    python -m alignbench.rewards.geneval.suite --seed 43 -n 100 --output DIR

writes the benchmark's own 553 prompts.
"""

import argparse
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from alignbench.errors import DataError
from alignbench.outside import read_json, read_json_lines
from alignbench.prompts.record import RELATIONS, read
from alignbench.prompts.sampled import RECORD, numbered, samples
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
    """Writes ``evaluation_metadata.jsonl`` (a record per line) and ``generation_prompts.txt`` (a prompt per line)."""
    records = list(records)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / METADATA_FILE).write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    (folder / PROMPTS_FILE).write_text("".join(f"{record['prompt']}\n" for record in records), encoding="utf-8")


def read_records(path: Path) -> list[Record]:
    """Reads a file of records, one JSON object per line.

    Raises:
        DataError: the file cannot be read, or a line is not a record with a tag; the line is named.
    """
    return [_record(value, f"{path}, line {number}") for number, value in read_json_lines(path, "a GenEval record")]


def _record(value: object, where: str) -> Record:
    text, record = read(value, where)
    for key in ("tag", "include"):
        if key not in record:
            raise DataError(f'{where}: the GenEval record of {text!r}: "{key}" is missing')
    return record


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

    Sub-folders and samples whose name is not a number are skipped; see ``sampled.samples``.

    Raises:
        DataError: the folder is missing, holds no prompt, or a prompt lacks its record or its images.
    """
    if not os.path.isdir(folder):
        raise DataError(
            f"{folder} is not a folder: expected <index>/metadata.jsonl and <index>/samples/<number>.png in it"
        )
    parts = numbered(folder)
    if not parts:
        raise DataError(f"{folder} holds no prompt: expected sub-folders named by number, such as 00000")
    return [
        PromptImages(int(part.name), _record(read_json(part / RECORD), str(part / RECORD)), tuple(samples(part)))
        for part in parts
    ]


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
