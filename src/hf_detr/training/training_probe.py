"""Figures of a few training images that show why training is slow or stuck, which the loss does not."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_convert

from ..model.boxes import iou
from ..model.matcher import hungarian_matching
from ..model.modeling_hf_detr import DetrForDetection
from ..model.post_processing import class_probabilities
from ..model.segmentation import DetrForSegmentation

MIN_SCORE = 0.3  # of predictions that are checked for duplicates
DUPLICATE_IOU = 0.6  # from which two predictions of a class are duplicates


FIGURES = ("matched_iou", "class_error", "never_matched", "duplicates", "changed_matches")


class TrainingProbe:
    """Measures a model on the same training images, without augmentation, again and again.

    Args:
        rows: training images without augmentation; a few dozen are enough.
        collate: makes a batch of them, as for training.

    The figures, over all objects, queries or predictions of these images:

    - `matched_iou`: mean IoU of an object and the box of the query that is matched to it;
    - `class_error`: fraction of the matched queries whose most likely class is wrong;
    - `changed_matches`: fraction of the objects that are matched to another query than in the last measurement
      (matching instability, DN-DETR, arXiv 2203.01305, section 3.1);
    - `never_matched`: fraction of the queries that were not matched in any measurement (unused queries);
    - `duplicates`: fraction of the predictions with a score of at least 0.3 that repeat a better one of the same class.
    """

    def __init__(
        self, rows: Sequence[Any], collate: Callable[[Sequence[Any]], Mapping[str, Any]], batch_size: int
    ) -> None:
        self.rows, self.collate, self.batch_size = rows, collate, batch_size
        self.last: Tensor | None = None  # (N,) query of each object in the last measurement, -1 if unmatched
        self.ever: Tensor | None = None  # (Q,) which queries were matched so far

    @torch.no_grad()
    def measure(self, model: DetrForDetection) -> dict[str, float]:
        """The figures by name; `changed_matches` from the second measurement on. One process can call this alone.

        Args:
            model: not wrapped by Accelerate; it keeps its mode.
        """
        mode, config, device = model.training, model.config, next(model.parameters()).device
        model.eval()
        queries, overlaps, wrong, confident, repeated = [], [], [], 0, 0
        for start in range(0, len(self.rows), self.batch_size):
            batch = self.collate([self.rows[i] for i in range(start, min(start + self.batch_size, len(self.rows)))])
            no_masks = {"masks_above": 1.0} if isinstance(model, DetrForSegmentation) else {}
            images = {name: batch[name].to(device) for name in ("pixel_values", "pixel_mask") if name in batch}
            outputs = model(**images, **no_masks)
            logits, boxes = outputs.logits.float(), outputs.pred_boxes.float()
            probabilities = class_probabilities(outputs)
            labels = batch["labels"]
            classes = torch.cat([label["class_labels"] for label in labels]).to(device)
            objects = torch.cat([label["boxes"] for label in labels]).to(boxes)
            image, query, target = hungarian_matching(
                logits[None],
                boxes[None],
                classes,
                objects,
                [len(label["class_labels"]) for label in labels],
                class_cost=config.class_cost,
                bbox_cost=config.bbox_cost,
                giou_cost=config.giou_cost,
                class_loss=config.class_loss,
                class_activation=config.class_activation,
            )
            query_of_object = torch.full((len(classes),), -1, device=device)
            query_of_object[target[0]] = query[0]
            queries.append(query_of_object.cpu())
            predicted = box_convert(boxes[image, query[0]], "cxcywh", "xyxy")
            overlaps.append(iou(predicted, box_convert(objects[target[0]], "cxcywh", "xyxy")).cpu())
            wrong.append((probabilities[image, query[0]].argmax(-1) != classes[target[0]]).cpu())
            counts = count_duplicates(probabilities, boxes)
            confident, repeated = confident + counts[0], repeated + counts[1]
        model.train(mode)
        now = torch.cat(queries)
        ever = torch.zeros(config.num_predictions, dtype=torch.bool) if self.ever is None else self.ever
        ever[now[now >= 0]] = True
        figures = {
            "matched_iou": _mean(torch.cat(overlaps)),
            "class_error": _mean(torch.cat(wrong).float()),
            "never_matched": 1 - _mean(ever.float()),
            "duplicates": repeated / max(confident, 1),
        }
        if self.last is not None:
            figures["changed_matches"] = _mean((now != self.last).float())
        self.last, self.ever = now, ever
        return {name: round(value, 4) for name, value in figures.items()}

    def state_dict(self) -> dict[str, Tensor | None]:
        return {"last": self.last, "ever": self.ever}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        self.last, self.ever = state["last"], state["ever"]


def _mean(values: Tensor) -> float:
    return values.mean().item() if len(values) else 0.0


def count_duplicates(probabilities: Tensor, boxes: Tensor) -> tuple[int, int]:
    """The number of predictions with a score of at least 0.3, and of those among them that overlap (IoU at least 0.6)
    one of the same image and class with a higher score.

    Args:
        probabilities: (B, Q, num_labels).
        boxes: (B, Q, 4) cxcywh.
    """
    scores, classes = probabilities.max(-1)  # (B, Q)
    confident = scores >= MIN_SCORE
    corners = box_convert(boxes, "cxcywh", "xyxy")
    same = (classes[:, :, None] == classes[:, None]) & (iou(corners[:, :, None], corners[:, None]) >= DUPLICATE_IOU)
    better = (scores[:, None] > scores[:, :, None]) & confident[:, None]  # [b, i, j]: j is better than i
    return int(confident.sum()), int((same & better & confident[:, :, None]).any(2).sum())
