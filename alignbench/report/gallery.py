"""Sample grids: the same prompts and noises before, during and after training, embedded in the page."""

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from alignbench.records import read_regular
from alignbench.report.data import BASE, TRAINED, Comparison, Evaluation, TrainingRun, legible

DURING = 4  # grids between base and final
PIXEL_ART = 512  # grids up to this width are drawn with hard pixels
LARGEST_WIDTH = 1024
QUALITY = 90  # of WebP: a quarter of the bytes of a grid of the embedded world


@dataclass(frozen=True)
class Frame:
    """One embedded grid."""

    source: str  # data URI
    width: int
    height: int
    caption: str
    alt: str
    prompts: tuple[str, ...]  # of the rows, from the top; empty where the records do not name them
    used: int | None  # share of the budget in percent; None beside training, at another guidance than the curves'

    @property
    def hard_pixels(self) -> bool:
        return self.width <= PIXEL_ART


@dataclass(frozen=True)
class Strip:
    """The grids of one run, which stands for its method."""

    label: str
    run: str
    seed: int
    frames: tuple[Frame, ...]
    missing: tuple[str, ...]  # grids that are recorded but cannot be read


def embed(content: bytes) -> tuple[str, int, int]:
    """(data URI, width, height) of a PNG, compressed so that the page stays portable.

    Raises OSError, ValueError, SyntaxError or DecompressionBombError if it is none, is damaged, or is absurdly large.
    """
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        shown = image.convert("RGB")
    shown.thumbnail((LARGEST_WIDTH, LARGEST_WIDTH * 4))
    buffer = io.BytesIO()
    shown.save(buffer, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", *shown.size


def chosen(run: TrainingRun) -> list[Evaluation]:
    """Rows with a grid: base at every guidance, evenly spaced ones during training, the last at every guidance."""
    rows = sorted(
        (row for row in run.evaluations if row.grid is not None), key=lambda row: (row.fraction, row.guidance)
    )
    base = list({row.guidance: row for row in reversed(rows) if row.weights == BASE}.values())[::-1]
    trained = [row for row in rows if row.weights == TRAINED]
    if not trained:
        return base
    end = trained[-1].fraction
    final = list({row.guidance: row for row in trained if row.fraction == end}.values())
    during = [row for row in trained if row.fraction < end and row.guidance == run.curve_guidance]
    places = np.linspace(0, len(during) - 1, min(DURING, len(during))).round().astype(int)
    return [*base, *(during[place] for place in places), *final]


def _caption(row: Evaluation) -> str:
    when = "base" if row.weights == BASE else f"{row.fraction:.0%} of the budget"
    names = (("geneval", "GenEval"), ("geneval_hf", "GenEval (hub detector)"), ("exact_scene", "exact scene"))
    scores = [f"{name} {row.metrics[key]:.3f}" for key, name in names if key in row.metrics]
    return ", ".join([when, f"guidance {row.guidance:g}", *scores])


def prompts(row: Evaluation) -> tuple[str, ...]:
    """Prompts of the grid's rows, from the top; none where the scores file does not name them or cannot be read."""
    try:
        recorded = json.loads(read_regular(row.scores)) if row.scores else {}
        return tuple(legible(str(each["prompt"])) for each in recorded.get("grid", ()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ()


def strip(run: TrainingRun) -> Strip:
    """The run's grids; those that cannot be read are named instead."""
    frames, missing = [], []
    for row in chosen(run):
        assert row.grid is not None
        try:
            source, width, height = embed(read_regular(row.grid))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            missing.append(f"{row.grid.name} cannot be read ({error})")
            continue
        caption = _caption(row)
        alt = f"Grid of sampled images, {run.label} trained on {run.reward}, seed {run.seed}: {caption}."
        used = min(100, round(100 * row.fraction)) if row.guidance == run.curve_guidance else None
        frames.append(Frame(source, width, height, caption, alt, prompts(row), used))
    return Strip(run.label, run.name, run.seed, tuple(frames), tuple(missing))


def strips(comparison: Comparison) -> Sequence[Strip]:
    """One strip a method: its finished run of the lowest seed, else its unfinished one."""
    found = []
    for label in comparison.labels:
        run = min(comparison.of(label), key=lambda run: (not run.finished, run.seed))
        shown = strip(run)
        if shown.frames or shown.missing:
            found.append(shown)
    return found
