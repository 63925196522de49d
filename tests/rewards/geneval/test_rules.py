"""The rules on hand-made detections; every expected value is worked out by hand."""

import json
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignbench.rewards.geneval import suite
from alignbench.rewards.geneval.rules import (
    Box,
    Detection,
    Record,
    Row,
    confidence_threshold,
    keep_detections,
    make_row,
    official,
    relations,
    soft,
    soft_released,
    strict,
    summarise,
)

# A busy machine is no failure.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

SQUARE = (0.0, 0.0, 10.0, 10.0)
FAR_RIGHT = (100.0, 0.0, 110.0, 10.0)


def thing(name: str, box: Box = SQUARE, score: float = 1.0) -> Detection:
    return Detection(name, box, score)


class World:
    """Detections with known colours, best first within a class; remembers what it was asked."""

    def __init__(self, *objects: tuple[str, str, Box]) -> None:
        self.found: dict[str, list[Detection]] = {}
        self.colours: dict[Detection, str] = {}
        self.asked: list[list[Detection]] = []
        for name, colour, box in objects:
            detection = thing(name, box)
            self.found.setdefault(name, []).append(detection)
            self.colours[detection] = colour

    def colour_of(self, detections: Sequence[Detection]) -> list[str]:
        self.asked.append(list(detections))
        return [self.colours[detection] for detection in detections]

    def judge(self, record: Record) -> tuple[bool, float, float]:
        arguments = (record, self.found, self.colour_of)
        return official(*arguments).correct, strict(*arguments), soft(*arguments)

    def reasons(self, record: Record) -> tuple[str, ...]:
        return official(record, self.found, self.colour_of).reasons


def world(text: str) -> World:
    """``"red dog@5, dog, green apple"``: colour (default grey), name, and left edge (default 0) of a 10 px square."""
    objects = []
    for item in filter(None, text.split(", ")):
        words, _, left = item.partition("@")
        x = float(left or 0)
        *colour, name = words.split(" ")
        objects.append((name, colour[0] if colour else "grey", (x, 0.0, x + 10, 10.0)))
    return World(*objects)


# ------------------------------------------------------------------------------------------------ relations


@pytest.mark.parametrize(
    ("box_a", "box_b", "expected"),
    [
        (SQUARE, FAR_RIGHT, {"left of"}),
        (SQUARE, (50, 50, 60, 60), {"left of", "above"}),
        ((0, 0, 100, 100), (10, 0, 110, 100), set()),
        ((0, 0, 100, 100), (30, 0, 130, 100), set()),
        ((0, 0, 100, 100), (40, 0, 140, 100), set()),  # 40 - 20 = 20 is exactly half of 40: not more than half
        ((40, 0, 140, 100), (0, 0, 100, 100), set()),
        ((0, 0, 100, 100), (0, 40, 100, 140), set()),
        ((0, 40, 100, 140), (0, 0, 100, 100), set()),
        ((0, 0, 100, 100), (41, 0, 141, 100), {"left of"}),
        ((41, 0, 141, 100), (0, 0, 100, 100), {"right of"}),
        ((0, 0, 100, 100), (0, 41, 100, 141), {"above"}),
        ((0, 41, 100, 141), (0, 0, 100, 100), {"below"}),
        ((0, 0, 100, 100), (50, 0, 150, 100), {"left of"}),
        ((0, 100, 10, 110), SQUARE, {"below"}),
        (SQUARE, SQUARE, set()),
        # offset (30, 40), length 50, equal squares of 10: shrunk to (28, 38), so (0.56, 0.76)
        ((30, 40, 40, 50), SQUARE, {"right of", "below"}),
        # offset (-30, 50), length 58.3, shrunk to (-28, 48): (-0.48, 0.82)
        ((-30, 50, -20, 60), SQUARE, {"below"}),
        # unequal sizes: widths 10 and 30 shrink 20 to 16, heights 10 and 10 shrink -20 to -18; length 28.3
        ((20, -20, 30, -10), (-10, 0, 20, 10), {"right of", "above"}),
    ],
)
def test_relations(box_a: Box, box_b: Box, expected: set[str]) -> None:
    assert relations(box_a, box_b) == expected


def test_relations_with_another_threshold() -> None:
    # Without shrinking, any horizontal offset is the whole offset.
    assert relations((0, 0, 100, 100), (10, 0, 110, 100), position_threshold=0.0) == {"left of"}
    # 0.25 of 20 leaves 5 of 10: exactly half.
    assert relations(SQUARE, (10, 0, 20, 10), position_threshold=0.25) == set()


def test_a_remainder_below_a_thousandth_is_no_offset() -> None:
    # Two points: nothing is shrunk, so the whole offset of 0.0005 remains and would otherwise be "left of".
    assert relations((0, 0, 0, 0), (0.0005, 0, 0.0005, 0)) == set()
    assert relations((0, 0, 0, 0), (0.002, 0, 0.002, 0)) == {"left of"}


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
coordinates = st.integers(0, 200)
sizes = st.integers(1, 100)
boxes = st.builds(lambda x, y, w, h: (x, y, x + w, y + h), coordinates, coordinates, sizes, sizes)


@patient
@given(boxes, boxes)
def test_relations_are_antisymmetric(box_a: Box, box_b: Box) -> None:
    forward = relations(box_a, box_b)
    assert relations(box_b, box_a) == {OPPOSITE[relation] for relation in forward}
    assert len(forward) <= 2
    assert not forward & {OPPOSITE[relation] for relation in forward}


@patient
@given(boxes, boxes, st.integers(-50, 50), st.integers(-50, 50), st.sampled_from([0.25, 0.5, 2.0, 4.0]))
def test_relations_do_not_depend_on_origin_or_scale(box_a: Box, box_b: Box, x: int, y: int, scale: float) -> None:
    # Scales are powers of two, exact in floating point.
    def moved(box: Box) -> Box:
        return (scale * (box[0] + x), scale * (box[1] + y), scale * (box[2] + x), scale * (box[3] + y))

    assert relations(moved(box_a), moved(box_b)) == relations(box_a, box_b)


# ------------------------------------------------------------------------------------------------ kept detections


def test_the_score_must_be_above_the_threshold() -> None:
    kept = keep_detections([thing("dog", score=0.3), thing("cat", score=0.300001)])
    assert list(kept) == ["cat"]


def test_counting_demands_more_confidence() -> None:
    assert confidence_threshold("counting") == 0.9
    others = [tag for tag in suite.TAGS if tag != "counting"]
    assert {confidence_threshold(tag) for tag in others} == {0.3}
    scores = [0.95, 0.9, 0.89]
    kept = keep_detections([thing("dog", score=score) for score in scores], threshold=confidence_threshold("counting"))
    assert [detection.score for detection in kept["dog"]] == [0.95]


def test_the_best_sixteen_of_each_class_are_kept_best_first() -> None:
    scores = [0.4 + 0.01 * index for index in range(20)]
    kept = keep_detections([thing(name, score=score) for score in scores for name in ("dog", "cat")])
    assert [detection.score for detection in kept["dog"]] == sorted(scores, reverse=True)[:16]
    assert len(kept["cat"]) == 16


def test_equal_scores_keep_their_order() -> None:
    detections = [thing("dog", (float(x), 0.0, x + 1.0, 1.0)) for x in (7, 3, 5)]
    assert keep_detections(detections)["dog"] == detections


def test_identical_boxes_survive_unless_suppression_is_on() -> None:
    detections = [thing("dog", score=0.8), thing("dog", score=0.9)]
    assert len(keep_detections(detections)["dog"]) == 2
    assert [kept.score for kept in keep_detections(detections, max_overlap=0.99)["dog"]] == [0.9]


def test_suppression_counts_the_last_pixel_and_drops_at_equality() -> None:
    # Widths 10 (0..9), heights 1: boxes from 0 and from 5 share 5 of 15 pixels, an IoU of one third;
    # plain widths of 9 would share 4 of 14.
    pair = [thing("dog", (0, 0, 9, 0), 0.9), thing("dog", (5, 0, 14, 0), 0.8)]
    assert len(keep_detections(pair, max_overlap=5 / 15)["dog"]) == 1
    assert len(keep_detections(pair, max_overlap=5 / 15 + 1e-9)["dog"]) == 2


def test_a_suppressed_detection_suppresses_nothing() -> None:
    # IoU of neighbours: 8 of 12 pixels; of the first and the third: 6 of 14.
    chain = [
        thing("dog", (0, 0, 9, 0), 0.9),
        thing("dog", (2, 0, 11, 0), 0.8),
        thing("dog", (4, 0, 13, 0), 0.7),
    ]
    assert [kept.score for kept in keep_detections(chain, max_overlap=0.5)["dog"]] == [0.9, 0.7]


def test_suppression_stays_within_a_class_and_after_the_first_sixteen() -> None:
    both = keep_detections([thing("dog"), thing("cat")], max_overlap=0.5)
    assert set(both) == {"dog", "cat"}
    # Sixteen copies come first, so the seventeenth, alone in its place, is cut before suppression makes room.
    crowd = [thing("dog", score=0.9)] * 16 + [thing("dog", FAR_RIGHT, 0.8)]
    assert len(keep_detections(crowd, max_overlap=0.5)["dog"]) == 1


# ------------------------------------------------------------------------------------------------ the three rules

DOG = suite.single_object("dog")
DOG_AND_CAT = suite.two_object("dog", "cat")
TWO_DOGS = suite.counting("dog", 2)
RED_DOG = suite.colors("dog", "red")
DOG_LEFT_OF_CAT = suite.position("dog", "left of", "cat")
RED_DOG_GREEN_CAT = suite.color_attr("dog", "red", "cat", "green")
TWO_RED_DOGS = {"tag": "x", "include": [suite.clause("dog", 2, colour="red")], "prompt": "two red dogs"}
RED_DOG_LEFT_OF_CAT = {
    "tag": "x",
    "include": [suite.clause("cat"), suite.clause("dog", colour="red", position=("left of", 0))],
    "prompt": "a red dog left of a cat",
}
DOG_LEFT_OF_RED_CAT = {
    "tag": "x",
    "include": [suite.clause("cat", colour="red"), suite.clause("dog", position=("left of", 0))],
    "prompt": "a dog left of a red cat",
}


@pytest.mark.parametrize(
    ("record", "objects", "expected"),
    [
        # at least one against exactly one
        (DOG, "dog", (True, 1.0, 1.0)),
        (DOG, "", (False, 0.0, 0.0)),
        (DOG, "cat", (False, 0.0, 0.0)),
        (DOG, "dog, dog", (True, 0.0, 0.0)),
        (DOG, "dog, dog, dog", (True, 0.0, -1.0)),  # 1 - |1 - 3| / 1
        (DOG, "dog, cat, cat", (True, 1.0, 1.0)),
        (DOG_AND_CAT, "dog, cat", (True, 1.0, 1.0)),
        (DOG_AND_CAT, "dog", (False, 0.0, 0.5)),
        (DOG_AND_CAT, "dog, dog, cat", (True, 0.0, 0.5)),
        # counting is exact under every rule
        (TWO_DOGS, "dog, dog", (True, 1.0, 1.0)),
        (TWO_DOGS, "dog", (False, 0.0, 0.5)),
        (TWO_DOGS, "dog, dog, dog", (False, 0.0, 0.5)),
        (TWO_DOGS, "dog, dog, dog, dog, dog", (False, 0.0, -0.5)),  # 1 - 3 / 2
        (TWO_DOGS, "", (False, 0.0, 0.0)),
        # colour: only the best of the class counts officially; strictly there must be no second one
        (RED_DOG, "red dog", (True, 1.0, 1.0)),
        (RED_DOG, "green dog", (False, 0.0, 0.5)),  # count 1, colour 0
        (RED_DOG, "red dog, green dog", (True, 0.0, 0.0)),  # count 0, and 0 for the colour not looked at
        (RED_DOG, "green dog, red dog", (False, 0.0, 0.0)),
        (RED_DOG, "", (False, 0.0, 0.0)),
        (TWO_RED_DOGS, "red dog, red dog", (True, 1.0, 1.0)),
        (TWO_RED_DOGS, "red dog, green dog", (False, 0.0, 0.75)),  # count 1, colour 1/2
        (TWO_RED_DOGS, "red dog, red dog, green dog", (True, 0.0, 0.25)),  # count 1/2, and 0
        (TWO_RED_DOGS, "red dog", (False, 0.0, 0.25)),
        # position, with the terms (cat, dog, position)
        (DOG_LEFT_OF_CAT, "dog@0, cat@100", (True, 1.0, 1.0)),
        (DOG_LEFT_OF_CAT, "dog@100, cat@0", (False, 0.0, 2 / 3)),
        (DOG_LEFT_OF_CAT, "dog@0, cat@2", (False, 0.0, 2 / 3)),
        (DOG_LEFT_OF_CAT, "dog@0", (False, 0.0, 1 / 3)),  # cat 0, dog 1, position 0: no reference
        (DOG_LEFT_OF_CAT, "cat@0", (False, 0.0, 1 / 3)),  # cat 1, dog 0, and 0
        (DOG_LEFT_OF_CAT, "", (False, 0.0, 0.0)),
        (DOG_LEFT_OF_CAT, "dog@0, dog@200, cat@100", (True, 0.0, 1 / 3)),  # cat 1, dog 0, and 0
        (DOG_LEFT_OF_CAT, "dog@200, dog@0, cat@100", (False, 0.0, 1 / 3)),
        (DOG_LEFT_OF_CAT, "dog@100, cat@200, cat@0", (True, 0.0, 1 / 3)),  # cat 0, dog 1, position 0
        # attribute binding
        (RED_DOG_GREEN_CAT, "red dog, green cat", (True, 1.0, 1.0)),
        (RED_DOG_GREEN_CAT, "green dog, red cat", (False, 0.0, 0.5)),
        (RED_DOG_GREEN_CAT, "red dog, red cat", (False, 0.0, 0.75)),
        (RED_DOG_GREEN_CAT, "red dog, green cat, red cat", (True, 0.0, 0.5)),
        # colour and position in one clause, terms (cat, dog, colour, position)
        (RED_DOG_LEFT_OF_CAT, "red dog@0, cat@100", (True, 1.0, 1.0)),
        (RED_DOG_LEFT_OF_CAT, "green dog@0, cat@100", (False, 0.0, 0.5)),
        (RED_DOG_LEFT_OF_CAT, "red dog@100, cat@0", (False, 0.0, 0.75)),
        (RED_DOG_LEFT_OF_CAT, "cat@100", (False, 0.0, 1 / 3)),  # cat 1, dog 0, and a single 0
        # a reference of the wrong colour is no reference, terms (cat, colour, dog, position)
        (DOG_LEFT_OF_RED_CAT, "dog@0, red cat@100", (True, 1.0, 1.0)),
        (DOG_LEFT_OF_RED_CAT, "dog@0, green cat@100", (False, 0.0, 0.5)),
    ],
)
def test_three_rules(record: Record, objects: str, expected: tuple[bool, float, float]) -> None:
    correct, strictly, softly = world(objects).judge(record)
    assert (correct, strictly) == expected[:2]
    assert softly == pytest.approx(expected[2], abs=1e-12)


@pytest.mark.parametrize(
    ("record", "objects", "paper", "released"),
    [
        # terms (cat, dog, position); the released code adds a 1 behind the 0 of a violated relation
        (DOG_LEFT_OF_CAT, "dog@0, cat@100", 1.0, 1.0),
        (DOG_LEFT_OF_CAT, "dog@100, cat@0", 2 / 3, 3 / 4),
        (DOG_LEFT_OF_CAT, "dog@0, cat@2", 2 / 3, 3 / 4),
        (DOG_LEFT_OF_CAT, "dog@0", 1 / 3, 1 / 3),  # no reference: a single 0
        (DOG_LEFT_OF_CAT, "cat@0", 1 / 3, 1 / 3),
        # and it asks for no position where the colour was wrong, terms (cat, dog, colour, position)
        (RED_DOG_LEFT_OF_CAT, "green dog@0, cat@100", 1 / 2, 2 / 3),
        (RED_DOG_LEFT_OF_CAT, "green dog@100, cat@0", 1 / 2, 2 / 3),
        (RED_DOG_LEFT_OF_CAT, "red dog@100, cat@0", 3 / 4, 4 / 5),
        (DOG_LEFT_OF_RED_CAT, "dog@0, green cat@100", 1 / 2, 1 / 2),
        # everywhere else the two are one
        (TWO_RED_DOGS, "red dog, green dog", 3 / 4, 3 / 4),
        (TWO_DOGS, "dog, dog, dog, dog, dog", -1 / 2, -1 / 2),
    ],
)
def test_the_released_codes_partial_credit(record: Record, objects: str, paper: float, released: float) -> None:
    scene = world(objects)
    assert soft(record, scene.found, scene.colour_of) == pytest.approx(paper, abs=1e-12)
    assert soft_released(record, scene.found, scene.colour_of) == pytest.approx(released, abs=1e-12)


def test_exclude_is_ignored_by_the_strict_rule() -> None:
    record = {"tag": "x", "include": [suite.clause("dog")], "exclude": [suite.clause("cat")], "prompt": "no cat"}
    assert world("dog, cat").judge(record) == (False, 1.0, 1.0)
    assert world("dog").judge(record) == (True, 1.0, 1.0)


def test_exclude_counts_every_kept_detection() -> None:
    assert world("dog, dog, dog, dog").reasons(TWO_DOGS) == ("expected dog<3, found 4",)


def test_the_number_found_is_capped_at_the_number_demanded() -> None:
    assert world("dog").reasons(TWO_DOGS) == ("expected dog>=2, found 1",)
    assert world("").reasons(DOG_AND_CAT) == ("expected dog>=1, found 0", "expected cat>=1, found 0")


def test_every_clause_is_judged_after_a_failure() -> None:
    # The dog is missing, the cat has the wrong colour, and there is a bird: three reasons, in this order.
    record = {**RED_DOG_GREEN_CAT, "exclude": [suite.clause("bird")]}
    reasons = world("red cat, bird").reasons(record)
    assert reasons == ("expected dog>=1, found 0", "expected green cat>=1, found red", "expected bird<1, found 1")


def test_a_missing_object_is_not_asked_for_its_colour() -> None:
    empty = world("green cat")
    empty.judge(RED_DOG)
    assert empty.asked == []


def test_only_the_demanded_number_is_asked_for_its_colour() -> None:
    three = world("red dog, red dog, green dog")
    assert official(TWO_RED_DOGS, three.found, three.colour_of).correct
    assert three.asked == [three.found["dog"][:2]]


def test_a_wrong_colour_ends_the_clause_before_its_position() -> None:
    # Wrong on both accounts, but only the colour is told.
    (reason,) = world("green dog@100, cat@0").reasons(RED_DOG_LEFT_OF_CAT)
    assert "red dog" in reason


def test_a_position_without_its_reference_names_the_reference_first() -> None:
    reasons = world("dog@0").reasons(DOG_LEFT_OF_CAT)
    assert reasons[0] == "expected cat>=1, found 0"
    assert len(reasons) == 2


def test_the_same_pixels_may_be_two_objects() -> None:
    assert world("dog@0, cat@0").judge(DOG_AND_CAT) == (True, 1.0, 1.0)


def test_a_position_holds_for_every_pair() -> None:
    record = {
        "tag": "x",
        "include": [suite.clause("cat", 2), suite.clause("dog", 2, position=("left of", 0))],
        "prompt": "two dogs left of two cats",
    }
    assert world("dog@0, dog@20, cat@100, cat@120").judge(record) == (True, 1.0, 1.0)
    # The second cat stands left of both dogs: terms cat 1, dog 1, position 0.
    assert world("dog@40, dog@60, cat@100, cat@0").judge(record) == pytest.approx((False, 0.0, 2 / 3))
    # One dog stands between the cats.
    assert world("dog@0, dog@110, cat@80, cat@140").judge(record) == pytest.approx((False, 0.0, 2 / 3))


def test_a_position_refers_to_any_earlier_clause() -> None:
    record = {
        "tag": "x",
        "include": [suite.clause("cat"), suite.clause("bird"), suite.clause("dog", position=("left of", 1))],
        "prompt": "a cat, a bird and a dog left of the bird",
    }
    assert world("cat@0, dog@50, bird@100").judge(record) == (True, 1.0, 1.0)
    assert world("bird@0, dog@50, cat@100").judge(record) == (False, 0.0, 0.75)


def test_a_diagonal_offset_satisfies_both_relations() -> None:
    diagonal = World(("dog", "grey", SQUARE), ("cat", "grey", (50.0, 50.0, 60.0, 60.0)))
    assert diagonal.judge(suite.position("dog", "left of", "cat")) == (True, 1.0, 1.0)
    assert diagonal.judge(suite.position("dog", "above", "cat")) == (True, 1.0, 1.0)


# ------------------------------------------------------------------------------------------------ properties

NAMES = ("dog", "cat", "bird")
HUES = ("red", "green")
names = st.sampled_from(NAMES)
hues = st.sampled_from(HUES)
pairs = st.permutations(NAMES).map(lambda order: order[:2])
suite_records = st.one_of(
    st.builds(suite.single_object, names),
    st.builds(lambda pair: suite.two_object(*pair), pairs),
    st.builds(suite.counting, names, st.integers(2, 4)),
    st.builds(suite.colors, names, hues),
    st.builds(
        lambda pair, relation: suite.position(pair[0], relation, pair[1]), pairs, st.sampled_from(suite.RELATIONS)
    ),
    st.builds(lambda pair, order: suite.color_attr(pair[0], order[0], pair[1], order[1]), pairs, st.permutations(HUES)),
)
worlds = st.lists(st.tuples(names, hues, boxes), max_size=8).map(lambda objects: World(*objects))


@patient
@given(suite_records, worlds)
def test_strict_implies_official_on_the_records_of_the_suite(record: Record, scene: World) -> None:
    # In general an exclude clause could contradict; in the suite it only repeats that the count is exact.
    correct, strictly, _ = scene.judge(record)
    assert correct or not strictly


@patient
@given(suite_records, worlds)
def test_strict_is_official_and_exact_counts(record: Record, scene: World) -> None:
    exact = all(len(scene.found.get(clause["class"], [])) == clause["count"] for clause in record["include"])
    correct, strictly, _ = scene.judge(record)
    assert strictly == float(correct and exact)


@patient
@given(suite_records, worlds)
def test_soft_is_one_exactly_where_strict_is(record: Record, scene: World) -> None:
    _, strictly, softly = scene.judge(record)
    assert softly <= 1.0
    assert (softly == 1.0) == (strictly == 1.0)


@patient
@given(suite_records, worlds)
def test_the_two_partial_credits_differ_on_wrong_relations_alone(record: Record, scene: World) -> None:
    paper, released = (rule(record, scene.found, scene.colour_of) for rule in (soft, soft_released))
    assert (released == 1.0) == (paper == 1.0)
    assert released >= paper
    if record["tag"] != "position":
        assert released == paper


@patient
@given(suite_records, worlds, hues, boxes, st.integers(1, 5))
def test_objects_of_other_classes_change_nothing(record: Record, scene: World, hue: str, box: Box, number: int) -> None:
    before = scene.judge(record)
    reasons = scene.reasons(record)
    extra = World(*[("horse", hue, box)] * number)
    scene.found |= extra.found
    scene.colours |= extra.colours
    assert scene.judge(record) == before
    assert scene.reasons(record) == reasons


@patient
@given(suite_records.filter(lambda record: record["tag"] != "counting"), worlds, names, hues, boxes)
def test_a_lower_ranked_extra_never_makes_an_official_image_wrong(
    record: Record, scene: World, name: str, hue: str, box: Box
) -> None:
    before = scene.judge(record)[0]
    extra = thing(name, box)
    scene.found.setdefault(name, []).append(extra)
    scene.colours[extra] = hue
    assert scene.judge(record)[0] >= before


@patient
@given(names, st.integers(2, 4), st.integers(0, 8))
def test_counting_is_equality(name: str, demanded: int, number: int) -> None:
    scene = World(*[(name, "red", SQUARE)] * number)
    correct, strictly, softly = scene.judge(suite.counting(name, demanded))
    assert correct == (strictly == 1.0) == (number == demanded)
    assert softly == pytest.approx(1 - abs(number - demanded) / demanded)


# ------------------------------------------------------------------------------------------------ aggregation


def rows_of(tag: str, results: dict[str, str]) -> list[Row]:
    """Rows from ``{"prompt": "+-"}``: an image for each sign."""
    return [
        Row(f"{prompt}/{index}.png", tag, prompt, sign == "+", "", json.dumps({"prompt": prompt}), "{}")
        for prompt, signs in results.items()
        for index, sign in enumerate(signs)
    ]


def test_the_score_is_the_mean_of_the_tags_not_of_the_images() -> None:
    rows = rows_of("counting", {"two dogs": "+---", "three dogs": "----"}) + rows_of("colors", {"a red dog": "++"})
    summary = summarise(rows)
    assert summary.images == 10
    assert summary.prompts == 3
    assert summary.correct_images == pytest.approx(3 / 10)
    assert summary.correct_prompts == pytest.approx(2 / 3)
    assert list(summary.tags) == ["counting", "colors"]
    assert (summary.tags["counting"].correct, summary.tags["counting"].images) == (1, 8)
    assert summary.tags["counting"].accuracy == pytest.approx(1 / 8)
    assert summary.score == pytest.approx((1 / 8 + 1) / 2)


def test_prompts_are_distinct_records() -> None:
    # The same record in two places is one prompt; either image may make it right.
    assert summarise(rows_of("colors", {"a": "-"}) + rows_of("colors", {"a": "+"})).correct_prompts == 1.0


@patient
@given(st.lists(st.tuples(st.sampled_from(suite.TAGS), st.booleans()), min_size=1, max_size=40))
def test_the_score_lies_between_the_worst_and_the_best_tag(results: list[tuple[str, bool]]) -> None:
    rows = [row for tag, correct in results for row in rows_of(tag, {tag: "+" if correct else "-"})]
    summary = summarise(rows)
    accuracies = [tag.accuracy for tag in summary.tags.values()]
    assert min(accuracies) - 1e-12 <= summary.score <= max(accuracies) + 1e-12
    weighted = sum(tag.accuracy * tag.images for tag in summary.tags.values()) / summary.images
    assert summary.correct_images == pytest.approx(weighted)


def test_no_rows_have_no_score() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        summarise([])


def test_a_row_holds_record_reasons_and_boxes() -> None:
    record = suite.counting("dog", 2)
    found = keep_detections([thing("dog", (1, 2, 3, 4), 0.95), thing("cat", (5, 6, 7, 8), 0.5)])
    verdict = official(record, found, lambda detections: [])
    row = make_row("00000/samples/0000.png", record, found, verdict)
    assert list(json.loads(row.to_json())) == [
        "filename",
        "tag",
        "prompt",
        "correct",
        "reason",
        "metadata",
        "details",
    ]
    assert (row.tag, row.prompt, row.correct) == ("counting", "a photo of two dogs", False)
    assert row.reason == "expected dog>=2, found 1"
    assert json.loads(row.metadata) == record
    assert json.loads(row.details) == {"dog": [[1, 2, 3, 4, 0.95]], "cat": [[5, 6, 7, 8, 0.5]]}


def test_reasons_are_joined_by_newlines() -> None:
    scene = world("")
    verdict = official(DOG_AND_CAT, scene.found, scene.colour_of)
    assert make_row("x.png", DOG_AND_CAT, scene.found, verdict).reason.split("\n") == list(verdict.reasons)
