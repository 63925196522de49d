"""How far two scorers of GenEval agree on the same images.

    python -m alignbench.rewards.geneval.calibrate ours.jsonl official.jsonl

Both files have one line per image, as the official scorer and ``geneval.evaluate`` write them; images are matched by
prompt folder and file name.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from alignbench.errors import AlignbenchError, DataError
from alignbench.rewards.geneval.rules import Row, read_rows, summarise
from alignbench.terminal import lasting


@dataclass(frozen=True)
class Confusion:
    """Decisions of two scorers about the same images.

    Attributes:
        both: correct by both.
        ours: correct by ours alone.
        official: correct by the official one alone.
        neither: correct by none.
    """

    both: int
    ours: int
    official: int
    neither: int

    @property
    def images(self) -> int:
        return self.both + self.ours + self.official + self.neither

    @property
    def agreement(self) -> float:
        """Share of images on which both decide alike."""
        return (self.both + self.neither) / self.images


@dataclass(frozen=True)
class Calibration:
    """The comparison of two scorers.

    Attributes:
        tags: the decisions by tag, in the order of our file.
        ours: our GenEval score, the unweighted mean over tags.
        official: the official one.
    """

    tags: Mapping[str, Confusion]
    ours: float
    official: float

    @property
    def total(self) -> Confusion:
        """The decisions over all tags."""
        tags = self.tags.values()
        return Confusion(
            sum(tag.both for tag in tags),
            sum(tag.ours for tag in tags),
            sum(tag.official for tag in tags),
            sum(tag.neither for tag in tags),
        )


def compare(ours: Sequence[Row], official: Sequence[Row]) -> Calibration:
    """Compares the decisions of two scorers, image by image.

    Raises:
        DataError: an image is in one of them only, or twice, or its tag or prompt differs.
    """
    mine, theirs = _by_image(ours), _by_image(official)
    lonely = sorted(mine.keys() ^ theirs.keys())
    if lonely:
        raise DataError(
            f"{lonely[0]} and {len(lonely) - 1} more images are in one of the files only: "
            "score the same folder with both"
        )
    counts: dict[str, dict[tuple[bool, bool], int]] = {}
    for image, row in mine.items():
        other = theirs[image]
        if (row.tag, row.prompt) != (other.tag, other.prompt):
            raise DataError(
                f"{image} is {row.tag} {row.prompt!r} in one file and {other.tag} {other.prompt!r} in the other"
            )
        of_tag = counts.setdefault(row.tag, {})
        of_tag[row.correct, other.correct] = of_tag.get((row.correct, other.correct), 0) + 1
    tags = {
        tag: Confusion(*(of.get(pair, 0) for pair in ((True, True), (True, False), (False, True), (False, False))))
        for tag, of in counts.items()
    }
    return Calibration(tags, summarise(ours).score, summarise(official).score)


def _by_image(rows: Sequence[Row]) -> dict[str, Row]:
    """Rows by ``<index>/samples/<number>.png``, wherever the folder lay."""
    found: dict[str, Row] = {}
    for row in rows:
        image = "/".join(PurePosixPath(row.filename.replace("\\", "/")).parts[-3:])
        if image in found:
            raise DataError(f"{image} occurs twice in one file: one line per image is needed")
        found[image] = row
    return found


def table(calibration: Calibration) -> str:
    """The comparison as text."""
    lines = [f"{'tag':14} {'images':>6} {'agree':>7} {'both':>6} {'ours':>6} {'official':>8} {'neither':>7}"]
    for name, of in [*calibration.tags.items(), ("all images", calibration.total)]:
        lines.append(
            f"{name:14} {of.images:6} {of.agreement:7.2%} {of.both:6} {of.ours:6} {of.official:8} {of.neither:7}"
        )
    difference = calibration.ours - calibration.official
    lines.append(
        f"score (unweighted over tags): ours {calibration.ours:.5f}, official {calibration.official:.5f}, "
        f"difference {difference:+.5f}"
    )
    return "\n".join(lines)


@lasting()
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints how far two scorers agree, by tag."""
    parser = argparse.ArgumentParser(prog="python -m alignbench.rewards.geneval.calibrate", description=main.__doc__)
    parser.add_argument("ours", type=Path, help="rows of geneval.evaluate")
    parser.add_argument("official", type=Path, help="rows of the official scorer on the same images")
    options = parser.parse_args(arguments)
    try:
        print(table(compare(read_rows(options.ours), read_rows(options.official))))
    except AlignbenchError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
