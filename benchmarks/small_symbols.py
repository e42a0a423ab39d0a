"""Data sets of symbols, different in kind from the shapes.

    python benchmarks/small_symbols.py symbols FOLDER

`symbols`: 200 images of 128 pixels over a gradient or noise, each with 3 to 8 of twelve symbols of 8 to 20 pixels,
turned by up to 15 degrees. The classes stay apart when an image is mirrored.

`crowded`: 200 images of 320 pixels with 20 to 120 symbols of 8 to 40 pixels among clutter, which may cover each other
partly. Of the six classes each is 2.2 times as rare as the one before, the last 50 times as rare as the first.

`few`: 120 images of 160 pixels, 10 of each of the twelve classes, with 1 to 4 symbols of 16 to 64 pixels among clutter.
"""

import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from hf_detr.data.shapes import Drawing, write_drawn_dataset

MAX_TILT = math.radians(15)
MIN_CONTRAST = 110  # of a symbol to the background's mean, in the channel where they differ most
OVERSAMPLING = 4

Outline = list[tuple[float, float]]
Box = tuple[float, float, float, float]


def _rectangle(left: float, top: float, right: float, bottom: float) -> Outline:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _arc(radius: float, start: float, end: float, corners: int = 32) -> Outline:
    """Along a circle, angles in degrees, clockwise from the right."""
    angles = np.radians(np.linspace(start, end, corners))
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _star() -> Outline:
    angles = [math.pi * (k / 5 - 0.5) for k in range(10)]
    radii = [1.0, 0.42] * 5
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle, radius in zip(angles, radii, strict=True)]


# Each symbol is the union of its outlines within [-1, 1], y downwards; of the ring, the second one is the hole.
PLUS = [_rectangle(-1, -0.28, 1, 0.28), _rectangle(-0.28, -1, 0.28, 1)]
SYMBOLS: dict[str, list[Outline]] = {
    "plus": PLUS,
    "cross": [[((x - y) * 0.76, (x + y) * 0.76) for x, y in outline] for outline in PLUS],
    "ring": [_arc(1, 0, 360), _arc(0.52, 0, 360)],
    "arrow": [_rectangle(-1, -0.2, 0.2, 0.2), [(0.05, -0.75), (1, 0), (0.05, 0.75)]],
    "star": [_star()],
    "bar": [_rectangle(-1, -0.3, 1, 0.3)],
    "L": [_rectangle(-0.7, -1, -0.15, 1), _rectangle(-0.7, 0.45, 0.7, 1)],
    "T": [_rectangle(-0.9, -1, 0.9, -0.45), _rectangle(-0.28, -1, 0.28, 1)],
    "U": [_rectangle(-0.85, -1, -0.3, 1), _rectangle(0.3, -1, 0.85, 1), _rectangle(-0.85, 0.45, 0.85, 1)],
    "half disc": [[(x, y + 0.5) for x, y in _arc(1, 180, 360)]],
    "diamond": [[(0, -1), (0.72, 0), (0, 1), (-0.72, 0)]],
    "chevron": [[(-1, -0.2), (0, 0.8), (1, -0.2), (1, -0.9), (0, 0.1), (-1, -0.9)]],
}
CLASSES = tuple(SYMBOLS)


@dataclass(frozen=True)
class Scene:
    """What a data set shows.

    Args:
        side: of the images, in pixels.
        sizes: of the longer side of a symbol before it is turned, in pixels.
        counts: of symbols in an image, from and to.
        max_overlap: of the smaller of two boxes.
        classes: how many of `CLASSES` occur.
        rarity: how many times each class is as rare as the one before.
        clutter: pieces without meaning in an image, up to.
        one_class: an image has symbols of one class only.
    """

    description: str
    side: int
    sizes: tuple[float, float]
    counts: tuple[int, int]
    images: tuple[int, int]
    max_overlap: float = 0.05
    classes: int = len(CLASSES)
    rarity: float = 1.0
    clutter: int = 0
    one_class: bool = False


SCENES = {
    "symbols": Scene("hf_detr small symbols", 128, (8.0, 20.0), (3, 8), (200, 200)),
    "crowded": Scene(
        "hf_detr crowded symbols", 320, (8.0, 40.0), (20, 120), (200, 100), max_overlap=0.3, classes=6,
        rarity=50 ** (1 / 5), clutter=60,
    ),
    "few": Scene("hf_detr few symbols", 160, (16.0, 64.0), (1, 4), (120, 120), clutter=12, one_class=True),
}  # fmt: skip


def draw_symbols_dataset(
    folder: str | Path,
    scene: str = "symbols",
    *,
    num_train: int | None = None,
    num_val: int | None = None,
    seed: int = 0,
) -> Path:
    """Like `draw_shapes_dataset`, as PNG: JPEG would blur the colours of symbols this small."""
    chosen = SCENES[scene]
    return write_drawn_dataset(
        folder, partial(draw_symbols_image, scene=chosen), CLASSES[: chosen.classes], chosen.description,
        num_train=num_train or chosen.images[0], num_val=num_val or chosen.images[1], seed=seed, progress=False,
        file_type="png",
    )  # fmt: skip


def draw_symbols_image(rng: np.random.Generator, scene: Scene = SCENES["symbols"]) -> Drawing:
    """One image, and its objects as (class, (x_min, y_min, width, height) in pixels)."""
    pixels = _background(rng, scene.side)
    mean = pixels.mean((0, 1))
    for _ in range(int(rng.integers(scene.clutter + 1)) if scene.clutter else 0):
        corners = _clutter(rng, scene)
        window, covered = _coverage([corners], scene.side, hole=False)
        pixels[window] = pixels[window] * (1 - covered) + rng.uniform(0, 255, size=3) * covered
    objects: list[tuple[int, Box]] = []
    shares = np.cumsum(scene.rarity ** -np.arange(scene.classes))
    of_image = int(rng.integers(scene.classes)) if scene.one_class else None
    for _ in range(int(rng.integers(scene.counts[0], scene.counts[1] + 1))):
        if of_image is not None:
            class_id = of_image
        elif scene.rarity == 1:
            class_id = int(rng.integers(scene.classes))
        else:
            class_id = int(np.searchsorted(shares, rng.uniform(0, shares[-1])))
        for _attempt in range(50):
            outlines = _place(rng, SYMBOLS[CLASSES[class_id]], scene)
            box = _box(outlines)
            if all(_overlap(box, other) <= scene.max_overlap for _, other in objects):
                break
        else:
            continue
        window, covered = _coverage(outlines, scene.side, hole=CLASSES[class_id] == "ring")
        pixels[window] = pixels[window] * (1 - covered) + _colour(rng, mean) * covered
        objects.append((class_id, box))
    pixels = pixels + rng.normal(0, rng.uniform(1, 6), size=pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8)), objects


def _clutter(rng: np.random.Generator, scene: Scene) -> np.ndarray:
    """A polygon without meaning of the size of a symbol, (corners, 2) in pixels."""
    angles = np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(3, 8))))
    radii = rng.uniform(0.3, 0.5, len(angles)) * rng.uniform(*scene.sizes)
    center = rng.uniform(1 + radii.max(), scene.side - 1 - radii.max(), size=2)
    return center + radii[:, None] * np.stack((np.cos(angles), np.sin(angles)), axis=1)


def _place(rng: np.random.Generator, outlines: list[Outline], scene: Scene) -> list[np.ndarray]:
    """The outlines at a random size, tilt and place that lies within the image, in pixels."""
    points = np.concatenate([np.array(outline) for outline in outlines])
    size = rng.uniform(*scene.sizes) / np.ptp(points, axis=0).max()
    tilt = rng.uniform(-MAX_TILT, MAX_TILT)
    turn = size * np.array([[math.cos(tilt), -math.sin(tilt)], [math.sin(tilt), math.cos(tilt)]])
    points = points @ turn.T
    center = rng.uniform(1 - points.min(0), scene.side - 1 - points.max(0))
    return [np.array(outline) @ turn.T + center for outline in outlines]


def _box(outlines: list[np.ndarray]) -> Box:
    points = np.concatenate(outlines)
    (left, top), (width, height) = points.min(0), np.ptp(points, axis=0)
    return float(left), float(top), float(width), float(height)


def _overlap(a: Box, b: Box) -> float:
    """Share of the smaller box that lies within the other one."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0) / min(a[2] * a[3], b[2] * b[3])


def _coverage(outlines: list[np.ndarray], side: int, hole: bool) -> tuple[tuple[slice, slice], np.ndarray]:
    """How much of each pixel the symbol covers, (h, w, 1) in [0, 1], in a window (rows, columns) around it."""
    points = np.concatenate(outlines)
    left, top = np.floor(points.min(0)).astype(int) - 1
    right, bottom = np.ceil(points.max(0)).astype(int) + 1
    left, top, right, bottom = max(left, 0), max(top, 0), min(right, side), min(bottom, side)
    size = right - left, bottom - top
    mask = Image.new("L", (size[0] * OVERSAMPLING, size[1] * OVERSAMPLING))
    draw = ImageDraw.Draw(mask)
    for number, outline in enumerate(outlines):
        # pixel centres: PIL fills the pixel at (0, 0) for a corner at (0, 0), which is the middle of our first pixel
        corners = (outline - (left, top)) * OVERSAMPLING - 0.5
        draw.polygon([(float(x), float(y)) for x, y in corners], fill=0 if hole and number == 1 else 255)
    covered = np.asarray(mask.resize(size, Image.Resampling.BOX), dtype=np.float64)[..., None] / 255
    return (slice(top, bottom), slice(left, right)), covered


def _colour(rng: np.random.Generator, background: np.ndarray) -> np.ndarray:
    colour = rng.uniform(0, 255, size=3)
    while np.abs(colour - background).max() < MIN_CONTRAST:
        colour = rng.uniform(0, 255, size=3)
    return colour


def _background(rng: np.random.Generator, side: int) -> np.ndarray:
    """(side, side, 3) of two related colours, mixed along a direction or at random."""
    first = rng.uniform(20, 235, size=3)
    second = first + rng.uniform(-40, 40, size=3)
    y, x = np.mgrid[:side, :side] / side
    angle = rng.uniform(0, 2 * math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    mix = (along - along.min()) / np.ptp(along) if rng.random() < 0.5 else rng.random((side, side))
    return first + (second - first) * mix[..., None]


if __name__ == "__main__":
    print(draw_symbols_dataset(sys.argv[2], sys.argv[1]))
