"""Advice in words where training is stuck, from the figures of the training probe."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..evaluation.coco_metrics import NOTHING
from ..runtime import listed, more_about

PATIENCE = 4  # evaluations without progress from which training counts as stuck
MIN_PROGRESS = 0.01  # of AP50
MEMORIZED_AP50 = 0.9  # from which a model has memorized the images of --overfit
STUCK_AP50 = 0.5  # training that was better than this before is not stuck


def training_advice(history: Sequence[Mapping[str, float]], *, query_type: str, stride: int) -> str | None:
    """What to try if training is stuck; None if it is not.

    Args:
        history: lines of the log with an evaluation, oldest first, each with `AP50` and the figures of
            [`TrainingProbe`]. Stuck: `AP50` is below 0.5 and the last four are no better than those before.
        query_type, stride: of the model.
    """
    if len(history) <= PATIENCE:
        return None
    before = max(line["AP50"] for line in history[:-PATIENCE])
    now = history[-1]
    if max(line["AP50"] for line in history[-PATIENCE:]) > before + MIN_PROGRESS or before >= STUCK_AP50:
        return None
    reason, symptom = _reason(now, query_type, stride)
    return f"AP50 has stayed at {now['AP50']:.2f} for {PATIENCE} evaluations. {reason} {more_about(symptom)}"


def _reason(now: Mapping[str, float], query_type: str, stride: int) -> tuple[str, str]:
    """The reason, and the symptom that it belongs to."""
    overlap, wrong, changed = now["matched_iou"], now["class_error"], now.get("changed_matches", 0.0)
    stabilize = "Lower --learning_rate"
    if query_type == "learned":
        stabilize += ", or train a new model with anchors (without --model), whose queries have fixed locations"
    finer = f", or --set feature_stride={stride // 2}" if stride > 8 else ""
    reasons = (
        (
            changed > 0.5,
            f"{changed:.0%} of the objects are matched to another query than in the last epoch: the matching is "
            f"unstable. {stabilize}.",
            "ap-is-0",
        ),
        (
            now["duplicates"] > 0.3,
            f"{now['duplicates']:.0%} of the predictions repeat another one: the queries do not suppress duplicates "
            "yet. Train longer, or lower --learning_rate.",
            "the-same-object-is-found-several-times",
        ),
        (
            overlap >= 0.7 and wrong <= 0.1,
            f"On training images boxes (IoU {overlap:.2f}) and classes ({wrong:.0%} wrong) are right: the model "
            "overfits and needs more images or stronger augmentation, or the validation images are labelled "
            "differently (examples/check_dataset.py compares them).",
            "good-on-training-images-bad-in-validation",
        ),
        (
            overlap >= 0.6 and wrong > 0.3,
            f"Boxes fit (IoU {overlap:.2f}), but {wrong:.0%} of the classes are wrong: check the labels "
            "(examples/check_dataset.py), and classes that look alike or are rare.",
            "a-class-is-never-found",
        ),
        (
            now["never_matched"] > 0.7,
            f"{now['never_matched']:.0%} of the queries were never matched to an object. Fewer queries are learned "
            "faster: --set num_queries=...",
            "ap-is-0",
        ),
        (
            overlap < 0.6,
            f"Boxes do not fit (IoU {overlap:.2f}): objects may be too small for the feature map (a larger "
            f"--image_size{finer}), or the learning rate too low or too high. Try --overfit 8.",
            "small-objects-are-missed",
        ),
    )
    unknown = "No figure stands out: train longer, or try --overfit 8 to see whether the model can learn at all."
    return next(((reason, symptom) for applies, reason, symptom in reasons if applies), (unknown, "ap-is-0"))


def has_memorized(history: Sequence[Mapping[str, float]]) -> bool:
    """Whether the model has memorized the boxes and masks of the images of `--overfit`; `history` as in
    [`explain_overfit`]. A number below 0 has nothing to measure; stuff has segments only."""
    numbers = _memorized_numbers(history[-1]).values() if history else ()
    return bool(numbers) and min(numbers) > MEMORIZED_AP50


def describe_overfit(history: Sequence[Mapping[str, float]], *, num_images: int, steps: int, **figures: Any) -> str:
    """The result of `--overfit` in words.

    Args:
        history, figures: as in [`explain_overfit`].
    """
    numbers = [f"{name.replace('_', ' ')} {value:.2f}" for name, value in _memorized_numbers(history[-1]).items()]
    result = f"{listed(numbers)} on {num_images} images after {steps} steps"
    if has_memorized(history):
        return f"Overfit: yes, {result}: labels, model and learning rate work together."
    return f"Overfit: NO, {result}. {explain_overfit(history, **figures)} {more_about('ap-is-0')}"


def _memorized_numbers(line: Mapping[str, float]) -> dict[str, float]:
    """The numbers of an evaluation that tell whether images were memorized, without those that measure nothing."""
    names = ("AP50", "mask_AP50", "PQ_stuff")
    return {name: line[name] for name in names if line.get(name, NOTHING) != NOTHING}


def explain_overfit(
    history: Sequence[Mapping[str, float]], *, object_pixels: float, stride: int, max_objects: int, num_queries: int
) -> str:
    """Likely reasons why a model cannot memorize a few images, which it can if data, model and learning rate are right.

    Args:
        history: lines of the log with an evaluation, oldest first, each with `loss`, `AP50` and the figures of
            [`TrainingProbe`].
        object_pixels: first quartile of the side of the objects, in pixels of the resized images.
        stride: of the feature map, in pixels.
        max_objects: largest number of objects in one image.
    """
    now, losses = history[-1], [line["loss"] for line in history]
    overlap, wrong = now["matched_iou"], now["class_error"]
    half = losses[len(losses) // 2]
    reasons = []
    if max_objects > num_queries:
        reasons.append(
            f"Sizes: an image has {max_objects} objects, but the model {num_queries} queries: --set num_queries="
            f"{2 * max_objects}."
        )
    if losses[-1] > 1.1 * min(losses) or losses[-1] > losses[0]:
        reasons.append(
            f"Learning rate: the loss rose again, from {min(losses):.2f} to {losses[-1]:.2f}. Lower --learning_rate."
        )
    elif losses[-1] < 0.8 * half:
        reasons.append(
            f"Time: the loss was still falling, from {half:.2f} to {losses[-1]:.2f} in the second half. Raise "
            "--learning_rate or --epochs."
        )
    if object_pixels < stride and overlap < 0.75:
        reasons.append(
            f"Sizes: a quarter of the objects is smaller than {object_pixels:.0f} pixels, at {stride} pixels per "
            "location of the feature map. A larger --image_size, or --set feature_stride=8."
        )
    if wrong > 0.1 and overlap >= 0.6:
        reasons.append(
            f"Labels: boxes fit (IoU {overlap:.2f}), but {wrong:.0%} of the classes are wrong even here. Objects of "
            "one kind may have different names; python examples/check_dataset.py finds such labels."
        )
    if wrong <= 0.1 and overlap < 0.6:
        reasons.append(
            f"Labels: the classes are learned, but not the boxes (IoU {overlap:.2f}). They may not lie where the "
            "objects are: see validation.png, where ground truth is white."
        )
    return " ".join(reasons) or (
        f"IoU {overlap:.2f}, {wrong:.0%} of the classes wrong, loss {losses[-1]:.2f}. See validation.png, and try "
        "another --learning_rate."
    )
