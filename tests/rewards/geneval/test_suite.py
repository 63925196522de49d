"""The prompt suite against the published file: its hash, its counts and its lines; and the files that scorers read."""

import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alignbench.errors import DataError
from alignbench.rewards.geneval import suite
from alignbench.rewards.geneval.rules import Record

OFFICIAL_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return suite.generate(seed=43, n=100)


def with_tag(records: list[Record], tag: str) -> list[Record]:
    return [record for record in records if record["tag"] == tag]


# ------------------------------------------------------------------------------------------------ grammar


def test_vocabulary() -> None:
    assert len(suite.OBJECTS) == len(set(suite.OBJECTS)) == 80
    indices = {"person": 0, "dog": 16, "computer mouse": 64, "tv remote": 65, "computer keyboard": 66, "toothbrush": 79}
    assert {name: suite.OBJECTS.index(name) for name in indices} == indices


@pytest.mark.parametrize(
    ("words", "expected"),
    [("apple", "an apple"), ("dog", "a dog"), ("oven", "an oven"), ("umbrella", "an umbrella"), ("hair", "a hair")],
)
def test_article(words: str, expected: str) -> None:
    assert suite.with_article(words) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [("dog", "dogs"), ("bus", "buses"), ("skis", "skises"), ("toothbrush", "toothbrushs"), ("person", "persons")],
)
def test_plural(name: str, expected: str) -> None:
    assert suite.plural(name) == expected


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (
            suite.single_object("skis"),
            '{"tag": "single_object", "include": [{"class": "skis", "count": 1}], "prompt": "a photo of a skis"}',
        ),
        (
            suite.two_object("apple", "cup"),
            '{"tag": "two_object", "include": [{"class": "apple", "count": 1}, {"class": "cup", "count": 1}], '
            '"prompt": "a photo of an apple and a cup"}',
        ),
        (
            suite.counting("bus", 3),
            '{"tag": "counting", "include": [{"class": "bus", "count": 3}], '
            '"exclude": [{"class": "bus", "count": 4}], "prompt": "a photo of three buses"}',
        ),
        (
            suite.colors("car", "orange"),
            '{"tag": "colors", "include": [{"class": "car", "count": 1, "color": "orange"}], '
            '"prompt": "a photo of an orange car"}',
        ),
        (
            suite.position("dog", "left of", "oven"),
            '{"tag": "position", "include": [{"class": "oven", "count": 1}, '
            '{"class": "dog", "count": 1, "position": ["left of", 0]}], "prompt": "a photo of a dog left of an oven"}',
        ),
        (
            suite.color_attr("cup", "red", "orange", "orange"),
            '{"tag": "color_attr", "include": [{"class": "cup", "count": 1, "color": "red"}, '
            '{"class": "orange", "count": 1, "color": "orange"}], '
            '"prompt": "a photo of a red cup and an orange orange"}',
        ),
    ],
)
def test_records(record: Record, line: str) -> None:
    assert json.dumps(record) == line


# ------------------------------------------------------------------------------------------------ generator


def test_official_file(tmp_path: Path, records: list[Record]) -> None:
    suite.write_prompts(tmp_path, records)
    content = (tmp_path / "evaluation_metadata.jsonl").read_bytes()
    assert hashlib.sha256(content).hexdigest() == OFFICIAL_SHA256
    prompts = (tmp_path / "generation_prompts.txt").read_text().split("\n")
    assert prompts == [record["prompt"] for record in records] + [""]


@pytest.mark.parametrize(("seed", "number"), [(43, 553), (0, 548), (1, 554), (42, 559)])
def test_number_of_records(seed: int, number: int) -> None:
    assert len(suite.generate(seed, 100)) == number


def test_tags_stand_in_blocks(records: list[Record]) -> None:
    sizes = {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    assert [record["tag"] for record in records] == [tag for tag, size in sizes.items() for _ in range(size)]
    assert tuple(sizes) == suite.TAGS


def test_counts_of_counting_and_position(records: list[Record]) -> None:
    counts = Counter(record["include"][0]["count"] for record in with_tag(records, "counting"))
    assert counts == {2: 26, 3: 28, 4: 26}
    relations = Counter(record["include"][1]["position"][0] for record in with_tag(records, "position"))
    assert relations == {"left of": 19, "right of": 27, "above": 26, "below": 28}


def test_texts_are_distinct_and_every_object_stands_alone_once(records: list[Record]) -> None:
    assert len({record["prompt"] for record in records}) == 553
    alone = [record["include"][0]["class"] for record in with_tag(records, "single_object")]
    assert sorted(alone) == sorted(suite.OBJECTS)


@pytest.mark.parametrize("seed", [0, 1, 42, 43])
def test_clauses(seed: int) -> None:
    for record in suite.generate(seed, 100):
        assert ("exclude" in record) == (record["tag"] == "counting")
        classes = [clause["class"] for clause in record["include"]]
        colours = [clause["color"] for clause in record["include"] if "color" in clause]
        assert len(set(classes)) == len(classes)
        assert len(set(colours)) == len(colours)
        assert not colours or "person" not in classes
        if record["tag"] == "counting":
            (wanted,), (limit,) = record["include"], record["exclude"]
            assert limit == {"class": wanted["class"], "count": wanted["count"] + 1}


def test_no_draws_leave_the_single_objects() -> None:
    assert {record["tag"] for record in suite.generate(7, 0)} == {"single_object"}


# ------------------------------------------------------------------------------------------------ prompt files


def test_records_survive_a_file(tmp_path: Path, records: list[Record]) -> None:
    suite.write_prompts(tmp_path / "new" / "folder", records)
    assert suite.read_records(tmp_path / "new" / "folder" / suite.METADATA_FILE) == records


GOOD = json.dumps(suite.single_object("dog"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, "", GOOD], r"line 2: empty; every line must hold a GenEval record"),
        ([GOOD, GOOD, '{"tag": "x"'], "line 3: not valid JSON"),
        (["[1]"], 'line 1: expected an object with a non-empty "prompt"'),
        (['{"tag": "x", "include": []}'], 'line 1: expected an object with a non-empty "prompt"'),
        (['{"tag": "x", "prompt": "y"}'], '"include" is missing'),
        (['{"prompt": "y", "include": [{"class": "dog", "count": 1}]}'], '"tag" is missing'),
        (['{"tag": "x", "prompt": "y", "include": []}'], 'expected a list of clauses .* under "include", got'),
        (['{"tag": "x", "prompt": "y", "include": [{"count": 1}]}'], r'include\[0\]: expected .*"class", got nothing'),
        (
            ['{"tag": "x", "prompt": "y", "include": [{"class": "dog", "count": 0}]}'],
            r'include\[0\]: expected a whole number of 1 or more under "count", got 0',
        ),
        (
            ['{"tag": "x", "prompt": "y", "include": [{"class": "dog", "count": 1}], "exclude": [{"class": "dog"}]}'],
            r'exclude\[0\]: expected a whole number of 1 or more under "count", got nothing',
        ),
        (
            ['{"tag": "x", "prompt": "y", "include": [{"class": "dog", "count": 1}], "exclude": 3}'],
            'expected a list of clauses .* under "exclude", got 3',
        ),
        (
            ['{"tag": "x", "prompt": "y", "include": [{"class": "dog", "count": 1, "color": 3}]}'],
            r'include\[0\]: expected the name of a colour under "color", got 3',
        ),
    ],
)
def test_malformed_files(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=message):
        suite.read_records(path)


@pytest.mark.parametrize("position", [["beside", 0], ["left of", 1], ["left of", -1], ["left of"], "left of"])
def test_malformed_positions(tmp_path: Path, position: object) -> None:
    record = {
        "tag": "x",
        "prompt": "y",
        "include": [suite.clause("dog"), {**suite.clause("cat"), "position": position}],
    }
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"include\[1\]: expected a position \[relation, k\].*left of, right of"):
        suite.read_records(path)


def test_missing_empty_and_binary_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.jsonl: cannot be read \(No such file"):
        suite.read_records(tmp_path / "missing.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="is empty"):
        suite.read_records(tmp_path / "empty.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="line 1: cannot be read: not a text in UTF-8"):
        suite.read_records(tmp_path / "binary.jsonl")


# ------------------------------------------------------------------------------------------------ image folders


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(6, 5, 3), dtype=np.uint8)


def test_images_survive_a_folder(tmp_path: Path) -> None:
    dog, cats = suite.single_object("dog"), suite.counting("cat", 2)
    written = [
        suite.write_images(tmp_path, 12, cats, [noise(2)]),
        suite.write_images(tmp_path, 3, dog, [noise(0), noise(1)]),
    ]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "00003/metadata.jsonl",
        "00003/samples/0000.png",
        "00003/samples/0001.png",
        "00012/metadata.jsonl",
        "00012/samples/0000.png",
    ]
    assert json.loads((tmp_path / "00012" / "metadata.jsonl").read_text()) == cats
    read = suite.read_images(tmp_path)
    assert read == written[::-1]
    pixels = [np.asarray(Image.open(path)) for prompt in read for path in prompt.images]
    for image, seed in zip(pixels, (0, 1, 2), strict=True):
        np.testing.assert_array_equal(image, noise(seed))


def test_only_numbered_samples_are_read_in_numerical_order(tmp_path: Path) -> None:
    prompt = suite.write_images(tmp_path, 0, suite.single_object("dog"), [noise(0)])
    samples = tmp_path / "00000" / "samples"
    for name in ("10.png", "9.PNG", "grid.png", "x1.png", "5.jpg", "6.webp", "7.txt"):
        (samples / name).write_bytes(prompt.images[0].read_bytes())
    (tmp_path / "00000" / "grid.png").write_bytes(prompt.images[0].read_bytes())
    (tmp_path / "notes").mkdir()
    (tmp_path / "results.jsonl").touch()
    (only,) = suite.read_images(tmp_path)
    assert [path.name for path in only.images] == ["0000.png", "5.jpg", "6.webp", "9.PNG", "10.png"]
    (samples / "05.jpeg").write_bytes(prompt.images[0].read_bytes())
    with pytest.raises(DataError, match="have one number"):
        suite.read_images(tmp_path)


def test_incomplete_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        suite.read_images(tmp_path / "missing")
    with pytest.raises(DataError, match="holds no prompt"):
        suite.read_images(tmp_path)
    suite.write_images(tmp_path, 0, suite.single_object("dog"), [])
    with pytest.raises(DataError, match="no image of this prompt"):
        suite.read_images(tmp_path)
    metadata = tmp_path / "00000" / "metadata.jsonl"
    metadata.write_text(f"{GOOD}\n{GOOD}\n")
    with pytest.raises(DataError, match="not valid JSON"):
        suite.read_images(tmp_path)
    metadata.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        suite.read_images(tmp_path)


# ------------------------------------------------------------------------------------------------ command


def test_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "alignbench.rewards.geneval.suite", "--seed", "43", "-n", "100"]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("553 prompts in ")
    assert hashlib.sha256((tmp_path / suite.METADATA_FILE).read_bytes()).hexdigest() == OFFICIAL_SHA256


def test_command_with_an_unwritable_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stop:
        suite.main(["--output", str(tmp_path / "file" / "below")])
    assert stop.value.code == 2
    assert "cannot write to" in capsys.readouterr().err


def test_command_with_a_negative_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.main(["-n", "-1", "--output", str(tmp_path)])
    assert "must be 0 or more, got 43 and -1" in capsys.readouterr().err
