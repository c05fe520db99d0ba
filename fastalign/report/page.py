"""The page of a report, one HTML file that loads nothing else: the values for the template page.html."""

import base64
import io
from itertools import groupby
from pathlib import Path
from statistics import median

import jinja2
import numpy as np
from PIL import Image

from fastalign.config import to_yaml
from fastalign.report.charts import colours_of, curves, line_chart, ramp, size_chart, tiles
from fastalign.report.features import PatchMaps, Pictures
from fastalign.report.run import ALIGNED, BEFORE, METRICS, Probe, Run, Setting, score_text, setting_text
from fastalign.training.metrics import series

OBJECTIVES = {"maskembed": "MaskEmbed", "mim": "masked image modeling"}
QUALITY = 85


def render_page(run: Run, pictures: Pictures | None, maps: PatchMaps | None) -> str:
    """The HTML of a run; without pictures, its section about patch features is left out."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"score": score_text, "setting": setting_text}
    name = run.config.student.name if run.config else run.folder.resolve().name
    probe = run.probe
    return environment.get_template("page.html").render(
        run=run,
        name=run.facts["name"] if run.facts else name,
        objective=OBJECTIVES[run.config.objective] if run.config else "",
        last_step=max((line["step"] for line in run.metrics), default=0),
        numbers=_key_numbers(run),
        charts={title: line_chart(title, lines) for title, lines in curves(run.metrics).items()},
        maps=maps,
        ramp=ramp(),
        pictures=[_picture(pictures, maps, index) for index in range(len(pictures.names) if pictures else 0)],
        probe=probe,
        metrics=METRICS,
        details=[_details(probe, setting) for setting in probe.settings()] if probe else [],
        yaml=to_yaml(run.config, comments=True) if run.config else "",
    )


def _key_numbers(run: Run) -> list[tuple[str, str]]:
    found = []
    steps, losses = series(run.metrics, "val_loss")
    if losses:
        ends = (0, -1)[: len(losses)]
        about = f"Validation loss, step {' → '.join(str(steps[end]) for end in ends)}"
        found.append((about, " → ".join(f"{losses[end]:.4f}" for end in ends)))
    if run.facts and "step" in run.facts:
        found.append(("Backbone of step", str(run.facts["step"])))
    if run.probe:
        setting = run.probe.settings()[0]
        for key, title in (("macro_recall", "macro recall"), ("map", "mAP")):
            scores = {m: score for m in (BEFORE, ALIGNED) if (score := run.probe.score(m, setting, key))}
            if scores:
                about = f"Patch probe, {title}, % {' → '.join(scores)}, {setting_text(setting)}"
                found.append((about, " → ".join(map(score_text, scores.values()))))
    top1 = {model: 100 * facts["mean"]["top1"] for model, facts in run.classified.items()}
    if top1:
        head = next(iter(run.classified.values()))["settings"]["head"]
        about = f"Image classification, top-1, % {' → '.join(top1)}, {head} head"
        found.append((about, " → ".join(f"{value:.1f}" for value in top1.values())))
    if values := series(run.metrics, "images_per_second")[1]:
        found.append(("Images per second, median", f"{median(values):.0f}"))
    if values := series(run.metrics, "data_wait")[1]:
        found.append(("Time spent waiting for data, median", f"{median(values):.1%}"))
    return found


def _picture(pictures: Pictures, maps: PatchMaps, index: int) -> dict:
    """A picture, and its maps by title: tiles with their data URIs and their marks (class, row, column)."""
    marks = [("ab"[query], *divmod(patch, maps.grid[1])) for query, patch in enumerate(maps.queries[index])]
    shown, *rest = (
        (
            tile,
            _image(tile.pixels, "jpeg" if tile.title == "Picture" else "png"),
            [marks[q] for q in tile.queries],
        )
        for tile in tiles(pictures, maps, index)
    )
    return {
        "name": pictures.names[index],
        "shown": shown,
        "groups": groupby(rest, lambda found: found[0].title),
    }


def _image(pixels: np.ndarray, kind: str) -> str:
    """A data URI of uint8 RGB, [h, w, 3]."""
    Image.fromarray(pixels).save(file := io.BytesIO(), kind, quality=QUALITY)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def _details(probe: Probe, setting: Setting) -> dict:
    """Recall by size and by class in a setting; the largest gain first, classes without patches last."""
    models = probe.models(setting)
    recall, precision = (
        {m: values for m in models if (values := probe.average(m, setting, "per_class", key))}
        for key in ("recall", "average_precision")
    )
    count = probe.average(next(reversed(recall), ""), setting, "per_class", "positives")
    rows = zip(
        probe.facts["data"]["classes"], count, *recall.values(), *precision.values(), strict=bool(recall)
    )

    def rank(row: tuple) -> tuple:
        values = row[2 : 2 + len(recall)]
        gain = -2.0 if None in values else values[-1] - (values[0] if len(values) > 1 else 0)
        return -gain, row[0]

    return {
        "setting": setting,
        "sizes": size_chart(*probe.by_size(setting)),
        "colours": colours_of(recall),
        "precision": list(precision),
        "classes": sorted(rows, key=rank),
    }
