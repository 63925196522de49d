"""The detector on scenes whose truth is known, and on images that are none."""

import numpy as np
import pytest
from scipy import ndimage

from alignbench.shapes.captions import TAGS, coloured, counting, position, records, single_object, two_object
from alignbench.shapes.detector import FoundObject, ShapesDetector, exact_scene, main, measure, recovers
from alignbench.shapes.render import render
from alignbench.shapes.scenes import BACKGROUND, COLOURS, PALETTE, SHAPES, Object, random_scene, sample_scene

AREA = {"circle": np.pi, "square": 4.0, "triangle": 2.0, "cross": 2.56}


@pytest.fixture(scope="module")
def detector():
    return ShapesDetector()


def canvas(count=1):
    return np.full((count, 32, 32, 3), BACKGROUND, dtype=np.uint8)


def blur(images, sigma):
    return np.rint(ndimage.gaussian_filter(images.astype(float), (0, sigma, sigma, 0))).astype(np.uint8)


def noise(images, deviation, rng):
    return np.clip(np.rint(images + 255 * deviation * rng.standard_normal(images.shape)), 0, 255).astype(np.uint8)


# ------------------------------------------------------------------------------------------------ rendered scenes


@pytest.mark.parametrize("disturbance", ["none", "noise", "blur", "both"])
def test_random_scenes_are_recovered(detector, disturbance):
    rng = np.random.default_rng(0)
    scenes = [random_scene(rng) for _ in range(300)]
    images = render(scenes)
    if disturbance in ("blur", "both"):
        images = blur(images, 0.6)
    if disturbance in ("noise", "both"):
        images = noise(images, 0.05, rng)
    results = zip(scenes, *detector.survey(images), strict=True)
    assert sum(not recovers(*result) for result in results) <= (0 if disturbance == "none" else 3)


@pytest.mark.parametrize("tag", TAGS)
def test_scenes_of_a_record_are_exact(detector, tag):
    rng = np.random.default_rng(1)
    chosen = [record for record in records() if record["tag"] == tag]
    chosen = [chosen[k % len(chosen)] for k in range(120)]
    found, invalid = detector.survey(render([sample_scene(record, rng) for record in chosen]))
    assert all(exact_scene(*case) for case in zip(chosen, found, invalid, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [4.0, 5.5, 7.0])
def test_an_object_is_measured(detector, shape, radius):
    (found,), (invalid,) = detector.survey(render([(Object(shape, "yellow", 14.3, 17.6, radius),)]))
    (thing,) = found
    assert invalid == 0
    assert (thing.shape, thing.colour) == (shape, "yellow")
    assert thing.x == pytest.approx(14.3, abs=0.1)
    assert thing.y == pytest.approx(17.6, abs=0.2)
    # opacity is relative to the blob's own mean, which the soft edge lowers: areas come out a little large
    assert thing.area == pytest.approx(AREA[shape] * radius**2, rel=0.08)


def test_box_and_mask_of_an_aligned_square(detector):
    ((thing,),) = detector.detect(render([(Object("square", "blue", 16.0, 12.0, 4.0),)]))
    expected = np.zeros((32, 32), dtype=bool)
    expected[8:16, 12:20] = True
    assert np.array_equal(thing.mask, expected)
    assert thing.box == (12.0, 8.0, 20.0, 16.0)
    assert (thing.x, thing.y, thing.area) == pytest.approx((16, 12, 64), abs=1e-3)


def test_objects_are_ordered_by_area_then_from_the_top_left(detector):
    scene = (
        Object("square", "red", 24.0, 24.0, 4.0),
        Object("square", "green", 8.0, 24.0, 4.0),
        Object("square", "blue", 24.0, 8.0, 4.0),
        Object("square", "white", 8.0, 8.0, 5.0),
    )
    (found,) = detector.detect(render([scene]))
    assert [thing.colour for thing in found] == ["white", "blue", "green", "red"]


def test_an_image_does_not_depend_on_its_batch(detector):
    rng = np.random.default_rng(2)
    images = noise(render([random_scene(rng) for _ in range(300)]), 0.1, rng)
    together, invalid = detector.survey(images)
    for k in (0, 127, 128, 299):
        (alone,), (alone_invalid,) = detector.survey(images[k : k + 1])
        assert alone_invalid == invalid[k]
        assert [(t.shape, t.colour, t.x, t.area) for t in alone] == [
            (t.shape, t.colour, t.x, t.area) for t in together[k]
        ]


def test_touching_objects_are_separated_by_colour(detector):
    rng = np.random.default_rng(3)
    scenes = []
    for first in COLOURS:
        for second in COLOURS:
            if first != second:
                shapes, radius = rng.choice(SHAPES, 2), rng.uniform(4, 7, 2)
                left = Object(str(shapes[0]), first, 15.6 - radius[0], 16.2, float(radius[0]))
                right = Object(str(shapes[1]), second, 15.6 + radius[1], 15.5, float(radius[1]))
                scenes.append((left, right))
    for sigma in (0, 0.5):
        results = zip(scenes, *detector.survey(blur(render(scenes), sigma)), strict=True)
        assert all(recovers(*result) for result in results)


def test_touching_squares_do_not_leave_a_blob_of_mixed_colours(detector):
    """Between a red and a green square lies a strip of up to twice seven mixed, yellowish pixels."""
    scenes = [
        (Object("square", "red", x - 7.0, 16.0, 7.0), Object("square", "green", x + 7.0, 16.0, 7.0))
        for x in np.linspace(15.5, 16.5, 9)
    ]
    for sigma in (0, 0.5, 0.8):
        results = zip(scenes, *detector.survey(blur(render(scenes), sigma)), strict=True)
        assert all(recovers(*result) for result in results)


def test_a_dim_object_is_still_found(detector):
    image = render([(Object("triangle", "green", 16.0, 16.0, 6.0),)])
    dim = np.rint(BACKGROUND + 0.6 * (image - np.array(BACKGROUND, dtype=float))).astype(np.uint8)
    ((thing,),) = detector.detect(dim)
    assert (thing.shape, thing.colour) == ("triangle", "green")


# ------------------------------------------------------------------------------------------------ other images


def test_an_empty_image_has_nothing(detector):
    assert detector.survey(canvas(3)) == ([[], [], []], [0, 0, 0])
    assert detector.survey(canvas(0)) == ([], [])


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (slice(14, 17), slice(6, 20)),  # a bar of 3 x 14
        (slice(5, 9), slice(8, 12)),  # a square of half the smallest side
        (slice(4, 28), slice(4, 28)),  # a square too large for this world
        (slice(0, 32), slice(0, 32)),  # another background
    ],
)
def test_what_is_no_object_is_invalid(detector, rows, columns):
    image = canvas()
    image[0, rows, columns] = PALETTE["purple"]
    assert detector.survey(image) == ([[]], [1])


def test_a_ring_is_invalid(detector):
    y, x = np.mgrid[:32, :32] + 0.5
    distance = np.hypot(x - 16, y - 16)
    image = canvas()
    image[0, (distance < 7) & (distance > 4.5)] = PALETTE["white"]
    assert detector.survey(image) == ([[]], [1])


def test_two_objects_of_one_colour_grown_together_are_one_invalid_blob(detector):
    scene = (Object("circle", "red", 10.0, 10.0, 5.0), Object("circle", "red", 18.0, 10.0, 5.0))
    assert detector.survey(render([scene])) == ([[]], [1])


def test_specks_are_noise(detector):
    image = render([(Object("circle", "red", 10.0, 10.0, 5.0),)])
    image[0, 24:26, 24:26] = PALETTE["green"]
    (found,), (invalid,) = detector.survey(image)
    assert len(found) == 1
    assert invalid == 0


def test_an_invalid_blob_does_not_hide_an_object(detector):
    image = render([(Object("cross", "white", 10.0, 10.0, 5.0),)])
    image[0, 26:29, 4:24] = PALETTE["blue"]
    (found,), (invalid,) = detector.survey(image)
    assert [(thing.shape, thing.colour) for thing in found] == [("cross", "white")]
    assert invalid == 1


def test_pixel_noise_hardly_ever_makes_objects(detector):
    images = np.random.default_rng(4).integers(0, 256, (100, 32, 32, 3), dtype=np.uint8)
    found, invalid = detector.survey(images)
    assert sum(map(len, found)) < 25
    assert sum(invalid) > 300


@pytest.mark.parametrize(
    "images",
    [np.zeros((1, 32, 32, 3)), np.zeros((32, 32, 3), dtype=np.uint8), np.zeros((1, 3, 32, 32), dtype=np.uint8)],
)
def test_other_arrays_are_refused(detector, images):
    with pytest.raises(ValueError, match=r"expected uint8 \[n, 32, 32, 3\], got"):
        detector.detect(images)


# ------------------------------------------------------------------------------------------------ exact scenes


def thing(shape, colour, x=16.0, y=16.0, radius=4.0):
    box = (x - radius, y - radius, x + radius, y + radius)
    return FoundObject(shape, colour, x, y, 4 * radius**2, box, np.zeros((32, 32), dtype=bool))


RED_CIRCLE, BLUE_CROSS = thing("circle", "red", x=8), thing("cross", "blue", x=24)


@pytest.mark.parametrize(
    ("record", "found", "exact"),
    [
        (single_object("circle"), [RED_CIRCLE], True),
        (single_object("circle"), [], False),
        (single_object("circle"), [BLUE_CROSS], False),
        (single_object("circle"), [RED_CIRCLE, BLUE_CROSS], False),
        (single_object("circle"), [RED_CIRCLE, RED_CIRCLE], False),
        (two_object("cross", "circle"), [RED_CIRCLE, BLUE_CROSS], True),
        (two_object("cross", "square"), [RED_CIRCLE, BLUE_CROSS], False),
        (counting("circle", 3), [RED_CIRCLE] * 3, True),
        (counting("circle", 3), [RED_CIRCLE] * 4, False),
        (counting("circle", 2), [RED_CIRCLE] * 2 + [BLUE_CROSS], False),
        (coloured("red", "circle"), [RED_CIRCLE], True),
        (coloured("green", "circle"), [RED_CIRCLE], False),
        (position("circle", "left of", "cross"), [BLUE_CROSS, RED_CIRCLE], True),
        (position("cross", "right of", "circle"), [BLUE_CROSS, RED_CIRCLE], True),
        (position("circle", "right of", "cross"), [BLUE_CROSS, RED_CIRCLE], False),
        (position("circle", "above", "cross"), [BLUE_CROSS, RED_CIRCLE], False),
        (position("circle", "left of", "cross"), [BLUE_CROSS, RED_CIRCLE, thing("square", "red", y=28)], False),
    ],
)
def test_exact_scene(record, found, exact):
    found = [thing(f.shape, f.colour, f.x, f.y) for f in found]  # detections are told apart by identity
    assert exact_scene(record, found, invalid=0) is exact
    assert exact_scene(record, found, invalid=1) is False


def test_recovery_demands_every_object_at_its_place():
    scene = (Object("circle", "red", 8.0, 16.0, 4.0), Object("cross", "blue", 24.0, 16.0, 4.0))
    assert recovers(scene, [BLUE_CROSS, RED_CIRCLE], 0)
    assert not recovers(scene, [BLUE_CROSS, RED_CIRCLE], 1)
    assert not recovers(scene, [BLUE_CROSS], 0)
    assert not recovers(scene, [BLUE_CROSS, thing("circle", "white", x=8)], 0)
    assert not recovers(scene, [BLUE_CROSS, thing("circle", "red", x=9.5)], 0)


# ------------------------------------------------------------------------------------------------ measurement


def test_measure_reports_every_tag_and_disturbance():
    rows = measure(24, seed=5)
    assert [row["images"] for row in rows][:2] == ["clean", "noise 0.05"]
    assert all(list(row) == ["images", *TAGS, "recovered", "images/s"] for row in rows)
    assert [rows[0][name] for name in (*TAGS, "recovered")] == [1.0] * 7


def test_command_line_prints_the_table(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["detector", "--scenes", "12"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["images", *TAGS, "recovered", "images/s"]
    assert lines[1].split()[:8] == ["clean"] + ["1.0000"] * 7
