"""An exact detector for the embedded world: pixels back to objects.

A pixel's colour is the palette colour whose direction from the background is nearest; connected pixels of one colour
are a blob. A blob's soft mask is compared with every shape of the same area at the same centroid, with sharp and with
soft edges: the best intersection over union decides the shape, and below ``ACCEPTANCE`` the blob is invalid, a thing
that is no object of this world.

Everything is vectorised over the blobs of many images. ``python -m alignbench.shapes.detector --scenes 3000`` measures
it on rendered scenes.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from scipy import ndimage

from alignbench.rewards.geneval.rules import Box, Detection, strict
from alignbench.shapes.captions import TAGS, records
from alignbench.shapes.render import coverage, half_width, render
from alignbench.shapes.scenes import BACKGROUND, COLOURS, PALETTE, SHAPES, SIZE, Scene, random_scene, sample_scene
from alignbench.terminal import lasting

ACCEPTANCE = 0.70  # intersection over union with the best shape
OPACITY = 0.45  # share of the palette colour's distance from the background from which a pixel belongs to a blob
SPECK = 6  # blobs of fewer pixels are noise
SEAM = 20  # blobs of fewer pixels that touch another one are the mixed colours of an edge between two objects

_WINDOW = 21  # side of the square in which blobs are compared; larger blobs are invalid
_HALF = _WINDOW // 2
_STEP = 0.25  # grid of the templates' radii and sub-pixel places, in pixels
_RADII = np.arange(3.0, 8.5 + _STEP / 2, _STEP, dtype=np.float32)  # MIN_RADIUS - 1 to MAX_RADIUS + 1.5
_SOFTNESS = (0.0, 0.8)  # sigma of the templates' edges in pixels: rendered, and as an autoencoder leaves them
_CHUNK = 128  # images analysed at once, so that the intermediate arrays stay in the cache

Float = NDArray[np.float32]
Index = NDArray[np.int64]
Mask = NDArray[np.bool_]
Images = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class FoundObject:
    """An object that the detector accepts.

    Attributes:
        shape, colour: names of the world.
        x, y: centre of the fitted shape's bounding box, in pixels.
        area: pixels, partly covered ones counted in part.
        box: ``(x1, y1, x2, y2)`` around the mask; the last pixel is inside.
        mask: bool [32, 32].
    """

    shape: str
    colour: str
    x: float
    y: float
    area: float
    box: Box
    mask: Mask


class ShapesDetector:
    """Finds the objects in images of the embedded world."""

    def __init__(self) -> None:
        palette = np.array([PALETTE[colour] for colour in COLOURS], dtype=np.float32)
        self._background = np.array(BACKGROUND, dtype=np.float32)
        offset = palette - self._background
        self._distance = np.linalg.norm(offset, axis=1)
        self._direction = offset / self._distance[:, None]
        self._templates = _Templates()

    def detect(self, images: Images) -> list[list[FoundObject]]:
        """The accepted objects of every image, largest first, then from the top left.

        Args:
            images: uint8 [n, 32, 32, 3].
        """
        return self.survey(images)[0]

    def survey(self, images: Images) -> tuple[list[list[FoundObject]], list[int]]:
        """The accepted objects of every image, as from :meth:`detect`, and its number of invalid blobs.

        Raises:
            ValueError: the images have another shape or type.
        """
        if images.dtype != np.uint8 or images.shape[1:] != (SIZE, SIZE, 3):
            raise ValueError(f"expected uint8 [n, {SIZE}, {SIZE}, 3], got {images.dtype} {list(images.shape)}")
        objects: list[list[FoundObject]] = []
        invalid: list[int] = []
        for start in range(0, len(images), _CHUNK):
            found, rejected = self._survey_chunk(images[start : start + _CHUNK])
            objects += found
            invalid += rejected
        return objects, invalid

    def _survey_chunk(self, images: Images) -> tuple[list[list[FoundObject]], list[int]]:
        offset = images.astype(np.float32) - self._background
        blobs = _find_blobs(self._colour_planes(offset))
        soft, seam = self._soft_masks(blobs, offset)
        area = soft.sum(axis=(1, 2))
        x, y = _centroids(soft, area)
        shape, overlap, shift = self._templates.match(soft, area, x, y)
        accepted = (overlap >= ACCEPTANCE) & ~seam & blobs.fits
        x, y = x + blobs.left, y + blobs.top + shift

        found: list[list[FoundObject]] = [[] for _ in images]
        order = np.lexsort((blobs.box[:, 0], blobs.box[:, 1], -area))
        for k in order[accepted[order]].tolist():
            found[blobs.image[k]].append(
                FoundObject(
                    shape=SHAPES[shape[k]],
                    colour=COLOURS[blobs.colour[k]],
                    x=float(x[k]),
                    y=float(y[k]),
                    area=float(area[k]),
                    box=tuple(blobs.box[k].astype(float).tolist()),
                    mask=blobs.labels[blobs.image[k]] == blobs.label[k],
                )
            )
        invalid = np.bincount(blobs.image[~accepted & ~seam], minlength=len(images))
        return found, invalid.tolist()

    def _colour_planes(self, offset: Float) -> Mask:
        """Pixels by their nearest colour, bool [colours, n, height, width]."""
        direction = self._direction[:, :, None, None, None]
        red, green, blue = np.moveaxis(offset, -1, 0)
        # not a matrix product: its rounding depends on the number of images, and so would a pixel on the threshold
        projection = direction[:, 0] * red + direction[:, 1] * green + direction[:, 2] * blue
        opaque = projection > OPACITY * self._distance[:, None, None, None]
        nearest = projection == projection.max(axis=0)  # the largest projection belongs to the smallest angle
        return np.asarray(nearest & opaque)

    def _soft_masks(self, blobs: "_Blobs", offset: Float) -> tuple[Float, Mask]:
        """Opacity of every blob in its window, with its soft edge of one pixel, and whether it is a seam.

        Opacity is relative to the blob's own, so that a dim object has the same mask as a bright one.
        """
        labels, pixels = blobs.windows(blobs.labels), blobs.windows(offset)
        own = labels == blobs.label[:, None, None]
        edge = _dilate(own) & ~own
        seam = (blobs.pixels < SEAM) & (edge & (labels > 0)).any(axis=(1, 2))
        opacity = np.einsum("bchw,bc->bhw", pixels, self._direction[blobs.colour])
        inside = opacity * own
        level = (inside**2).sum(axis=(1, 2)) / inside.sum(axis=(1, 2))
        region = own | (edge & (labels == 0))
        return np.clip(opacity / level[:, None, None], 0, 1) * region, seam


# ------------------------------------------------------------------------------------------------ blobs


@dataclass(frozen=True)
class _Blobs:
    """The blobs of a batch of images, [b] each.

    Attributes:
        labels: [n, height, width], the blob of every pixel, 0 for none.
        label: its number in ``labels``.
        image, colour: indices.
        pixels: number of pixels.
        box: [b, 4], ``(x1, y1, x2, y2)``.
        left, top: corner of the window centred at the box.
    """

    labels: NDArray[np.int32]
    label: Index
    image: Index
    colour: Index
    pixels: Index
    box: Index
    left: Index
    top: Index

    @property
    def fits(self) -> Mask:
        """Whether the window holds the blob with its soft edge."""
        sides = (self.box[:, 2:] - self.box[:, :2]).max(axis=1, initial=0)
        return np.asarray(sides <= _WINDOW - 3)

    def windows(self, array: NDArray[Any]) -> NDArray[Any]:
        """Cuts the window of every blob from [n, height, width, ...], to [b, ..., _WINDOW, _WINDOW]; 0 outside."""
        padding = [(0, 0), (_WINDOW, _WINDOW), (_WINDOW, _WINDOW)] + [(0, 0)] * (array.ndim - 3)
        views = sliding_window_view(np.pad(array, padding), (_WINDOW, _WINDOW), axis=(1, 2))
        return views[self.image, self.top + _WINDOW, self.left + _WINDOW]


def _find_blobs(planes: Mask) -> _Blobs:
    """Connected components (4 neighbours) of every plane of bool [colours, n, height, width], specks left out."""
    neighbours = np.zeros((3, 3, 3, 3), dtype=bool)
    neighbours[1, 1] = ndimage.generate_binary_structure(2, 1)
    components, count = ndimage.label(planes, structure=neighbours)
    colour, image, y, x = np.nonzero(planes)
    component = components[colour, image, y, x]
    size = np.bincount(component, minlength=count + 1)
    kept = size >= SPECK
    kept[0] = False
    number = (np.cumsum(kept) * kept)[component]  # 1, 2, ... for the kept components
    colour, image, y, x, number = (values[number > 0] for values in (colour, image, y, x, number))

    labels = np.zeros(planes.shape[1:], dtype=np.int32)
    labels[image, y, x] = number
    first = np.unique(number, return_index=True)[1]
    low, high = np.full((2, len(first), 2), [[[SIZE]], [[0]]])
    place = np.stack([x, y], axis=1)
    np.minimum.at(low, number - 1, place)
    np.maximum.at(high, number - 1, place + 1)
    left, top = ((low + high) // 2 - _HALF).T
    return _Blobs(
        labels=labels,
        label=np.arange(1, len(first) + 1),
        image=image[first],
        colour=colour[first],
        pixels=size[kept],
        box=np.concatenate([low, high], axis=1),
        left=left,
        top=top,
    )


def _dilate(masks: Mask) -> Mask:
    """Grows masks [b, height, width] by their 8 neighbours."""
    rows = masks.copy()
    rows[:, 1:] |= masks[:, :-1]
    rows[:, :-1] |= masks[:, 1:]
    grown = rows.copy()
    grown[:, :, 1:] |= rows[:, :, :-1]
    grown[:, :, :-1] |= rows[:, :, 1:]
    return grown


def _centroids(soft: Float, area: Float) -> tuple[Float, Float]:
    """x and y of soft masks [b, height, width], in pixels of their window."""
    centres = np.arange(soft.shape[1], dtype=np.float32) + np.float32(0.5)
    return (soft.sum(axis=1) * centres).sum(axis=1) / area, (soft.sum(axis=2) * centres).sum(axis=1) / area


class _Templates:
    """The shapes at every radius and sub-pixel place of a grid, drawn by the renderer itself."""

    def __init__(self) -> None:
        self._reach = 3  # pixels by which a template may lie off the window's centre
        side = _WINDOW + 2 * self._reach
        self._middle = side // 2
        places = np.arange(0, 1, _STEP, dtype=np.float32)
        radius, dy, dx = (grid.ravel() for grid in np.meshgrid(_RADII, places, places, indexing="ij"))
        sharp = np.stack([coverage(shape, self._middle + dx, self._middle + dy, radius, side) for shape in SHAPES])
        table = np.stack([ndimage.gaussian_filter(sharp, (0, 0, sigma, sigma)) for sigma in _SOFTNESS], axis=1)
        table = table.reshape(len(SHAPES), len(_SOFTNESS), len(_RADII), len(places), len(places), side, side)
        self._total = table.sum(axis=(-2, -1))
        self._views = sliding_window_view(table, (_WINDOW, _WINDOW), axis=(-2, -1))
        self._area, self._centroid = np.array([_moments(shape) for shape in SHAPES], dtype=np.float32).T

    def match(self, soft: Float, area: Float, x: Float, y: Float) -> tuple[Index, Float, Float]:
        """Compares soft masks with every shape of the same area at the same centroid.

        Args:
            soft: [b, _WINDOW, _WINDOW] in [0, 1].
            area, x, y: [b], of the soft masks.

        Returns:
            For each mask the best shape's index, its soft intersection over union, and the way from the centroid down
            to the centre of the shape's bounding box.
        """
        radius = np.sqrt(area[:, None] / self._area)  # [b, shapes]
        shift = -self._centroid * radius
        size = np.clip(np.rint((radius - _RADII[0]) / _STEP).astype(np.int64), 0, len(_RADII) - 1)
        column, dx = self._grid(np.broadcast_to(x[:, None], radius.shape))
        row, dy = self._grid(y[:, None] + shift)
        kind, softness = np.ogrid[: len(SHAPES), : len(_SOFTNESS)]
        entry = (kind, softness, size[..., None], dy[..., None], dx[..., None])
        template = self._views[(*entry, row[..., None], column[..., None])].reshape(
            *size.shape, len(_SOFTNESS), _WINDOW**2
        )
        intersection = np.minimum(soft.reshape(-1, 1, 1, _WINDOW**2), template).sum(axis=-1)
        overlap = (intersection / (area[:, None, None] + self._total[entry] - intersection)).max(axis=-1)
        best = overlap.argmax(axis=1)
        each = np.arange(len(soft))
        return best, overlap[each, best], shift[each, best]

    def _grid(self, place: Float) -> tuple[Index, Index]:
        """First row or column of the window in a template centred at a place of the window, and its sub-pixel index."""
        whole, part = np.divmod(np.rint(place / _STEP).astype(np.int64), round(1 / _STEP))
        return np.clip(self._middle - whole, 0, 2 * self._reach), part


def _moments(shape: str) -> tuple[float, float]:
    """Area and height of the centroid (positive: below the centre) of a shape of radius 1."""
    height = (np.arange(20_000, dtype=np.float64) + 0.5) / 10_000 - 1
    width = 2 * half_width(shape, height)
    return width.mean() * 2, (width * height).sum() / width.sum()


# ------------------------------------------------------------------------------------------------ the exact scene


def exact_scene(record: Mapping[str, Any], found: Sequence[FoundObject], invalid: int) -> bool:
    """Whether a record is strictly true of an image and nothing else is there.

    Args:
        record: a GenEval record.
        found: the accepted objects of the image.
        invalid: its number of invalid blobs.
    """
    if invalid or len(found) != sum(clause["count"] for clause in record["include"]):
        return False
    colours = {Detection(thing.shape, thing.box, 1.0): thing.colour for thing in found}
    by_shape: dict[str, list[Detection]] = {}
    for detection in colours:
        by_shape.setdefault(detection.class_name, []).append(detection)
    return strict(record, by_shape, lambda detections: [colours[detection] for detection in detections]) == 1.0


def recovers(scene: Scene, found: Sequence[FoundObject], invalid: int, tolerance: float = 1.0) -> bool:
    """Whether the found objects are those of a scene, each centre within a tolerance in pixels, and nothing else."""
    if invalid or len(found) != len(scene):
        return False
    return all(
        any(
            (thing.shape, thing.colour) == (candidate.shape, candidate.colour)
            and max(abs(thing.x - candidate.x), abs(thing.y - candidate.y)) <= tolerance
            for candidate in found
        )
        for thing in scene
    )


# ------------------------------------------------------------------------------------------------ measurement


def _noise(images: Images, deviation: float, rng: np.random.Generator) -> Images:
    noisy = images + 255 * deviation * rng.standard_normal(images.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def _blur(images: Images, sigma: float) -> Images:
    blurred: Float = ndimage.gaussian_filter(images.astype(np.float32), (0, sigma, sigma, 0))
    return np.rint(blurred).astype(np.uint8)


def measure(count: int, seed: int = 0) -> list[dict[str, float | str]]:
    """Accuracy on rendered scenes, clean and disturbed; one row per disturbance.

    Every tag has a sixth of ``count`` scenes of its records, judged by :func:`exact_scene`; ``recovered`` is the share
    of ``count`` random scenes of which every object is found and nothing else.
    """
    rng = np.random.default_rng(seed)
    by_tag = {tag: [record for record in records() if record["tag"] == tag] for tag in TAGS}
    prompts = [by_tag[tag][k % len(by_tag[tag])] for k in range(count // len(TAGS)) for tag in TAGS]
    scenes = [random_scene(rng) for _ in range(count)]
    prompted = render([sample_scene(record, rng) for record in prompts])
    random = render(scenes)
    disturbances: dict[str, Callable[[Images], Images]] = {
        "clean": lambda images: images,
        "noise 0.05": lambda images: _noise(images, 0.05, rng),
        "noise 0.10": lambda images: _noise(images, 0.10, rng),
        "blur 0.6": lambda images: _blur(images, 0.6),
        "blur 0.8": lambda images: _blur(images, 0.8),
        "blur 0.6, noise 0.05": lambda images: _noise(_blur(images, 0.6), 0.05, rng),
    }
    detector = ShapesDetector()
    rows: list[dict[str, float | str]] = []
    for name, disturb in disturbances.items():
        row: dict[str, float | str] = {"images": name}
        found, invalid = detector.survey(disturb(prompted))
        right = np.array([exact_scene(*case) for case in zip(prompts, found, invalid, strict=True)])
        row |= {tag: float(right[k :: len(TAGS)].mean()) for k, tag in enumerate(TAGS)}
        disturbed = disturb(random)
        start = time.process_time()
        found, invalid = detector.survey(disturbed)
        seconds = time.process_time() - start
        row["recovered"] = float(np.mean([recovers(*case) for case in zip(scenes, found, invalid, strict=True)]))
        rows.append(row | {"images/s": round(count / seconds)})
    return rows


@lasting()
def main() -> None:
    parser = argparse.ArgumentParser(description="Accuracy and speed of the shapes detector on rendered scenes.")
    parser.add_argument("--scenes", type=int, default=3000, help="rendered scenes a row, prompted and random each")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rows = measure(arguments.scenes, arguments.seed)
    print("".join(f"{name:>22}" if k == 0 else f"{name:>15}" for k, name in enumerate(rows[0])))
    for row in rows:
        name, *values = row.values()
        print(
            f"{name:>22}"
            + "".join(f"{value:>15.4f}" if isinstance(value, float) else f"{value:>15}" for value in values)
        )


if __name__ == "__main__":
    main()
