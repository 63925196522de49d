"""The decisions of GenEval for detected objects: official, strict and partial credit, and the score over many images.

Source: Ghosh et al. 2023, "GenEval: An Object-Focused Framework for Evaluating Text-to-Image Alignment". Partial credit
is what Flow-GRPO (arXiv 2505.05470, section 4.1) and DiffusionNFT (arXiv 2509.16117) train on; their code logs the
strict rule beside it.

The rules read the same record and the same detections and must not be mixed:

* ``official``, the only one whose mean over images may be called a GenEval score: *at least* n objects of a class;
* ``strict``: *exactly* n objects, whatever the tag;
* ``soft``, the trained reward: the strict demands with partial credit, clause by clause;
* ``soft_released``, partial credit as the released training code adds it up.

Boxes are ``(x1, y1, x2, y2)`` in pixels, y pointing down.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alignbench.errors import DataError
from alignbench.outside import read_json_lines, shown

Box = tuple[float, float, float, float]
Record = Mapping[str, Any]

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
POSITION_THRESHOLD = 0.1


@dataclass(frozen=True, eq=False)
class Detection:
    """One detected object; two detections are equal only if they are the same one.

    Attributes:
        class_name: a name of the detector's vocabulary.
        box: ``(x1, y1, x2, y2)`` in pixels.
        score: confidence in [0, 1].
        mask: bool [H, W], or None where the detector gives boxes only.
    """

    class_name: str
    box: Box
    score: float
    mask: NDArray[np.bool_] | None = None


Found = Mapping[str, Sequence[Detection]]
"""The kept detections of an image by class, best first; a class of which nothing was kept is absent."""

ColourOf = Callable[[Sequence[Detection]], list[str]]
"""The colours of some detections of one class in one image, in their order."""


@dataclass(frozen=True)
class Verdict:
    """The official decision for an image; every unmet demand is a reason."""

    correct: bool
    reasons: tuple[str, ...]


# ------------------------------------------------------------------------------------------------ detections


def confidence_threshold(tag: str) -> float:
    """Confidence that a detection must exceed: counting demands more, since there an extra object fails the image."""
    return COUNTING_THRESHOLD if tag == "counting" else THRESHOLD


def keep_detections(
    candidates: Iterable[Detection],
    *,
    threshold: float = THRESHOLD,
    max_objects: int = MAX_OBJECTS,
    max_overlap: float = 1.0,
) -> dict[str, list[Detection]]:
    """The detections of an image that count, by class and best first (ties keep the order they came in).

    Args:
        candidates: all detections of one image, of any class and in any order.
        threshold: the score must be strictly above; see :func:`confidence_threshold`.
        max_objects: how many are kept of a class, before suppression.
        max_overlap: a detection whose IoU with a better one of its class reaches this is dropped; 1.0 keeps all.
    """
    by_class: dict[str, list[Detection]] = {}
    for detection in sorted(candidates, key=lambda candidate: -candidate.score):
        if detection.score > threshold:
            by_class.setdefault(detection.class_name, []).append(detection)
    return {name: _suppress(detections[:max_objects], max_overlap) for name, detections in by_class.items()}


def _suppress(detections: Sequence[Detection], max_overlap: float) -> list[Detection]:
    if max_overlap >= 1.0:
        return list(detections)
    kept: list[Detection] = []
    for candidate in detections:
        if all(_overlap(candidate.box, better.box) < max_overlap for better in kept):
            kept.append(candidate)
    return kept


def _overlap(box_a: Box, box_b: Box) -> float:
    """Intersection over union of boxes whose last pixel belongs to them, so that a width is ``x2 - x1 + 1``."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0.0) * max(y2 - y1 + 1, 0.0)

    intersection = area(
        max(box_a[0], box_b[0]), max(box_a[1], box_b[1]), min(box_a[2], box_b[2]), min(box_a[3], box_b[3])
    )
    union = area(*box_a) + area(*box_b) - intersection
    return intersection / union if union > 0 else 0.0


# ------------------------------------------------------------------------------------------------ relations


def relations(box_a: Box, box_b: Box, position_threshold: float = POSITION_THRESHOLD) -> set[str]:
    """The relations of object A to object B: none, one or two of "left of", "right of", "above", "below".

    The offset between the centres is shrunk on each axis by ``position_threshold`` of the two sizes together; what
    remains, divided by the length of the whole offset, must exceed a half.
    """
    a = np.asarray(box_a, dtype=np.float64)
    b = np.asarray(box_b, dtype=np.float64)
    offset = (a[:2] + a[2:] - b[:2] - b[2:]) / 2
    sizes = (a[2:] - a[:2]) + (b[2:] - b[:2])
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - position_threshold * sizes, 0.0)
    if (np.abs(shrunk) < 1e-3).all():
        return set()
    dx, dy = shrunk / np.linalg.norm(offset)
    holds = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, true in holds.items() if true}


# ------------------------------------------------------------------------------------------------ decisions


@dataclass(frozen=True)
class _ClauseResult:
    """What one include clause came to.

    Attributes:
        count: number of objects found, capped at the demanded number unless counts are exact.
        matching: how many of them have the demanded colour; None where no colour was looked at.
        reason: the first unmet demand, None if there is none.
        group: the matched objects, to which later clauses may refer; None if a demand was not met.
    """

    count: int
    matching: int | None
    reason: str | None
    group: Sequence[Detection] | None


def _judge_includes(record: Record, found: Found, colour_of: ColourOf, *, exact: bool) -> list[_ClauseResult]:
    results: list[_ClauseResult] = []
    for clause in record["include"]:
        detections = found.get(clause["class"], ())
        objects = detections if exact else detections[: clause["count"]]
        results.append(_judge_clause(clause, objects, colour_of, results))
    return results


def _judge_clause(
    clause: Record, objects: Sequence[Detection], colour_of: ColourOf, earlier: Sequence[_ClauseResult]
) -> _ClauseResult:
    name, demanded, count = clause["class"], clause["count"], len(objects)
    matching = None
    if count != demanded:
        return _ClauseResult(count, None, f"expected {name}>={demanded}, found {count}", None)
    if "color" in clause:
        colours = colour_of(objects)
        matching = colours.count(clause["color"])
        if matching < demanded:
            seen = ", ".join(colours)
            return _ClauseResult(count, matching, f"expected {clause['color']} {name}>={demanded}, found {seen}", None)
    if "position" in clause:
        relation, index = clause["position"]
        reason = _violation(name, relation, objects, earlier[index].group)
        if reason is not None:
            return _ClauseResult(count, matching, reason, None)
    return _ClauseResult(count, matching, None, objects)


def _violation(
    name: str, relation: str, objects: Sequence[Detection], references: Sequence[Detection] | None
) -> str | None:
    """The first pair without the relation, as a reason; None if every object has it to every reference object."""
    if references is None:
        return f"{name} cannot be {relation} an object that was not matched"
    for thing in objects:
        for reference in references:
            held = relations(thing.box, reference.box)
            if relation not in held:
                seen = " and ".join(sorted(held)) or "neither beside nor above nor below"
                return f"expected {name} {relation} {reference.class_name}, found {seen}"
    return None


def official(record: Record, found: Found, colour_of: ColourOf) -> Verdict:
    """The decision of the GenEval benchmark: at least n objects of a class, colour and position of the n best only.

    Every clause is judged, also after a failure. An exclude clause fails the image when its class has as many kept
    detections as it names, which makes counting exact.
    """
    reasons = [
        result.reason for result in _judge_includes(record, found, colour_of, exact=False) if result.reason is not None
    ]
    for clause in record.get("exclude", ()):
        name, limit = clause["class"], clause["count"]
        count = len(found.get(name, ()))
        if count >= limit:
            reasons.append(f"expected {name}<{limit}, found {count}")
    return Verdict(correct=not reasons, reasons=tuple(reasons))


def strict(record: Record, found: Found, colour_of: ColourOf) -> float:
    """0 or 1: exactly n objects of every class, each with its colour and relation."""
    results = _judge_includes(record, found, colour_of, exact=True)
    return float(all(result.group is not None for result in results))


def soft(record: Record, found: Found, colour_of: ColourOf) -> float:
    """Partial credit: the mean over the terms of all clauses, at most 1 and 1 only where ``strict`` is 1.

    A clause for n objects gives ``1 - |n - found| / n``, which many extra objects make negative. Where the count is
    exact, a colour gives ``1 - |n - matching| / n`` and a position gives 1 or 0 (0 also if the objects or those they
    refer to were not matched); where it is not, a clause with either gives one 0 (arXiv 2505.05470, section 4.1).
    """
    return _partial_credit(record, found, colour_of, released=False)


def soft_released(record: Record, found: Found, colour_of: ColourOf) -> float:
    """Partial credit as the released code of Flow-GRPO and DiffusionNFT adds it up; see ``soft`` for what is alike.

    There a violated relation gives two terms, 0 and 1, so that a wrong relation between the right objects scores 3/4
    of a perfect picture; and a position gives no term where the colour of the same clause was wrong.
    """
    return _partial_credit(record, found, colour_of, released=True)


def _partial_credit(record: Record, found: Found, colour_of: ColourOf, *, released: bool) -> float:
    terms: list[float] = []
    results = _judge_includes(record, found, colour_of, exact=True)
    for clause, result in zip(record["include"], results, strict=True):
        demanded = clause["count"]
        terms.append(1 - abs(demanded - result.count) / demanded)
        if result.count != demanded:
            if "color" in clause or "position" in clause:
                terms.append(0.0)
            continue
        if result.matching is not None:
            terms.append(1 - abs(demanded - result.matching) / demanded)
        if "position" in clause:
            holds = result.group is not None
            if released and not holds:
                if result.matching is not None and result.matching < demanded:
                    continue
                if results[clause["position"][1]].group is not None:  # there is something to stand beside
                    terms.append(1.0)
            terms.append(float(holds))
    return sum(terms) / len(terms)


# ------------------------------------------------------------------------------------------------ aggregation


@dataclass(frozen=True)
class Row:
    """The result of one image, as a line of the result file.

    ``metadata`` is the record and ``details`` the boxes of the kept detections, both as JSON text.
    """

    filename: str
    tag: str
    prompt: str
    correct: bool
    reason: str
    metadata: str
    details: str

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def make_row(filename: str, record: Record, found: Found, verdict: Verdict) -> Row:
    """The row of one image; ``details`` holds ``[x1, y1, x2, y2, score]`` of every kept detection by class."""
    details = {name: [[*detection.box, detection.score] for detection in found[name]] for name in found}
    return Row(
        filename=filename,
        tag=record["tag"],
        prompt=record["prompt"],
        correct=verdict.correct,
        reason="\n".join(verdict.reasons),
        metadata=json.dumps(record),
        details=json.dumps(details),
    )


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes a result file, one image per line."""
    path.write_text("".join(f"{row.to_json()}\n" for row in rows), encoding="utf-8")


def read_rows(path: Path) -> list[Row]:
    """Reads a result file of ours or of the official scorer.

    Raises:
        DataError: the file cannot be read, or a line is not a result; the line is named.
    """
    return [_row(value, f"{path}, line {number}") for number, value in read_json_lines(path, "a GenEval result")]


def _row(value: object, where: str) -> Row:
    names = [each.name for each in fields(Row)]
    if not isinstance(value, dict) or any(name not in value for name in names):
        raise DataError(f"{where}: expected an object with {', '.join(names)}, got {shown(value)}")
    for name in names:
        kind = bool if name == "correct" else str
        if type(value[name]) is not kind:
            expected = "true or false" if kind is bool else "a text"
            raise DataError(f'{where}: expected {expected} under "{name}", got {shown(value[name])}')
    return Row(**{name: value[name] for name in names})


@dataclass(frozen=True)
class TagScore:
    """Correct images of a tag, out of how many."""

    correct: int
    images: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.images


@dataclass(frozen=True)
class Summary:
    """What a set of rows came to.

    Attributes:
        images: number of images.
        prompts: number of distinct records.
        correct_images: share of images that are correct.
        correct_prompts: share of prompts of which any image is correct.
        tags: the score of every tag, in the order of their first image.
    """

    images: int
    prompts: int
    correct_images: float
    correct_prompts: float
    tags: Mapping[str, TagScore]

    @property
    def score(self) -> float:
        """The GenEval score: the unweighted mean of the tags' accuracies, not the share of correct images."""
        return sum(tag.accuracy for tag in self.tags.values()) / len(self.tags)


def summarise(rows: Iterable[Row]) -> Summary:
    """Aggregates the rows of a set of images.

    Raises:
        ValueError: there is no row.
    """
    by_tag: dict[str, list[bool]] = {}
    by_prompt: dict[str, bool] = {}
    for row in rows:
        by_tag.setdefault(row.tag, []).append(row.correct)
        by_prompt[row.metadata] = by_prompt.get(row.metadata, False) or row.correct
    if not by_tag:
        raise ValueError("expected the rows of at least one image, got none")
    tags = {tag: TagScore(correct=sum(correct), images=len(correct)) for tag, correct in by_tag.items()}
    images = sum(tag.images for tag in tags.values())
    return Summary(
        images=images,
        prompts=len(by_prompt),
        correct_images=sum(tag.correct for tag in tags.values()) / images,
        correct_prompts=sum(by_prompt.values()) / len(by_prompt),
        tags=tags,
    )
