"""The model card of the generator."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from alignbench.shapes.captions import TAGS
from alignbench.shapes.pretrain.card import hashes, table
from alignbench.shapes.pretrain.evaluation import score
from alignbench.shapes.pretrain.evaluation import test_records as captions_of_the_test_split
from alignbench.shapes.render import render
from alignbench.shapes.scenes import sample_scene


def test_rendered_captions_score_one_and_the_table_says_so() -> None:
    captions = captions_of_the_test_split(4)
    rng = np.random.default_rng(0)
    scores = score(captions, render([sample_scene(record, rng) for record in captions]), guidance=1.0)
    assert scores.images == 4
    assert scores.geneval == scores.strict == scores.exact_scene == 1
    assert set(scores.tags) == set(TAGS)
    named = np.mean([sum(clause["count"] for clause in record["include"]) for record in captions])
    assert scores.objects_per_image == named
    header, rule, row = table([replace(scores, guidance=4.5)]).splitlines()
    assert header.count("|") == rule.count("|") == row.count("|") == 13
    assert row.startswith("| 4.5 | 1.000 |")


def test_empty_pictures_score_zero() -> None:
    scores = score(captions_of_the_test_split(2), np.full((12, 32, 32, 3), 24, dtype=np.uint8), guidance=1.0)
    assert scores.geneval == scores.exact_scene == scores.objects_per_image == scores.invalid_share == 0


def test_every_tag_has_equally_many_captions_of_the_test_split() -> None:
    captions = captions_of_the_test_split(5)
    assert [record["tag"] for record in captions] == [tag for tag in TAGS for _ in range(5)]


def test_hashes_are_those_of_the_weight_files(tmp_path: Path) -> None:
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "weights.safetensors").write_bytes(b"abc")
    (tmp_path / "config.json").write_text("{}")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert hashes(tmp_path) == {"vae/weights.safetensors": abc}
