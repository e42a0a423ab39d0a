"""A synthetic dataset: coloured shapes on textured backgrounds, as ordinary COCO files."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm.auto import tqdm

from ..runtime.files import atomic_write
from .masks import encode_masks, mask_areas, mask_boxes, to_coco_rle
from .panoptic_export import PanopticWriter

CLASSES = ("rectangle", "ellipse", "triangle")
MIN_SIDE, MAX_SIDE = 96, 160
MAX_OBJECTS = 4
MIN_VISIBLE = 0.7  # fraction of each shape that later shapes must not cover
STUFF = ("stripes", "speckles")  # classes of the regions of a background with masks
OVERSAMPLING = 3  # shapes are drawn this much larger and scaled down, for smooth edges


def draw_shapes_dataset(
    folder: str | Path,
    *,
    num_train: int = 2000,
    num_val: int = 200,
    seed: int = 0,
    masks: bool = False,
    progress: bool = True,
) -> Path:
    """Draw `train/` and `val/` images with `annotations/instances_train.json` and `instances_val.json` into `folder`.

    Height and width are 96 to 160 pixels, independent of each other. Images have 0 to 4 rectangles, ellipses and
    triangles of random colour, size and rotation over noise, stripes, a checkerboard, blobs or a gradient. Shapes may
    overlap, but most of each stays visible; a box includes the covered parts of its shape. Image `i` depends only on
    `seed`, the split and `i`, so a larger dataset starts with the images of a smaller one. About 5 ms per image.

    Annotation files are written last. A split that already exists with the same size and seed is not drawn again.

    Args:
        masks: draw other images, whose background is two regions, stripes and speckles, and write their masks: of the
            visible pixels of shapes into `instances_*.json`, with the boxes and areas of these pixels, and of shapes
            (things) and regions (stuff) into `panoptic_*.json` with its PNGs, COCO's panoptic format. A pixel belongs
            to the shape or region at its centre.

    Raises:
        FileExistsError: `folder` has annotations that were not drawn with these arguments.
    """
    return write_drawn_dataset(
        folder,
        draw_segments if masks else draw_shapes_image,
        CLASSES,
        "hf_detr shapes with masks" if masks else "hf_detr shapes",
        num_train=num_train,
        num_val=num_val,
        seed=seed,
        progress=progress,
        stuff=STUFF if masks else (),
    )


Objects = list[tuple[int, tuple[float, ...]]]
Drawing = tuple[Image.Image, Objects] | tuple[Image.Image, Objects, np.ndarray]


def write_drawn_dataset(
    folder: str | Path,
    draw: Callable[[np.random.Generator], Drawing],
    classes: Sequence[str],
    description: str,
    *,
    num_train: int,
    num_val: int,
    seed: int,
    progress: bool,
    file_type: str = "jpg",
    stuff: Sequence[str] = (),
) -> Path:
    """[`draw_shapes_dataset`] for any function that draws an image.

    Args:
        draw: draws an image with this generator; returns it and its objects as (class id, (x_min, y_min, width, height)
            in pixels). With `stuff` also a map (H, W) of what each pixel belongs to: 1 ... n for the n objects, and
            from n + 1 on the classes of stuff. Boxes and areas are then those of the map.
        description: identifies the dataset in its annotation files.
        file_type: suffix of the image files.
        stuff: names of classes of background regions; with them, panoptic annotations are written, too.
    """
    folder = Path(folder)
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(classes)]
    for split, count in (("train", num_train), ("val", num_val)):
        target = folder / "annotations" / f"instances_{split}.json"
        info = {"description": description, "seed": seed, "split": split, "images": count}
        for file in (target, panoptic_file(folder, split)):
            if file.exists() and json.loads(file.read_text()).get("info") != info:
                raise FileExistsError(
                    f"{file} was not drawn with seed={seed} and {count} images. Choose another folder."
                )
        if target.exists():
            continue
        (folder / split).mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        coco: dict[str, Any] = {
            "info": info,
            "categories": categories,
            "images": [],
            "annotations": [],
        }
        panoptic = _panoptic_writer(folder, split, categories, stuff, info) if stuff else None
        for index in tqdm(range(count), desc=f"Drawing {split}", disable=not progress, leave=False):
            image, objects, *segments = draw(np.random.default_rng([seed, split == "val", index]))
            name = f"{index:06d}.{file_type}"
            image.save(folder / split / name, quality=92)  # ignored for PNG
            coco["images"].append({"id": index + 1, "file_name": name, "width": image.width, "height": image.height})
            places = [
                {"bbox": [round(value, 2) for value in (x, y, width, height)], "area": round(width * height, 2)}
                for _, (x, y, width, height) in objects
            ]
            if panoptic is not None:
                kinds = [class_id for class_id, _ in objects] + list(range(len(classes), len(classes) + len(stuff)))
                listed = [{"id": i, "category_id": kinds[i - 1] + 1} for i in np.unique(segments[0]).tolist()]
                panoptic.add(coco["images"][-1], segments[0], listed)
                places = [_of_mask(segments[0] == number + 1) for number in range(len(objects))]
            for (class_id, _), place in zip(objects, places, strict=True):
                coco["annotations"].append(
                    {
                        "id": len(coco["annotations"]) + 1,
                        "image_id": index + 1,
                        "category_id": class_id + 1,
                        **place,
                        "iscrowd": 0,
                    }
                )
        if panoptic is not None:
            panoptic.close()
        with atomic_write(target) as target_file:
            json.dump(coco, target_file)
    return folder


def _panoptic_writer(
    folder: Path, split: str, things: list[dict[str, Any]], stuff: Sequence[str], info: dict[str, Any]
) -> PanopticWriter:
    categories = [category | {"isthing": 1} for category in things]
    categories += [{"id": len(things) + 1 + i, "name": name, "isthing": 0} for i, name in enumerate(stuff)]
    file = panoptic_file(folder, split)
    file.unlink(missing_ok=True)  # of a drawing that was killed before its last file
    return PanopticWriter(file, categories, info)


def panoptic_file(folder: Path, split: str) -> Path:
    """Where the panoptic annotations of a split are."""
    return folder / "annotations" / f"panoptic_{split}.json"


def _of_mask(mask: np.ndarray) -> dict[str, Any]:
    """`bbox`, `area` and `segmentation` of the visible pixels of an object."""
    counts, size = encode_masks(mask[None]), (mask.shape[0], mask.shape[1])
    place = {"bbox": mask_boxes(counts, size)[0], "area": mask_areas(counts, size)[0]}
    return place | {"segmentation": to_coco_rle(counts[0], size)}


def draw_shapes_image(rng: np.random.Generator) -> tuple[Image.Image, Objects]:
    """One image, and its objects as (class id, (x_min, y_min, width, height) in pixels)."""
    image, objects, _ = _draw_shapes(rng, _background(rng, *_random_size(rng)))
    return image, objects


def draw_segments(rng: np.random.Generator) -> tuple[Image.Image, Objects, np.ndarray]:
    """One image whose background is two regions, its objects, and what the centre of each pixel (H, W) belongs to:
    1 ... n for the n objects, n + 1 + i for class i of `STUFF`."""
    background, regions = _two_textures(rng, *_random_size(rng))
    colours = np.stack([background[regions == region].mean(axis=0) for region in np.unique(regions)])
    image, objects, owner = _draw_shapes(rng, background, colours)
    return image, objects, np.where(owner > 0, owner, len(objects) + 1 + regions)


def _random_size(rng: np.random.Generator) -> list[int]:
    return [int(side) for side in rng.integers(MIN_SIDE, MAX_SIDE + 1, size=2)]


def _draw_shapes(
    rng: np.random.Generator, background: np.ndarray, colours: np.ndarray | None = None
) -> tuple[Image.Image, Objects, np.ndarray]:
    """An image, its objects, and the number from 1 of the object at the centre of each pixel (H, W), 0 for none.

    Args:
        background: (H, W, 3).
        colours: (K, 3) from which all shapes differ visibly; None: the mean of the background.
    """
    height, width = background.shape[:2]
    enlarged = width * OVERSAMPLING, height * OVERSAMPLING
    canvas, ids = Image.fromarray(background).resize(enlarged), Image.new("L", enlarged)
    draw, draw_ids = ImageDraw.Draw(canvas), ImageDraw.Draw(ids)
    if colours is None:
        colours = np.asarray(canvas.resize((1, 1), Image.Resampling.BOX))[0].astype(float)
    owner = np.zeros((height, width), dtype=np.uint8)  # number of the visible shape at each pixel, 0 = background
    full_areas: list[float] = []
    objects: Objects = []
    for _ in range(int(rng.integers(0, MAX_OBJECTS + 1))):
        for _attempt in range(20):
            class_id, outline = _outline(rng, width, height)
            mask = Image.new("L", (width, height))
            ImageDraw.Draw(mask).polygon(outline, fill=1)
            covered = np.asarray(mask, dtype=bool)
            after = np.where(covered, len(objects) + 1, owner)
            visible_areas = [np.count_nonzero(after == i + 1) for i in range(len(objects))]
            if covered.any() and all(
                visible >= MIN_VISIBLE * full for visible, full in zip(visible_areas, full_areas, strict=True)
            ):
                break
        else:
            continue
        owner = after.astype(np.uint8)
        full_areas.append(float(np.count_nonzero(covered)))
        corners = [(x * OVERSAMPLING, y * OVERSAMPLING) for x, y in outline]
        draw.polygon(corners, fill=_colour(rng, colours))
        draw_ids.polygon(corners, fill=len(objects) + 1)
        xs, ys = zip(*outline, strict=True)
        objects.append((class_id, (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))))
    pixels = np.asarray(canvas.resize((width, height), Image.Resampling.BOX)).astype(np.float32)
    pixels += rng.normal(0, rng.uniform(2, 12), size=pixels.shape)
    centres = slice(OVERSAMPLING // 2, None, OVERSAMPLING)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), objects, np.asarray(ids)[centres, centres].astype(int)


def _outline(rng: np.random.Generator, width: int, height: int) -> tuple[int, list[tuple[float, float]]]:
    """A random class id, and the corners of a random shape of that class inside the image."""
    class_id = int(rng.integers(len(CLASSES)))
    size = math.exp(rng.uniform(math.log(0.2), math.log(0.65))) * min(width, height)
    stretch = math.exp(rng.uniform(-0.5, 0.5))
    half = np.array([size * stretch**0.5, size * stretch**-0.5]) / 2
    if CLASSES[class_id] == "rectangle":
        corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * half
        rotation = rng.uniform(-0.35, 0.35)
    elif CLASSES[class_id] == "ellipse":
        angle = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        corners = np.stack((np.cos(angle), np.sin(angle)), axis=1) * half
        rotation = rng.uniform(0, math.pi)
    else:
        corners = np.array([[-1, 0.8], [1, 0.8], [rng.uniform(-0.6, 0.6), -1]]) * half
        rotation = rng.uniform(0, 2 * math.pi)
    matrix = np.array([[math.cos(rotation), -math.sin(rotation)], [math.sin(rotation), math.cos(rotation)]])
    corners = corners @ matrix.T
    low, high = corners.min(0), corners.max(0)
    center = rng.uniform(-low + 1, np.maximum(np.array([width, height]) - high - 1, -low + 1.01))
    return class_id, [(float(x), float(y)) for x, y in corners + center]


def _colour(rng: np.random.Generator, others: np.ndarray) -> tuple[int, ...]:
    """A random colour that differs visibly from others (K, 3)."""
    colour = rng.integers(0, 256, size=3)
    while np.abs(colour - others).max(axis=1).min() < 70:
        colour = rng.integers(0, 256, size=3)
    return tuple(int(value) for value in colour)


def _background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """(height, width, 3) uint8: two similar colours blended by a random texture."""
    first = rng.uniform(0, 255, size=3)
    second = np.clip(first + rng.uniform(-50, 50, size=3), 0, 255)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = rng.uniform(0, math.pi)
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    period = rng.uniform(6, 30)
    textures: Sequence[Any] = (
        lambda: rng.random((height, width)),
        lambda: 0.5 + 0.5 * np.sin(2 * math.pi * along / period),
        lambda: (np.floor(along / period) + np.floor(across / period)) % 2,
        lambda: (along - along.min()) / (np.ptp(along) + 1),
        lambda: np.asarray(
            Image.fromarray(rng.random((6, 6), dtype=np.float32)).resize((width, height), Image.Resampling.BICUBIC)
        ),
    )
    mix = textures[int(rng.integers(len(textures)))]()[..., None]
    return (first + (second - first) * mix).clip(0, 255).astype(np.uint8)


def _two_textures(rng: np.random.Generator, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """(height, width, 3) uint8, two regions on both sides of a line near the centre, and the class of `STUFF` at each
    pixel. Each region has two colours that differ visibly, in stripes or at random."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = rng.uniform(0, 2 * math.pi)
    away = (x - width / 2) * math.cos(angle) + (y - height / 2) * math.sin(angle)
    regions = (away > rng.uniform(-0.25, 0.25) * min(width, height)).astype(int)
    direction = rng.uniform(0, math.pi)
    waves = np.sin(2 * math.pi * (x * math.cos(direction) + y * math.sin(direction)) / rng.uniform(7, 14))
    pixels = np.empty((height, width, 3))
    for region, mix in enumerate((0.5 + 0.5 * waves, rng.random((height, width)))):
        first = rng.uniform(0, 255, size=3)
        second = first + np.where(first < 128, 1, -1) * rng.uniform(40, 90, size=3)
        pixels[regions == region] = (first + (second - first) * mix[..., None])[regions == region]
    return pixels.astype(np.uint8), regions
