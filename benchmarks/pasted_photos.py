"""A data set like photographs: nine kinds of things, cut from real photographs and pasted into others.

    pip install scikit-image scikit-learn
    python benchmarks/pasted_photos.py FOLDER

Images have sides of 400 to 640 pixels and 1 to 8 things of 32 to 240 pixels, scaled, turned, mirrored, in other light,
and partly hidden by others or by pieces without meaning. The photographs are those that scikit-image and scikit-learn
ship.
"""

import importlib.util
import math
import sys
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from hf_detr.data.shapes import Drawing, write_drawn_dataset

MIN_SIDE, MAX_SIDE = 400, 640
MIN_SIZE, MAX_SIZE = 32, 240  # of the longer side of a thing, in pixels
MAX_OBJECTS = 8
MIN_VISIBLE = 0.6
PACKAGES = {"skimage": "data", "sklearn": "datasets/images"}

Outline = list[tuple[float, float]]


def _ellipse(x: float, y: float, width: float, height: float) -> Outline:
    """An ellipse around (x, y) with these radii."""
    angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    return [(x + width * math.cos(angle), y + height * math.sin(angle)) for angle in angles]


SHUTTLE = [
    (418, 0), (436, 20), (441, 150), (460, 200), (455, 235), (380, 235), (374, 205), (395, 150), (393, 60), (405, 0),
]  # fmt: skip
PAGODA = [
    (205, 31), (232, 72), (325, 130), (300, 190), (332, 250), (350, 330), (368, 384), (84, 340), (100, 270), (94, 180),
    (90, 125), (180, 72),
]  # fmt: skip
# class: (photograph, outline of the thing in its pixels)
THINGS: dict[str, list[tuple[str, Outline]]] = {
    "face": [("astronaut.png", _ellipse(226, 92, 78, 86))],
    "helmet": [("astronaut.png", _ellipse(392, 428, 104, 80))],
    "shuttle": [("astronaut.png", [(float(x), float(y)) for x, y in SHUTTLE])],
    "cat": [("chelsea.png", _ellipse(198, 150, 155, 138))],
    "cup": [("coffee.png", _ellipse(277, 198, 203, 185))],
    "flower": [("flower.jpg", _ellipse(307, 219, 140, 138))],
    "wheel": [("motorcycle_left.png", _ellipse(598, 368, 84, 88)), ("motorcycle_left.png", _ellipse(196, 319, 76, 82))],
    "pagoda": [("china.jpg", [(float(x), float(y)) for x, y in PAGODA])],
    "coin": [("coins.png", _ellipse(x, y, r, r)) for x, y, r in ((333, 44, 30), (44, 53, 22), (270, 119, 26))],
}
CLASSES = tuple(THINGS)
BACKGROUNDS = (  # without those that show one of the things

    "rocket.jpg", "grass.png", "gravel.png", "brick.png", "ihc.png", "retina.jpg", "hubble_deep_field.jpg", "page.png",
    "moon.png", "camera.png",
)  # fmt: skip


@cache
def photograph(name: str) -> Image.Image:
    """A photograph that one of the packages ships.

    Raises:
        FileNotFoundError: the packages are not installed, or do not have it.
    """
    for package, folder in PACKAGES.items():
        found = importlib.util.find_spec(package)
        for place in (found.submodule_search_locations or []) if found else []:
            if (path := Path(place, folder, name)).is_file():
                return Image.open(path).convert("RGB")
    raise FileNotFoundError(f"There is no photograph {name}. pip install scikit-image scikit-learn")


@cache
def _cutout(class_name: str, number: int) -> Image.Image:
    """A thing as RGBA."""
    name, outline = THINGS[class_name][number]
    source = photograph(name)
    alpha = Image.new("L", source.size)
    ImageDraw.Draw(alpha).polygon(outline, fill=255)
    image = source.convert("RGBA")
    image.putalpha(alpha.filter(ImageFilter.GaussianBlur(1)))
    return image.crop(alpha.getbbox())


def draw_pasted_dataset(folder: str | Path, *, num_train: int = 200, num_val: int = 100, seed: int = 0) -> Path:
    """Like `draw_shapes_dataset`."""
    return write_drawn_dataset(
        folder, draw_pasted_image, CLASSES, "hf_detr pasted photographs", num_train=num_train, num_val=num_val,
        seed=seed, progress=False,
    )  # fmt: skip


def draw_pasted_image(rng: np.random.Generator) -> Drawing:
    """One image, and its objects as (class, (x_min, y_min, width, height) in pixels)."""
    width, height = (int(side) for side in rng.integers(MIN_SIDE, MAX_SIDE + 1, size=2))
    canvas = _background(rng, width, height)
    owner = np.zeros((height, width), dtype=np.uint8)  # number of the visible thing at each pixel, 0 = background
    areas: list[float] = []
    objects: list[tuple[int, tuple[float, ...]]] = []
    for _ in range(int(rng.integers(0, 4))):  # under the things
        _paste(canvas, _piece(rng), rng)
    for _ in range(int(rng.integers(1, MAX_OBJECTS + 1))):
        for _attempt in range(20):
            class_id = int(rng.integers(len(CLASSES)))
            thing = _vary(_cutout(CLASSES[class_id], int(rng.integers(len(THINGS[CLASSES[class_id]])))), rng)
            place = _place(thing, width, height, rng)
            if place is None:
                continue
            alpha = np.asarray(thing)[..., 3] > 127
            x, y = place
            after = owner.copy()
            part = after[y : y + thing.height, x : x + thing.width]
            part[alpha] = len(objects) + 1
            visible = [np.count_nonzero(after == number + 1) / area for number, area in enumerate(areas)]
            if all(share >= MIN_VISIBLE for share in visible):
                rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
                left, top = int(columns[0]), int(rows[0])
                size = float(columns[-1] - left + 1), float(rows[-1] - top + 1)
                canvas.paste(thing, place, thing)
                owner, areas = after, [*areas, float(alpha.sum())]
                objects.append((class_id, (float(x + left), float(y + top), *size)))
                break
    return canvas, objects


def _background(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    source = photograph(BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))])
    scale = max(width / source.width, height / source.height) * rng.uniform(1.0, 2.0)
    source = source.resize((math.ceil(source.width * scale), math.ceil(source.height * scale)))
    x, y = int(rng.integers(source.width - width + 1)), int(rng.integers(source.height - height + 1))
    return _relight(source.crop((x, y, x + width, y + height)), rng, 0.4)


def _piece(rng: np.random.Generator) -> Image.Image:
    """A polygon without meaning, cut from a background."""
    size = int(rng.integers(MIN_SIZE, MAX_SIZE))
    image = _background(rng, size, size).convert("RGBA")
    alpha, angles = Image.new("L", (size, size)), np.sort(rng.uniform(0, 2 * math.pi, int(rng.integers(4, 9))))
    radii = rng.uniform(0.3, 0.5, len(angles)) * size
    corners = [(size / 2 + r * math.cos(a), size / 2 + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]
    ImageDraw.Draw(alpha).polygon(corners, fill=255)
    image.putalpha(alpha)
    return image


def _vary(thing: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Another size, turn, side and light."""
    side = math.exp(rng.uniform(math.log(MIN_SIZE), math.log(MAX_SIZE)))
    scale = side / max(thing.size)
    stretched = rng.uniform(0.85, 1.15)
    size = max(8, round(thing.width * scale * stretched)), max(8, round(thing.height * scale / stretched))
    thing = thing.resize(size, Image.Resampling.LANCZOS)
    if rng.random() < 0.5:
        thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    thing = thing.rotate(rng.uniform(-30, 30), Image.Resampling.BICUBIC, expand=True)
    lit = _relight(thing.convert("RGB"), rng, 0.3).convert("RGBA")
    lit.putalpha(thing.getchannel("A"))
    return lit


def _relight(image: Image.Image, rng: np.random.Generator, strength: float) -> Image.Image:
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(1 + rng.uniform(-strength, strength))
    return image


def _place(thing: Image.Image, width: int, height: int, rng: np.random.Generator) -> tuple[int, int] | None:
    if thing.width >= width or thing.height >= height:
        return None
    return int(rng.integers(width - thing.width)), int(rng.integers(height - thing.height))


def _paste(canvas: Image.Image, piece: Image.Image, rng: np.random.Generator) -> None:
    place = _place(piece, canvas.width, canvas.height, rng)
    if place is not None:
        canvas.paste(piece, place, piece)


if __name__ == "__main__":
    draw_pasted_dataset(sys.argv[1])
