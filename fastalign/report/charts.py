"""Figures by matplotlib: inline SVG for the page, PNG files for a README."""

import io
import re
from collections.abc import Container, Sequence
from itertools import product

import numpy as np
from markupsafe import Markup, escape

from fastalign.report.features import PatchMaps
from fastalign.report.run import METRICS, Setting
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
"""The light theme of page.css. Inline SVG uses its variables instead, so that it follows the theme."""
STYLE = {
    **dict.fromkeys(("axes.edgecolor", "grid.color"), THEME["rule"]),
    **dict.fromkeys(("axes.labelcolor", "text.color", "xtick.color", "ytick.color"), THEME["quiet"]),
    **dict.fromkeys(("axes.spines.left", "axes.spines.right", "axes.spines.top", "legend.frameon"), False),
    **dict.fromkeys(("axes.axisbelow", "axes.grid", "figure.constrained_layout.use"), True),
    **dict.fromkeys(("xtick.major.size", "ytick.major.size"), 0),
    "axes.grid.axis": "y",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "path.simplify_threshold": 1.0,  # pixels: a curve of any length stays small and keeps its extremes
    "svg.fonttype": "none",
}
PNG = {"dpi": 110, "metadata": {"Software": None}}
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
    ("Peak memory (GiB)", "memory", "memory", 2**-30, "third", "-"),
    ("Model FLOPs utilization (%)", "utilization", "mfu", 100, "third", "-"),
]
"""Chart, curve, key in metrics.jsonl, factor, colour of `THEME`, line style."""
Curve = tuple[str, list[int], list[float], str, str]  # name, steps, values, colour, line style


def curves(metrics: list[dict], titles: Container[str] | None = None) -> dict[str, list[Curve]]:
    """The curves of the charts with these titles (None = all) for which the run has values, by title."""
    found: dict[str, list[Curve]] = {}
    for title, name, key, factor, colour, style in CURVES:
        steps, values = series(metrics, key)
        if steps and (titles is None or title in titles):
            values = [factor * value for value in values]
            found.setdefault(title, []).append((name, steps, values, THEME[colour], style))
    return found


@matplotlib.rc_context(STYLE)
def curves_figure(charts: dict[str, list[Curve]]) -> Figure:
    """The charts of `curves` in a row. Axes begin at 0, that of the loss near the lowest value if 0 is far away."""
    figure = Figure(figsize=(4.4 * len(charts), 2.8))
    row = figure.subplots(1, len(charts), squeeze=False)[0]
    for axes, (title, lines) in zip(row, charts.items(), strict=True):
        for name, steps, values, colour, style in lines:
            style = style if len(steps) > 1 else "o"
            axes.plot(steps, values, style, color=colour, label=name, clip_on=False)
        lowest, highest = axes.dataLim.intervaly
        if title != LOSS or lowest <= highest / 2:
            axes.set_ylim(bottom=min(0, lowest))
        axes.set(title=title, xlabel="step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if len(lines) > 1:
            axes.legend(loc="upper right" if title == LOSS else "lower right")
    return figure


@matplotlib.rc_context(STYLE)
def probe_figure(name: str, setting: Setting) -> Figure:
    """A setting's scores and, if it was measured, recall by size."""
    figure, keys = Figure(figsize=(8.8, 2.8)), ("macro_recall", "map")
    left, right = figure.subplots(1, 2, width_ratios=[1, 2])
    means, spreads = (
        {model: [scores.get(key, {}).get(part) for key in keys] for model, scores in setting.scores.items()}
        for part in ("mean", "std")
    )
    _draw_bars(left, [METRICS[key] for key in keys], means, spreads)
    left.set_title(f"Patch probe (%)\n{name}")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper")
    if recall := setting.average("by_size", "recall"):
        edges = setting.average("by_size", "edges")[next(iter(recall))][1:]
        _draw_bars(right, [f"{100 * edge:.0f}" for edge in edges], recall)
        about = "share of the image's patches that contain the class, % at most"
        right.set(title="Recall by size (%)", xlabel=about)
    right.set_visible(bool(recall))
    return figure


def _draw_bars(axes: Axes, names: list[str], groups: dict[str, Sequence], errors: dict | None = None) -> None:
    """Draw bars in percent. groups, errors: for each model a share in 0..1 per name; None or NaN = no bar."""
    width, colours = 0.8 / len(groups), ("aligned", "before")  # the last model is the aligned one
    for order, (model, shares) in enumerate(groups.items()):
        colour = THEME[colours[len(groups) - 1 - order]]
        places = np.arange(len(names)) + (order - (len(groups) - 1) / 2) * width
        spread = 100 * np.array(errors[model], float) if errors else None
        heights, errorbar = 100 * np.array(shares, float), {"ecolor": THEME["quiet"]}
        bars = axes.bar(places, heights, width, yerr=spread, error_kw=errorbar, color=colour, label=model)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(names)), names)
    axes.set_ylim(0, 100)


@matplotlib.rc_context(STYLE)
def patches_figure(maps: PatchMaps, chosen: Sequence[int]) -> Figure:
    """One row per picture: its components, and its cosines from dark (`maps.low`) to light (1)."""
    models, (rows, columns) = list(maps.colours), next(iter(maps.colours.values())).shape[1:3]
    count = 1 + 3 * len(models)
    figure = Figure(figsize=(1.45 * count, (1.45 * rows / columns + 0.4) * len(chosen)))
    for line, index in zip(figure.subplots(len(chosen), count, squeeze=False), chosen, strict=True):
        tiles = [(f"{maps.names[index]}\n", maps.shown[index], None, (0, 1))]
        tiles += [(f"components\n{model}", maps.colours[model][index], "none", ()) for model in models]
        for query, model in product(range(2), models):
            values = maps.cosines[model][index, query]
            title = f"cosine with {'AB'[query]}\n{model}, mean {values.mean():.2f}"
            tiles.append((title, values, "none", (query,)))
        for axes, (title, pixels, interpolation, queries) in zip(line, tiles, strict=True):
            extent = (0, columns, rows, 0)  # in units of patches
            axes.imshow(pixels, extent=extent, interpolation=interpolation, vmin=maps.low, vmax=1)
            axes.set_axis_off()
            axes.set_title(title, fontsize=7)
            for query, (colour, width) in product(queries, (("black", 3), ("white", 1.5))):
                y, x = divmod(maps.queries[index][query], columns)
                mark = Circle((x + 0.5, y + 0.5), 0.5) if query else Rectangle((x, y), 1, 1)
                axes.add_patch(mark).set(fill=False, edgecolor=colour, linewidth=width, clip_on=False)
    return figure


def inline_svg(figure: Figure, label: str) -> Markup:
    """The figure as SVG with the colour variables of page.css; its ids are unique to the label."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": label}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file := io.BytesIO(), format="svg", transparent=True, dpi=150, metadata=nothing)
    text = file.getvalue().decode()
    text = re.sub(r' id="\w+_\d+"', "", text[text.index("<g ") :]).replace("xlink:href", "href")
    for name, colour in THEME.items():
        text = text.replace(colour, f"var(--{name})")
    size = " ".join(f"{72 * inches:g}" for inches in figure.get_size_inches())
    return Markup(f'<svg viewBox="0 0 {size}" role="group" aria-label="{escape(label)}">{text}')
