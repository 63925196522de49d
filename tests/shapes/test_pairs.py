import numpy as np
import pytest

from alignbench.shapes.captions import split
from alignbench.shapes.detector import ShapesDetector, exact_scene
from alignbench.shapes.pairs import preference_pairs

COUNT = 400


@pytest.fixture(scope="module")
def pairs() -> dict[str, np.ndarray]:
    return preference_pairs(split("train"), COUNT, seed=3)


def is_exact(images: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """The detector's word on whether each picture shows its caption and nothing else."""
    detector = ShapesDetector()
    records = {prompt.text: prompt.metadata for prompt in split("train")}
    found, invalid = detector.survey(images)
    return np.array(
        [
            exact_scene(records[str(caption)], objects, rejected)
            for caption, objects, rejected in zip(captions, found, invalid, strict=True)
        ]
    )


def test_columns(pairs: dict[str, np.ndarray]) -> None:
    assert all(len(column) == COUNT for column in pairs.values())
    for name in ("jpg_0", "jpg_1"):
        assert pairs[name].shape == (COUNT, 32, 32, 3)
        assert pairs[name].dtype == np.uint8
    assert (pairs["label_0"] + pairs["label_1"] == 1).all()
    assert set(np.unique(pairs["label_0"])) == {0.0, 0.5, 1.0}
    assert np.array_equal(pairs["has_label"], pairs["label_0"] != 0.5)
    uids = [*pairs["image_0_uid"], *pairs["image_1_uid"]]
    assert len(set(uids)) == 2 * COUNT


def test_the_best_uid_is_that_of_the_label(pairs: dict[str, np.ndarray]) -> None:
    best = np.where(pairs["label_0"] == 1, pairs["image_0_uid"], pairs["image_1_uid"])
    assert np.array_equal(pairs["best_image_uid"], np.where(pairs["has_label"], best, "tie"))


def test_shares_and_sides(pairs: dict[str, np.ndarray]) -> None:
    for kind, share in (("near_miss", 0.5), ("degraded", 0.4), ("tie", 0.1)):
        assert (pairs["kind"] == kind).mean() == pytest.approx(share, abs=0.075)  # three standard errors
    assert (pairs["label_0"] == 1).sum() / pairs["has_label"].sum() == pytest.approx(0.5, abs=0.08)


def test_the_detector_agrees_with_the_labels(pairs: dict[str, np.ndarray]) -> None:
    exact_0, exact_1 = (is_exact(pairs[name], pairs["caption"]) for name in ("jpg_0", "jpg_1"))
    first = pairs["label_0"] == 1
    better, worse = np.where(first, exact_0, exact_1), np.where(first, exact_1, exact_0)
    near_miss, tie = pairs["kind"] == "near_miss", pairs["kind"] == "tie"
    assert better[pairs["has_label"]].mean() > 0.99
    assert not worse[near_miss].any()
    assert exact_0[tie].mean() > 0.97
    assert exact_1[tie].mean() > 0.97


def test_the_two_pictures_differ_and_the_seed_decides(pairs: dict[str, np.ndarray]) -> None:
    assert (pairs["jpg_0"] != pairs["jpg_1"]).any(axis=(1, 2, 3)).all()
    again = preference_pairs(split("train"), COUNT, seed=3)
    assert all(np.array_equal(pairs[name], again[name]) for name in pairs)
    other = preference_pairs(split("train"), COUNT, seed=4)
    assert not np.array_equal(pairs["jpg_0"], other["jpg_0"])
