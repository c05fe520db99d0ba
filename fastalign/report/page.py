"""The page of a report, one HTML file that loads nothing else: the values for the template page.html."""

from pathlib import Path
from statistics import median

import jinja2
import numpy as np

from fastalign.config import to_yaml
from fastalign.evaluation.results import percent
from fastalign.report import charts
from fastalign.report.features import PatchMaps
from fastalign.report.run import METRICS, Run
from fastalign.training.metrics import series


def render_page(run: Run, maps: PatchMaps | None) -> str:
    """The HTML of a run; without maps, its section about patch features is left out."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = percent
    name = run.folder.resolve().name
    steps, losses = series(run.metrics, "val_loss")
    speed, wait = (series(run.metrics, key)[1] for key in ("images_per_second", "data_wait"))
    return environment.get_template("page.html").render(
        run=run,
        name=run.facts["name"] if run.facts else run.config.student.name if run.config else name,
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
        metrics=METRICS,
        details=[_details(run, name) for name in run.settings],
        yaml=to_yaml(run.config, comments=True) if run.config else "",
    )


def _details(run: Run, name: str) -> dict:
    """A setting's scores, and a table by class: the largest gain of recall first, classes without patches last."""
    setting, classes = run.settings[name], run.probe["data"]["classes"]
    keys = ("positives", "recall", "average_precision")
    count, recall, precision = (setting.average("per_class", key) for key in keys)
    first, last = [0, *recall.values()][-2:] if recall else (0, np.empty(0))
    gain, columns = last - first, [*list(count.values())[-1:], *recall.values(), *precision.values()]
    order = np.lexsort((classes[: len(gain)], -np.nan_to_num(gain, nan=-2.0)))
    return {
        "name": name,
        "scores": setting.scores,
        "chart": charts.inline_svg(charts.probe_figure(name, setting), name),
        "titles": [f"Recall, {model}" for model in recall] + [f"AP, {model}" for model in precision],
        "classes": [(classes[index], *(column[index] for column in columns)) for index in order],
    }
