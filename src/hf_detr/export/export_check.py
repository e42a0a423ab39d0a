"""Comparison of an export with its model over a grid of batch sizes, image sizes and padding that excludes the shape it
was traced with."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..model.mask_encoding import NO_MASK
from ..model.post_processing import best_detections

if TYPE_CHECKING:
    from ..model.modeling_hf_detr import DetrForDetection
    from .exported_model import ExportedDetr

TOLERANCE = 1e-4  # for float32
TOLERANCE_FLOAT16 = 0.05  # its usual differences are 0.001 to 0.005
# Proposals that may be others; of models that had hardly learned, up to 0.09 and 0.26 were
REPLACED_FLOAT16 = 0.15  # fraction of the queries of all images together
REPLACED_OF_IMAGE = 0.4  # largest fraction of the queries of one image
COMPARED = ("logits", "pred_boxes", "pred_masks", "scores", "boxes")


@dataclass(frozen=True)
class Case:
    """A batch of `batch` random images of `height` x `width` pixels; if `padded`, images of different smaller sizes
    padded to it."""

    batch: int
    height: int
    width: int
    padded: bool

    def inputs(self, channels: int) -> tuple[Tensor, Tensor]:
        """`pixel_values` and `pixel_mask`, deterministic."""
        generator = torch.Generator().manual_seed(self.batch * self.height + self.width)
        pixel_values = torch.randn(self.batch, channels, self.height, self.width, generator=generator)
        pixel_mask = torch.zeros(self.batch, self.height, self.width, dtype=torch.int64)
        for index in range(self.batch):
            rows = self.height - (index + 1) * self.height // 6 if self.padded else self.height
            columns = self.width - (self.batch - index) * self.width // 7 if self.padded else self.width
            pixel_mask[index, :rows, :columns] = 1
        return pixel_values * pixel_mask[:, None], pixel_mask


def check_cases(stride: int, working_size: tuple[int, int], shape: tuple[int, int, int] | None = None) -> list[Case]:
    """Small sizes of a few feature map locations, most of them not multiples of the stride, and the working size.

    Args:
        stride: of the backbone.
        working_size: (height, width) of a typical image after the processor's resize.
        shape: the only batch size, height and width of the graph: then this one, and smaller and larger batches of
            smaller images, which the export pads.
    """
    if shape is not None:
        batch, height, width = shape
        smaller = (max(1, height * 4 // 5), max(1, width * 2 // 3))
        return [Case(batch, height, width, False), Case(batch, height, width, True), Case(batch + 1, *smaller, True)]
    unit = max(stride, 32)
    sizes = [(5 * unit, 3 * unit), (3 * unit - 5, 7 * unit + 1), (6 * unit + 9, 5 * unit - 3)]
    cases = [Case(n, *size, padded) for size in sizes for n in (1, 2, 3) for padded in (False, True)]
    return [*cases, Case(1, *working_size, False), Case(2, *working_size, True)]


@dataclass
class CheckResult:
    """Maximum absolute differences between the outputs of an export and its model, divided by the largest absolute
    value of the tensor if that exceeds 1. `boxes` are compared relative to the image size.

    Attributes:
        cases: each case with the difference of each output.
        unpadded, padded: maximum over the cases without and with padding.
    """

    cases: list[dict[str, Any]]
    unpadded: float
    padded: float

    def passes(self, tolerance: float = TOLERANCE) -> bool:
        return self.unpadded <= tolerance and self.padded <= tolerance

    def record(self, tolerance: float | None) -> dict[str, Any]:
        """The entry in `export.json`."""
        largest = max(self.unpadded, self.padded)
        return {"tolerance": tolerance, "largest_difference": largest, "cases": self.cases}

    def worst(self) -> str:
        case = max(self.cases, key=lambda row: max(row[name] for name in COMPARED if name in row))
        return f"The worst case: {case}."

    def summary(self) -> str:
        padded = f", {self.padded:.1e} with" if any(case["padded"] for case in self.cases) else ""
        return f"{len(self.cases)} cases, largest difference {self.unpadded:.1e} without padding{padded}"


@torch.no_grad()
def compare(
    exported: "ExportedDetr", model: "DetrForDetection", cases: list[Case], *, replaced: float = 0.0
) -> CheckResult:
    """Run an export and its model on the same batches. Queries that are proposals, which the rounding of their scores
    may reorder, are compared with those that they are closest to.

    Args:
        model: in eval mode, float32, on the CPU.
        replaced: fraction of all proposals that may be other ones, and are not compared: rounding decides a tie for the
            last places, and which of two overlapping proposals comes first, which changes what both predict.
    """
    compared: Iterable[tuple[Outputs, Outputs]] = (_outputs(exported, model, case) for case in cases)
    if model.config.query_proposals:
        compared = _paired(list(compared), replaced)
    rows, worst = [], {False: 0.0, True: 0.0}
    for case, (found, expected) in zip(cases, compared, strict=True):
        differences = {name: _difference(found[name], value) for name, value in expected.items()}
        worst[case.padded] = max(worst[case.padded], *differences.values())
        rows.append(asdict(case) | differences)
    return CheckResult(rows, worst[False], worst[True])


Outputs = dict[str, Tensor]  # each (B, Q, ...), or (M, ...) of the M queries that are compared


def _outputs(exported: "ExportedDetr", model: "DetrForDetection", case: Case) -> tuple[Outputs, Outputs]:
    """Of the export and of the model."""
    pixel_values, pixel_mask = case.inputs(model.config.num_channels)
    theirs = exported(pixel_values, pixel_mask)
    ours = model(pixel_values=pixel_values, pixel_mask=pixel_mask)
    expected = {"logits": ours.logits, "pred_boxes": ours.pred_boxes}
    if exported.export["post_processing"]:
        best = best_detections(ours)
        # rounding decides the order of equal scores, where detections are ranked
        expected |= {"scores": best.scores} | ({"boxes": best.boxes} if model.config.has_no_object else {})
    if exported.has_masks:
        sizes, wanted_sizes = theirs["mask_sizes"], ours["mask_sizes"]
        if not torch.equal(sizes, wanted_sizes):
            raise ValueError(f"The sizes of masks differ: {sizes.tolist()} and {wanted_sizes.tolist()}.")
        height, width = sizes.amax(0).tolist()  # a graph of one shape has more, all of it padding
        masks = [output["pred_masks"][..., :height, :width] for output in (theirs, ours)]
        padding = (masks[0] <= NO_MASK) & (masks[1] <= NO_MASK)  # the largest values, which tell nothing
        theirs["pred_masks"], expected["pred_masks"] = (part.masked_fill(padding, 0) for part in masks)
    return {name: theirs[name] for name in expected}, expected


def _paired(compared: list[tuple[Outputs, Outputs]], replaced: float) -> list[tuple[Outputs, Outputs]]:
    """Each query beside the one that it is closest to. The fraction `replaced` of all queries, those that differ most,
    is excluded, but at most `REPLACED_OF_IMAGE` of each image, and none if an output is not finite."""
    pairs = [_closest(found, expected) for found, expected in compared]  # rows, columns, costs
    costs = torch.cat([costs.flatten() for *_, costs in pairs]).sort().values
    limit = costs[len(costs) - 1 - math.floor(replaced * len(costs))]
    if any(not values.isfinite().all() for found, _ in compared for values in found.values()):
        limit = torch.tensor(math.inf)
    result = []
    for (found, expected), (rows, columns, of_case) in zip(compared, pairs, strict=True):
        least = of_case.sort(1).values[:, math.ceil((1 - REPLACED_OF_IMAGE) * of_case.shape[1]) - 1]
        image, at = (of_case <= torch.maximum(limit, least)[:, None]).nonzero(as_tuple=True)
        result.append((_take(found, image, rows[image, at]), _take(expected, image, columns[image, at])))
    return result


def _closest(found: Outputs, expected: Outputs) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of queries of each image: their numbers in both outputs and how much they differ, each (B, Q)."""
    scale = expected["logits"].abs().max().clamp(min=1)
    ours, theirs = (torch.cat((o["logits"] / scale, o["pred_boxes"]), dim=-1).float() for o in (expected, found))
    costs = torch.cdist(theirs, ours, p=math.inf).nan_to_num(nan=1e6, posinf=1e6)
    assigned = [linear_sum_assignment(of_image.numpy()) for of_image in costs]
    rows, columns = (torch.stack([torch.as_tensor(pair[axis]) for pair in assigned]) for axis in (0, 1))
    return rows, columns, costs[torch.arange(len(costs))[:, None], rows, columns]


def _take(outputs: Outputs, image: Tensor, query: Tensor) -> Outputs:
    return {name: values[image, query] for name, values in outputs.items()}


def _difference(found: Tensor, expected: Tensor) -> float:
    largest = (found - expected).abs().max() / expected.abs().max().clamp(min=1)
    return float(largest.nan_to_num(nan=math.inf))
