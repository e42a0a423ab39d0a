"""The doctor's findings as a page to look at: one HTML file without links to anything."""

import base64
import html
import math
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageOps

from ..data.checks import KINDS, Finding
from ..data.source import Source
from ..visualization import contact_sheet, draw_boxes
from .examine import Examination

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


def write_report(examination: Examination, file: str | Path, *, worst: int = 16) -> Path:
    """Write the findings, the statistics of boxes and classes, and pictures of the worst findings.

    Args:
        worst: how many pictures.

    Returns:
        the file.
    """
    file = Path(file)
    verdict = (
        f'<span class="error">{len(examination.errors)} errors</span> that would break training'
        if examination.errors
        else '<span class="ok">nothing that would break training</span>'
    )
    parts = [
        f"<h1>{html.escape(examination.folder.name)}</h1>",
        f"<p>{verdict}; {len(examination.findings) - len(examination.errors)} warnings. "
        f"Read in {examination.seconds:.1f} s.</p>",
        _splits(examination),
        "<h2>Findings</h2>",
        _findings(examination.findings),
        "<h2>The worst of them</h2>" + _pictures(examination.findings, worst) if examination.findings else "",
        *(_statistics(split, source) for split, source in examination.sources.items()),
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(examination.folder.name)}</title>'
        f"<style>{STYLE}</style><body>{''.join(parts)}</body></html>",
        encoding="utf-8",
    )
    return file


def _splits(examination: Examination) -> str:
    rows = "".join(
        f"<tr><td>{split}</td><td>{source.kind}</td><td class=n>{len(source.photos)}</td>"
        f"<td class=n>{sum(len(photo.boxes) for photo in source.photos)}</td>"
        f"<td class=n>{sum(not photo.boxes for photo in source.photos)}</td>"
        f"<td><code>{html.escape(str(source.file))}</code></td></tr>"
        for split, source in examination.sources.items()
    )
    return (
        "<table><tr><th>split<th>format<th class=n>images<th class=n>boxes<th class=n>images without boxes"
        f"<th>annotations</tr>{rows}</table>"
    )


def _findings(findings: list[Finding]) -> str:
    if not findings:
        return '<p class="ok">None.</p>'
    rows = []
    for code, count in Counter(finding.code for finding in findings).most_common():
        severity, what, fix = KINDS[code]
        examples = [f"{f.split}: {f.record}: {f.message}" for f in findings if f.code == code][:5]
        listed = "<br>".join(f"<small>{html.escape(example)}</small>" for example in examples)
        rows.append(
            (
                severity != "error",
                f'<tr><td class="{severity}">{severity}</td><td class=n>{count}</td>'
                f"<td><b>{html.escape(what)}</b>. {html.escape(fix)}<br>{listed}</td></tr>",
            )
        )
    return "<table>" + "".join(row for _, row in sorted(rows, key=lambda pair: pair[0])) + "</table>"


def _pictures(findings: list[Finding], worst: int) -> str:
    """One picture a kind in turn, so that many findings of one kind do not hide the others."""
    by_kind: dict[str, list[Finding]] = {}
    for finding in findings:
        if finding.photo is not None:
            by_kind.setdefault(finding.code, []).append(finding)
    queue = [group[i] for i in range(worst) for group in by_kind.values() if i < len(group)]
    images = []
    for finding in queue:
        picture = _picture(finding)
        if picture is not None:
            images.append(picture)
        if len(images) == worst:
            break
    if not images:
        return "<p>None of them can be shown.</p>"
    buffer = BytesIO()
    contact_sheet(images).save(buffer, "PNG", optimize=True)
    return f'<img alt="worst findings" src="data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}">'


def _picture(finding: Finding) -> PIL.Image.Image | None:
    photo = finding.photo
    if photo is None:
        return None
    try:
        image = PIL.ImageOps.exif_transpose(PIL.Image.open(photo.path)).convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return None
    scale = 480 / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    shown = [box for box in photo.boxes if box is not finding.box and _drawable(box.bbox)]
    boxes = [_corners(box.bbox, scale) for box in shown]
    captions, colours = [""] * len(boxes), [GREY] * len(boxes)
    if finding.box is not None and _drawable(finding.box.bbox):
        boxes.append(_corners(finding.box.bbox, scale))
        captions.append(finding.code)
        colours.append(RED)
    elif not boxes or finding.box is None:
        boxes.append([1, 1, image.width - 2, image.height - 2])
        captions.append(finding.code)
        colours.append(RED)
    return draw_boxes(image, boxes, captions, colours, 2)


def _drawable(bbox: Any) -> bool:
    numbers = isinstance(bbox, (list, tuple)) and len(bbox) == 4
    return numbers and all(isinstance(v, (int, float)) and math.isfinite(v) and abs(v) < 1e6 for v in bbox)


def _corners(bbox: list[float], scale: float) -> list[float]:
    x, y, width, height = bbox
    return [x * scale, y * scale, (x + width) * scale, (y + height) * scale]


def _statistics(split: str, source: Source) -> str:
    boxes = [box for photo in source.photos for box in photo.boxes if _drawable(box.bbox) and min(box.bbox[2:]) > 0]
    classes = Counter(source.names[box.category] for box in boxes if box.category is not None)
    sizes = Counter(2 ** math.floor(math.log2(max(1.0, (box.bbox[2] * box.bbox[3]) ** 0.5))) for box in boxes)
    ratios = Counter(round(math.log2(box.bbox[2] / box.bbox[3])) for box in boxes)
    charts = [
        _bars("Boxes by class", {name: classes[name] for name in sorted(source.names, key=lambda n: -classes[n])[:40]}),
        _bars("Size of boxes: root of the area, pixels", {f"{k} to {2 * k}": sizes[k] for k in sorted(sizes)}),
        _bars("Width over height", {f"about {_ratio(k)}": ratios[k] for k in sorted(ratios)}),
        _bars(
            "Objects in an image",
            {str(k): v for k, v in sorted(Counter(len(photo.boxes) for photo in source.photos).items())[:40]},
        ),
    ]
    return f"<h2>{split}</h2><div class=charts>{''.join(charts)}</div>"


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
