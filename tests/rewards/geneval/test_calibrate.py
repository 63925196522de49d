"""Agreement of two scorers, counted by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from alignbench.errors import DataError
from alignbench.rewards.geneval import suite
from alignbench.rewards.geneval.calibrate import Confusion, compare, main
from alignbench.rewards.geneval.rules import Row, Verdict, make_row, read_rows, write_rows

DOG, CATS = suite.single_object("dog"), suite.counting("cat", 2)


def rows(folder: str, dog: str, cats: str) -> list[Row]:
    """One letter an image: y is correct."""
    return [
        make_row(f"{folder}/{index:05d}/samples/{image:04d}.png", record, {}, Verdict(letter == "y", ()))
        for index, (record, letters) in enumerate(((DOG, dog), (CATS, cats)))
        for image, letter in enumerate(letters)
    ]


def test_decisions_are_counted_by_tag_wherever_the_folder_lay() -> None:
    ours, official = rows("/here", "yyynn", "yn"), rows("C:\\there", "yynyn", "ny")
    result = compare(ours, official[::-1])
    assert result.tags == {"single_object": Confusion(2, 1, 1, 1), "counting": Confusion(0, 1, 1, 0)}
    assert result.tags["single_object"].agreement == pytest.approx(3 / 5)
    assert result.total == Confusion(2, 2, 2, 1)
    assert result.ours == pytest.approx((3 / 5 + 1 / 2) / 2)
    assert result.official == pytest.approx((3 / 5 + 1 / 2) / 2)


def test_the_command_prints_the_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "ours.jsonl", rows("a", "yyyn", "nn"))
    write_rows(tmp_path / "official.jsonl", rows("b", "yynn", "yn"))
    main([str(tmp_path / "ours.jsonl"), str(tmp_path / "official.jsonl")])
    text = capsys.readouterr().out
    assert "single_object       4  75.00%      2      1        0       1" in text
    assert "all images          6  66.67%      2      1        1       2" in text
    assert "ours 0.37500, official 0.50000, difference -0.12500" in text


def test_other_images_other_prompts_and_repetitions_are_refused() -> None:
    ours = rows("a", "yy", "y")
    with pytest.raises(DataError, match=r"00001/samples/0001.png and 0 more images are in one of the files only"):
        compare(ours, rows("a", "yy", "yy"))
    with pytest.raises(DataError, match="occurs twice"):
        compare([*ours, ours[0]], ours)
    with pytest.raises(DataError, match="is counting"):
        compare(ours, [*ours[:2], replace(ours[2], tag="colors")])


def test_rows_are_read_back(tmp_path: Path) -> None:
    written = rows("a", "yn", "y")
    write_rows(tmp_path / "results.jsonl", written)
    assert read_rows(tmp_path / "results.jsonl") == written
    first = json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])
    assert list(first) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert json.loads(first["metadata"]) == DOG


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("{", "line 1: not valid JSON"),
        ('{"tag": "colors"}', "line 1: expected an object with filename, tag"),
    ],
)
def test_files_that_are_no_results(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "results.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / "results.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_rows(tmp_path / "gone.jsonl")
