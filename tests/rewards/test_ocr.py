"""Visual text, with an engine that reads what the test wrote."""

import sys
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from alignbench.errors import ConfigError, DataError
from alignbench.prompts.prompt import Prompt
from alignbench.rewards.ocr import OcrScore, RapidOcr, levenshtein, likeness, quoted

SIGN = Prompt("0", 'a sign that says "Open Now", red')


class Engine:
    """Reads the text whose number is the red value of the picture."""

    def __init__(self, *texts: str) -> None:
        self.texts = texts

    def __call__(self, picture: NDArray[np.uint8]) -> str:
        assert picture.shape == (4, 6, 3)
        return self.texts[picture[0, 0, 0]]


def numbered(count: int) -> torch.Tensor:
    images = torch.zeros(count, 3, 4, 6)
    images[:, 0] = torch.arange(count).view(-1, 1, 1) / 255
    return images


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        ("Open Now", 1),
        ("OPENNOW", 1),
        ("shop: open now!", 1),  # it stands in it
        ("", 0),
        ("open no", 6 / 7),
        ("opem nov", 5 / 7),
        ("openn", 5 / 7),
        ("something else entirely", 0),  # never below 0
    ],
)
def test_scores_by_hand(read: str, expected: float) -> None:
    scores = OcrScore(Engine("x", read)).score(numbered(2)[1:], [SIGN])["reward"]
    assert scores.tolist() == pytest.approx([expected])


def test_every_image_has_its_own_prompt() -> None:
    prompts = [Prompt(str(i), f'write "{text}"') for i, text in enumerate(("ab", "cd", "ab"))]
    images = numbered(3)
    images[2, 0, 1, 1] = torch.inf
    scores = OcrScore(Engine("ab", "ab", "ab")).score(images, prompts)["reward"]
    assert scores[:2].tolist() == [1, 0]
    assert scores[2].isnan()


@given(st.text("ab", max_size=6), st.text("ab", max_size=6))
def test_the_distance_is_the_recursive_one(a: str, b: str) -> None:
    @cache
    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert levenshtein(a, b) == distance(len(a), len(b))


@given(st.text(min_size=1).filter(str.split), st.text())
def test_scores_are_between_0_and_1(wanted: str, read: str) -> None:
    assert 0 <= likeness(read, wanted) <= 1
    assert likeness(wanted, wanted) == 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('a sign that says "OPEN"', "OPEN"),
        ('"A" above "B"', "A"),  # of several the first
        ('a 5" disk that says "OPEN"', " disk that says "),  # as the released code reads it
        ("a sign that says “OPEN”, “NOW”", "OPEN"),
        ('“A” above "B", a “C”', "B"),  # these marks first, wherever they stand
        ('a 5" disk that says “OPEN”', "OPEN"),
        ("ein Schild „OFFEN“", "OFFEN"),
        ("ein Schild „OFFEN”", "OFFEN"),
        ("ein Schild »OFFEN«", "OFFEN"),
        ("une enseigne « OUVERT »", " OUVERT "),
        ("写着「你好」的牌子", "你好"),
        ("『営業中』の看板", "営業中"),
        ("＂안녕＂ 간판", "안녕"),
        ("写着'你好'的牌子", "你好"),
        ("“” and “B”", "B"),
        ("a sign that says 'OPEN'", "OPEN"),
        ("a shop's sign, the owners' pride, that says 'OPEN'", "OPEN"),
        ("it says 'it's open'", "it's open"),
        ("a '90s diner that says 'OPEN'", "OPEN"),
        ("a shop’s sign that says ‘OPEN’", "OPEN"),
        ("a sign that says 'OPEN' and “NOW”", "NOW"),  # typographic marks before single ones
    ],
)
def test_what_a_prompt_quotes(text: str, wanted: str) -> None:
    assert quoted(Prompt("0", text)) == wanted
    score = OcrScore(Engine(wanted)).score(numbered(1), [Prompt("0", text)])["reward"]
    assert score.tolist() == [1]


def test_spaces_and_composition_do_not_count() -> None:
    assert likeness("你好", "你\u3000好") == 1
    assert likeness("caf\u00e9", "CAFE\u0301") == 1
    assert likeness("한국", "\u1112\u1161\u11ab\u1100\u116e\u11a8") == 1
    assert likeness("你们", "你好") == 0.5


@pytest.mark.parametrize(
    "text", ["a sign", 'a 5" disk', 'says ""', 'says " "', "a shop's sign", "the owners' cars", "“ ”", "says '' now"]
)
def test_prompts_without_a_quoted_text_are_refused_before_any_work(text: str) -> None:
    reward = OcrScore(Engine())
    reward.check([SIGN])
    with pytest.raises(DataError, match="quotes no text"):
        reward.check([SIGN, Prompt("1", text)])


def test_the_missing_engine_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ConfigError, match=r"pip install 'alignbench\[ocr\]'"):
        OcrScore("rapidocr")


def test_the_engine_gets_blue_first(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Result:
        txts = ("OP", "EN")

    def engine(picture: NDArray[np.uint8]) -> Result:
        seen.append(picture)
        return Result()

    reader = RapidOcr.__new__(RapidOcr)
    reader._engine = engine
    picture = np.zeros((2, 3, 3), np.uint8)
    picture[..., 0] = 200  # red
    assert reader(picture) == "OPEN"
    assert seen[0][0, 0].tolist() == [0, 0, 200]
    monkeypatch.setattr(Result, "txts", None)
    assert reader(picture) == ""


def test_the_engine_itself_reads_what_is_written(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rapidocr")
    pytest.importorskip("onnxruntime")

    def written(text: str, colour: str, ground: str) -> NDArray[np.uint8]:
        picture = Image.new("RGB", (256, 256), ground)
        ImageDraw.Draw(picture).text((20, 104), text, fill=colour, font=ImageFont.load_default(40))
        return np.asarray(picture)

    pictures = [written("OPEN NOW", "red", "blue"), written("CLOSED", "black", "white"), written("", "black", "white")]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    scores = OcrScore("rapidocr").score(images, [SIGN] * 3)["reward"]
    assert scores.tolist() == [1, 0, 0]
    assert capfd.readouterr().err == ""  # nothing is said of images without text
