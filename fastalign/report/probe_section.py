"""The section of the patch probe: scores, classes and sizes, before and after."""

from html import escape
from pathlib import Path

from fastalign.report.charts import bar_chart
from fastalign.report.probe import METRICS, Probe, Score, Setting

COLOURS = ("before", "aligned")


def score_text(score: Score | None) -> str:
    """A score in percent, with its spread where there are several seeds: 71.3 ± 0.4"""
    if score is None or score.mean is None:
        return "–"
    spread = f" ± {100 * score.std:.1f}" if score.std is not None else ""
    return f"{100 * score.mean:.1f}{spread}"


def setting_text(setting: Setting) -> str:
    """A setting in words."""
    labels, head, skipped = setting
    return f"{labels} labels, {head} head" + (f", {skipped} blocks skipped" if skipped != "0" else "")


def probe_section(probe: Probe | None, folder: Path) -> str:
    """Scores, then recall by class and by size for each setting, the first one open."""
    if probe is None:
        command = f"python -m fastalign.probe --backbone {escape(str(folder))} --before --data DATA"
        return (
            "<section>\n<h2>Patch probe</h2>\n<p>This run has not been probed: "
            f"<code>{command}</code> measures how well a small head reads the classes of each patch off its "
            "features.</p>\n</section>"
        )
    counts = ", ".join(f"{count} {split}" for split, count in probe.data.images.items())
    place = f" of <code>{escape(probe.data.path)}</code>" if probe.data.path else ""
    parts = [
        "<section>\n<h2>Patch probe</h2>",
        f"<p>A small head, trained on frozen features, says which of {len(probe.data.classes)} classes each patch "
        f"holds. Images{place}: {counts}. Test split, percent; ± is the standard deviation over seeds.</p>",
        _scores(probe),
    ]
    for place, setting in enumerate(probe.settings()):
        body = _bars(probe, setting)
        if body:
            opened = " open=''" if place == 0 else ""
            parts.append(
                f"<details{opened}><summary>By class and by size: {escape(setting_text(setting))}</summary>"
                f"{body}</details>"
            )
    return "\n".join(parts) + "\n</section>"


def _scores(probe: Probe) -> str:
    titles = "".join(
        f'<th scope="col">{title}</th>'
        for title in ("Model", "Labels", "Head", "Blocks skipped", "Seeds", *METRICS.values())
    )
    rows = []
    for row in probe.summary:
        cells = (row.labels, row.head, str(row.skip_blocks), str(row.seeds))
        cells += tuple(score_text(row.test.get(metric)) for metric in METRICS)
        body = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{escape(row.model)}</th>{body}</tr>')
    return _table("Scores", titles, rows, "scroll scores")


def _table(label: str, titles: str, rows: list[str], kind: str) -> str:
    return (
        f'<div class="{kind}" tabindex="0" role="region" aria-label="{label}">'
        f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _bars(probe: Probe, setting: Setting) -> str:
    models = probe.models(setting)
    if not models:
        return ""
    recall = {model: probe.per_class(model, setting, "recall") for model in models}
    sizes = {model: probe.by_size(model, setting) for model in models}
    parts = []
    if all(sizes.values()):
        edges = next(iter(sizes.values()))[0]
        if all(found[0] == edges for found in sizes.values()):
            names = [f"{100 * edge:.0f}" for edge in edges[1:]]
            shares = {model: found[1] for model, found in sizes.items()}
            axis = "share of the image's patches that hold the class, % at most"
            parts.append(bar_chart(names, shares, "Recall by size", axis))
    if all(recall.values()):
        precision = {model: probe.per_class(model, setting, "average_precision") for model in models}
        positives = probe.per_class(models[-1], setting, "positives")
        parts.append(_classes(probe.data.classes, recall, precision, positives))
    return "\n".join(parts)


def _classes(classes: list[str], recall: dict, precision: dict, positives: list) -> str:
    models = list(recall)
    colours = dict(zip(models, COLOURS[-len(models) :], strict=True))
    order = sorted(range(len(classes)), key=lambda c: (-_gain(recall, models, c), classes[c]))
    keys = "".join(
        f'<span><i style="background:var(--{colour})"></i>{escape(model)}</span>'
        for model, colour in colours.items()
    )
    titles = [
        *(f"Recall, {model}" for model in models),
        *(f"AP, {model}" for model in models if precision[model]),
    ]
    head = '<th scope="col">Class</th><th scope="col">Patches</th><th class="bars" scope="col">Recall</th>'
    head += "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    rows = []
    for c in order:
        bars = "".join(
            f'<i style="width:{100 * (recall[model][c] or 0):.2f}%;background:var(--{colour})"></i>'
            for model, colour in colours.items()
        )
        cells = [_share(recall[model][c]) for model in models]
        cells += [_share(precision[model][c]) for model in models if precision[model]]
        count = "–" if positives[c] is None else round(positives[c])
        rows.append(
            f'<tr><th scope="row">{escape(classes[c])}</th><td>{count}</td>'
            f'<td class="bars" aria-hidden="true">{bars}</td>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    return (
        f'<h3>Recall by class <span class="legend">{keys}</span></h3><p class="quiet">In percent, of patches that '
        "hold the class; the largest gain first.</p>" + _table("Recall by class", head, rows, "scroll tall")
    )


def _gain(recall: dict, models: list[str], c: int) -> float:
    values = [recall[model][c] for model in models]
    if any(value is None for value in values):
        return -2.0  # absent from the split: last
    return values[-1] - values[0] if len(values) > 1 else values[0]


def _share(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"
