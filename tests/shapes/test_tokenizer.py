"""The tokenizer of the embedded world."""

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from alignbench.shapes.captions import CONTROL_WORDS, records
from alignbench.shapes.tokenizer import MAX_LENGTH, apply_merges, build_tokenizer, caption_words


def test_every_word_of_the_captions_is_one_token() -> None:
    tokenizer = build_tokenizer()
    words = {word for record in records() for word in record["prompt"].split()}
    words |= {word for place in CONTROL_WORDS.values() for word in place}
    assert words <= set(caption_words())
    for word in words:
        assert tokenizer.tokenize(word) == [f"{word}</w>"]


def test_the_longest_text_fits_with_a_control_word() -> None:
    tokenizer = build_tokenizer()
    longest = max(len(tokenizer(f"sharp. {record['prompt']}").input_ids) for record in records())
    assert longest == 14  # begin, "sharp", ".", "a photo of a red circle and a blue square", end
    assert longest <= MAX_LENGTH == tokenizer.model_max_length


def test_different_captions_have_different_tokens() -> None:
    tokenizer = build_tokenizer()
    ids = {tuple(tokenizer(record["prompt"]).input_ids) for record in records()}
    assert len(ids) == len(records())


def test_padding_and_unknown_characters_are_the_end_token() -> None:
    ids = build_tokenizer()("a ☂", padding="max_length", max_length=MAX_LENGTH, truncation=True).input_ids
    assert len(ids) == MAX_LENGTH
    assert ids[0] == 0
    assert set(ids[2:]) == {1}


@pytest.mark.parametrize("words", [("left", "leftmost", "most"), ("most", "leftmost", "left")])
def test_a_word_stays_one_token_whatever_is_added_later(words: tuple[str, ...]) -> None:
    tokenizer = build_tokenizer(words)
    for word in words:
        assert tokenizer.tokenize(word) == [f"{word}</w>"]


def test_the_merges_agree_with_the_tokenizers_library() -> None:
    tokenizer = build_tokenizer()
    merges = {pair: rank for rank, pair in enumerate(_merges(tokenizer))}
    for word in ("squared", "photon", "reds", "zebra", "trianglesque"):
        assert tokenizer.tokenize(word) == apply_merges(word, merges)


def test_it_is_saved_and_loaded_unchanged(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    text = "sharp. a photo of four crosses"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.model_max_length == MAX_LENGTH


def _merges(tokenizer: CLIPTokenizer) -> list[tuple[str, str]]:
    import json

    stored = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    return [(first, second) for first, second in stored]
