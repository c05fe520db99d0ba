"""The page of a report, one HTML file that loads nothing else: the values for the template page.html."""

from pathlib import Path
from statistics import median

import jinja2
import numpy as np

from fastalign.config import to_yaml
from fastalign.report import charts
from fastalign.report.features import PatchMaps
from fastalign.report.run import METRICS, Probe, Run, score_text
from fastalign.training.metrics import series

OBJECTIVES = {"maskembed": "MaskEmbed", "mim": "masked image modeling"}


def render_page(run: Run, maps: PatchMaps | None) -> str:
    """The HTML of a run; without maps, its section about patch features is left out."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["score"] = score_text
    name, probe = run.folder.resolve().name, run.probe
    return environment.get_template("page.html").render(
        run=run,
        name=run.facts["name"] if run.facts else run.config.student.name if run.config else name,
        objective=OBJECTIVES[run.config.objective] if run.config else "",
        last_step=max((line["step"] for line in run.metrics), default=0),
        numbers=_key_numbers(run),
        charts=[
            charts.inline_svg(charts.curves_figure({title: lines}), title)
            for title, lines in charts.curves(run.metrics).items()
        ],
        maps=maps,
        pictures=[
            charts.inline_svg(charts.patches_figure(maps, [index]), name)
            for index, name in enumerate(maps.names if maps else [])
        ],
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
            scores = {
                m: score for m in run.probe.models(setting) if (score := run.probe.score(setting, m, key))
            }
            if scores:
                about = f"Patch probe, {title}, % {' → '.join(scores)}, {setting}"
                found.append((about, " → ".join(map(score_text, scores.values()))))
    if run.classified:
        head = next(iter(run.classified.values()))["settings"]["head"]
        about = f"Image classification, top-1, % {' → '.join(run.classified)}, {head} head"
        found.append(
            (about, " → ".join(f"{100 * each['mean']['top1']:.1f}" for each in run.classified.values()))
        )
    for about, key, form in (
        ("Images per second, median", "images_per_second", ".0f"),
        ("Time spent waiting for data, median", "data_wait", ".1%"),
    ):
        if values := series(run.metrics, key)[1]:
            found.append((about, f"{median(values):{form}}"))
    return found


def _details(probe: Probe, setting: str) -> dict:
    """Scores, recall by size and by class in a setting; the largest gain first, classes without patches last."""
    count, recall, precision = (
        probe.average(setting, "per_class", key) for key in ("positives", "recall", "average_precision")
    )
    first, last = next(iter(recall.values()), 0), next(reversed(recall.values()), np.empty(0))
    gain = last - first if len(recall) > 1 else last
    columns = [*list(count.values())[-1:], *recall.values(), *precision.values()]
    names = probe.facts["data"]["classes"]
    order = sorted(range(len(gain)), key=lambda index: (-np.nan_to_num(gain[index], nan=-2.0), names[index]))
    return {
        "setting": setting,
        "chart": charts.inline_svg(charts.probe_figure(probe, setting), setting),
        "colours": charts.colours_of(recall),
        "precision": list(precision),
        "classes": [(names[index], *(column[index] for column in columns)) for index in order],
    }
