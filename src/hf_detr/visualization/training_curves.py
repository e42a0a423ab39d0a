"""The curves of a training run in one figure."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.extras import import_extra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Line = dict[str, Any]
TERM = re.compile(r"loss_(?P<kind>[a-z]\w*?)(?:_(?P<layer>\d+))?(?:_(?P<part>denoising|dense))?$")
NAMES = {"ce": "class", "bbox": "box L1", "giou": "GIoU", "mask": "mask", "dice": "dice"}
PROBE = {
    "matched_iou": "IoU of matched boxes",
    "class_error": "class error",
    "changed_matches": "changed matches (instability)",
    "never_matched": "queries never matched",
    "duplicates": "duplicates",
}


def read_log(run: str | Path) -> list[Line]:
    """The lines of a run's `log.jsonl`, one per epoch; the last one of an epoch that was trained again.

    Raises:
        ValueError: there is no log, it has no epoch yet, or a line is not JSON.
    """
    file = Path(run) / "log.jsonl" if Path(run).is_dir() else Path(run)
    if not file.is_file():
        raise ValueError(f"{file} does not exist. Pass the output folder of examples/finetune.py.")
    lines: dict[int, Line] = {}
    for number, text in enumerate(file.read_text().splitlines(), start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number}: not JSON ({error}).") from error
        lines[int(line["epoch"])] = line
    if not lines:
        raise ValueError(f"{file} has no epoch yet. A line is written at the end of each epoch.")
    return [lines[epoch] for epoch in sorted(lines)]


def training_curves(run: str | Path) -> "Figure":
    """AP, every term of the loss by decoder layer, how well objects are matched, and learning rates, against epochs.
    Layers are numbered from 1 here.

    Args:
        run: the output folder of `finetune.py`, or its `log.jsonl`.

    Raises:
        ValueError: there is no log, it has no epoch yet, or a line is not JSON.
        ImportError: matplotlib is not installed.
    """
    figure_class = import_extra("matplotlib.figure", "visualization").Figure
    lines = read_log(run)
    terms = sorted(
        {found["kind"] for name in lines[-1] if (found := TERM.match(name))},
        key=lambda term: (list(NAMES).index(term) if term in NAMES else len(NAMES), term),
    )
    panels = ["metrics", "loss", *terms, "matching", "rates"]
    columns = 3
    rows = -(-len(panels) // columns)
    figure: Figure = figure_class(figsize=(4.6 * columns, 3 * rows), layout="constrained")
    axes = dict(zip(panels, figure.subplots(rows, columns, squeeze=False).flat, strict=False))
    for unused in figure.axes[len(panels) :]:
        unused.set_axis_off()
    metrics = [name for name in ("AP", "AP50", "mask_AP", "mask_AP50", "PQ") if _has(lines, name)]
    for name in metrics:
        _plot(axes["metrics"], lines, name, name, marker="o", markersize=3)
    axes["metrics"].set_title("validation metrics" if metrics else "no evaluation yet")
    _plot(axes["loss"], lines, "loss", "all terms, weighted")
    axes["loss"].set_title("loss")
    for term in terms:
        of_term = [name for name in lines[-1] if (found := TERM.match(name)) and found["kind"] == term]
        for name in sorted(of_term, key=_order):
            found = TERM.match(name)
            assert found is not None
            style = {"denoising": "--", "dense": ":"}.get(found["part"], "-")
            _plot(axes[term], lines, name, _describe(found), linestyle=style)
        axes[term].set_title(f"{NAMES.get(term, term)} loss by layer")
    for name, text in PROBE.items():
        if _has(lines, name):
            _plot(axes["matching"], lines, name, text)
    axes["matching"].set_title("matching, on a few training images")
    for name in ("learning_rate", "backbone_learning_rate"):
        _plot(axes["rates"], lines, name, name.replace("_", " "))
    axes["rates"].set_title("learning rates")
    for panel in axes.values():
        panel.set_xlabel("epoch")
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize="x-small")
    return figure


def _has(lines: list[Line], name: str) -> bool:
    return any(line.get(name) is not None for line in lines)


def _plot(axes: "Axes", lines: list[Line], name: str, label: str, **style: Any) -> None:
    known = [(line["epoch"], line[name]) for line in lines if line.get(name) is not None]
    if known:
        axes.plot(*zip(*known, strict=True), label=label, **style)


def _order(name: str) -> tuple[str, int]:
    found = TERM.match(name)
    assert found is not None
    return found["part"] or "", int(found["layer"]) if found["layer"] else 1000


def _describe(found: re.Match[str]) -> str:
    if found["part"] == "dense":
        return "all locations"
    layer = f"layer {int(found['layer']) + 1}" if found["layer"] else "last layer"
    return f"{layer}, denoising" if found["part"] else layer
