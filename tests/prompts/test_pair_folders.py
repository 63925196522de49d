"""Preference data sets on disk: Pick-a-Pic's columns, other folders, and what is wrong with one."""

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from alignbench.errors import ConfigError, DataError
from alignbench.prompts.pairs import PairFolder
from alignbench.shapes.captions import split
from alignbench.shapes.pairs import preference_pairs, write_pairs

COUNT = 60


def opened(path: Path | str | None, **settings: Any) -> PairFolder:
    """A folder with Pick-a-Pic's columns."""
    columns = {
        "split": "train",
        "caption": "caption",
        "images": ("jpg_0", "jpg_1"),
        "labels": ("label_0", "label_1"),
        "has_label": "has_label",
        "resolution": None,
        "count": None,
        "seed": 0,
    }
    return PairFolder(path=None if path is None else str(path), **columns | settings)


def png(colour: tuple[int, int, int], width: int = 8, height: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "png")
    return file.getvalue()


def saved(folder: Path, **columns: list[Any]) -> Path:
    """A data set of two pairs, red against blue, some of whose columns are replaced (None: left out)."""
    red, blue = png((255, 0, 0)), png((0, 0, 255))
    table: dict[str, Any] = {
        "caption": ["a", "b"],
        "jpg_0": [red, red],
        "jpg_1": [blue, blue],
        "label_0": [1.0, 0.0],
        "label_1": [0.0, 1.0],
        "has_label": [True, True],
    } | columns
    datasets.Dataset.from_dict({name: column for name, column in table.items() if column}).save_to_disk(str(folder))
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_rendered_pairs_are_read_back_winner_first_and_without_ties(tmp_path: Path) -> None:
    columns = preference_pairs(split("train"), COUNT, seed=2)
    write_pairs(tmp_path / "pairs", columns)
    folder = opened(tmp_path / "pairs")
    kept = [row for row in range(COUNT) if columns["kind"][row] != "tie"]
    assert 0 < len(kept) < COUNT
    assert [prompt.text for prompt in folder.prompts] == [columns["caption"][row] for row in kept]
    assert len({prompt.id for prompt in folder.prompts}) == len(folder) == len(kept)
    for index, row in enumerate(kept):
        better, worse = ("jpg_0", "jpg_1") if columns["label_0"][row] == 1 else ("jpg_1", "jpg_0")
        winner, loser = folder[index]
        assert np.array_equal(winner, columns[better][row])
        assert np.array_equal(loser, columns[worse][row])


def test_the_command_writes_the_same_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alignbench.shapes import pairs

    monkeypatch.setattr("sys.argv", ["pairs", "--output", str(tmp_path / "pairs"), "--count", "12", "--seed", "5"])
    pairs.main()
    columns = preference_pairs(split("train"), 12, seed=5)
    assert len(opened(tmp_path / "pairs")) == columns["has_label"].sum()


def test_a_saved_data_set_with_names_of_its_own(tmp_path: Path) -> None:
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    pixels[1] = 200
    table = {"text": ["x"], "one": [pixels[0].tolist()], "two": [pixels[1].tolist()], "a": [1], "b": [2]}
    datasets.DatasetDict({"other": datasets.Dataset.from_dict(table)}).save_to_disk(str(tmp_path / "set"))
    names = {"caption": "text", "images": ("one", "two"), "labels": ("a", "b"), "has_label": None, "split": "other"}
    winner, loser = opened(tmp_path / "set", **names)[0]
    assert np.array_equal(winner, pixels[1])
    assert np.array_equal(loser, pixels[0])


def test_decoded_pictures(tmp_path: Path) -> None:
    red, blue = (Image.new("RGB", (8, 8), colour) for colour in ("red", "blue"))
    features = datasets.Features({
        "caption": datasets.Value("string"), "jpg_0": datasets.Image(), "jpg_1": datasets.Image(),
        "label_0": datasets.Value("float32"), "label_1": datasets.Value("float32"), "has_label": datasets.Value("bool"),
    })  # fmt: skip
    table = {"caption": ["x"], "jpg_0": [red], "jpg_1": [blue], "label_0": [0], "label_1": [1], "has_label": [True]}
    datasets.Dataset.from_dict(table, features=features).save_to_disk(str(tmp_path / "set"))
    winner, loser = opened(tmp_path / "set")[0]
    assert winner[0, 0].tolist() == [0, 0, 255]
    assert loser[0, 0].tolist() == [255, 0, 0]


def test_larger_images_are_resized_by_their_shorter_side_and_keep_their_middle(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, :8], wide[:, 8:16] = (255, 0, 0), (0, 255, 0)  # red, green, black: the middle is green
    first, second = [wide.tolist()] * 2, [wide[:, ::-1].tolist()] * 2
    winner, _ = opened(saved(tmp_path / "set", jpg_0=first, jpg_1=second), resolution=4)[0]
    assert winner.shape == (4, 4, 3)
    assert (winner[:, 1:3] == (0, 255, 0)).all()


def test_a_share_of_the_pairs_is_drawn_by_the_seed(tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs", preference_pairs(split("train"), COUNT, seed=2))
    drawn = [[prompt.id for prompt in opened(tmp_path / "pairs", count=10, seed=seed).prompts] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 10
    assert set(drawn[0]) <= {prompt.id for prompt in opened(tmp_path / "pairs").prompts}


def test_missing_labels_are_no_winners(tmp_path: Path) -> None:
    folder = opened(saved(tmp_path / "set", label_0=[1.0, None], label_1=[0.0, 1.0]))
    assert [prompt.text for prompt in folder.prompts] == ["a"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label_1": []}, r"has no column 'label_1'; it has caption, jpg_0"),
        ({"label_0": [0.5, 0.5], "label_1": [0.5, 0.5]}, "holds 2 pairs, and none of them has a winner"),
        ({"has_label": [False, False]}, "none of them has a winner"),
        ({"jpg_0": [b"no picture"] * 2}, "row 0, jpg_0: not an image that can be read: expected PNG, JPEG or WebP"),
        ({"jpg_0": ["red.png", "red.png"]}, r"row 0, jpg_0: expected an array \[height, width, 3\]"),
        ({"jpg_0": [[[[0.5, 0.5, 0.5]]]] * 2}, "row 0, jpg_0: expected an array .* of whole numbers from 0 to 255"),
        ({"jpg_0": [[[[0, 0, 256]]]] * 2}, "got values from 0 to 256"),
        ({"label_0": ["a", "b"]}, "expected numbers in label_0, label_1, has_label"),
        ({"has_label": ["False", "False"]}, "expected numbers in label_0, label_1, has_label"),
        ({"caption": ["", "b"]}, "row 0: expected a text in 'caption', got ''"),
        ({"jpg_1": [png((0, 0, 0), 4, 8)] * 2}, "row 0: the two images have 8 x 8 and 4 x 8 pixels"),
    ],
)
def test_what_is_wrong_with_a_data_set(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    def read(path: Path) -> None:
        folder = opened(path)
        assert folder.prompts
        folder[0]

    path = saved(tmp_path / "set", **columns)
    with pytest.raises(DataError, match=message):
        read(path)


def test_images_are_never_enlarged(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"8 x 8 pixels, smaller than .*resolution=16"):
        opened(saved(tmp_path / "set"), resolution=16)[0]


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dataset\.path=FOLDER"):
        opened(None)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        opened(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="cannot be read as a data set"):
        opened(tmp_path / "empty")
    write_pairs(tmp_path / "pairs", preference_pairs(split("train"), 5, seed=0))
    with pytest.raises(DataError, match="with the split 'validation'"):
        opened(tmp_path / "pairs", split="validation")
    with pytest.raises(DataError, match=r"fewer than dataset\.count=100"):
        opened(tmp_path / "pairs", count=100)
    with pytest.raises(ConfigError, match=r"dataset\.count is 0"):
        opened(tmp_path / "pairs", count=0)
