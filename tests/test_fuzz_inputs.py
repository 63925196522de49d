"""Fuzz of every reader of a user's files: nothing but an error that a user can act on leaves, in bounded time.

``INPUTS`` inputs for each reader: random bytes, files with bytes changed, and whole records of which some parts are
replaced by values of every kind. ``ALIGNBENCH_FUZZ=5000`` makes more of them.
"""

import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from alignbench import pictures
from alignbench.errors import DataError
from alignbench.prompts import record, sets
from alignbench.prompts.images import CaptionedImages
from alignbench.prompts.prompt import Prompt
from alignbench.prompts.sampled import SampledImages
from alignbench.rewards.geneval import suite
from alignbench.rewards.geneval.detectors.shapes import ShapesGenevalDetector
from alignbench.rewards.geneval.photo import photo_record
from alignbench.rewards.geneval.reward import score_scene
from alignbench.rewards.geneval.rules import make_row, official, read_rows, soft, soft_released, strict, summarise
from alignbench.rewards.ocr import OcrScore, quoted

INPUTS = int(os.environ.get("ALIGNBENCH_FUZZ", "200"))
fuzz = settings(
    max_examples=INPUTS, deadline=5_000, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)

NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 2, 2**31, 2**63, 10**30])
WORDS = st.text(max_size=8) | st.sampled_from(
    ["square", "circle", "red", "above", "left of", "inside", "colors", "counting", "\ud800", "a\u2028b", "x.png", ""]
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def spoiled(draw: st.DrawFn, whole: Any) -> Any:
    """JSON data with up to two of its parts replaced, left out or joined by others."""
    value = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(0, 2))):
        place = value
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw(st.sampled_from([*keys, "more"])) if isinstance(place, dict) else draw(st.sampled_from(keys))
            inside = place[key] if key != "more" else None
            if not (isinstance(inside, dict | list) and inside and draw(st.booleans())):
                break
            place = inside
        if draw(st.booleans()) and key != "more":
            del place[key]
        elif isinstance(place, dict) or key != "more":
            place[key] = draw(VALUES)
    return value


WHOLE = [
    suite.single_object("dog"), suite.counting("cat", 2), suite.colors("bench", "red"),
    suite.position("dog", "above", "cat"), {"prompt": "a dog"}, {"prompt": "a dog", "seed": 3, "tag": "x"},
    *(prompt.metadata for prompt in sets.load("shapes", "test")[::40]),
]  # fmt: skip
RECORDS = st.sampled_from(WHOLE).flatmap(spoiled)
ENTRIES = st.sampled_from([{"image": name, **each} for each in WHOLE for name in ("a.png", "b.jpg")]).flatmap(spoiled)
ROWS = spoiled(
    {"filename": "f", "tag": "x", "prompt": "p", "correct": True, "reason": "", "metadata": "{}", "details": "{}"}
)
ENDS = st.sampled_from([b"\n", b"\r\n", b"\n\n", b"", "\u2028".encode(), b"\r"])


@st.composite
def changed(draw: st.DrawFn, whole: bytes) -> bytes:
    """Some bytes replaced, left out or put in."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        content[place : place + draw(st.integers(0, 6))] = draw(st.binary(max_size=6))
    return bytes(content[: draw(st.just(len(content)) | st.integers(0, len(content)))])


def files(lines: st.SearchStrategy[Any]) -> st.SearchStrategy[bytes]:
    """Files of such lines, whole, changed or of random bytes."""

    @st.composite
    def made(draw: st.DrawFn) -> bytes:
        content = draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
        for value in draw(st.lists(lines, max_size=4)):
            text = json.dumps(value, ensure_ascii=draw(st.booleans())) if not isinstance(value, bytes) else ""
            content += (value if isinstance(value, bytes) else text.encode("utf-8", "surrogatepass")) + draw(ENDS)
        return content

    return made() | made().flatmap(changed) | st.binary(max_size=200)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
        image.save(path / "a.png")
        image.save(path / "b.jpg")
        yield path


def accepted(read: Callable[[], Any]) -> Any:
    """What was read; None where it was refused in one short sentence."""
    try:
        return read()
    except DataError as error:
        told = str(error)
    assert len(told) < 1_500
    assert "\n" not in told
    return None


@fuzz
@given(content=files(st.binary(max_size=40) | WORDS.map(lambda word: word.encode("utf-8", "surrogatepass"))))
def test_prompt_files_of_text(folder: Path, content: bytes) -> None:
    (folder / "p.txt").write_bytes(content)
    for prompt in accepted(lambda: sets.read_file(folder / "p.txt")) or ():
        assert prompt.text == prompt.text.strip() != ""
        assert not prompt.metadata


@fuzz
@given(content=files(RECORDS))
def test_prompt_files_of_json(folder: Path, content: bytes) -> None:
    (folder / "p.jsonl").write_bytes(content)
    for prompt in accepted(lambda: sets.read_file(folder / "p.jsonl")) or ():
        assert prompt.text == prompt.text.strip() != ""
        json.dumps(prompt.metadata, allow_nan=False).encode()


@fuzz
@given(content=files(ENTRIES))
def test_indices_of_training_images(folder: Path, content: bytes) -> None:
    (folder / "images.jsonl").write_bytes(content)
    images = accepted(lambda: CaptionedImages(folder))
    for text in images.files if images else ():
        accepted(lambda text=text: images.draw(Prompt("0", text), np.random.default_rng(0)))


@fuzz
@given(content=files(ENTRIES))
def test_indices_of_evaluated_images(folder: Path, content: bytes) -> None:
    (folder / "images.jsonl").write_bytes(content)
    images = accepted(lambda: SampledImages.read(folder))
    if images:
        assert images.pixels(0, 0).shape == (8, 8, 3)


@fuzz
@given(content=files(RECORDS))
def test_folders_in_genevals_layout(folder: Path, content: bytes) -> None:
    part = folder / "layout" / "00000"
    (part / "samples").mkdir(parents=True, exist_ok=True)
    (part / "samples" / "0.png").write_bytes((folder / "a.png").read_bytes())
    (part / "metadata.jsonl").write_bytes(content)
    accepted(lambda: SampledImages.read(folder / "layout"))
    accepted(lambda: suite.read_images(folder / "layout"))


@fuzz
@given(value=RECORDS)
def test_records_that_are_read_can_be_judged(value: Any) -> None:
    """Every rule runs through every record that the schema lets pass, in an empty picture and in one with objects."""
    read = accepted(lambda: record.read(value, "x"))
    if read is None or not read[1].get("include"):
        return
    metadata = read[1] | {"tag": "x"}
    pixels = np.zeros((2, 32, 32, 3), np.uint8)
    pixels[1, 4:12, 4:12, 0] = 255
    for scene in ShapesGenevalDetector().detect(pixels):
        scores = score_scene(metadata, scene)
        assert all(np.isfinite(score) for score in scores.values())
        for rule in (strict, soft, soft_released):
            assert rule(metadata, scene.found, scene.colour_of) <= 1
        json.loads(make_row("f", metadata, scene.found, official(metadata, scene.found, scene.colour_of)).to_json())
    accepted(lambda: photo_record(Prompt("0", read[0], metadata)))


@fuzz
@given(content=files(RECORDS))
def test_genevals_own_files(folder: Path, content: bytes) -> None:
    (folder / "records.jsonl").write_bytes(content)
    for each in accepted(lambda: suite.read_records(folder / "records.jsonl")) or ():
        assert each["tag"]
        assert each["include"]


@fuzz
@given(content=files(ROWS))
def test_result_rows(folder: Path, content: bytes) -> None:
    (folder / "rows.jsonl").write_bytes(content)
    rows = accepted(lambda: read_rows(folder / "rows.jsonl"))
    if rows:
        assert summarise(rows).images == len(rows)


def samples() -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 4), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    found = []
    for image in (
        Image.fromarray(pixels), Image.fromarray(pixels[..., :3]).quantize(5), Image.fromarray(pixels[..., 0]),
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), Image.fromarray(pixels[..., :3]),
    ):  # fmt: skip
        for kind in ("png", "jpeg", "webp"):
            if kind == "png" or image.mode == "RGB":
                file = io.BytesIO()
                image.save(file, kind, exif=exif)
                found.append(file.getvalue())
    return found


@fuzz
@given(content=st.sampled_from(samples()).flatmap(changed) | st.binary(max_size=100))
def test_pictures(folder: Path, content: bytes) -> None:
    (folder / "picture").write_bytes(content)
    size = accepted(lambda: pictures.size(folder / "picture"))
    picture = accepted(lambda: pictures.read(folder / "picture"))
    if picture:
        assert picture.mode == "RGB"
        assert size is not None


@fuzz
@given(text=st.text(alphabet="ab 好'\"“”„«»「」‘’＂\n", max_size=60) | st.text(max_size=2_000))
def test_quotations(text: str) -> None:
    if accepted(lambda: quoted(Prompt("0", text))):
        assert (
            0
            <= OcrScore(lambda picture: text[::-1]).score(torch.zeros(1, 3, 4, 4), [Prompt("0", text)])["reward"].item()
            <= 1
        )
