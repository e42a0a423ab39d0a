"""Line charts as inline SVG, without a plotting library."""

from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 480, 320, 46, 40, 10, 12  # of the chart and its margins, in pixels


def line_chart(
    x: Sequence[float], lines: Mapping[str, Sequence[float]], *, x_title: str, y_title: str, mean: bool = True
) -> str:
    """Lines over a common x, both axes from 0 to 1; with `mean`, their mean as a thick black line. A tooltip names each
    line; up to eight lines are also named in a legend below the chart."""
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_title)} over {escape(x_title)}">']
    for step in range(6):
        value = step / 5
        down, across = TOP + (1 - value) * inner_height, LEFT + value * inner_width
        parts += [
            f'<path class="grid" d="M{LEFT} {down:.1f}H{WIDTH - RIGHT}M{across:.1f} {TOP}V{HEIGHT - BOTTOM}"/>',
            f'<text x="{LEFT - 7}" y="{down + 4:.1f}" text-anchor="end">{value:.1f}</text>',
            f'<text x="{across:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{value:.1f}</text>',
        ]
    middle = TOP + inner_height / 2
    parts += [
        f'<text class="axis" x="{LEFT + inner_width / 2}" y="{HEIGHT - 5}" text-anchor="middle">'
        f"{escape(x_title)}</text>",
        f'<text class="axis" x="12" y="{middle}" text-anchor="middle" transform="rotate(-90 12 {middle})">'
        f"{escape(y_title)}</text>",
    ]

    def path(values: Sequence[float], style: str, name: str) -> str:
        points = " ".join(
            f"{LEFT + a * inner_width:.1f},{TOP + (1 - b) * inner_height:.1f}" for a, b in zip(x, values, strict=True)
        )
        return f'<polyline points="{points}" style="{style}"><title>{escape(name)}</title></polyline>'

    parts += [path(values, f"stroke:{colour(i)}", name) for i, (name, values) in enumerate(lines.items())]
    if mean and len(lines) > 1:
        average = [sum(values) / len(lines) for values in zip(*lines.values(), strict=True)]
        parts.append(path(average, "stroke:#111;stroke-width:3", "mean of the classes"))
    parts.append("</svg>")
    if len(lines) <= 8:
        entries = [f'<i style="background:{colour(i)}"></i>{escape(name)}' for i, name in enumerate(lines)]
        entries += ['<i style="background:#111"></i>mean'] if mean and len(lines) > 1 else []
        parts.append('<p class="legend">' + "".join(f"<span>{entry}</span>" for entry in entries) + "</p>")
    return "".join(parts)


def colour(index: int) -> str:
    """Colour of a line: hues a golden angle apart, dark enough for a white background."""
    return f"hsl({(210 + index * 222.5) % 360:.0f} 65% 42%)"
