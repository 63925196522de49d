import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alignbench.report import gallery
from alignbench.report.data import TrainingRun, load
from alignbench.report.output import Output
from alignbench.report.page import render
from tests.report.synthetic import write_run


def only(root: Path) -> TrainingRun:
    (run,) = load([root]).runs
    return run


def test_base_then_training_then_final(tmp_path: Path) -> None:
    write_run(tmp_path)
    rows = gallery.chosen(only(tmp_path))
    weights = [(row.weights, row.fraction, row.guidance) for row in rows]
    assert weights[:2] == [("base", 0.0, 1.0), ("base", 0.0, 3.0)]
    assert weights[-2:] == [("evaluation", 1.0, 1.0), ("evaluation", 1.0, 3.0)]
    during = [fraction for _, fraction, _ in weights[2:-2]]
    assert len(during) == 4
    assert during == sorted(during)
    assert during[0] > 0
    assert during[-1] < 1


def test_every_frame_says_what_it_shows(tmp_path: Path) -> None:
    write_run(tmp_path)
    strip = gallery.strip(only(tmp_path))
    first = strip.frames[0]
    assert first.caption == "base, guidance 1, GenEval 0.300, exact scene 0.200"
    assert first.alt == f"Grid of sampled images, diffusion_nft trained on geneval, seed 0: {first.caption}."
    assert (first.width, first.height, first.hard_pixels) == (136, 408, True)
    content = Image.open(io.BytesIO(base64.b64decode(first.source.removeprefix("data:image/webp;base64,"))))
    assert (content.format, content.size) == ("WEBP", (136, 408))
    file = sorted((only(tmp_path).folder / "images").iterdir())[0]
    difference = np.asarray(content.convert("RGB"), float) - np.asarray(Image.open(file).convert("RGB"), float)
    assert np.abs(difference).mean() < 4


def with_prompts(folder: Path, named: dict[int, str]) -> None:
    """Write a scores file for some evaluations: its content by the evaluation's number."""
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    for number, content in named.items():
        rows[number]["scores"] = f"scores{number}.json"
        (folder / rows[number]["scores"]).write_text(content)
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_frame_names_the_prompts_of_its_rows(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    grid = json.dumps({"grid": [{"id": "p/0", "prompt": "a red circle"}, {"id": "p/1", "prompt": "<b>"}]})
    with_prompts(folder, {0: grid, 1: grid, 2: grid})
    frames = gallery.strip(only(tmp_path)).frames
    assert frames[0].prompts == frames[1].prompts == ("a red circle", "<b>")
    assert frames[-1].prompts == ()
    output = Output(tmp_path / "report")
    page = render(load([tmp_path]), output)
    assert page.count('<ol class="prompts pixels"') == 1  # beside the first of the frames that share them
    assert '<li title="&lt;b&gt;"><span>&lt;b&gt;</span></li>' in page


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"grid": 3}', '{"grid": [{"id": "p/0"}]}', '{"grid": ["a"]}'])
def test_scores_that_name_no_prompts_leave_the_grid_as_it_is(tmp_path: Path, content: str) -> None:
    with_prompts(write_run(tmp_path), {0: content})
    frame = gallery.strip(only(tmp_path)).frames[0]
    assert frame.prompts == ()
    assert frame.width == 136


def test_a_damaged_grid_is_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    first = sorted((folder / "images").iterdir())
    first[0].write_bytes(first[0].read_bytes()[:100])
    first[1].unlink()
    strip = gallery.strip(only(tmp_path))
    assert [name.split(" ")[0] for name in strip.missing] == [first[0].name, first[1].name]
    assert len(strip.frames) == 6


def test_a_large_grid_is_embedded_smaller() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    source, width, height = gallery.embed(buffer.getvalue())
    assert source.startswith("data:image/webp;base64,")
    assert (width, height) == (1024, 768)


def test_the_strip_is_of_the_finished_run_of_the_lowest_seed(tmp_path: Path) -> None:
    write_run(tmp_path, seed=0, status="failed", until=0.5)
    write_run(tmp_path, seed=1)
    write_run(tmp_path, seed=2)
    (comparison,) = load([tmp_path]).studies[0].comparisons
    (strip,) = gallery.strips(comparison)
    assert strip.seed == 1


@pytest.mark.parametrize("until", [0.0, 0.02, 0.5])
def test_an_unfinished_run_shows_what_it_has(tmp_path: Path, until: float) -> None:
    write_run(tmp_path, status="running", until=until)
    rows = gallery.chosen(only(tmp_path))
    assert rows[0].weights == "base"
    assert rows[-1].fraction == until


def test_no_strip_without_grids(tmp_path: Path) -> None:
    write_run(tmp_path, grids=False)
    (comparison,) = load([tmp_path]).studies[0].comparisons
    assert gallery.strips(comparison) == []
