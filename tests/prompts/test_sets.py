"""Prompt sets: what is read, and how an iteration draws."""

import json
from collections import Counter
from pathlib import Path

import pytest

from alignbench.errors import ConfigError
from alignbench.prompts import sets
from alignbench.prompts.prompt import Prompt


def test_files_keep_order_text_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    record = {"tag": "single_object", "include": [{"class": "circle", "count": 1}], "prompt": "a photo of a circle"}
    path.write_text(json.dumps(record) + '\n{"prompt": "a dog"}\n')
    assert sets.load("file", path=str(path)) == [
        Prompt("mine/00000", "a photo of a circle", record),
        Prompt("mine/00001", "a dog", {}),
    ]
    (tmp_path / "mine.txt").write_text("a cat\n  a dog \n")
    assert [prompt.text for prompt in sets.load("file", path=str(tmp_path / "mine.txt"))] == ["a cat", "a dog"]


def test_drawing_is_distinct_repeatable_and_balanced_over_tags() -> None:
    prompts = [Prompt(f"a/{i}", f"a{i}", {"tag": "a"}) for i in range(90)] + [
        Prompt(f"b/{i}", f"b{i}", {"tag": "b"}) for i in range(10)
    ]
    drawn = [sets.draw(prompts, 4, seed=0, iteration=i) for i in range(300)]
    assert drawn[7] == sets.draw(prompts, 4, seed=0, iteration=7)
    assert drawn[7] != sets.draw(prompts, 4, seed=1, iteration=7)
    assert all(len({prompt.id for prompt in each}) == 4 for each in drawn)
    share = Counter(prompt.metadata["tag"] for each in drawn for prompt in each)["b"] / 1200
    assert 0.4 < share < 0.55  # half by tag, a tenth by count; without replacement a little below half
    uniform = [sets.draw(prompts, 4, 0, i, balance="none") for i in range(300)]
    assert Counter(p.metadata["tag"] for each in uniform for p in each)["b"] / 1200 < 0.2


def test_unknown_source() -> None:
    with pytest.raises(ConfigError, match="choose shapes or file"):
        sets.load("web")


def test_train_and_test_captions_share_no_held_out_combination() -> None:
    train, test = sets.load("shapes", "train"), sets.load("shapes", "test")
    unseen = {prompt.text for prompt in test if not prompt.metadata["seen"]}
    assert unseen
    assert not unseen & {prompt.text for prompt in train}
