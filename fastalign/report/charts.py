"""Figures by matplotlib: inline SVG for the page, PNG files for a README."""

import io
import re
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np
from markupsafe import Markup, escape

from fastalign.report.features import PatchMaps, Pictures
from fastalign.report.run import Probe, setting_text
from fastalign.training.metrics import series
from fastalign.utils.errors import UserError

try:
    import matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle, Rectangle
    from matplotlib.ticker import MaxNLocator
except ImportError:
    raise UserError("figures need a package: pip install matplotlib") from None

THEME = {"before": "#b45309", "aligned": "#1d4ed8", "third": "#0f766e", "quiet": "#565d66", "rule": "#d5d9de"}
"""The light theme of page.css. Inline SVG names its variables instead, so that it follows the theme."""
STYLE = {
    **dict.fromkeys(("axes.edgecolor", "grid.color"), THEME["rule"]),
    **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.color", "ytick.color"), THEME["quiet"]),
    **dict.fromkeys(("axes.spines.left", "axes.spines.right", "axes.spines.top", "legend.frameon"), False),
    **dict.fromkeys(("axes.axisbelow", "axes.grid", "figure.constrained_layout.use"), True),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
    "axes.grid.axis": "y",
    "font.size": 11,
    "legend.fontsize": 11,
    "path.simplify_threshold": 1.0,  # pixels: a curve of any length stays small and keeps its extremes
    "svg.fonttype": "none",
}
WIDTH, HEIGHT = 420, 250
"""Of inline SVG, in points."""
PNG = {"dpi": 110, "metadata": {"Software": None}}
COLOUR_MAP = matplotlib.colormaps["viridis"]
LOSS, PROBE, THROUGHPUT = "Loss", "Patch probe during training (%)", "Throughput (images per second)"
CURVES = [
    (LOSS, "training", "loss", 1, "aligned", "-"),
    (LOSS, "validation", "val_loss", 1, "before", "o-"),
    (PROBE, "macro recall", "probe_macro_recall", 100, "aligned", "o-"),
    (PROBE, "mAP", "probe_map", 100, "third", "o-"),
    ("Learning rate", "learning rate", "lr", 1, "aligned", "-"),
    ("Gradient norm (before clipping)", "gradient norm", "grad_norm", 1, "aligned", "-"),
    (THROUGHPUT, "images per second", "images_per_second", 1, "third", "-"),
    ("Waiting for data (% of the time)", "data wait", "data_wait", 100, "third", "-"),
    ("Memory (GiB at most)", "memory", "memory", 2**-30, "third", "-"),
    ("Model FLOPs utilisation (%)", "utilisation", "mfu", 100, "third", "-"),
]
"""Chart, curve, key in metrics.jsonl, factor, colour of `THEME`, line style."""
Curve = tuple[str, list[int], list[float], str, str]
"""Name, steps, values, colour, line style."""


def curves(metrics: list[dict]) -> dict[str, list[Curve]]:
    """The curves of each chart of which the run has values, by title."""
    found: dict[str, list[Curve]] = {}
    for title, name, key, factor, colour, style in CURVES:
        steps, values = series(metrics, key)
        if steps:
            values = [factor * value for value in values]
            found.setdefault(title, []).append((name, steps, values, THEME[colour], style))
    return found


def draw_curves(axes: Axes, title: str, lines: list[Curve]) -> None:
    """Draw a chart. The axis of values begins at 0, that of losses near them if 0 is far away."""
    for name, steps, values, colour, style in lines:
        style = style if len(steps) > 1 else "o"
        axes.plot(steps, values, style, color=colour, label=name, clip_on=False)
    lowest, highest = axes.dataLim.intervaly
    if title != LOSS or lowest <= highest / 2:
        axes.set_ylim(bottom=min(0, lowest))
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))


def draw_bars(axes: Axes, names: Sequence[str], groups: dict[str, list], errors: dict | None = None) -> None:
    """Draw bars in percent: of each model a share in 0..1 for each name, None = no bar; `errors` likewise."""
    width = 0.8 / max(len(groups), 1)
    for order, (model, shares) in enumerate(groups.items()):
        places = [place for place, share in enumerate(shares) if share is not None]
        bars = axes.bar(
            [place + (order - (len(groups) - 1) / 2) * width for place in places],
            [100 * shares[place] for place in places],
            width,
            yerr=[100 * (errors[model][place] or 0) for place in places] if errors else None,
            color=THEME[colours_of(groups)[model]],
            label=model,
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 100)


def draw_sizes(axes: Axes, edges: list[float], recall: dict[str, list]) -> None:
    """Draw each model's recall in bins of size, of which `edges` are the upper ones."""
    draw_bars(axes, [f"{100 * edge:.0f}" for edge in edges], recall)
    axes.set_xlabel("share of the image's patches that hold the class, % at most")


def colours_of(models: Iterable[str]) -> dict[str, str]:
    """Colours of one or two compared models, of which the last is the aligned one."""
    models = list(models)
    return dict(zip(models, ("before", "aligned")[2 - len(models) :], strict=True))


def line_chart(title: str, lines: list[Curve]) -> Markup:
    """A chart of `curves` as inline SVG."""
    texts = [
        f"{name}: {values[0]:.4g} at step {steps[0]}, {values[-1]:.4g} at step {steps[-1]}"
        for name, steps, values, *_ in lines
    ]
    draw = partial(draw_curves, title=title, lines=lines)
    return _inline_svg(draw, f"{title.partition(' (')[0]}. {'; '.join(texts)}")


def size_chart(edges: list[float], recall: dict[str, list]) -> Markup:
    """Recall by size as inline SVG; empty if it was not measured."""
    texts = []
    for model, shares in recall.items():
        pairs = [(edge, share) for edge, share in zip(edges, shares, strict=True) if share is not None]
        texts.append(f"{model}: {', '.join(f'{100 * edge:.0f}: {100 * share:.0f}' for edge, share in pairs)}")
    draw = partial(draw_sizes, edges=edges, recall=recall)
    return _inline_svg(draw, f"Recall by size, percent. {'; '.join(texts)}") if recall else Markup("")


@matplotlib.rc_context(STYLE)
def _inline_svg(draw: Callable[[Axes], None], description: str) -> Markup:
    """A chart whose colours are variables of page.css; its ids differ from those of other charts."""
    figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
    axes = figure.add_subplot()
    draw(axes)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        figure.legend(loc="outside upper left", ncols=2)
    with matplotlib.rc_context({"svg.hashsalt": description}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file := io.BytesIO(), format="svg", transparent=True, metadata=nothing)
    text = file.getvalue().decode()
    text = re.sub(r' id="\w+_\d+"', "", text[text.index("<g ") :]).replace("xlink:href", "href")
    for name, colour in THEME.items():
        text = text.replace(colour, f"var(--{name})")
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(description)}">'
    return Markup(head + text)


@matplotlib.rc_context(STYLE)
def curves_figure(metrics: list[dict], titles: Container[str]) -> Figure | None:
    """Those of some charts of which the run has values, in a row; None if it has none."""
    found = [(title, lines) for title, lines in curves(metrics).items() if title in titles]
    if not found:
        return None
    figure = Figure(figsize=(4 * len(found), 3.2))
    places = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (title, lines) in zip(places, found, strict=True):
        draw_curves(axes, title, lines)
        axes.set_title(title)
        if len(lines) > 1:
            axes.legend()
    return figure


@dataclass(frozen=True)
class Tile:
    """A picture or a map of it."""

    title: str
    model: str
    alt: str
    pixels: np.ndarray  # [h, w, 3] uint8
    queries: tuple[int, ...] = ()  # which of the query patches are marked
    caption: str = ""


def tiles(pictures: Pictures, maps: PatchMaps, index: int) -> list[Tile]:
    """A picture, its components and its cosines, the latter from dark (`maps.low`) to light (1)."""
    name = pictures.names[index]
    found = [Tile("Picture", "", f"{name}, with patches A and B marked", pictures.shown[index], (0, 1))]
    for model, colours in maps.colours.items():
        alt = f"Principal components of {name}, {model}"
        found.append(Tile("Principal components", model, alt, colours[index], caption=model))
    for query, (model, maps_of) in product(range(2), maps.cosines.items()):
        values, title = maps_of[index, query], f"patch {'AB'[query]}"
        mean = f"mean {round(values.mean(), 2) + 0.0:.2f}"  # no -0.00
        alt = f"Cosines with {name}, {title}, {model}: {mean}, lowest {values.min():.2f}"
        pixels = COLOUR_MAP((values - maps.low) / (1 - maps.low), bytes=True)[..., :3]
        found.append(Tile(f"Cosine with {title}", model, alt, pixels, (query,), f"{model}, {mean}"))
    return found


@matplotlib.rc_context(STYLE)
def patches_figure(pictures: Pictures, maps: PatchMaps) -> Figure:
    """The tiles of all pictures, a row a picture."""
    lines = [tiles(pictures, maps, index) for index in range(len(pictures.names))]
    (rows, columns), count = maps.grid, len(lines[0])
    figure = Figure(figsize=(1.45 * count, 1.45 * rows / columns * len(lines) + 0.5))
    places = figure.subplots(len(lines), count, squeeze=False)
    for index, tile_index in np.ndindex(places.shape):
        axes, tile = places[index, tile_index], lines[index][tile_index]
        axes.imshow(tile.pixels, extent=(0, columns, rows, 0), interpolation="nearest")  # units of patches
        axes.set_axis_off()
        if index == 0:
            axes.set_title(f"{tile.title}\n{tile.model}", fontsize=8)
        for query, (colour, width) in product(tile.queries, (("black", 3), ("white", 1.5))):
            y, x = divmod(maps.queries[index][query], columns)
            circle, square = Circle((x + 0.5, y + 0.5), 0.5), Rectangle((x, y), 1, 1)
            mark = axes.add_patch(circle if query else square)
            mark.set(fill=False, edgecolor=colour, linewidth=width)
    return figure


@matplotlib.rc_context(STYLE)
def probe_figure(probe: Probe) -> Figure | None:
    """Scores and recall by size in the first setting; None if there is no score."""
    setting = probe.settings()[0]
    names, models = ("macro recall", "mAP"), probe.models(setting)
    keys = ("macro_recall", "map")
    scores = {model: [probe.score(model, setting, key) or {} for key in keys] for model in models}
    means, spreads = ({m: [s.get(key) for s in row] for m, row in scores.items()} for key in ("mean", "std"))
    if not any(mean is not None for row in means.values() for mean in row):
        return None
    figure = Figure(figsize=(8, 3.2))
    left, right = figure.subplots(1, 2, width_ratios=[1, 2])
    draw_bars(left, names, means, spreads)
    left.set_title(f"Patch probe (%)\n{setting_text(setting)}", fontsize=9)
    left.legend(fontsize=8)
    edges, recall = probe.by_size(setting)
    right.set_visible(bool(recall))
    draw_sizes(right, edges, recall)
    right.set_title("Recall by size (%)", fontsize=9)
    return figure


def ramp() -> str:
    """The colours of cosines for a CSS gradient, dark to light."""
    return ",".join(map(matplotlib.colors.to_hex, COLOUR_MAP(np.linspace(0, 1, 9))))
