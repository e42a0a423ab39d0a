"""The findings as a self-contained HTML page."""

import base64
import html
import itertools
import math
from collections import Counter
from io import BytesIO
from pathlib import Path

import PIL.Image
from torchvision.transforms.functional import to_pil_image

from ..data.findings import KINDS, Finding
from ..data.records import AnnotatedSplit, BoxRecord
from ..model.annotations import box_problem
from ..model.image_io import to_image_tensor
from ..visualization import contact_sheet, draw_boxes
from .full_check import CheckResult

RED, GREY = (230, 30, 30), (200, 200, 200)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #222 }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .25rem .6rem; vertical-align: top }
tr:nth-child(even) { background: #f6f6f6 } .error { color: #b00020; font-weight: 600 } .warning { color: #8a5a00 }
.ok { color: #15703a; font-weight: 600 } .bar { background: #4a7ebb; height: .8rem; display: inline-block }
.n { text-align: right; font-variant-numeric: tabular-nums } img { max-width: 100% } code { font-size: .9em }
.charts { display: grid; grid-template-columns: 1fr 1fr; gap: 2rem }
"""


def write_page(result: CheckResult, file: str | Path, *, max_images: int = 16) -> Path:
    """Write the findings, statistics of boxes and classes, and images with findings drawn on them.

    Returns:
        the file.
    """
    file = Path(file)
    errors = (
        f'<span class="error">{len(result.errors)} errors</span> that would break training'
        if result.errors
        else '<span class="ok">No errors</span>'
    )
    parts = [
        f"<h1>{html.escape(Path(result.source).name)}</h1>",
        f"<p>{errors}; {len(result.findings) - len(result.errors)} warnings. Checked in {result.seconds:.1f} s.</p>",
        _splits(result),
        "<h2>Findings</h2>",
        _findings(result),
        "<h2>Examples</h2>" + _examples(result.findings, max_images) if result.findings else "",
        *(_statistics(name, split) for name, split in result.splits.items()),
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(Path(result.source).name)}</title>'
        f"<style>{STYLE}</style><body>{''.join(parts)}</body></html>",
        encoding="utf-8",
    )
    return file


def _splits(result: CheckResult) -> str:
    rows = "".join(
        f"<tr><td>{name}</td><td>{split.format}</td><td class=n>{len(split.images)}</td>"
        f"<td class=n>{sum(len(image.boxes) for image in split.images)}</td>"
        f"<td class=n>{sum(not image.boxes for image in split.images)}</td>"
        f"<td><code>{html.escape(str(split.file))}</code></td></tr>"
        for name, split in result.splits.items()
    )
    return (
        "<table><tr><th>split<th>format<th class=n>images<th class=n>boxes<th class=n>images without boxes"
        f"<th>annotations</tr>{rows}</table>"
    )


def _findings(result: CheckResult) -> str:
    if not result.findings:
        return '<p class="ok">None.</p>'
    rows = ""
    for code, count in result.counts().items():
        severity, description, fix = KINDS[code]
        examples = [f"{f.split}: {f.record}: {f.message}" for f in result.findings if f.code == code][:5]
        listed = "<br>".join(f"<small>{html.escape(example)}</small>" for example in examples)
        rows += (
            f'<tr><td class="{severity}">{severity}</td><td class=n>{count}</td>'
            f"<td><b>{html.escape(description)}</b>. {html.escape(fix)}<br>{listed}</td></tr>"
        )
    return f"<table>{rows}</table>"


def _examples(findings: list[Finding], max_images: int) -> str:
    """A contact sheet of images, alternating between the kinds so that a frequent kind does not hide the others."""
    by_kind: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.image is not None:
            by_kind.setdefault(finding.code, []).append(finding)
    queue = [group[i] for i in range(max_images) for group in by_kind.values() if i < len(group)]
    drawn = (image for image in map(_draw, queue) if image is not None)
    images = list(itertools.islice(drawn, max_images))
    if not images:
        return "<p>No image with a finding can be shown.</p>"
    buffer = BytesIO()
    contact_sheet(images).save(buffer, "PNG", optimize=True)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="images with findings" src="data:image/png;base64,{encoded}">'


def _draw(finding: Finding) -> PIL.Image.Image | None:
    """The image of a finding with its boxes, the one concerned in red; None if the file cannot be read."""
    if finding.image is None:
        return None
    try:
        read = finding.image.read
        file = finding.image.path if read is None else BytesIO(read())
        image = to_pil_image(to_image_tensor(PIL.Image.open(file)))  # as training reads it
    except (OSError, ValueError):
        return None
    scale = 480 / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    boxes = [_corners(box, scale) for box in finding.image.boxes if box is not finding.box and _is_drawable(box)]
    captions, colours = [""] * len(boxes), [GREY] * len(boxes)
    if finding.box is not None and _is_drawable(finding.box):
        boxes.append(_corners(finding.box, scale))
    elif not boxes or finding.box is None:
        boxes.append([1, 1, image.width - 2, image.height - 2])
    if len(boxes) > len(captions):
        captions.append(finding.code)
        colours.append(RED)
    return draw_boxes(image, boxes, captions, colours, 2)


def _is_drawable(box: BoxRecord) -> bool:
    problem = box_problem(box.bbox, None)
    numeric = problem is None or problem[0] != "box-not-numbers"
    return numeric and all(abs(float(value)) < 1e6 for value in box.bbox)


def _corners(box: BoxRecord, scale: float) -> list[float]:
    x, y, width, height = (float(value) * scale for value in box.bbox)
    return [x, y, x + width, y + height]


def _statistics(name: str, split: AnnotatedSplit) -> str:
    learned = [[box for box in image.boxes if not box.iscrowd] for image in split.images]
    boxes = [box for of_image in learned for box in of_image if box_problem(box.bbox, None) is None]
    classes = Counter(split.names[box.category] for box in boxes if box.category is not None)
    sides = [(float(box.bbox[2]), float(box.bbox[3])) for box in boxes]
    sizes = Counter(2 ** math.floor(math.log2(max(1.0, (width * height) ** 0.5))) for width, height in sides)
    ratios = Counter(round(math.log2(width / height)) for width, height in sides)
    objects = Counter(map(len, learned))
    labels = sorted(split.names, key=lambda label: -classes[label])[:40]
    charts = [
        _bars("Boxes per class", {label: classes[label] for label in labels}),
        _bars("Box size: square root of the area, pixels", {f"{k} to {2 * k}": sizes[k] for k in sorted(sizes)}),
        _bars("Width : height", {f"about {_ratio(k)}": ratios[k] for k in sorted(ratios)}),
        _bars("Objects per image", {str(k): objects[k] for k in sorted(objects)[:40]}),
    ]
    return f"<h2>{name}</h2><div class=charts>{''.join(charts)}</div>"


def _ratio(power: int) -> str:
    return f"{2**power} : 1" if power >= 0 else f"1 : {2**-power}"


def _bars(title: str, counts: dict[str, int]) -> str:
    most = max(counts.values(), default=0) or 1
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td class=n>{count}</td>"
        f'<td style="width:55%"><span class=bar style="width:{100 * count / most:.1f}%"></span></td></tr>'
        for name, count in counts.items()
    )
    return f"<div><h3>{html.escape(title)}</h3><table>{rows}</table></div>"
