"""Why this box: does the detection depend on where the query looked? A deletion and insertion test (RISE, arXiv
1806.07421; for detectors D-RISE, arXiv 2006.03204)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.ops import box_convert, box_iou
from torchvision.transforms.v2.functional import gaussian_blur
from tqdm import tqdm

from ..model.image_processing_hf_detr import DetrImageProcessor
from ..model.modeling_hf_detr import DetrForDetection
from ..model.post_processing import class_probabilities
from ..runtime.extras import import_extra
from .attention_maps import AttentionMaps, attention_maps, predict_image, read_image
from .draw import CORNERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUR = 1 / 10  # standard deviation, as a fraction of the shorter side; at least half a location


@dataclass(frozen=True)
class Explanation:
    """The result of [`explain`]. Curves are scores of the detection divided by its score in the unblurred image, so all
    start at 1. S is the number of steps + 1, R that of random orders.

    Args:
        maps: the attention of the image.
        index: of the detection in `maps.detections`.
        fractions: (S,), the fraction of the image that is blurred, from 0 to 1.
        highest_first: (S,), the curve if locations with the highest attention are blurred first.
        lowest_first: (S,), the curve if locations with the lowest attention are blurred first.
        random: (R, 2, S), the curves of random orders, each followed by that of its reverse.
    """

    maps: AttentionMaps
    index: int
    fractions: Tensor
    highest_first: Tensor
    lowest_first: Tensor
    random: Tensor

    @property
    def detection(self) -> dict[str, Any]:
        return self.maps.detections[self.index]

    @property
    def insertion(self) -> Tensor:
        """(S,), the insertion curve: from the blurred image, locations are restored in order of decreasing attention.
        It equals `lowest_first` reversed."""
        return self.lowest_first.flip(0)

    @property
    def faithfulness(self) -> float:
        """Area under `lowest_first` minus area under `highest_first`: 0 if attention is no better than a random order,
        at most `1 - 1 / steps` while the curves stay between 0 and 1. Blurring can also raise a score above 1."""
        return _area(self.fractions, self.lowest_first) - _area(self.fractions, self.highest_first)

    @property
    def random_faithfulness(self) -> list[float]:
        """The same number of each random order: around 0."""
        return [_area(self.fractions, last) - _area(self.fractions, first) for first, last in self.random]

    @property
    def is_explained(self) -> bool:
        """Whether faithfulness exceeds that of every random order and its reverse."""
        return self.faithfulness > max(abs(value) for value in self.random_faithfulness)

    def describe(self) -> str:
        """The result in a sentence."""
        chance = max(abs(value) for value in self.random_faithfulness)
        name = f"{self.detection['label']} {self.detection['score']:.2f}"
        if self.is_explained:
            return f"{name}: faithfulness {self.faithfulness:.2f}, random orders reach {chance:.2f}."
        return (
            f"{name}: faithfulness {self.faithfulness:.2f}, no more than random orders ({chance:.2f}). Attention does "
            "not show what this detection depends on."
        )

    def draw(self) -> Image.Image:
        """The attention of the detection over the image."""
        return self.maps._heat_of(self.index, None)

    def figure(self) -> "Figure":
        """The attention, and the curves.

        Raises:
            ImportError: matplotlib is not installed.
        """
        figure_class = import_extra("matplotlib.figure", "visualization").Figure
        figure: Figure = figure_class(figsize=(13, 4), layout="constrained")
        picture, deletion, insertion = figure.subplots(1, 3)
        picture.imshow(self.draw())
        picture.set_axis_off()
        chance = self.random.flatten(0, 1)
        for axes, highest, lowest, random in (
            (deletion, self.highest_first, self.lowest_first, chance),
            (insertion, self.insertion, self.highest_first.flip(0), chance.flip(1)),
        ):
            axes.plot(self.fractions, highest, color="C3", label="highest attention first")
            axes.plot(self.fractions, lowest, color="C0", label="lowest first")
            axes.plot(self.fractions, random.mean(0), color="grey", linestyle="--", label="random, mean")
            spread = random.amin(0), random.amax(0)
            axes.fill_between(self.fractions, *spread, color="grey", alpha=0.2, label="random, range")
            axes.set_ylim(0, max(1.05, float(highest.max()), float(lowest.max())))
            axes.set_ylabel("score relative to the unblurred image")
            axes.legend(fontsize="small")
        deletion.set_xlabel("fraction of the image blurred (deletion)")
        insertion.set_xlabel("fraction of the image sharp (insertion)")
        figure.suptitle(self.describe(), fontsize="medium")
        return figure


def _area(fractions: Tensor, curve: Tensor) -> float:
    return float(torch.trapezoid(curve, fractions))


@torch.no_grad()
def explain(
    model: DetrForDetection,
    image: Any,
    processor: DetrImageProcessor,
    detection: int | Mapping[str, Any] = 0,
    *,
    threshold: float = 0.5,
    steps: int = 8,
    random_orders: int = 4,
    batch_size: int = 8,
    seed: int = 0,
    progress: bool = True,
) -> Explanation:
    """Test whether the cross-attention of a detection shows what the detection depends on.

    The image is blurred step by step in several orders: the locations with the highest attention first, those with the
    lowest first, and random orders with their reverses. Each step blurs another `1 / steps` of the locations, and the
    detection is scored: `max over queries of p(class) · IoU(box, detected box)`, divided by the score of the unblurred
    image. If attention explains the detection, the score falls early in the first order and late in the second. This
    takes `(steps - 1) · (2 + 2 · random_orders) + 2` images, 72 by default, and one pass for the attention.

    Args:
        image: as for [`attention_maps`].
        detection: its index, 0 for the most confident, or a result of `pipeline("object-detection")` for this image,
            which selects the detection of the same label with the largest IoU, at least 0.5.
        threshold: detections with a higher score can be selected, as in [`attention_maps`].
        steps: number of equal steps from the sharp to the fully blurred image.
        random_orders: number of random orders to compare with; each is also used in reverse.
        batch_size: blurred images per forward pass.
        seed: of the random orders.

    Raises:
        ValueError: there is no such detection, its box has no area, the model returns no attention weights, or a number
            is below 1.
    """
    if min(steps, random_orders, batch_size) < 1:
        raise ValueError("`steps`, `random_orders` and `batch_size` must be at least 1.")
    maps = attention_maps(model, image, processor, threshold=threshold)
    index = _index_of(detection, maps)
    order = maps.of_detection(index).flatten().argsort(descending=True, stable=True)
    generator = torch.Generator().manual_seed(seed)
    orders = [order, order.flip(0)]
    for _ in range(random_orders):
        shuffled = torch.randperm(len(order), generator=generator)
        orders += [shuffled, shuffled.flip(0)]

    sharp = read_image(image, processor)[1]  # (1, C, H, W)
    blurred = _blur(sharp, maps.cross_attention.shape[-2])
    counts = torch.linspace(0, len(order), steps + 1).round().long()
    size = tuple(maps.cross_attention.shape[-2:])
    scores: list[Tensor] = []
    total = len(orders) * (steps - 1) + 2
    with tqdm(total=total, desc="Blurred images", disable=not progress, leave=False) as bar:
        masks = _masks(orders, counts.tolist(), size)
        while batch := list(islice(masks, batch_size)):
            area = interpolate(torch.stack(batch)[:, None].float(), size=sharp.shape[-2:])
            outputs = predict_image(model, sharp * (1 - area) + blurred * area)
            scores.append(_similarity(outputs, maps.detections[index], maps.label2id, maps.image.size))
            bar.update(len(batch))
    values = torch.cat(scores)
    if not values[0] > 0:
        raise ValueError(f"Detection {index} has a box without area, or a score of 0; nothing can be tested.")
    values = values / values[0]
    inner = values[2:].unflatten(0, (len(orders), steps - 1))
    ends = values[0].expand(len(orders), 1), values[1].expand(len(orders), 1)
    curves = torch.cat((ends[0], inner, ends[1]), dim=1)
    return Explanation(
        maps, index, counts / len(order), curves[0], curves[1], curves[2:].unflatten(0, (random_orders, 2))
    )


def _index_of(detection: int | Mapping[str, Any], maps: AttentionMaps) -> int:
    found = maps.detections
    if isinstance(detection, int):
        if not 0 <= detection < len(found):
            raise ValueError(
                f"There are {len(found)} detections, no number {detection}. Lower `threshold` to get more."
            )
        return detection
    alike = [index for index, other in enumerate(found) if other["label"] == detection["label"]]
    if not alike:
        raise ValueError(f"No detection of {detection['label']!r} was found. Check the label, or lower `threshold`.")
    corners = [[d["box"][key] for key in CORNERS] for d in (detection, *(found[i] for i in alike))]
    overlaps = box_iou(torch.tensor(corners[:1], dtype=torch.float32), torch.tensor(corners[1:]))[0]
    if overlaps.max() < 0.5:
        raise ValueError(
            f"No detection of {detection['label']!r} has an IoU of at least 0.5 with this box. Check that it is from "
            "this image, or lower `threshold`."
        )
    return alike[int(overlaps.argmax())]


def _blur(image: Tensor, rows: int) -> Tensor:
    """Gaussian blur in two passes, rows and columns: torchvision's kernel is the whole square."""
    deviation = max(BLUR * min(image.shape[-2:]), 0.5 * image.shape[-2] / rows)
    radius = min(round(3 * deviation), min(image.shape[-2:]) - 1)
    length = 2 * radius + 1
    for kernel in ([length, 1], [1, length]):
        image = gaussian_blur(image, kernel, [deviation] * 2)
    return image


def _masks(orders: list[Tensor], counts: list[int], size: tuple[int, ...]) -> Iterator[Tensor]:
    """Which locations are blurred, (h, w) bool: none, all, and each order with as many as `counts` between."""
    for full in (False, True):
        yield torch.full(size, full)
    for order in orders:
        for count in counts[1:-1]:
            mask = torch.zeros(len(order), dtype=torch.bool)
            mask[order[:count]] = True
            yield mask.view(size)


def _similarity(outputs: Any, target: Mapping[str, Any], label2id: Mapping[str, int], size: tuple[int, int]) -> Tensor:
    """(B,), how much each image has of the detection; `size` is (width, height) of the image in pixels."""
    probabilities = class_probabilities(outputs)[..., label2id[target["label"]]].cpu()  # (B, Q)
    width, height = size
    box = torch.tensor([[target["box"][key] for key in CORNERS]])
    box = box / torch.tensor([width, height, width, height])
    boxes = box_convert(outputs.pred_boxes.float().cpu(), "cxcywh", "xyxy").clamp(0, 1)
    overlap = box_iou(boxes.flatten(0, 1), box)[:, 0].view(probabilities.shape)
    return (probabilities * overlap).amax(1)
