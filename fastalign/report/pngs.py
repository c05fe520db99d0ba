"""The same figures as PNGs, for a README. Needs matplotlib (the extra `demo`)."""

from pathlib import Path

import numpy as np

from fastalign.report.features import Maps, ramp_colours
from fastalign.report.page import curves
from fastalign.report.pictures import Pictures
from fastalign.report.probe import Probe
from fastalign.report.probe_section import setting_text
from fastalign.report.source import Run
from fastalign.utils.errors import UserError

try:
    from matplotlib.figure import Figure
    from matplotlib.patches import Ellipse, Rectangle
except ImportError:
    raise UserError("--pngs needs a package: pip install matplotlib") from None

COLOURS = {"before": "#b45309", "aligned": "#1d4ed8", "third": "#0f766e"}
CURVES = ("Loss", "Patch probe during training", "Throughput")
DPI = 110


def write(folder: Path, run: Run, pictures: Pictures | None, maps: Maps | None) -> list[Path]:
    """Write curves.png, patches.png and probe.png, of those that there is something to draw for.

    Args:
        folder: where; made where it is missing.
        run: the run.
        pictures: those of the page.
        maps: theirs.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "curves": _curves(run),
        "patches": _patches(pictures, maps) if pictures else None,
        "probe": _probe(run.probe) if run.probe else None,
    }
    found = []
    for name, figure in figures.items():
        if figure is not None:
            path = folder / f"{name}.png"
            figure.savefig(path, dpi=DPI, metadata={"Software": None})
            found.append(path)
    return found


def _curves(run: Run) -> Figure | None:
    charts = [chart for chart in curves(run) if chart[0] in CURVES]
    if not charts:
        return None
    figure = Figure(figsize=(4 * len(charts), 3.2), layout="constrained")
    axes = figure.subplots(1, len(charts), squeeze=False)[0]
    for place, (title, unit, lines) in zip(axes, charts, strict=True):
        for line in lines:
            style = {"color": COLOURS[line.colour], "linewidth": 1.3, "label": line.name}
            place.plot(line.steps, line.values, "o-" if line.markers else "-", markersize=4, **style)
        place.set_title(f"{title} ({unit})" if unit else title, fontsize=10)
        place.set_xlabel("step")
        place.set_ylim(bottom=0)
        place.grid(alpha=0.25)
        place.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            place.legend(frameon=False)
    return figure


def _patches(pictures: Pictures, maps: Maps) -> Figure:
    models = list(maps.colours)
    titles = ["picture", *(f"components,\n{model}" for model in models)]
    titles += [f"cosine with {letter},\n{model}" for letter in "AB" for model in models]
    shape = maps.grid[0] / maps.grid[1]
    size = (1.45 * len(titles), 1.45 * shape * len(pictures.names) + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(pictures.names), len(titles), squeeze=False)
    for index, row in enumerate(axes):
        extent = (0, maps.grid[1], maps.grid[0], 0)  # in patches, so that marks are too
        tiles = [np.asarray(pictures.shown[index]), *(maps.colours[model][index] for model in models)]
        marks = [(0, 1), *(() for _ in models)]
        for query in range(2):
            tiles += [ramp_colours(maps.cosines[model][index, query], maps.low) for model in models]
            marks += [(query,) for _ in models]
        for place, tile, marked in zip(row, tiles, marks, strict=True):
            place.imshow(tile, extent=extent, interpolation="nearest")
            place.set_axis_off()
            for query in marked:
                _mark(place, maps, maps.queries[index][query], query)
    for place, title in zip(axes[0], titles, strict=True):
        place.set_title(title, fontsize=8)
    return figure


def _mark(place, maps: Maps, patch: int, query: int) -> None:
    row, column = divmod(patch, maps.grid[1])
    for colour, width in (("black", 3), ("white", 1.5)):
        style = {"fill": False, "edgecolor": colour, "linewidth": width}
        shape = (
            Ellipse((column + 0.5, row + 0.5), 1, 1, **style)
            if query
            else Rectangle((column, row), 1, 1, **style)
        )
        place.add_patch(shape)


def _probe(probe: Probe) -> Figure | None:
    setting = probe.settings()[0]
    models = probe.models(setting)
    sizes = {model: probe.by_size(model, setting) for model in models}
    names = {"macro_recall": "macro recall", "map": "mAP"}
    scores = {model: [probe.score(model, setting, metric) for metric in names] for model in models}
    scored = any(score and score.mean is not None for row in scores.values() for score in row)
    if not scored:
        return None
    sized = all(sizes.values())
    figure = Figure(figsize=(8 if sized else 4, 3.2), layout="constrained")
    axes = figure.subplots(1, 2 if sized else 1, squeeze=False, width_ratios=[1, 2] if sized else [1])[0]
    means = {m: [s.mean if s else None for s in row] for m, row in scores.items()}
    errors = {m: [(s.std or 0) if s else 0 for s in row] for m, row in scores.items()}
    _group(axes[0], list(names.values()), means, errors)
    axes[0].set_title(f"Patch probe (%)\n{setting_text(setting)}", fontsize=9)
    axes[0].legend(frameon=False, fontsize=8)
    if sized:
        edges = next(iter(sizes.values()))[0]
        _group(axes[1], [f"{100 * edge:.0f}" for edge in edges[1:]], {m: s[1] for m, s in sizes.items()})
        axes[1].set_title("Recall by size (%)", fontsize=9)
        axes[1].set_xlabel("share of the image's patches that hold the class, % at most")
    return figure


def _group(place, names: list[str], groups: dict[str, list], errors: dict[str, list] | None = None) -> None:
    width = 0.8 / len(groups)
    colours = ("before", "aligned")[-len(groups) :]
    for number, (model, shares) in enumerate(groups.items()):
        xs = np.arange(len(names)) + (number - (len(groups) - 1) / 2) * width
        heights = [100 * (share or 0) for share in shares]
        spread = [100 * error for error in errors[model]] if errors else None
        place.bar(xs, heights, width, yerr=spread, capsize=3, color=COLOURS[colours[number]], label=model)
    place.set_xticks(range(len(names)), names)
    place.set_ylim(0, 100)
    place.grid(axis="y", alpha=0.25)
    place.set_axisbelow(True)
    place.spines[["top", "right"]].set_visible(False)
