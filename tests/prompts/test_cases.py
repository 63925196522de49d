"""Files that users have, each accepted with the right value or refused in one sentence, wherever it comes from."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alignbench.errors import DataError
from alignbench.prompts import record, sets
from alignbench.prompts.images import CaptionedImages
from alignbench.prompts.prompt import Prompt
from alignbench.prompts.sampled import SampledImages
from alignbench.rewards.geneval import suite
from alignbench.rewards.geneval.detectors.shapes import ShapesGenevalDetector
from alignbench.rewards.geneval.reward import GenevalReward, score_scene
from alignbench.rewards.geneval.rules import read_rows
from tests import input_cases

SQUARE = "the GenEval record of 'a photo of a square': "
COUNT = SQUARE + 'include[0]: expected a whole number of 1 or more under "count", got '
POSITION = "expected a position [relation, k] with a relation of left of, right of, above, below and k the index of an "
LIST = SQUARE + 'expected a list of clauses such as [{"class": "dog", "count": 1}] under '

REFUSED = {
    "count_missing": COUNT + "nothing",
    "count_zero": COUNT + "0",
    "count_text": COUNT + '"2"',
    "count_null": COUNT + "null",
    "count_real": COUNT + "1.5",
    "class_missing": SQUARE + 'include[0]: expected the name of an object under "class", got nothing',
    "clause_null": SQUARE + 'include[0]: expected an object such as {"class": "dog", "count": 1}, got null',
    "include_text": LIST + '"include", got "square"',
    "include_mapping": LIST + '"include", got {"class": "square", "count": 1}',
    "include_number": LIST + '"include", got 3',
    "position_nothing": SQUARE + f'include[0]: {POSITION}earlier clause, got ["above", 4]',
    "position_itself": SQUARE + f'include[0]: {POSITION}earlier clause, got ["above", 0]',
    "position_text": SQUARE + f'include[1]: {POSITION}earlier clause, got "above"',
    "exclude_text": LIST + '"exclude", got "square"',
    "exclude_no_count": SQUARE + 'exclude[0]: expected a whole number of 1 or more under "count", got nothing',
    "deep": "JSON nested too deeply; 32 levels are read",
    "surrogate": 'half of a surrogate pair in the text "\\ud800 a square"',
    "huge_integer": "an integer of 5000 characters; integers of 64 bits are read",
}


def texts(path: Path) -> list[str]:
    return [prompt.text for prompt in sets.read_file(path)]


def test_repeats_are_left_out_and_told_once(cases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets.tell.cache_clear()
    for _ in range(2):
        assert texts(cases / "repeats.txt") == ["a photo of a red circle", "a photo of a blue square"]
    told = capsys.readouterr().err
    assert told == f"note: {cases / 'repeats.txt'}: 2 prompts; 1 line that repeats one is left out\n"
    assert sets.read_file(cases / "repeats.jsonl") == [
        Prompt("repeats/00000", "a photo of a square", input_cases.RECORD)
    ]
    assert "1 prompt; 2 lines that repeat one are left out" in capsys.readouterr().err


def test_the_released_files_repeat_their_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GenEval's 553 records four times each, and 200 texts five times each."""
    records = suite.generate(43, 100)
    geneval, drawbench = tmp_path / "geneval.jsonl", tmp_path / "drawbench.txt"
    geneval.write_text("".join(json.dumps(each) + "\n" for each in records for _ in range(4)))
    drawbench.write_text("".join(f"prompt {number}\n" for _ in range(5) for number in range(200)))
    assert [prompt.metadata for prompt in sets.read_file(geneval)] == records
    assert texts(drawbench) == [f"prompt {number}" for number in range(200)]
    told = capsys.readouterr().err
    assert "553 prompts; 1,659 lines that repeat one are left out" in told
    assert "200 prompts; 800 lines that repeat one are left out" in told


def test_a_repeat_with_another_record_is_refused(tmp_path: Path) -> None:
    other = input_cases.RECORD | {"include": [{"class": "square", "count": 2}]}
    path = tmp_path / "p.jsonl"
    path.write_text(f"{json.dumps(input_cases.RECORD)}\n{json.dumps(other)}\n")
    with pytest.raises(
        DataError, match=r"line 2: the prompt 'a photo of a square' was .* p/00000, with other metadata"
    ):
        sets.read_file(path)


def test_marks_line_ends_and_separators(cases: Path) -> None:
    assert texts(cases / "bom_crlf.txt") == ["a photo of a red circle", "a photo of a blue square"]
    assert texts(cases / "line_separator.jsonl") == ["a red circle\u2028and a cross"]


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n \n\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
def test_what_a_prompt_file_tolerates_an_index_tolerates(tmp_path: Path, start: str, end: str) -> None:
    lines = [
        json.dumps({"prompt": f" a\u2028{letter} ", "image": f"{letter}.png"}, ensure_ascii=False) for letter in "bc"
    ]
    for name in ("images.jsonl", "p.jsonl"):
        (tmp_path / name).write_bytes((start + "\r\n".join(lines) + end).encode())
    for letter in "bc":
        Image.new("RGB", (4, 4)).save(tmp_path / f"{letter}.png")
    assert texts(tmp_path / "p.jsonl") == ["a\u2028b", "a\u2028c"]
    assert list(CaptionedImages(tmp_path).files) == ["a\u2028b", "a\u2028c"]
    assert [prompt.text for prompt in SampledImages.read(tmp_path).prompts] == ["a\u2028b", "a\u2028c"]
    (tmp_path / "p.txt").write_bytes((start + " b \r\nc" + end).encode())
    assert texts(tmp_path / "p.txt") == ["b", "c"]
    for name, reader in {"images.jsonl": CaptionedImages, "p.jsonl": sets.read_file}.items():
        (tmp_path / name).write_bytes("\n\n".join(lines).encode())
        with pytest.raises(DataError, match=f"{name}, line 2: empty; every line must hold"):
            reader(tmp_path if name == "images.jsonl" else tmp_path / name)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ GenEval records


def as_layout(line: str, folder: Path) -> None:
    """The record in GenEval's layout, with one image."""
    (folder / "00000" / "samples").mkdir(parents=True)
    (folder / "00000" / "metadata.jsonl").write_text(line)
    Image.new("RGB", (4, 4)).save(folder / "00000" / "samples" / "0000.png")


def as_index(line: str, folder: Path) -> None:
    """The record in an index of images."""
    (folder / "images.jsonl").write_text(line.replace("{", '{"image": "a.png", ', 1))
    Image.new("RGB", (4, 4)).save(folder / "a.png")


@pytest.mark.parametrize("name", REFUSED)
def test_records_are_refused_when_they_are_read(cases: Path, tmp_path: Path, name: str) -> None:
    path = cases / f"record_{name}.jsonl"
    line = path.read_text()
    layout, index = tmp_path / "layout", tmp_path / "index"
    index.mkdir()
    as_layout(line, layout)
    as_index(line, index)
    for read, where in (
        (lambda: sets.read_file(path), f"{path}, line 1: "),
        (lambda: suite.read_records(path), f"{path}, line 1: "),
        (lambda: suite.read_images(layout), f"{layout}/00000/metadata.jsonl: "),
        (lambda: SampledImages.read(layout), f"{layout}/00000/metadata.jsonl: "),
        (lambda: SampledImages.read(index), f"{index}/images.jsonl, line 1: "),
        (lambda: CaptionedImages(index), f"{index}/images.jsonl, line 1: "),
    ):
        with pytest.raises(DataError) as raised:
            read()
        assert str(raised.value).startswith(where)
        assert REFUSED[name] in str(raised.value)


@pytest.mark.parametrize("name", ["plural", "colour_unknown"])
def test_words_that_a_world_lacks_are_refused_by_its_reward(cases: Path, name: str) -> None:
    prompts = sets.read_file(cases / f"record_{name}.jsonl")
    with pytest.raises(DataError, match=r"expected a class of circle, square, .* and a color of red"):
        GenevalReward().check(prompts)


def test_exclude_null_is_no_exclude(cases: Path) -> None:
    (prompt,) = sets.read_file(cases / "record_exclude_null.jsonl")
    assert prompt.metadata == input_cases.RECORD
    GenevalReward().check([prompt])
    (scene,) = ShapesGenevalDetector().detect(np.zeros((1, 32, 32, 3), np.uint8))
    assert score_scene(prompt.metadata, scene)["geneval"] == 0


def test_null_is_as_good_as_nothing() -> None:
    value = input_cases.RECORD | {"include": [input_cases.SQUARE | {"color": None, "position": None}], "seed": None}
    assert record.read(value | {"exclude": None}, "x") == (
        input_cases.RECORD["prompt"],
        input_cases.RECORD | {"seed": None},
    )
    assert record.read({"prompt": " x ", "include": None, "tag": None}, "x") == ("x", {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"include": [input_cases.SQUARE, input_cases.SQUARE | {"position": ["inside", 0]}]}, 'got ["inside", 0]'),
        ({"include": [input_cases.SQUARE, input_cases.SQUARE | {"position": ["above", -1]}]}, 'got ["above", -1]'),
        ({"include": [input_cases.SQUARE, input_cases.SQUARE | {"position": ["above", "0"]}]}, 'got ["above", "0"]'),
        (
            {"include": [input_cases.SQUARE, input_cases.SQUARE | {"position": ["above", False]}]},
            'got ["above", false]',
        ),
        ({"include": [input_cases.SQUARE | {"count": -2}]}, "got -2"),
        ({"include": [input_cases.SQUARE | {"count": True}]}, "got true"),
        ({"include": [input_cases.SQUARE | {"class": 3}]}, '"class", got 3'),
        (
            {"include": [input_cases.SQUARE | {"colour": "red"}]},
            'include[0]: has "colour"; a clause of include has class',
        ),
        ({"include": []}, 'under "include", got []'),
        (
            {"exclude": [input_cases.SQUARE | {"color": "red"}]},
            'exclude[0]: has "color"; a clause of exclude has class',
        ),
        ({"exclude": [input_cases.SQUARE], "include": None}, '"exclude" stands beside "include", which is missing'),
        ({"tag": 3}, 'expected a non-empty text under "tag", got 3'),
        ({"tag": " "}, 'expected a non-empty text under "tag", got " "'),
    ],
)
def test_more_of_the_same_kinds(change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError) as raised:
        record.read(input_cases.RECORD | change, "p.jsonl, line 7")
    assert str(raised.value).startswith(f"p.jsonl, line 7: {SQUARE}")
    assert message in str(raised.value)


# ------------------------------------------------------------------------------------------------ images


def test_one_rule_for_images(cases: Path) -> None:
    """Against pixels that are worked out here from the ones that were written."""
    photo = input_cases.photo().astype(float)
    grey = np.repeat(photo[..., :1], 3, axis=2)
    palette = Image.open(cases / "images/palette_png/palette.png")
    colours = np.array(palette.getpalette()).reshape(-1, 3)
    raw = np.asarray(Image.open(cases / "images/exif_rotated/rotated.jpg"))
    expected = {
        "rgb_png": photo,
        "alpha_png": photo * 128 / 255 + 255 * (1 - 128 / 255),
        "deep_png": grey,
        "grey_png": grey,
        "palette_png": colours[np.asarray(palette)],
        "exif_rotated": np.rot90(raw, -1),
        "photo_jpg": np.asarray(Image.open(cases / "images/photo_jpg/photo.jpg")),
        "photo_webp": np.asarray(Image.open(cases / "images/photo_webp/photo.webp")),
    }
    prompt = Prompt("0", "a photo of a square")
    for name, pixels in expected.items():
        trained = CaptionedImages(cases / "images" / name).draw(prompt, np.random.default_rng(0))
        evaluated = SampledImages.read(cases / "images" / name).pixels(0, 0)
        assert trained.dtype == evaluated.dtype == np.uint8
        assert np.array_equal(trained, evaluated), name
        assert np.abs(trained - pixels).max() <= (1 if name == "alpha_png" else 0), name


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp", "PNG"])
def test_samples_of_genevals_layout_may_be_png_jpeg_or_webp(tmp_path: Path, suffix: str) -> None:
    as_layout(json.dumps(input_cases.RECORD), tmp_path)
    samples = tmp_path / "00000" / "samples"
    (samples / "0000.png").unlink()
    Image.new("RGB", (4, 4), "red").save(samples / f"0000.{suffix}")
    assert SampledImages.read(tmp_path).files == [[samples / f"0000.{suffix}"]]
    assert suite.read_images(tmp_path)[0].images == (samples / f"0000.{suffix}",)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "nothing", "file/below"])
def test_paths_that_lead_nowhere(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / name
    columns = {"column": "a", "tag": None, "splits": {"train": "train"}, "files": None, "revision": None}
    for read in (
        lambda: sets.load("file", path=f"{path}.txt"),
        lambda: sets.load("dataset", path=str(path), dataset=columns),
        lambda: CaptionedImages(path),
        lambda: SampledImages.read(path),
        lambda: suite.read_images(path),
        lambda: suite.read_records(path),
        lambda: read_rows(path),
    ):
        with pytest.raises(DataError):
            read()


def test_folders_of_one_prompt_are_its_images(tmp_path: Path) -> None:
    """A folder sampled from a prompt file that repeats its prompts."""
    for number in range(4):
        part = tmp_path / f"{number:05d}"
        (part / "samples").mkdir(parents=True)
        (part / "metadata.jsonl").write_text(json.dumps({"prompt": f"p{number // 2}", "tag": "x"}))
        Image.new("RGB", (4, 4)).save(part / "samples" / "0.png")
    read = SampledImages.read(tmp_path)
    assert [prompt.text for prompt in read.prompts] == ["p0", "p1"]
    assert [[file.parts[-3] for file in files] for files in read.files] == [["00000", "00001"], ["00002", "00003"]]
    (tmp_path / "00001" / "metadata.jsonl").write_text(json.dumps({"prompt": "p0", "tag": "y"}))
    with pytest.raises(DataError, match=r"00001/metadata.jsonl: other metadata than the earlier images of 'p0' have"):
        SampledImages.read(tmp_path)
