"""What the loss does not tell: how training goes, in numbers an expert looks at, and in words when it is stuck."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model.boxes import cxcywh_to_xyxy, iou
from ..model.matcher import hungarian_matching
from ..model.modeling_hf_detr import DetrForDetection

CONFIDENT = 0.3  # score from which a prediction counts as said
SAME_OBJECT = 0.6  # IoU from which two predictions of a class mean the same object
PATIENCE = 4  # looks without progress before training counts as stuck
PROGRESS = 0.01  # of AP50


class TrainingProbe:
    """Looks at the same training images, as they are, again and again, and says what has changed.

    Args:
        rows: some training images without augmentation; a few dozen will do.
        collate: makes a batch of them, as for training.

    All figures are means over the objects (queries, predictions) of these images:

    - `matched_iou`: IoU of an object and the box of the query that is matched to it;
    - `class_error`: share of those queries whose likeliest class is another;
    - `changed_matches`: share of objects that another query answers for than at the last look; DN-DETR (arXiv
      2203.01305, section 3.1) shows why DETR is slow by this number;
    - `never_matched`: share of queries that no object was matched to at any look;
    - `duplicates`: share of predictions with a score of 0.3 or more that repeat a better one of the same class.
    """

    def __init__(
        self, rows: Sequence[Any], collate: Callable[[Sequence[Any]], Mapping[str, Any]], batch_size: int
    ) -> None:
        self.rows, self.collate, self.batch_size = rows, collate, batch_size
        self.last: Tensor | None = None  # query of each object, at the last look
        self.ever: Tensor | None = None  # (Q,), which queries were matched so far

    @torch.no_grad()
    def look(self, model: DetrForDetection) -> dict[str, float]:
        """The figures by name; `changed_matches` from the second look on. `model` is the plain [`DetrForDetection`],
        not what Accelerate wraps around it, and keeps its mode. One process is enough; it waits for no other."""
        mode, config = model.training, model.config
        model.eval()
        queries, overlaps, wrong, said, repeated = [], [], [], 0, 0
        for start in range(0, len(self.rows), self.batch_size):
            batch = self.collate([self.rows[i] for i in range(start, min(start + self.batch_size, len(self.rows)))])
            device = next(model.parameters()).device
            inputs = {name: batch[name].to(device) for name in ("pixel_values", "pixel_mask") if name in batch}
            outputs = model(**inputs)
            logits, boxes = outputs.logits.float(), outputs.pred_boxes.float()
            labels = batch["labels"]
            classes = torch.cat([label["class_labels"] for label in labels]).to(device)
            objects = torch.cat([label["boxes"] for label in labels]).to(boxes)
            counts = [len(label["class_labels"]) for label in labels]
            image, query, target = hungarian_matching(
                logits[None],
                boxes[None],
                classes,
                objects,
                counts,
                class_cost=config.class_cost,
                bbox_cost=config.bbox_cost,
                giou_cost=config.giou_cost,
                class_loss=config.class_loss,
            )
            answer = torch.full((len(classes),), -1, device=device)
            answer[target[0]] = query[0]
            queries.append(answer.cpu())
            found = cxcywh_to_xyxy(boxes[image, query[0]])
            overlaps.append(iou(found, cxcywh_to_xyxy(objects[target[0]])).cpu())
            wrong.append((logits[image, query[0], :-1].argmax(-1) != classes[target[0]]).cpu())
            count = count_duplicates(logits, boxes)
            said, repeated = said + count[0], repeated + count[1]
        model.train(mode)
        now = torch.cat(queries)
        ever = torch.zeros(config.num_queries, dtype=torch.bool) if self.ever is None else self.ever
        ever[now[now >= 0]] = True
        figures = {
            "matched_iou": _mean(torch.cat(overlaps)),
            "class_error": _mean(torch.cat(wrong).float()),
            "never_matched": 1 - _mean(ever.float()),
            "duplicates": repeated / max(said, 1),
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


def count_duplicates(logits: Tensor, boxes: Tensor) -> tuple[int, int]:
    """How many predictions have a score of at least 0.3, and how many of them repeat one of the same image and class
    with a higher score, with an IoU of at least 0.6. Logits (B, Q, num_labels+1), boxes (B, Q, 4) cxcywh."""
    scores, classes = logits.softmax(-1)[..., :-1].max(-1)  # (B, Q)
    said = scores >= CONFIDENT
    corners = cxcywh_to_xyxy(boxes)
    same = (classes[:, :, None] == classes[:, None]) & (iou(corners[:, :, None], corners[:, None]) >= SAME_OBJECT)
    better = (scores[:, None] > scores[:, :, None]) & said[:, None]  # [b, i, j]: j is better than i
    return int(said.sum()), int((same & better & said[:, :, None]).any(2).sum())


def hint(history: Sequence[Mapping[str, float]], *, query_type: str, stride: int) -> str | None:
    """What to try, in plain words, if training is stuck; None if it is not.

    Args:
        history: the epochs so far that were evaluated, oldest first, each with `AP50` and the figures of
            [`TrainingProbe`]. Stuck: `AP50` is below 0.5 and the last four are no better than what was before.
        query_type, stride: of the model.
    """
    if len(history) <= PATIENCE:
        return None
    before = max(line["AP50"] for line in history[:-PATIENCE])
    now = history[-1]
    if max(line["AP50"] for line in history[-PATIENCE:]) > before + PROGRESS or before >= 0.5:
        return None
    return f"AP50 has stayed at {now['AP50']:.2f} for {PATIENCE} evaluations. {_reason(now, query_type, stride)}"


def _reason(now: Mapping[str, float], query_type: str, stride: int) -> str:
    overlap, wrong, changed = now["matched_iou"], now["class_error"], now.get("changed_matches", 0.0)
    settle = "Lower --learning_rate"
    if query_type == "learned":
        settle += ", or train a new model with anchors (without --model), which give every query a place of its own"
    finer = f", or --set feature_stride={stride // 2}" if stride > 8 else ""
    reasons = (
        (
            changed > 0.5,
            f"{changed:.0%} of the objects are answered by another query at each look: the matching does not settle. "
            f"{settle}.",
        ),
        (
            now["duplicates"] > 0.3,
            f"{now['duplicates']:.0%} of the predictions repeat another: the queries do not yet know of each other. "
            "Train longer, or lower --learning_rate.",
        ),
        (
            overlap >= 0.7 and wrong <= 0.1,
            f"Training images: boxes (IoU {overlap:.2f}) and classes ({wrong:.0%} wrong) are right, so it has "
            "learned these by heart: it needs more images or stronger augmentation, or the validation labels mean "
            "something else (examples/check_dataset.py compares them).",
        ),
        (
            overlap >= 0.6 and wrong > 0.3,
            f"Boxes fit (IoU {overlap:.2f}) but {wrong:.0%} of the classes are wrong: look at the labels "
            "(examples/check_dataset.py), and at classes that look alike or are rare.",
        ),
        (
            now["never_matched"] > 0.7,
            f"{now['never_matched']:.0%} of the queries were never matched to anything. Fewer learn faster: "
            "--set num_queries=...",
        ),
        (
            overlap < 0.6,
            f"Boxes do not fit (IoU {overlap:.2f}): objects may be too small for the feature map (a larger "
            f"--image_size{finer}), or the learning rate too low or too high. Try --overfit 8.",
        ),
    )
    unknown = "Nothing is plainly wrong: train longer, or try --overfit 8 to see whether the model can learn at all."
    return next((reason for applies, reason in reasons if applies), unknown)


def explain_overfit(
    history: Sequence[Mapping[str, float]], *, object_pixels: float, stride: int, most_objects: int, num_queries: int
) -> str:
    """Why a model cannot learn a few images by heart, which every sound set-up can.

    Args:
        history: the evaluations, oldest first, each with `loss`, `AP50` and the figures of [`TrainingProbe`].
        object_pixels: a quarter of the objects has smaller sides, in pixels that the model sees.
        stride: pixels a cell of the feature map.
    """
    now, losses = history[-1], [line["loss"] for line in history]
    overlap, wrong = now["matched_iou"], now["class_error"]
    half = losses[len(losses) // 2]
    reasons = []
    if most_objects > num_queries:
        reasons.append(
            f"Sizes: an image has {most_objects} objects, but the model {num_queries} queries: --set num_queries="
            f"{2 * most_objects}."
        )
    if losses[-1] > 1.1 * min(losses) or losses[-1] > losses[0]:
        reasons.append(
            f"Learning rate: the loss went up again, from {min(losses):.2f} to {losses[-1]:.2f}. Lower --learning_rate."
        )
    elif losses[-1] < 0.8 * half:
        reasons.append(
            f"Time: the loss was still falling, from {half:.2f} to {losses[-1]:.2f} in the second half. Raise "
            "--learning_rate, or allow more --epochs."
        )
    if object_pixels < stride and overlap < 0.75:
        reasons.append(
            f"Sizes: a quarter of the objects is smaller than {object_pixels:.0f} pixels, with {stride} pixels a cell "
            "of the feature map. A larger --image_size, or --set feature_stride=8."
        )
    if wrong > 0.1 and overlap >= 0.6:
        reasons.append(
            f"Labels: boxes fit (IoU {overlap:.2f}), but {wrong:.0%} of the classes are wrong even here. The same "
            "thing may have different names; python examples/check_dataset.py looks for it."
        )
    if wrong <= 0.1 and overlap < 0.6:
        reasons.append(
            f"Labels: the classes are learned, but not the boxes (IoU {overlap:.2f}). They may not lie where the "
            "objects are: look at validation.png, where the true ones are white."
        )
    return " ".join(reasons) or (
        f"IoU {overlap:.2f}, {wrong:.0%} of the classes wrong, loss {losses[-1]:.2f}. Look at validation.png, and try "
        "another --learning_rate."
    )
