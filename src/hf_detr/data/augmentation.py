"""Augmentation of rows: the paper's recipe, any transform of torchvision v2 or Albumentations, and seeds that make an
epoch repeatable."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..model.boxes import xywh_to_xyxy, xyxy_to_xywh
from ..model.image_io import to_rgb_tensor

Row = dict[str, Any]

PAPER_SHORTEST_EDGE = 800
PAPER_SCALES = tuple(range(480, 801, 32))


class RandomSizeCrop(v2.Transform):
    """A random part of the image, as in the paper's recipe.

    There, the image is first resized to a shortest edge of 400, 500 or 600, and a rectangle with sides of 384 to 600 is
    cut out of that, each no longer than the image. Here the same rectangle is cut out of the image as it is, rounded to
    its pixels, so that it is resampled once, by the resize that follows, not twice. For the same reason no number
    depends on the resolution that is trained at.

    Args:
        shortest_edges: in pixels; one of them is drawn, and gives the sides below their scale.
        min_side, max_side: range of both sides in pixels at that scale.
    """

    def __init__(
        self, shortest_edges: Sequence[int] = (400, 500, 600), min_side: int = 384, max_side: int = 600
    ) -> None:
        super().__init__()
        self.shortest_edges = tuple(shortest_edges)
        self.min_side = min_side
        self.max_side = max_side

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        images = (PIL.Image.Image, tv_tensors.Image, tv_tensors.BoundingBoxes)
        height, width = next(F.get_size(entry) for entry in flat_inputs if isinstance(entry, images))
        scale = self.shortest_edges[_randint(0, len(self.shortest_edges) - 1)] / min(height, width)
        top, bottom = self._interval(height, scale)
        left, right = self._interval(width, scale)
        return {"top": top, "left": left, "height": bottom - top, "width": right - left}

    def _interval(self, length: int, scale: float) -> tuple[int, int]:
        """First pixel and the one behind the last, of a side of `length` pixels."""
        scaled = round(length * scale)
        side = _randint(min(self.min_side, scaled), min(scaled, self.max_side))
        start = _randint(0, scaled - side)
        first = min(round(start / scale), length - 1)
        return first, min(max(round((start + side) / scale), first + 1), length)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


def _randint(low: int, high: int) -> int:
    """From `low` to `high`, both included, by PyTorch's generator as all of torchvision v2."""
    return int(torch.randint(low, high + 1, ()))


class QuarterTurn(v2.Transform):
    """The image turned by 90 degrees counterclockwise."""

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.BoundingBoxes):
            height, width = inpt.canvas_size
            x, y, w, h = F.convert_bounding_box_format(inpt, new_format="XYWH").unbind(-1)  # type: ignore[attr-defined]
            turned = torch.stack((y, width - x - w, h, w), dim=-1)
            return tv_tensors.BoundingBoxes(turned, format="XYWH", canvas_size=(width, height))  # type: ignore[call-overload]
        if isinstance(inpt, tv_tensors.Image):
            return tv_tensors.wrap(inpt.rot90(1, (-2, -1)), like=inpt)
        return inpt


def turns_augmentation() -> "Augmentation":
    """Mirror images and quarter turns, all eight alike, for images without an up and a down: seen from above, through a
    microscope, or drawn. Nothing is resampled."""
    turn = v2.RandomApply([QuarterTurn()], p=0.5)
    return Augmentation(v2.Compose([v2.RandomHorizontalFlip(p=0.5), v2.RandomVerticalFlip(p=0.5), turn]))


def paper_augmentation(size: Mapping[str, int | None] | None = None) -> "Augmentation":
    """The paper's augmentation (section A.4 and `datasets/coco.py` of its code) for a processor's `size`.

    With probability 1/2 a random-size crop, with probability 1/2 mirrored, then resized so that the shortest edge is
    one of 480, 512, ..., 800 and the longest at most 1333.

    Args:
        size: of the processor; default: the paper's. With a `shortest_edge`, the scales are those above times
            `shortest_edge / 800`, the limit is its `longest_edge`, and the processor does not resize again. With any
            other form, such as `{"height": 96, "width": 96}`, the processor resizes, and what remains is crop and flip.

    The crop comes before the flip because there is less to mirror then; the distribution is the same.
    """
    given = {key: value for key, value in dict(size or {"shortest_edge": 800, "longest_edge": 1333}).items() if value}
    steps: list[v2.Transform] = [v2.RandomApply([RandomSizeCrop()], p=0.5), v2.RandomHorizontalFlip(p=0.5)]
    shortest = given.get("shortest_edge")
    if shortest:
        longest = given.get("longest_edge")
        scales = [round(scale * shortest / PAPER_SHORTEST_EDGE) for scale in PAPER_SCALES]
        steps.append(v2.RandomChoice([_resize(scale, longest) for scale in scales]))
    return Augmentation(v2.Compose(steps), resizes=bool(shortest))


def _resize(shortest: int, longest: int | None) -> v2.Transform:
    # torchvision takes a limit only if it is above the shortest edge; otherwise the limit decides alone
    return v2.Resize(None if longest and shortest >= longest else shortest, max_size=longest)


class Augmentation:
    """A torchvision v2 or Albumentations transform, applied to rows of the schema.

    Ids, categories, areas and crowd flags of the new row are of exactly the boxes that are left, whatever the transform
    drops or reorders: each box carries its place in the row through the transform.

    - Boxes are clipped to the new image. One that is left with less than `min_side` pixels in height or width is
      dropped; a row may end with no objects.
    - `area` shrinks and grows with its box: by the share of the box that is left and by the resize. The true area of a
      cut segmentation cannot be known without the segmentation.
    - The image becomes RGB, `uint8` (3, H, W); `width` and `height` are the new ones. Other columns stay.

    Args:
        transform: of torchvision v2, called with `{"image": tv_tensors.Image, "boxes": tv_tensors.BoundingBoxes,
            "labels": places in the row}`, so `v2.SanitizeBoundingBoxes()` works as it is; or an Albumentations
            `Compose` with `bbox_params` in any format, whose label fields, if it has some, are filled with the
            places in the row.
        resizes: the transform brings images to the resolution to train at. The processor then leaves their size alone
            (`DetectionCollator` sees it in the row's `resized`).
        min_side: in pixels of the new image.

    Raises:
        ValueError: an Albumentations transform without `bbox_params`; a box of the row that lies outside its image or
            has no area; a transform that returns boxes without their places.
    """

    def __init__(self, transform: Callable[..., Any], *, resizes: bool = False, min_side: float = 1.0) -> None:
        self.transform = transform
        self.resizes = resizes
        self.min_side = min_side
        self._albumentations = any(c.__module__.split(".")[0] == "albumentations" for c in type(transform).__mro__)
        if self._albumentations and "bboxes" not in getattr(transform, "processors", {}):
            raise ValueError(
                "Boxes do not follow this Albumentations transform. Make it "
                'A.Compose([...], bbox_params=A.BboxParams(format="coco")).'
            )

    def set_random_seed(self, seed: int) -> None:
        """Albumentations draws from generators of its own; torchvision from PyTorch's, which are the caller's."""
        if self._albumentations:
            self.transform.set_random_seed(seed)  # type: ignore[attr-defined]

    def __call__(self, row: Row) -> Row:
        image = to_rgb_tensor(row["image"])
        objects = row["objects"]
        before = _clip(torch.tensor(objects["bbox"], dtype=torch.float64).reshape(-1, 4), *image.shape[-2:])
        for place, (_, _, *sides) in enumerate(before.tolist()):
            if not all(side > 0 for side in sides):  # NaN is not
                raise ValueError(
                    f"Image {row.get('image_id')}, object {place}: bbox {objects['bbox'][place]} has no area in the "
                    f"image of {image.shape[-1]} x {image.shape[-2]}. Correct or remove it in the data set."
                )
        apply = self._apply_albumentations if self._albumentations else self._apply_torchvision
        image, after, places = apply(image, before)
        if len(places) != len(after):
            raise ValueError(
                f"Image {row.get('image_id')}: the transform returned {len(after)} boxes but labels for {len(places)}. "
                "Drop and reorder both alike, as v2.SanitizeBoundingBoxes does."
            )
        height, width = F.get_size(image)
        after = _clip(after, height, width)
        growth = after[:, 2:].prod(1) / before[places, 2:].prod(1)
        kept = [i for i, (*_, w, h) in enumerate(after.tolist()) if w > 0 and h > 0 and min(w, h) >= self.min_side]
        sources = [places[i] for i in kept]
        changed = {key: [values[place] for place in sources] for key, values in objects.items()}
        changed["bbox"] = after[kept].tolist()
        if "area" in changed:
            changed["area"] = [a * g for a, g in zip(changed["area"], growth[kept].tolist(), strict=True)]
        new = row | {"image": image, "width": width, "height": height, "objects": changed}
        return new | {"resized": True} if self.resizes else new

    def _apply_torchvision(self, image: Tensor, boxes: Tensor) -> tuple[Any, Tensor, list[int]]:
        height, width = image.shape[-2:]
        sample = self.transform(
            {
                "image": tv_tensors.Image(image),
                "boxes": tv_tensors.BoundingBoxes(boxes, format="XYWH", canvas_size=(height, width)),  # type: ignore[call-overload]
                "labels": torch.arange(len(boxes)),
            }
        )
        new, out = sample["image"], sample["boxes"]
        if not isinstance(out, tv_tensors.BoundingBoxes):
            raise ValueError(
                "The transform returned boxes as a plain tensor, as indexing makes of them. Return "
                "tv_tensors.wrap(new_boxes, like=boxes), so that their format is known."
            )
        out = F.convert_bounding_box_format(out, new_format=tv_tensors.BoundingBoxFormat.XYWH)
        new = new.as_subclass(Tensor) if isinstance(new, Tensor) else new
        return new, out.as_subclass(Tensor).double(), sample["labels"].tolist()

    def _apply_albumentations(self, image: Tensor, boxes: Tensor) -> tuple[Any, Tensor, list[int]]:
        params = self.transform.processors["bboxes"].params  # type: ignore[attr-defined]
        height, width = image.shape[-2:]
        places = np.arange(len(boxes))
        given = np.column_stack((_to_format(boxes.numpy(), params.format, height, width), places))
        result = self.transform(
            image=np.ascontiguousarray(image.permute(1, 2, 0).numpy()),
            bboxes=given,
            **{field: places.tolist() for field in params.label_fields or ()},
        )
        new, found = result["image"], np.asarray(result["bboxes"], dtype=np.float64).reshape(-1, 5)
        if isinstance(new, np.ndarray):
            new = torch.from_numpy(new).permute(2, 0, 1)
        height, width = F.get_size(new)
        out = torch.from_numpy(_from_format(found[:, :4], params.format, height, width))
        return new, out, found[:, 4].astype(int).tolist()


def _clip(boxes: Tensor, height: int, width: int) -> Tensor:
    """Boxes (N, 4) xywh to their part in the image; those inside stay as they are, to the last digit."""
    size = boxes.new_tensor([width, height])
    corners = xywh_to_xyxy(boxes)
    clipped = xyxy_to_xywh(torch.minimum(corners.clamp(min=0), size.repeat(2)))
    inside = (boxes[:, :2] >= 0).all(1) & (corners[:, 2:] <= size).all(1)
    return torch.where(inside[:, None], boxes, clipped)


def _to_format(boxes: np.ndarray, name: str, height: int, width: int) -> np.ndarray:
    """xywh in pixels to one of the four formats of Albumentations."""
    corner, side = boxes[:, :2], boxes[:, 2:]
    first = corner + side / 2 if name == "yolo" else corner
    second = corner + side if name in ("pascal_voc", "albumentations") else side
    unit = (width, height) if name in ("yolo", "albumentations") else (1, 1)
    return np.concatenate((first / unit, second / unit), axis=1)


def _from_format(boxes: np.ndarray, name: str, height: int, width: int) -> np.ndarray:
    """The reverse of `_to_format`."""
    unit = (width, height) if name in ("yolo", "albumentations") else (1, 1)
    first, second = boxes[:, :2] * unit, boxes[:, 2:] * unit
    side = second - first if name in ("pascal_voc", "albumentations") else second
    return np.concatenate((first - side / 2 if name == "yolo" else first, side), axis=1)


class AugmentedDataset(Dataset[Row]):
    """Rows of a data set, augmented anew each epoch; the row is a function of `(seed, epoch, index)` and nothing else.

    So the same seed gives the same epoch whatever the number of workers and processes and the order of the batches. The
    global generators of PyTorch (CPU), NumPy and `random` are seeded for each row and afterwards are as they were.

    Args:
        dataset: a `datasets.Dataset` in the schema, or any sequence of such rows.
        augmentation: from row to row; an `Augmentation`, or any callable that draws from the generators named above. If
            it has a `set_random_seed`, that is called with a seed for each row.
        seed: not negative.
    """

    def __init__(self, dataset: Any, augmentation: Callable[[Row], Row], seed: int = 0) -> None:
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}.")
        self.dataset = dataset
        self.augmentation = augmentation
        self.seed = seed
        # in shared memory: workers that outlive an epoch hold a copy of this object, and see the same number
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, in this process and in the workers it has already started."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        index = int(index)
        seeds = np.random.SeedSequence([self.seed, int(self._epoch), index % len(self)]).generate_state(4)
        row = self.dataset[index]
        with _seeded(int(seeds[0]), int(seeds[1]), int(seeds[2])):
            if hasattr(self.augmentation, "set_random_seed"):
                self.augmentation.set_random_seed(int(seeds[3]))
            return self.augmentation(row)


@contextmanager
def _seeded(for_torch: int, for_numpy: int, for_random: int) -> Iterator[None]:
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(for_torch)  # not torch.manual_seed, which would also seed the accelerators
    np.random.seed(for_numpy)
    random.seed(for_random)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
