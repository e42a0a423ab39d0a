"""The model card: a model's page on the Hub, with metadata that the Hub parses and text for readers.

Its results come from `metrics.json`, which holds a hash of the weights they were measured with. Results of other
weights never enter a card.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..evaluation import MASK_METRICS, METRICS, PANOPTIC_METRICS
from ..evaluation.coco_metrics import DESCRIPTIONS
from ..evaluation.panoptic_metrics import QUALITIES
from ..model.image_processing_hf_detr import HfDetrImageProcessor
from ..model.mask_post_processing import default_threshold
from ..model.modeling_hf_detr import DetrForDetection

# {name: meaning} of the numbers in the card
TEXTS = DESCRIPTIONS | {name: f"masks: {DESCRIPTIONS[name.removeprefix('mask_')]}" for name in MASK_METRICS}
TEXTS |= {
    name: f"{QUALITIES[quality]}{f' (of {group})' if group else ''}"
    for name in PANOPTIC_METRICS
    for quality, _, group in (name.partition("_"),)
}
TEMPLATE = Path(__file__).with_name("model_card_template.md")
MARKER = "<!-- Written by hf_detr. Delete this line to keep your edits: the next push then leaves this page alone. -->"
PICTURE = "validation.png"
# The description in transformers' automatic card.
BLANK = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. "
    "This model card has been automatically generated."
)


def hash_of_weights(folder: str | Path) -> str:
    """SHA-256 over the weight files of a checkpoint, in the order of their names. It ties `metrics.json` to the weights
    that were measured."""
    files = sorted(Path(folder).glob("*.safetensors")) or sorted(Path(folder).glob("*.bin"))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def read_metrics(folder: str | Path) -> dict[str, Any] | None:
    """The content of `metrics.json` in a checkpoint folder; None if there is none or if it was measured with other
    weights."""
    file = Path(folder) / "metrics.json"
    if not file.is_file():
        return None
    metrics: dict[str, Any] = json.loads(file.read_text())
    return metrics if metrics.get("weights") == hash_of_weights(folder) else None


def build_model_card(
    model: DetrForDetection,
    repo_id: str,
    *,
    processor: HfDetrImageProcessor | None = None,
    metrics: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    picture: bool = False,
    base_model: str | None = None,
    datasets: list[str] | None = None,
    license: str | None = None,
    source: str | None = None,
    training: str | None = None,
    template: str | Path = TEMPLATE,
) -> ModelCard:
    """Build the card of a model.

    Args:
        repo_id: the model's Hub id, for the code examples in the card.
        processor: its image processor, for the input size.
        metrics: the result of `ModelEvaluation.compute` for exactly these weights, with `dataset`, `split` and
            `num_images`. None: the card states that the model was not evaluated.
        settings: training settings, {name: value}.
        picture: show `validation.png`, which lies next to the card.
        base_model: Hub id of the checkpoint or backbone that training started from.
        datasets: Hub ids or names of the training data.
        license: identifier of the license on the Hub. None: the card names no license.
        source: origin of `metrics` that were measured by others; they do not enter the metadata.
        training: description of the training, shown if there are no `settings`.
        template: a Jinja template with the variables of the package's own (`hf_detr.hub.TEMPLATE`).
    """
    config = model.config
    name = repo_id.rsplit("/", maxsplit=1)[-1]
    labels = [label for label in config.id2label.values() if label != "N/A"]
    measured = metrics is not None and source is None
    task = "image-segmentation" if model.has_masks else "object-detection"
    own_threshold = None if processor is None else processor.panoptic_threshold
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=task,
        tags=[task, "vision", "detr", "hf_detr"],
        license=license,
        base_model=base_model,
        datasets=datasets,
        metrics=_metric_types(metrics) if metrics is not None else None,
        model_name=name if measured else None,
        eval_results=_eval_results(metrics) if metrics is not None and measured else None,
    )
    card = ModelCard.from_template(
        data,
        template_str=Path(template).read_text(encoding="utf-8"),
        model_name=name,
        repo_id=repo_id,
        config=config,
        labels=labels,
        parameters=f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}",
        picture=PICTURE if picture else None,
        base_model=base_model,
        metrics=[(key, _number(metrics[key]), text) for key, text in TEXTS.items() if key in metrics]
        if metrics
        else None,
        per_class=_per_class(metrics) if metrics else None,
        metrics_of_masks=_columns_of_masks(metrics or {}),
        task=task,
        threshold=default_threshold("paper", own_threshold) if model.has_masks else None,
        dataset_name=metrics.get("dataset") if metrics else None,
        split=metrics.get("split") if metrics else None,
        num_images=metrics.get("num_images") if metrics else None,
        epoch=metrics.get("epoch") if metrics else None,
        settings=list(settings.items()) if settings else None,
        source=source,
        training=training,
        size=_size(processor),
        stride=model.model.backbone.strides[-1],
    )
    # Not left to the template: a card without it is never renewed and would keep the results of earlier weights.
    card.content = f"{card.content.rstrip()}\n\n{MARKER}\n"
    return card


def _eval_results(metrics: Mapping[str, Any]) -> list[EvalResult]:
    dataset = str(metrics["dataset"])
    return [
        EvalResult(
            task_type="object-detection" if key in METRICS else "image-segmentation",
            dataset_name=dataset,
            dataset_type="custom",  # the Hub treats any other value as the id of one of its data sets
            dataset_split=metrics["split"],
            metric_type="panoptic_quality" if key.startswith("PQ") else "mean_average_precision",
            metric_name=f"{key} ({TEXTS[key]})",
            metric_value=round(metrics[key], 4),
        )
        for key in ("AP", "AP50", "AP75", "mask_AP", "mask_AP50", "mask_AP75", "PQ", "PQ_things", "PQ_stuff")
        if metrics.get(key, -1) >= 0
    ]


def _metric_types(metrics: Mapping[str, Any]) -> list[str]:
    return ["mean_average_precision", *(["panoptic_quality"] if "PQ" in metrics else [])]


def _columns_of_masks(metrics: Mapping[str, Any]) -> list[str]:
    return [*(["mask AP"] if "mask_AP" in metrics else []), *(["PQ"] if "PQ" in metrics else [])]


def _per_class(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(class, AP) rows; with masks (class, AP and the AP of masks, PQ), which stuff has only the last of."""
    ap, of_masks = metrics.get("per_class", {}), metrics.get("mask_per_class")
    segments = {name: row["PQ"] for name, row in metrics.get("panoptic_per_class", {}).items()}
    columns = [ap] + ([] if of_masks is None else [of_masks]) + ([segments] if segments else [])
    return [
        (name.replace("|", "\\|"), " | ".join(_number(column.get(name, -1)) for column in columns))
        for name in dict.fromkeys([*ap, *segments])
    ]


def _number(value: float) -> str:
    return f"{value:.3f}" if value >= 0 else "n/a"


def _size(processor: HfDetrImageProcessor | None) -> str:
    if processor is None:
        return "the size in its processor's config"
    size = {name: value for name, value in dict(processor.size).items() if value}
    if "shortest_edge" in size:
        return f"a shortest edge of {size['shortest_edge']} pixels (longest edge at most {size.get('longest_edge')})"
    height, width = size.get("height", size.get("max_height")), size.get("width", size.get("max_width"))
    return f"{height} x {width} pixels" if "height" in size else f"at most {height} x {width} pixels"


def may_replace(card: str) -> bool:
    """Whether a push may replace a card on the Hub: one written by hf_detr, or transformers' automatic card in which
    nothing has been filled in."""
    blank = ModelCard.from_template(ModelCardData(), model_description=BLANK)
    return MARKER in card or ModelCard(card).text.strip() == blank.text.strip()
