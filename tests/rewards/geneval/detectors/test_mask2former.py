"""Mask2Former as a detector: against a loop over queries and classes, and a resize, that are written here."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import Mask2FormerForUniversalSegmentation

from alignbench.errors import CheckpointError
from alignbench.rewards.geneval.detectors import mask2former
from alignbench.rewards.geneval.detectors.mask2former import Mask2FormerDetector, fitted, instances, preprocess
from alignbench.rewards.geneval.rules import Detection, confidence_threshold, keep_detections
from alignbench.rewards.geneval.suite import OBJECTS

Rows = list[tuple[str, tuple[float, ...], float, NDArray[np.bool_]]]


def pictures(count: int, height: int, width: int) -> NDArray[np.uint8]:
    """Coloured blocks, so that places differ."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (count, height // 16, width // 16, 3))
    return blocks.repeat(16, axis=1).repeat(16, axis=2).astype(np.uint8)


def enlarge(grid: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.float64]:
    """Bilinear interpolation between the centres of pixels, axis by axis; beyond the outer centres the edge's value."""
    for axis, wanted in enumerate(size):
        have = grid.shape[axis]
        places = np.clip((np.arange(wanted) + 0.5) * have / wanted - 0.5, 0, have - 1)
        low = np.floor(places).astype(int)
        high = np.minimum(low + 1, have - 1)
        share = (places - low).reshape([-1 if each == axis else 1 for each in range(2)])
        grid = grid.take(low, axis) * (1 - share) + grid.take(high, axis) * share
    return grid


def by_hand(
    classes: NDArray[np.float64], masks: NDArray[np.float64], sizes: tuple[tuple[int, int], ...], threshold: float
) -> Rows:
    """Every query with every class, one at a time in float64, best first."""
    padded, resized, original = sizes
    pairs = []
    for query, logits in enumerate(classes):
        exponentials = [math.exp(logit - max(logits)) for logit in logits]
        pairs += [(each / sum(exponentials), query, label) for label, each in enumerate(exponentials[:-1])]
    found = []
    for probability, query, label in sorted(pairs, reverse=True)[:100]:
        whole = enlarge(masks[query], padded)[: resized[0], : resized[1]]
        logits = enlarge(whole, original)
        inside = [
            (y, x, 1 / (1 + math.exp(-logits[y, x]))) for y in range(original[0]) for x in range(original[1])
            if logits[y, x] > 0
        ]  # fmt: skip
        if not inside:
            continue
        score = probability * sum(each for _, _, each in inside) / len(inside)
        ys, xs = [y for y, _, _ in inside], [x for _, x, _ in inside]
        if score > threshold:
            box = (min(xs), min(ys), max(xs) + 1, max(ys) + 1)
            found.append((OBJECTS[label], tuple(map(float, box)), score, logits > 0))
    return sorted(found, key=lambda each: -each[2])


def same(got: list[Detection], expected: Rows) -> None:
    got = sorted(got, key=lambda detection: -detection.score)
    assert [each.class_name for each in got] == [each[0] for each in expected]
    assert [each.box for each in got] == [each[1] for each in expected]
    assert [each.score for each in got] == pytest.approx([each[2] for each in expected], abs=1e-5)
    for each, (_, _, _, mask) in zip(got, expected, strict=True):
        assert each.mask is not None
        np.testing.assert_array_equal(each.mask, mask)


@pytest.fixture(scope="module")
def detector(tiny_mask2former: Path) -> Mask2FormerDetector:
    return Mask2FormerDetector(tiny_mask2former)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are looked at with 72 pixels instead of 800, which takes a moment only."""
    monkeypatch.setattr(mask2former, "SHORTER", 72)
    monkeypatch.setattr(mask2former, "LONGER", 120)


def logits(queries: int, classes: int, seed: int, size: tuple[int, int] = (6, 8)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        2 * torch.randn(queries, classes + 1, generator=generator),
        2 * torch.randn(queries, *size, generator=generator),
    )


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3])
def test_instances_are_those_of_a_loop_over_queries_and_classes(threshold: float) -> None:
    classes, masks = logits(9, 15, seed=3)  # 135 pairs: the least probable 35 are no candidates
    masks[4] = -1.0  # an empty mask
    classes[4, 2] = 9.0
    sizes = ((24, 32), (22, 29), (17, 40))
    expected = by_hand(classes.double().numpy(), masks.double().numpy(), sizes, threshold)
    assert 0 < len(expected) < 100  # 99 at threshold 0: the empty mask is among the hundred
    same(instances(classes, masks, sizes, threshold), expected)


def test_one_query_may_be_several_classes() -> None:
    classes = torch.full((1, 4), -9.0)
    classes[0, 0] = classes[0, 2] = 5.0
    found = instances(classes, torch.full((1, 4, 4), 50.0), ((8, 8), (8, 8), (8, 8)), 0.3)
    assert [each.class_name for each in found] == [OBJECTS[0], OBJECTS[2]]
    assert [each.box for each in found] == [(0.0, 0.0, 8.0, 8.0)] * 2
    assert [each.score for each in found] == pytest.approx([0.5, 0.5], abs=1e-5)


def test_no_object_is_no_class() -> None:
    classes = torch.zeros(3, 81)
    classes[:, -1] = 20.0
    assert instances(classes, torch.ones(3, 4, 4), ((8, 8), (8, 8), (8, 8)), 0.0001) == []


def test_the_score_is_probability_times_mean_mask_probability() -> None:
    """Half of the pixels with logit 1, half with logit -1: the mean is over the positive half alone."""
    masks = torch.ones(1, 2, 8)
    masks[:, :, 4:] = -1.0
    classes = torch.tensor([[math.log(3.0), 0.0]])  # probability 3 / 4
    (found,) = instances(classes, masks, ((2, 8), (2, 8), (2, 8)), 0.3)
    assert found.score == pytest.approx(0.75 / (1 + math.exp(-1)))
    assert found.box == (0.0, 0.0, 4.0, 2.0)
    assert instances(classes, masks, ((2, 8), (2, 8), (2, 8)), found.score) == []  # strictly above


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((512, 512), (800, 800)),
        ((1024, 1024), (800, 800)),
        ((480, 640), (800, 1067)),  # 1066.67
        ((640, 480), (1067, 800)),
        ((512, 1024), (667, 1333)),  # the longer side decides: 666.5
        ((100, 1000), (133, 1333)),
    ],
)
def test_size_at_which_an_image_is_looked_at(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fitted(size) == expected


@pytest.mark.parametrize(("height", "width"), [(64, 96), (96, 48), (1024, 1040)])
def test_pixel_values_are_those_of_an_8_bit_resize(height: int, width: int) -> None:
    """PIL's bilinear resize, normalised with ImageNet's statistics, zeros below and to the right."""
    (picture,) = pictures(1, height, width)
    size = fitted((height, width))
    resized = np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BILINEAR)) / 255
    shape = [math.ceil(each / 32) * 32 for each in size]
    expected = np.zeros((*shape, 3))
    expected[: size[0], : size[1]] = (resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    (got,) = preprocess(torch.from_numpy(picture[None]).permute(0, 3, 1, 2).float() / 255, size)
    np.testing.assert_allclose(got.permute(1, 2, 0).numpy(), expected, atol=1.1 / 255 / 0.224)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("height", "width"), [(32, 48), (48, 32), (48, 48)])
def test_detections_are_those_of_the_raw_model(
    detector: Mask2FormerDetector, tiny_mask2former: Path, height: int, width: int
) -> None:
    images = pictures(2, height, width)
    model = Mask2FormerForUniversalSegmentation.from_pretrained(tiny_mask2former).eval()
    size = fitted((height, width))
    pixels = preprocess(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255, size)
    with torch.no_grad():
        outputs = model(pixel_values=pixels)
    sizes = ((pixels.shape[2], pixels.shape[3]), size, (height, width))
    counts = []
    for index, found in enumerate(detector.detect(images, 0.3)):
        classes = outputs.class_queries_logits[index].double().numpy()
        expected = by_hand(classes, outputs.masks_queries_logits[index].double().numpy(), sizes, 0.3)
        same(found, expected)
        counts.append(len(expected))
    assert min(counts) > 2


@pytest.mark.usefixtures("small")
def test_a_batch_gives_what_its_images_give_alone(detector: Mask2FormerDetector) -> None:
    images = pictures(3, 64, 80)
    for found, image in zip(detector.detect(images, 0.2), images, strict=True):
        (alone,) = detector.detect(image[None], 0.2)
        alone.sort(key=lambda each: -each.score)
        same(found, [(each.class_name, each.box, each.score, each.mask) for each in alone])  # type: ignore[misc]
    assert detector.detect(images[:0]) == []


@pytest.mark.usefixtures("small")
def test_what_is_kept_for_counting_and_for_everything_else(detector: Mask2FormerDetector) -> None:
    """0.9 for counting and 0.3 otherwise; a candidate above the lower one is found for both."""
    (found,) = detector.detect(pictures(1, 64, 64), 0.3)
    for tag, threshold in (("counting", 0.9), ("colors", 0.3)):
        kept = keep_detections(found, threshold=confidence_threshold(tag))
        assert sorted(each.score for each in found if each.score > threshold) == sorted(
            each.score for of_class in kept.values() for each in of_class
        )


def test_sixteen_of_a_class_are_kept_and_overlap_may_be_forbidden() -> None:
    """Twenty queries with the same mask: 16 are kept as they are, and one where boxes may not coincide."""
    classes = torch.full((20, 81), -20.0)
    classes[:, 5] = torch.linspace(1.0, 3.0, 20)
    found = instances(classes, torch.full((20, 4, 4), 5.0), ((8, 8), (8, 8), (8, 8)), 0.3)
    kept = keep_detections(found)
    assert [len(each) for each in kept.values()] == [16]
    assert [len(each) for each in keep_detections(found, max_overlap=0.9).values()] == [1]


def test_labels_are_indices() -> None:
    """The library calls class 64 "mouse"; the benchmark knows it as a computer mouse."""
    classes = torch.full((1, 81), -20.0)
    classes[0, 64] = 5.0
    (found,) = instances(classes, torch.ones(1, 4, 4), ((8, 8), (8, 8), (8, 8)), 0.3)
    assert found.class_name == "computer mouse"


def test_another_number_of_classes_is_refused(
    tiny_mask2former: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match=r"absent.*mask2former-swin-small-coco-instance"):
        Mask2FormerDetector(tmp_path / "absent")
    monkeypatch.setattr(mask2former, "OBJECTS", OBJECTS[:79])
    with pytest.raises(CheckpointError, match="knows 80 classes: expected the 79"):
        Mask2FormerDetector(tiny_mask2former)
