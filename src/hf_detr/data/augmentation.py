"""Augmentation of rows: the paper's recipe, or any transform of torchvision v2 or Albumentations."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..model.annotations import box_problem
from ..model.image_io import to_image_tensor
from ..model.processor_size import rounded_size, size_fields
from .box_arrays import Boxes, clip_boxes, corners_of, to_boxes
from .masks import decode_masks, encode_masks, mask_areas, mask_boxes, resize_masks

Row = dict[str, Any]

PAPER_SHORTEST_EDGE = 800
PAPER_SCALES = tuple(range(480, 801, 32))
# names of Albumentations' box formats in `box_convert`
ALBUMENTATIONS_FORMATS = {"coco": "xywh", "pascal_voc": "xyxy", "yolo": "cxcywh", "albumentations": "xyxy"}


class RandomSizeCrop(v2.Transform):
    """The random crop of the paper's recipe.

    The paper resizes the image to a shortest edge of 400, 500 or 600 and crops a rectangle with sides of 384 to 600
    pixels, at most those of the image. Here the same rectangle, rounded to pixels, is cropped from the original image,
    so that it is resampled only once, by the resize that follows. The numbers therefore do not depend on the training
    resolution.

    Args:
        shortest_edges: in pixels; a random one defines the scale of the sides below.
        min_side, max_side: range of height and width of the crop, in pixels at that scale.
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
        """First and last (exclusive) pixel of the crop along a side of `length` pixels."""
        scaled = round(length * scale)
        side = _randint(min(self.min_side, scaled), min(scaled, self.max_side))
        start = _randint(0, scaled - side)
        first = min(round(start / scale), length - 1)
        return first, min(max(round((start + side) / scale), first + 1), length)

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.crop(inpt, **params)


def _randint(low: int, high: int) -> int:
    """From `low` to `high` inclusive, from PyTorch's generator like all random numbers of torchvision v2."""
    return int(torch.randint(low, high + 1, ()))


class RandomFlipRotate(v2.Transform):
    """One of the eight combinations of a flip and rotations by 90 degrees, all equally likely, without resampling."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"flipped": bool(_randint(0, 1)), "quarters": _randint(0, 3)}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Flip from left to right, and then rotate counterclockwise by so many quarters of a turn."""
        flipped, quarters = params["flipped"], params["quarters"]
        if isinstance(inpt, tv_tensors.BoundingBoxes):
            height, width = inpt.canvas_size
            x, y, w, h = F.convert_bounding_box_format(inpt, new_format="XYWH").unbind(-1)  # type: ignore[attr-defined]
            if flipped:
                x = width - x - w
            for _ in range(quarters):
                x, y, w, h, height, width = y, width - x - w, h, w, width, height
            return tv_tensors.BoundingBoxes(  # type: ignore[call-overload]
                torch.stack((x, y, w, h), dim=-1), format="XYWH", canvas_size=(height, width)
            )
        if isinstance(inpt, (tv_tensors.Image, tv_tensors.Mask)):
            pixels = inpt.as_subclass(Tensor)
            pixels = pixels.flip(-1) if flipped else pixels
            return tv_tensors.wrap(pixels.rot90(quarters, (-2, -1)) if quarters else pixels, like=inpt)
        return inpt


def flip_rotate_augmentation() -> "Augmentation":
    """Flips and rotations by 90 degrees, all eight combinations equally likely, for images without a natural
    orientation, such as aerial or microscope images and drawings. Nothing is resampled."""
    return Augmentation(RandomFlipRotate(), few_sizes=True)


def paper_augmentation(
    size: Mapping[str, int | None] | None = None, *, rounded: bool = False, one_size_per_batch: bool = False
) -> "Augmentation":
    """The paper's augmentation (section A.4 and `datasets/coco.py` of its code) for a processor's `size`.

    A random-size crop with probability 1/2, a horizontal flip with probability 1/2, then a resize so that the shortest
    edge is one of 480, 512, ..., 800 and the longest at most 1333.

    Args:
        size: of the processor; default: the paper's. With a `shortest_edge`, the scales above are multiplied by
            `shortest_edge / 800`, the limit is its `longest_edge`, and the processor does not resize again. With any
            other form, such as `{"height": 96, "width": 96}`, only crop and flip are applied, and the processor
            resizes.
        rounded: after the resize, height and width are rounded to the nearest multiples of 64 pixels (of less below
            256), neither above its limit. The aspect ratio usually changes by a few percent. Images
            then have few different sizes, for each of which oneDNN has to prepare kernels on a CPU.
        one_size_per_batch: the images of a batch get the size of one of them, see `Augmentation`, which changes aspect
            ratios more. No effect where the processor resizes.

    The crop precedes the flip to flip fewer pixels; the distribution is the same.
    """
    given = size_fields(size or {"shortest_edge": 800, "longest_edge": 1333})
    steps: list[v2.Transform] = [v2.RandomApply([RandomSizeCrop()], p=0.5), v2.RandomHorizontalFlip(p=0.5)]
    shortest = given.get("shortest_edge")
    if shortest:
        longest = given.get("longest_edge")
        scales = [round(scale * shortest / PAPER_SHORTEST_EDGE) for scale in PAPER_SCALES]
        limit = shortest if rounded else None
        steps.append(v2.RandomChoice([_Resize(scale, longest, rounded_up_to=limit) for scale in scales]))
    return Augmentation(
        v2.Compose(steps),
        resizes=bool(shortest),
        few_sizes=rounded or not shortest,
        one_size_per_batch=one_size_per_batch and bool(shortest),
    )


def with_color_jitter(augmentation: "Augmentation", probability: float) -> "Augmentation":
    """The same, with random brightness and contrast (each times 0.6 to 1.4) and saturation (0.3 to 1.7) afterwards.

    Args:
        augmentation: of torchvision.
        probability: of an image to be changed.
    """
    jitter = v2.RandomApply([v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.7)], p=probability)
    return Augmentation(
        v2.Compose([augmentation.transform, jitter]),
        resizes=augmentation.resizes,
        min_side=augmentation.min_side,
        few_sizes=augmentation.few_sizes,
        one_size_per_batch=augmentation.one_size_per_batch,
    )


class _Resize(v2.Transform):
    """To a shortest edge, or less where the longest would exceed its limit, but at least 1 pixel. Pixels of masks are
    those nearest to their centre; torchvision's own resize moves masks by up to half a pixel to the bottom right.

    Args:
        shortest, longest: in pixels; `longest` None: no limit.
        rounded_up_to: round height and width by [`rounded_size`], the shorter one to this length at most; None: do not.
    """

    def __init__(self, shortest: int, longest: int | None, *, rounded_up_to: int | None = None) -> None:
        super().__init__()
        self.shortest = shortest
        self.longest = longest
        self.rounded_up_to = rounded_up_to

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        size = self._size(*F.get_size(inpt))
        if isinstance(inpt, tv_tensors.Mask):
            return tv_tensors.Mask(resize_masks(inpt.as_subclass(Tensor), (size[0], size[1])))
        return F.resize(inpt, size, antialias=True)

    def _size(self, height: int, width: int) -> list[int]:
        """Height and width after the resize of an image."""
        if self.longest and min(height, width) * self.longest < max(height, width):
            size = [1, self.longest] if height < width else [self.longest, 1]
        else:
            # torchvision rejects a limit that is not above the shortest edge; then the limit alone defines the size
            shortest = None if self.longest and self.shortest >= self.longest else self.shortest
            none = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(height, width))  # type: ignore[call-overload]
            size = list(F.resize(none, shortest, max_size=self.longest).canvas_size)  # type: ignore[attr-defined, arg-type]
        if self.rounded_up_to is None:
            return size
        return list(
            rounded_size((size[0], size[1]), {"shortest_edge": self.rounded_up_to, "longest_edge": self.longest})
        )


class ResizeTo(v2.Resize):
    """To exactly this height and width, with pixels of masks as in [`_Resize`]."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__([height, width])

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            height, width = self.size
            return tv_tensors.Mask(resize_masks(inpt.as_subclass(Tensor), (height, width)))
        return super().transform(inpt, params)


class Augmentation:
    """A torchvision v2 or Albumentations transform, applied to rows of the schema.

    Ids, categories, areas and crowd flags of the new row match the remaining boxes, whatever the transform drops or
    reorders: the transform receives the index of each box in the row as its label.

    - Boxes are clipped to the new image. Boxes with less than `min_side` pixels in height or width are dropped; a row
      may end up without objects.
    - Masks, where the row has them, are cropped, resized and so on with the image. The box of an object that reaches
      the edge of the new image, where the transform may have cut it, is then that of the visible part of its mask.
      Objects without a visible pixel are dropped.
    - `area` is that of the mask. Without masks it is scaled like the area of its box, by the crop and the resize.
    - The image becomes RGB, `uint8` (3, H, W), unless it is a `tv_tensors.Image` (C, H, W), which stays as it is;
      `width` and `height` are updated. Other columns are unchanged.

    Args:
        transform: of torchvision v2, called with `{"image": tv_tensors.Image, "boxes": tv_tensors.BoundingBoxes,
            "labels": indices (N,)}` and, for rows with masks, `"masks": tv_tensors.Mask` (N, H, W), so that
            `v2.SanitizeBoundingBoxes()` works without changes; or an Albumentations `Compose` with `bbox_params` in any
            format, whose label fields, if any, receive the indices, and `masks` the masks.
        resizes: the transform resizes images to the training resolution. The row then has `resized`, and
            `DetectionCollator` does not resize it again.
        min_side: in pixels of the new image.
        few_sizes: the transform yields few different image sizes. The expected duration of a run then excludes what
            PyTorch prepares once for each.
        one_size_per_batch: `DetectionCollator` resizes the images of a batch once more, to the size of one of them. The
            row then has `one_size_per_batch`. Only with `resizes`.

    Raises:
        ValueError: an Albumentations transform has no `bbox_params`; a box of the row is invalid or outside its image;
            a transform returns boxes without their labels or masks.
    """

    def __init__(
        self,
        transform: Callable[..., Any],
        *,
        resizes: bool = False,
        min_side: float = 1.0,
        few_sizes: bool = False,
        one_size_per_batch: bool = False,
    ) -> None:
        if one_size_per_batch and not resizes:
            raise ValueError("`one_size_per_batch` needs `resizes`: all other images are resized by the processor.")
        self.transform = transform
        self.resizes = resizes
        self.few_sizes = few_sizes
        self.one_size_per_batch = one_size_per_batch
        self.min_side = min_side
        self._albumentations = any(c.__module__.split(".")[0] == "albumentations" for c in type(transform).__mro__)
        if self._albumentations and "bboxes" not in getattr(transform, "processors", {}):
            raise ValueError(
                "This Albumentations transform does not transform boxes. Use "
                'A.Compose([...], bbox_params=A.BboxParams(format="coco")).'
            )

    def set_random_seed(self, seed: int) -> None:
        """Seed the generators of Albumentations; torchvision uses the global one of PyTorch."""
        if self._albumentations:
            self.transform.set_random_seed(seed)  # type: ignore[attr-defined]

    def __call__(self, row: Row) -> Row:
        image, objects = image_of(row), row["objects"]
        height, width = image.shape[-2:]
        before = clip_boxes(to_boxes(objects["bbox"]), height, width)
        masks = decode_masks(objects["mask"], (height, width)) if "mask" in objects else None
        apply = self._apply_albumentations if self._albumentations else self._apply_torchvision
        image, after, indices, masks = apply(image, before, masks)
        if len(indices) != len(after):
            raise ValueError(
                f"Image {row.get('image_id')}: the transform returned {len(after)} boxes but {len(indices)} labels. It "
                "must drop and reorder both in the same way, as v2.SanitizeBoundingBoxes does."
            )
        height, width = F.get_size(image)
        after = clip_boxes(after, height, width)
        if masks is not None:
            if masks.shape != (len(indices), height, width):
                raise ValueError(
                    f"Image {row.get('image_id')}: the transform returned masks {tuple(masks.shape)}, but there are "
                    f"{len(indices)} boxes and {height} x {width} pixels. It must change masks as it changes both."
                )
            counts = encode_masks(masks)
            areas = mask_areas(counts, (height, width))
            after = _boxes_of_visible_parts(after, counts, areas, (height, width))
        with np.errstate(divide="ignore", invalid="ignore"):  # of boxes that are dropped for their size
            growth = after[:, 2:].prod(axis=1) / before[indices, 2:].prod(axis=1)
        kept = [i for i, (*_, w, h) in enumerate(after.tolist()) if w > 0 and h > 0 and min(w, h) >= self.min_side]
        sources = [indices[i] for i in kept]
        changed = {key: [values[index] for index in sources] for key, values in objects.items()}
        changed["bbox"] = after[kept].tolist()
        if masks is not None:
            changed["mask"] = [counts[i] for i in kept]
            changed["area"] = [float(areas[i]) for i in kept]
        elif "area" in changed:
            changed["area"] = [a * g for a, g in zip(changed["area"], growth[kept].tolist(), strict=True)]
        new = row | {"image": image, "width": width, "height": height, "objects": changed}
        if self.one_size_per_batch:
            new["one_size_per_batch"] = True
        return new | {"resized": True} if self.resizes else new

    def _apply_torchvision(
        self, image: Tensor, boxes: Boxes, masks: Tensor | None
    ) -> tuple[Any, Boxes, list[int], Tensor | None]:
        height, width = image.shape[-2:]
        with_masks = {} if masks is None else {"masks": tv_tensors.Mask(masks.view(torch.uint8))}
        sample = self.transform(
            {
                "image": tv_tensors.Image(image),
                "boxes": tv_tensors.BoundingBoxes(  # type: ignore[call-overload]
                    torch.from_numpy(boxes), format="XYWH", canvas_size=(height, width)
                ),
                "labels": torch.arange(len(boxes)),
                **with_masks,
            }
        )
        if masks is not None and "masks" not in sample:
            raise ValueError("The transform returned no masks. It must return all it is given.")
        new, out = sample["image"], sample["boxes"]
        if not isinstance(out, tv_tensors.BoundingBoxes):
            raise ValueError(
                "The transform returned boxes as a plain tensor, for example because it indexed them. It must return "
                "tv_tensors.wrap(new_boxes, like=boxes)."
            )
        out = F.convert_bounding_box_format(out, new_format=tv_tensors.BoundingBoxFormat.XYWH)
        new = new.as_subclass(Tensor) if isinstance(new, Tensor) else new
        masks = None if masks is None else sample["masks"].as_subclass(Tensor).bool()
        after = out.as_subclass(Tensor).detach().cpu().double().numpy()
        return new, after, sample["labels"].tolist(), masks

    def _apply_albumentations(
        self, image: Tensor, boxes: Boxes, masks: Tensor | None
    ) -> tuple[Any, Boxes, list[int], Tensor | None]:
        params = self.transform.processors["bboxes"].params  # type: ignore[attr-defined]
        box_format = ALBUMENTATIONS_FORMATS[params.format]
        given = box_convert(torch.from_numpy(boxes), "xywh", box_format) / _albumentations_scale(params.format, image)
        indices = np.arange(len(boxes))
        options = {field: indices.tolist() for field in params.label_fields or ()}
        if masks is not None and len(masks):
            options["masks"] = list(masks.view(torch.uint8).numpy())
        result = self.transform(
            image=np.ascontiguousarray(image.permute(1, 2, 0).numpy()),
            bboxes=np.column_stack((given.numpy(), indices)),
            **options,
        )
        new, found = result["image"], np.asarray(result["bboxes"], dtype=np.float64).reshape(-1, 5)
        if isinstance(new, np.ndarray):
            new = torch.from_numpy(new).permute(2, 0, 1)
        out = torch.from_numpy(found[:, :4]) * _albumentations_scale(params.format, new)
        kept = found[:, 4].astype(int).tolist()
        if masks is not None:  # Albumentations drops boxes, and no masks
            size = F.get_size(new)
            changed = [torch.as_tensor(result["masks"][index]).bool() for index in kept]
            masks = torch.stack(changed) if changed else torch.zeros((0, *size), dtype=torch.bool)
        return new, box_convert(out, box_format, "xywh").numpy(), kept, masks


def image_of(row: Row) -> Tensor:
    """The image of a row as a tensor (C, H, W): RGB, unless it is a `tv_tensors.Image`, which stays as it is.

    Raises:
        ValueError: a box of the row is invalid or outside its image.
    """
    image: Tensor = row["image"] if isinstance(row["image"], tv_tensors.Image) else to_image_tensor(row["image"])
    for number, bbox in enumerate(row["objects"]["bbox"]):
        problem = box_problem(bbox, (image.shape[-2], image.shape[-1]))
        if problem:
            raise ValueError(f"Image {row.get('image_id')}, object {number}, bbox {bbox}: {problem[1]}.")
    return image


def _boxes_of_visible_parts(boxes: Boxes, counts: list[str], areas: list[int], size: tuple[int, int]) -> Boxes:
    """Boxes (N, 4) xywh in which those that reach the edge of the image of this (height, width) are replaced by the
    boxes of their masks, and those of masks without pixels by boxes without area."""
    height, width = size
    visible = np.array(areas, dtype=np.int64) > 0
    x, y, right, bottom = corners_of(boxes).T
    at_edge = (x < 1) | (y < 1) | (right > width - 1) | (bottom > height - 1)
    return np.where((visible & ~at_edge)[:, None], boxes, to_boxes(mask_boxes(counts, size)))


def _albumentations_scale(name: str, image: Any) -> Tensor:
    """What to divide boxes in pixels by, (4,): the image size for the formats that are relative to the image."""
    height, width = F.get_size(image)
    return torch.tensor([width, height] * 2 if name in ("yolo", "albumentations") else [1, 1, 1, 1])
