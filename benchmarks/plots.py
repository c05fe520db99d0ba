"""A picture of each result, made from its JSON alone: ``python -m benchmarks.plots [NAME ...]``.

Turns `benchmarks/results/NAME.json` into `NAME.png` beside it. Needs matplotlib (the extra `demo`); where it is
missing, a benchmark says so and goes on.
"""

import argparse
import io
import sys
from pathlib import Path

from PIL import Image

from benchmarks import record

COLOURS = {"baseline": "#9aa0a6", "zero": "#1f77b4", "drop": "#2ca02c", "fp8": "#9467bd"}
BEST, WIDTH, ROW = "#1f77b4", 9, 0.28
SHORT = {
    "vit_base_patch16_clip_quickgelu_224": "B/16-224",
    "vit_large_patch14_clip_quickgelu_336": "L/14-336",
    "vit_so400m_patch14_siglip_384": "SO400M/14-384",
}


def draw(name: str) -> Path | None:
    """Draw a result; None, with a line that says why, where there is nothing to draw with or from."""
    if name not in PLOTS:
        print(f"no {name}.png: there is no plot of it")
        return None
    try:
        import matplotlib
    except ImportError:
        print(f"no {name}.png: matplotlib is not installed")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    result = record.read(name)
    if not any("failed" not in row for row in result.get("rows", [])):
        print(f"no {name}.png: nothing has been measured")
        return None
    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = PLOTS[name](pyplot, [row for row in result["rows"] if "failed" not in row], result)
        figure.text(0.995, 0.003, _place(result["environment"]), ha="right", fontsize=6, color="grey")
        figure.savefig(picture := io.BytesIO(), dpi=110)
        pyplot.close(figure)
    # A palette makes it a third as large.
    path = record.RESULTS / f"{name}.png"
    Image.open(picture).convert("RGB").quantize(64).save(path, optimize=True)
    return path


def _place(environment: dict) -> str:
    gpu, commit = environment.get("gpu") or "CPU", environment.get("commit") or "unknown"
    return f"{gpu} · torch {environment.get('torch')} · commit {commit} · {environment.get('date')}"


def _figure(pyplot, panels: list[int], title: str):
    """A column of panels, each with room for so many bars."""
    heights = [count * ROW + 0.7 for count in panels]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(WIDTH, sum(heights) + 0.6), height_ratios=heights, squeeze=False
    )
    bottom = 0.2 / (sum(heights) + 0.6)  # a line for where it was measured
    figure.set_layout_engine("constrained", rect=(0, bottom, 1, 1 - bottom))
    figure.suptitle(title, fontsize=11)
    return figure, axes[:, 0]


def _bars(axes, labels: list[str], values: list[float], text: list[str], colours, target=None) -> None:
    """Bars from left to right under one another, each with its figure; a dashed line for what is wanted."""
    axes.barh(range(len(values)), values, color=colours)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    for index, (value, said) in enumerate(zip(values, text, strict=True)):
        options = {"textcoords": "offset points", "va": "center", "fontsize": 8}
        options["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # over the dashed line
        axes.annotate(said, (value, index), (4, 0), **options)
    axes.set_xlim(0, 1.22 * max(*values, target or 0, 1e-9))
    if target:
        axes.axvline(target, color="crimson", linestyle="--", linewidth=1)


def _stacked(axes, labels: list[str], parts: list[dict[str, float]], unit: str) -> None:
    """A bar for each step, cut into its parts."""
    names = list(dict.fromkeys(name for found in parts for name in found))
    start = [0.0] * len(parts)
    for number, name in enumerate(names):
        widths = [found.get(name, 0.0) for found in parts]
        axes.barh(range(len(parts)), widths, left=start, label=name, color=f"C{number}")
        start = [before + width for before, width in zip(start, widths, strict=True)]
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _variant(row: dict) -> str:
    kind = {True: "compiled", "blocks": "blocks compiled", False: "eager"}[row["compiled"]]
    cap = "cap" if row["softcap"] else "no cap"
    return f"{row['implementation']}, {kind}, {cap}, batch {row['batch']}"


def step(pyplot, rows: list[dict], result: dict):
    """Images a second by variant, a panel a backbone; below, where the time of the compiled step goes."""
    names = list(dict.fromkeys(row["backbone"] for row in rows))
    by_name = [[row for row in rows if row["backbone"] == name] for name in names]
    cut = [row for row in rows if row["compiled"] is True and row["softcap"] and row["parts_ms"]]
    panels = [len(found) for found in by_name] + ([len(cut)] if cut else [])
    figure, axes = _figure(pyplot, panels, "Training step: images a second, and where the time goes")
    for name, found, panel in zip(names, by_name, axes, strict=False):
        text = [
            f"{r['images_per_second']:.0f}" + (f"   MFU {100 * r['mfu']:.0f} %" if r["mfu"] else "")
            for r in found
        ]
        colours = [COLOURS[row["implementation"]] for row in found]
        values = [row["images_per_second"] for row in found]
        _bars(panel, [_variant(row) for row in found], values, text, colours)
        panel.set_title(SHORT.get(name, name), loc="left")
    if cut:
        labels = [
            f"{SHORT.get(r['backbone'], r['backbone'])} {r['implementation']}, {r['batch']}" for r in cut
        ]
        total = {}
        for row in cut:  # the baseline comes first
            total.setdefault(row["backbone"], sum(row["parts_ms"].values()) / row["batch"])
        parts = [
            {part: ms / row["batch"] / total[row["backbone"]] for part, ms in row["parts_ms"].items()}
            for row in cut
        ]
        _stacked(axes[-1], labels, parts, "time an image over the baseline's, compiled, cap")
    return figure


def step_cpu(pyplot, rows: list[dict], result: dict):
    """Speed over the baseline's, and shares of the time."""
    figure, (speed, shares) = _figure(pyplot, [3, 3], f"Eager step on a CPU, {rows[0]['backbone']}")
    labels = [row["implementation"] for row in rows]
    values = [row.get("speedup_over_baseline", 1.0) for row in rows]
    text, colours = [f"{value:.2f}x" for value in values], [COLOURS[label] for label in labels]
    _bars(speed, labels, values, text, colours)
    speed.set_xlabel("speed over the baseline's")
    cut = [
        {part: share / v for part, share in row["parts"].items()} for row, v in zip(rows, values, strict=True)
    ]
    _stacked(shares, labels, cut, "time over the baseline's step")
    return figure


def kernels(pyplot, rows: list[dict], result: dict):
    """How near each kernel comes to what the GPU can do."""
    ours = [row for row in rows if row["implementation"] == "ours" and row["mode"] == "full"]
    kinds = (("copy_share", "share of the copy bandwidth"), ("matmul_share", "share of the matmul rate"))
    # An operation that counts as arithmetic has no bandwidth to reach.
    found = [
        [r for r in ours if key in r and (key == "matmul_share" or "matmul_share" not in r)]
        for key, _ in kinds
    ]
    shown = [(key, title, part) for (key, title), part in zip(kinds, found, strict=True) if part]
    figure, axes = _figure(
        pyplot, [len(part) for *_, part in shown] or [1], "Kernels against the GPU's limits"
    )
    for panel, (key, title, part) in zip(axes, shown, strict=False):
        labels = [f"{row['op']} {row['label']}" for row in part]
        values = [row[key] for row in part]
        target = 0.85 if key == "copy_share" else None
        _bars(panel, labels, values, [f"{100 * value:.0f} %" for value in values], BEST, target)
        panel.set_title(title, loc="left")
    return figure


def attention(pyplot, rows: list[dict], result: dict):
    """Rate of each implementation over the length, heads of 64, with and without a cap, dense and packed."""
    found = [r for r in rows if r.get("tflops") and r["mode"] == "full" and r["width"] == 64]
    found = [row for row in found if "computes" not in row]
    kinds = [(True, False), (False, False), (True, True), (False, True)]
    figure, grid = pyplot.subplots(2, 2, figsize=(WIDTH, 7), sharex=True)
    figure.set_layout_engine("constrained", rect=(0, 0.04, 1, 0.96))
    figure.suptitle("Attention, forward and backward, heads of 64", fontsize=11)
    names = sorted({row["implementation"] for row in found})
    for axes, (capped, packed) in zip(grid.flat, kinds, strict=True):
        for name in names:
            line = [
                r
                for r in found
                if r["implementation"] == name and bool(r["softcap"]) == capped and r["packed"] == packed
            ]
            line = sorted((row["length"], row["tflops"]) for row in line)
            style = {"color": "black", "linewidth": 2.5} if name == "ours" else {"linewidth": 1}
            if line:
                axes.plot(*zip(*line, strict=True), "o-", markersize=3, label=name, **style)
        axes.set_title(f"{'capped' if capped else 'plain'}, {'packed' if packed else 'dense'}", loc="left")
        axes.grid(alpha=0.25)
        axes.set_ylim(bottom=0)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7, frameon=False, ncols=2)
    figure.supxlabel("tokens", fontsize=9)
    figure.supylabel("TFLOP/s", fontsize=9)
    return figure


def masks(pyplot, rows: list[dict], result: dict):
    """The extension's speed over PyTorch's; on a logarithmic axis, because blocks differ by a hundred."""
    keys = ("draw_speedup", "draw_and_pack_speedup")
    figure, axes = _figure(pyplot, [len(rows)] * 2, "Masks: times faster than PyTorch")
    labels = [
        f"{row['kind']}, {row['device']}, {row['threads']} thread{'s' * (row['threads'] > 1)}" for row in rows
    ]
    for panel, key in zip(axes, keys, strict=True):
        values = [row[key] for row in rows]
        _bars(panel, labels, values, [f"{value:.0f}x" for value in values], BEST)
        panel.set_xscale("log")
        panel.set_xlim(0.5, 3 * max(values))
        panel.axvline(1, color="grey", linewidth=1)
        panel.set_title(key.removesuffix("_speedup").replace("_", " "), loc="left")
    return figure


def _lines(pyplot, title: str):
    figure, axes = pyplot.subplots(figsize=(WIDTH, 4.2))
    figure.set_layout_engine("constrained", rect=(0, 0.05, 1, 0.95))
    figure.suptitle(title, fontsize=11)
    axes.grid(alpha=0.25)
    return figure, axes


def data(pyplot, rows: list[dict], result: dict):
    """Images a second against threads, a line a source and decoder."""
    figure, axes = _lines(pyplot, "Data pipeline alone")
    key = "images_per_second" if "images_per_second" in rows[0] else "ratio"
    for series in dict.fromkeys((r["source"], r["decoder"], r["hw_decoder_load"]) for r in rows):
        source, decoder, load = series
        found = [r for r in rows if (r["source"], r["decoder"], r["hw_decoder_load"]) == series]
        label = f"{source}, {decoder}" + (f", hardware {load:g}" if "GPU" in decoder else "")
        style = "o--" if source.endswith("tar") else "o-"
        axes.plot([r["threads"] for r in found], [r[key] for r in found], style, markersize=4, label=label)
    if key == "images_per_second" and result.get("needs"):
        axes.axhline(result["needs"], color="crimson", linestyle="--", linewidth=1, label="what a step takes")
    axes.set_xlabel("threads")
    axes.set_xticks(sorted({row["threads"] for row in rows}))
    axes.set_ylabel("images a second" if key == "images_per_second" else "speed over the first row's")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def scaling(pyplot, rows: list[dict], result: dict):
    """Images a second over ranks, and the line of perfect scaling."""
    figure, axes = _lines(pyplot, f"Weak scaling, {rows[0]['batch_per_rank']} images a rank")
    ranks, rates = [row["ranks"] for row in rows], [row["images_per_second"] for row in rows]
    axes.plot(ranks, [rates[0] / ranks[0] * number for number in ranks], "--", color="grey", label="perfect")
    axes.plot(ranks, rates, "o-", color=BEST, label="measured")
    for row in rows:
        said = f"{100 * row['efficiency']:.0f} %" if "efficiency" in row else ""
        at = (row["ranks"], row["images_per_second"])
        axes.annotate(said, at, (0, -14), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xticks(ranks)
    axes.set_xlabel("ranks")
    axes.set_ylabel("images a second")
    axes.set_ylim(0, 1.1 * max(rates))
    axes.margins(x=0.08)
    axes.legend(frameon=False, loc="upper left")
    return figure


def profile(pyplot, rows: list[dict], result: dict):
    """The costliest operations of a step."""
    rows = rows[:20]
    name = SHORT.get(result.get("backbone"), result.get("backbone"))
    title = f"Costliest operations of a step: {name}, {result.get('mode')}, batch {result.get('batch')}"
    figure, (axes,) = _figure(pyplot, [len(rows)], title)
    labels = [row["operation"].removeprefix("void ").replace("at::native::", "")[:64] for row in rows]
    text = [f"{row['ms_a_step']:.2f} ms, {100 * row['share']:.1f} %" for row in rows]
    _bars(axes, labels, [row["ms_a_step"] for row in rows], text, BEST)
    axes.tick_params("y", labelsize=7)
    axes.set_xlabel("milliseconds a step")
    return figure


PLOTS = {
    "step": step,
    "step_cpu": step_cpu,
    "kernels": kernels,
    "attention": attention,
    "masks": masks,
    "data": data,
    "data_cpu": data,
    "scaling": scaling,
    "profile": profile,
}


def main(arguments: list[str] | None = None) -> int:
    """Draw what is asked for, or every result there is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: every result there is")
    names = parser.parse_args(arguments).names or [name for name in PLOTS if record.read(name)]
    for name in names:
        if name not in PLOTS:
            sys.exit(f"no plot {name}; there are {', '.join(PLOTS)}")
        print(draw(name) or "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
