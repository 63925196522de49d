"""GenEval of a folder of images in the benchmark's layout, by the official rules.

    python -m alignbench.rewards.geneval.evaluate IMAGES --output results.jsonl

reads ``IMAGES/00000/metadata.jsonl``, ``IMAGES/00000/samples/0000.png`` and so on, writes one line per image with the
keys of the official scorer, and prints the summary. The detector's weights are not the official ones, so the score is
called geneval_hf.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from alignbench import pictures
from alignbench.errors import AlignbenchError
from alignbench.prompts.prompt import Prompt
from alignbench.rewards.geneval.photo import CLIP, CLIP_WEIGHTS, DETECTOR, PhotoJudge, photo_record
from alignbench.rewards.geneval.rules import Row, Summary, make_row, official, summarise, write_rows
from alignbench.rewards.geneval.suite import PromptImages, read_images
from alignbench.terminal import lasting


def evaluate(folder: Path, judge: PhotoJudge) -> Iterator[Row]:
    """The rows of all images of a folder, prompt by prompt.

    Raises:
        DataError: the folder does not have the benchmark's layout, a record is not of the 80 classes, or a file is no
            image.
    """
    prompts = read_images(folder)
    for prompt in prompts:
        photo_record(Prompt(f"{folder}/{prompt.index:05d}", prompt.record["prompt"], prompt.record))
    for prompt in prompts:
        yield from _rows(prompt, judge)


def _rows(prompt: PromptImages, judge: PhotoJudge) -> Iterator[Row]:
    images = [np.array(pictures.read(path)) for path in prompt.images]
    if len({image.shape for image in images}) == 1:
        found = judge.find(np.stack(images), [prompt.record] * len(images))
    else:
        found = [judge.find(image[None], [prompt.record])[0] for image in images]
    for path, image, detections in zip(prompt.images, images, found, strict=True):
        verdict = official(prompt.record, detections, judge.colour_of(image))
        yield make_row(str(path), prompt.record, detections, verdict)


def describe(summary: Summary, name: str) -> str:
    """A summary as lines; accuracies in per cent with the numbers they come from."""
    lines = [
        f"{summary.images} images of {summary.prompts} prompts",
        f"correct images {summary.correct_images:.2%}, correct prompts {summary.correct_prompts:.2%}",
        *(f"{tag:14} {part.accuracy:.2%} ({part.correct} / {part.images})" for tag, part in summary.tags.items()),
        f"{name} score (unweighted over tags): {summary.score:.5f}",
    ]
    return "\n".join(lines)


@lasting()
def main(arguments: Sequence[str] | None = None) -> None:
    """Scores a folder of images and writes one line per image."""
    parser = argparse.ArgumentParser(prog="python -m alignbench.rewards.geneval.evaluate", description=main.__doc__)
    parser.add_argument("images", type=Path, help="folder with <index>/metadata.jsonl and <index>/samples/<number>.png")
    parser.add_argument("--output", type=Path, required=True, help="file to write, .jsonl")
    parser.add_argument("--detector", default=DETECTOR, help="folder or hub id of a Mask2Former of COCO instances")
    parser.add_argument("--clip", default=CLIP, help="open_clip model that names colours")
    parser.add_argument("--clip-weights", default=CLIP_WEIGHTS, help="its weights; none for a local-dir: model")
    options = parser.parse_args(arguments)
    weights = None if options.clip_weights == "none" else options.clip_weights
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        rows = list(evaluate(options.images, PhotoJudge(options.detector, options.clip, weights, device=device)))
        write_rows(options.output, rows)
    except (AlignbenchError, OSError) as error:
        parser.error(str(error))
    print(f"detector {options.detector}, colours {options.clip} {options.clip_weights}")
    print(describe(summarise(rows), "geneval_hf"))


if __name__ == "__main__":
    main()
