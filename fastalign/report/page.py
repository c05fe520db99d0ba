"""The page of a report, one HTML file that loads nothing else: the values for the template page.html."""

from pathlib import Path
from statistics import median

import jinja2
import numpy as np

from fastalign.config import to_yaml
from fastalign.evaluation.results import percent
from fastalign.report import charts
from fastalign.report.features import PatchMaps
from fastalign.report.run import METRICS, Probe, Run
from fastalign.training.metrics import series

OBJECTIVES = {"maskembed": "MaskEmbed", "mim": "masked image modeling"}


def render_page(run: Run, maps: PatchMaps | None) -> str:
    """The HTML of a run; without maps, its section about patch features is left out."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = percent
    name, probe = run.folder.resolve().name, run.probe
    steps, losses = series(run.metrics, "val_loss")
    speed, wait = (series(run.metrics, key)[1] for key in ("images_per_second", "data_wait"))
    return environment.get_template("page.html").render(
        run=run,
        name=run.facts["name"] if run.facts else run.config.student.name if run.config else name,
        objective=OBJECTIVES[run.config.objective] if run.config else "",
        last_step=max((line["step"] for line in run.metrics), default=0),
        validation=[(steps[end], losses[end]) for end in (0, -1)[: len(losses)]],
        speed=median(speed) if speed else None,
        wait=median(wait) if wait else None,
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
        "models": probe.models(setting),
        "chart": charts.inline_svg(charts.probe_figure(probe, setting), setting),
        "colours": charts.colours_of(recall),
        "precision": list(precision),
        "classes": [(names[index], *(column[index] for column in columns)) for index in order],
    }
