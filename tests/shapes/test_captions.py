"""Grammar by hand, the held-out split by reading the captions, hard negatives by the rules of GenEval."""

import itertools
import re
from collections import Counter

import numpy as np
import pytest

from alignbench.errors import ConfigError
from alignbench.rewards.geneval.rules import Detection, official, strict
from alignbench.shapes.captions import (
    CONTROL_WORDS,
    TAGS,
    caption_of,
    held_out,
    meaning,
    near_miss,
    position,
    records,
    split,
    two_object,
)
from alignbench.shapes.degrade import WORDS
from alignbench.shapes.scenes import COLOURS, SHAPES, sample_scene

BY_PROMPT = {record["prompt"]: record for record in records()}


def test_the_world_has_460_distinct_records():
    # 4 shapes; 4 x 3 ordered pairs; 4 x 3 counts; 4 x 6; 12 pairs x 4 relations; 12 pairs x 6 x 5 colours
    assert Counter(record["tag"] for record in records()) == {
        "single_object": 4,
        "two_object": 12,
        "counting": 12,
        "colors": 24,
        "position": 48,
        "color_attr": 360,
    }
    assert len(BY_PROMPT) == 460
    assert list(dict.fromkeys(record["tag"] for record in records())) == list(TAGS)
    assert records() == records()


@pytest.mark.parametrize(
    "record",
    [
        {"tag": "single_object", "include": [{"class": "cross", "count": 1}], "prompt": "a photo of a cross"},
        {
            "tag": "two_object",
            "include": [{"class": "square", "count": 1}, {"class": "circle", "count": 1}],
            "prompt": "a photo of a square and a circle",
        },
        {
            "tag": "counting",
            "include": [{"class": "cross", "count": 3}],
            "exclude": [{"class": "cross", "count": 4}],
            "prompt": "a photo of three crosses",
        },
        {
            "tag": "colors",
            "include": [{"class": "triangle", "count": 1, "color": "yellow"}],
            "prompt": "a photo of a yellow triangle",
        },
        {
            "tag": "position",
            "include": [{"class": "cross", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}],
            "prompt": "a photo of a circle left of a cross",
        },
        {
            "tag": "color_attr",
            "include": [
                {"class": "circle", "count": 1, "color": "red"},
                {"class": "cross", "count": 1, "color": "white"},
            ],
            "prompt": "a photo of a red circle and a white cross",
        },
    ],
    ids=lambda record: record["tag"],
)
def test_records_are_those_of_geneval(record):
    ours = BY_PROMPT[record["prompt"]]
    assert ours == record
    assert list(ours) == list(record)  # the order of keys is part of the format
    assert [list(clause) for clause in ours["include"]] == [list(clause) for clause in record["include"]]


def test_captions_follow_the_grammar_in_general():
    words = {"include": [{"class": "orange", "count": 1}, {"class": "bus", "count": 1, "color": "orange"}]}
    assert caption_of({"tag": "color_attr", **words}) == "a photo of an orange and an orange bus"
    plural = {"tag": "counting", "include": [{"class": "square", "count": 4}]}
    assert caption_of(plural) == "a photo of four squares"


def test_a_meaning_is_shared_by_captions_that_say_the_same():
    assert meaning(two_object("circle", "cross")) == meaning(two_object("cross", "circle"))
    assert meaning(position("circle", "above", "cross")) == meaning(position("cross", "below", "circle"))
    assert meaning(position("circle", "above", "cross")) != meaning(position("cross", "above", "circle"))
    # 4 + 6 + 12 + 24 + 24 + 180
    assert len({meaning(record) for record in records() if record["tag"] != "single_object"}) == 246


# ------------------------------------------------------------------------------------------------ split


def texts(name, tag=None):
    return [prompt.text for prompt in split(name) if tag in (None, prompt.metadata["tag"])]


def coloured_shapes(text):
    return set(re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})", text))


def shape_pair(text):
    return frozenset(re.findall("|".join(SHAPES), text))


def relation(text):
    """A spatial relation, written so that a caption and its mirror image agree."""
    shape, word, other = re.fullmatch(r"a photo of a (\w+) (left of|right of|above|below) a (\w+)", text).groups()
    if word in ("right of", "below"):
        return other, {"right of": "left of", "below": "above"}[word], shape
    return shape, word, other


def test_sizes_of_the_splits():
    sizes = {name: Counter(prompt.metadata["tag"] for prompt in split(name)) for name in ("train", "tuning", "test")}
    order = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
    assert [sizes["train"][tag] for tag in order] == [4, 6, 12, 15, 20, 116]
    assert [sizes["tuning"][tag] for tag in order] == [4, 2, 12, 3, 4, 22]
    assert [sizes["test"][tag] for tag in order] == [4, 4, 12, 6, 24, 222]
    assert len(split("all")) == 460


def test_unseen_captions_are_disjoint_in_meaning():
    meanings = {
        name: {
            meaning(BY_PROMPT[text])
            for tag in ("two_object", "colors", "position", "color_attr")
            for text in texts(name, tag)
        }
        for name in ("train", "tuning", "test")
    }
    for a, b in itertools.combinations(meanings, 2):
        assert not meanings[a] & meanings[b]
    everything = set(texts("train")) | set(texts("tuning")) | set(texts("test"))
    assert everything == set(BY_PROMPT)


def test_an_element_that_is_held_out_is_held_out_in_every_tag():
    held_coloured = {pair for text in texts("test", "colors") for pair in coloured_shapes(text)}
    assert len(held_coloured) == 6
    assert {colour for colour, _ in held_coloured} == set(COLOURS)
    assert {shape for _, shape in held_coloured} == set(SHAPES)
    held_pairs = {shape_pair(text) for text in texts("test", "two_object")}
    assert len(held_pairs) == 2
    held_relations = {relation(text) for text in texts("test", "position")}
    assert len(held_relations) == 12  # of 24; 8 of them only because the pair of shapes is held out
    assert sum(frozenset({a, b}) in held_pairs for a, _, b in held_relations) == 8

    for name in ("train", "tuning"):
        for text in texts(name):
            assert not coloured_shapes(text) & held_coloured
            assert shape_pair(text) not in held_pairs
        assert not {relation(text) for text in texts(name, "position")} & held_relations


def test_every_unseen_test_caption_has_a_held_out_element():
    held_coloured = {pair for text in texts("test", "colors") for pair in coloured_shapes(text)}
    held_pairs = {shape_pair(text) for text in texts("test", "two_object")}
    for text in texts("test", "color_attr"):
        assert coloured_shapes(text) & held_coloured or shape_pair(text) in held_pairs
    assert all(held_out(prompt.metadata) != prompt.metadata["seen"] for prompt in split("test"))


def test_training_still_sees_every_colour_shape_and_relation():
    assert {c for text in texts("train", "colors") for c, _ in coloured_shapes(text)} == set(COLOURS)
    assert {s for text in texts("train", "colors") for _, s in coloured_shapes(text)} == set(SHAPES)
    for tag in ("two_object", "position", "color_attr"):
        assert set().union(*(shape_pair(text) for text in texts("train", tag))) == set(SHAPES)
    for word in ("left of", "right of", "above", "below"):
        assert sum(word in text for text in texts("train", "position")) >= 4


def test_prompts_carry_their_record_and_whether_training_sees_them():
    trained = set(texts("train"))
    for name in ("train", "tuning", "test", "all"):
        prompts = split(name)
        assert [prompt.id for prompt in prompts] == [f"shapes/{name}/{k:04d}" for k in range(len(prompts))]
        members = {prompt.text for prompt in prompts}
        assert [prompt.text for prompt in prompts] == [text for text in BY_PROMPT if text in members]
        for prompt in prompts:
            assert prompt.metadata == BY_PROMPT[prompt.text] | {"seen": prompt.text in trained}
    seen = {prompt.metadata["tag"] for prompt in split("test") if prompt.metadata["seen"]}
    assert seen == {"single_object", "counting"}


def test_records_can_be_changed_without_changing_the_world():
    split("train")[0].metadata["include"].clear()
    records()[0].clear()
    assert records()[0]["include"] == [{"class": "circle", "count": 1}]
    assert split("train")[0].metadata["include"] == [{"class": "circle", "count": 1}]


def test_an_unknown_split_is_named():
    with pytest.raises(ConfigError, match="train, tuning, test or all of the shapes captions, got 'validation'"):
        split("validation")


# ------------------------------------------------------------------------------------------------ hard negatives


def truth(scene):
    """What a perfect detector finds in a scene."""
    colours = {Detection(thing.shape, thing.box, 1.0): thing.colour for thing in scene}
    found = {shape: [d for d in colours if d.class_name == shape] for shape in SHAPES}
    return found, lambda detections: [colours[detection] for detection in detections]


@pytest.mark.parametrize("tag", TAGS)
def test_a_near_miss_is_a_false_record_of_the_same_tag(tag):
    rng = np.random.default_rng(0)
    for record in [record for record in records() if record["tag"] == tag]:
        scene = truth(sample_scene(record, rng))
        assert official(record, *scene).correct
        assert strict(record, *scene) == 1
        for _ in range(3):
            negative = near_miss(record, rng)
            assert negative["tag"] == tag
            assert BY_PROMPT[negative["prompt"]] == negative
            assert not official(negative, *scene).correct
            assert strict(negative, *scene) == 0


def test_near_misses_change_one_thing():
    rng = np.random.default_rng(1)

    def negatives(prompt):
        return {near_miss(BY_PROMPT[prompt], rng)["prompt"].removeprefix("a photo of ") for _ in range(400)}

    assert negatives("a photo of a cross") == {"a circle", "a square", "a triangle"}
    assert negatives("a photo of two crosses") == {
        "three crosses", "four crosses", "two circles", "two squares", "two triangles",
    }  # fmt: skip
    assert negatives("a photo of a circle left of a cross") == {
        "a circle right of a cross", "a cross left of a circle",
        "a square left of a cross", "a triangle left of a cross",
        "a circle left of a square", "a circle left of a triangle",
    }  # fmt: skip
    attribution = negatives("a photo of a red circle and a white cross")
    assert len(attribution) == 1 + 8 + 4  # swapped; either colour one of four others; either shape one of two others
    assert "a white circle and a red cross" in attribution


def test_control_words_come_in_opposites_that_the_degradations_know():
    assert len(CONTROL_WORDS["positive"]) == len(CONTROL_WORDS["negative"])
    assert set(CONTROL_WORDS["negative"]) == set(WORDS.values())
    assert not set(CONTROL_WORDS["positive"]) & set(CONTROL_WORDS["negative"])
