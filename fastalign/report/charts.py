"""Inline SVG: curves over steps and bars. Colours are the page's CSS variables; numbers are in the user's units."""

import math
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 420, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 40
POINTS = 600
"""Points of a curve, at most about; of more, each bucket keeps its lowest and its highest."""


@dataclass(frozen=True)
class Line:
    """A curve."""

    name: str
    steps: list[int]
    values: list[float]
    colour: str = "aligned"
    """a CSS variable of the page: before, aligned or third"""
    markers: bool = False
    """a dot at each point"""


def finite(line: Line) -> Line:
    """The curve without values that are not finite."""
    kept = [(x, y) for x, y in zip(line.steps, line.values, strict=True) if math.isfinite(y)]
    return Line(line.name, [x for x, _ in kept], [y for _, y in kept], line.colour, line.markers)


def thinned(steps: list[int], values: list[float], limit: int = POINTS) -> tuple[list[int], list[float]]:
    """At most about `limit` points that keep every spike: of each bucket the lowest and the highest, in order."""
    if len(steps) <= limit:
        return steps, values
    kept, buckets = {0, len(steps) - 1}, limit // 2
    for bucket in range(buckets):
        span = range(bucket * len(steps) // buckets, (bucket + 1) * len(steps) // buckets)
        kept |= {min(span, key=values.__getitem__), max(span, key=values.__getitem__)}
    order = sorted(kept)
    return [steps[i] for i in order], [values[i] for i in order]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that enclose low..high, about `count` of them."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def line_chart(lines: list[Line], unit: str, label: str, *, zero: bool = True) -> str:
    """Curves over the steps, as SVG; empty where there is no point.

    Args:
        lines: the curves; values that are not finite are left out.
        unit: of the values, above the axis.
        label: what is shown.
        zero: the axis of values begins at 0; otherwise it may begin near the lowest, where all lie in the upper half.
    """
    lines = [line for line in map(finite, lines) if line.steps]
    if not lines:
        return ""
    values = [value for line in lines for value in line.values]
    steps = [step for line in lines for step in line.steps]
    low = min(values)
    rows = ticks(min(0.0, low) if zero or low <= max(values) / 2 else low, max(values))
    columns = [x for x in ticks(min(steps), max(steps)) if x == int(x)]
    xs = _Axis(columns[0], columns[-1], LEFT, WIDTH - RIGHT)
    ys = _Axis(rows[0], rows[-1], HEIGHT - BOTTOM, TOP)
    parts = [_grid(rows, ys), *(_x_tick(xs(x), f"{int(x)}") for x in columns)]
    parts.append(_x_title("step"))
    for line in lines:
        shown = zip(*thinned(line.steps, line.values), strict=True)
        points = [(xs(x), ys(y)) for x, y in shown]
        colour = f"var(--{line.colour})"
        name = escape(line.name, quote=True)
        path = " ".join(f"{x:.2f},{y:.2f}" for x, y in points)
        parts.append(f'<polyline data-name="{name}" points="{path}" stroke="{colour}"/>')
        if line.markers or len(points) == 1:
            parts += [f'<circle cx="{x:.2f}" cy="{y:.2f}" r="3.5" fill="{colour}"/>' for x, y in points]
    legend = [(line.name, line.colour) for line in lines] if len(lines) > 1 else []
    return _figure(parts, f"{label}. {_described(lines)}", label, unit, legend)


def _described(lines: list[Line]) -> str:
    return "; ".join(
        f"{line.name}: {line.values[0]:.4g} at step {line.steps[0]}, {line.values[-1]:.4g} at step {line.steps[-1]}"
        for line in lines
    )


def bar_chart(names: list[str], groups: dict[str, list[float | None]], label: str, axis: str) -> str:
    """Upright bars in percent, a group for each name, as SVG.

    Args:
        names: one a group, below the axis.
        groups: model -> a share in 0..1 for each name; None = nothing to measure, no bar.
        label: what is shown.
        axis: the title below.
    """
    ys = _Axis(0, 100, HEIGHT - BOTTOM, TOP)
    parts = [_grid([0, 20, 40, 60, 80, 100], ys)]
    pitch = (WIDTH - RIGHT - LEFT) / len(names)
    width = 0.8 * pitch / len(groups)
    colours = dict(zip(groups, ("before", "aligned") if len(groups) == 2 else ("aligned",), strict=True))
    for place, name in enumerate(names):
        start = LEFT + place * pitch + 0.1 * pitch
        parts.append(_x_tick(start + 0.4 * pitch, name))
        for order, (model, shares) in enumerate(groups.items()):
            share = shares[place]
            if share is None:
                continue
            x, top = start + order * width, ys(100 * share)
            parts.append(
                f'<rect x="{x:.2f}" y="{top:.2f}" width="{width:.2f}" height="{HEIGHT - BOTTOM - top:.2f}" '
                f'fill="var(--{colours[model]})"><title>{escape(model)}, {name}: {100 * share:.1f}%</title></rect>'
            )
    parts.append(_x_title(axis))
    text = "; ".join(
        f"{model}: "
        + ", ".join(
            f"{n}: {'none' if s is None else f'{100 * s:.0f}'}" for n, s in zip(names, shares, strict=True)
        )
        for model, shares in groups.items()
    )
    return _figure(parts, f"{label}, percent. {text}", label, "%", list(colours.items()))


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def _grid(rows: list[float], ys: _Axis) -> str:
    return "".join(
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{ys(row):.2f}" y2="{ys(row):.2f}" class="grid"/>'
        f'<text class="y" x="{LEFT - 6}" y="{ys(row) + 4:.2f}" text-anchor="end">{row:g}</text>'
        for row in rows
    )


def _x_tick(x: float, text: str) -> str:
    return (
        f'<text class="x" x="{x:.2f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{escape(text)}</text>'
    )


def _x_title(text: str) -> str:
    middle = (LEFT + WIDTH - RIGHT) / 2
    return f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(text)}</text>'


def _figure(parts: list[str], described: str, title: str, unit: str, legend: list[tuple[str, str]]) -> str:
    keys = "".join(
        f'<span><i style="background:var(--{colour})"></i>{escape(name)}</span>' for name, colour in legend
    )
    unit = f" <small>({escape(unit)})</small>" if unit else ""
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b>{unit}<span class="legend">{keys}</span>'
        "</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(described, quote=True)}">'
        f"{''.join(parts)}</svg></figure>"
    )
