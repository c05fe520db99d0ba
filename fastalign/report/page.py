"""The page: one HTML file that needs nothing else, from what was read and computed."""

from html import escape
from pathlib import Path
from statistics import median

from fastalign.config import to_yaml
from fastalign.report.charts import Line, line_chart
from fastalign.report.features import Maps
from fastalign.report.pictures import Pictures
from fastalign.report.probe import ALIGNED, BEFORE, METRICS, Score
from fastalign.report.probe_section import probe_section, score_text, setting_text
from fastalign.report.source import Run
from fastalign.report.tiles import pictures_section
from fastalign.training.metrics import series

GIB = 2**30
OBJECTIVES = {"maskembed": "MaskEmbed", "mim": "masked image modeling"}
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Browsers then refuse to load anything from elsewhere."""


def page(run: Run, pictures: Pictures | None, maps: Maps | None) -> str:
    """The whole page.

    Args:
        run: what was read.
        pictures: those shown; None = none.
        maps: what is drawn of them.
    """
    style = (Path(__file__).parent / "page.css").read_text()
    name = _name(run)
    sections = [_head(run, name), _notes(run), _curves(run)]
    if pictures is not None:
        sections.append(pictures_section(pictures, maps))
    sections += [probe_section(run.probe, run.folder), _appendix(run)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{escape(name)}: locality alignment</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )


def _name(run: Run) -> str:
    if run.facts:
        return run.facts["name"]
    return run.config.student.name if run.config else run.folder.resolve().name


def _head(run: Run, name: str) -> str:
    about = f"<p>{_what(run)}</p>" if run.config else ""
    cards = "".join(
        f"<div><dt>{escape(title)}</dt><dd>{escape(value)}</dd></div>" for title, value in _key_numbers(run)
    )
    keys = f'<dl class="key">{cards}</dl>' if cards else ""
    return f"<header>\n<h1>{escape(name)}</h1>\n{about}\n{keys}\n</header>"


def _what(run: Run) -> str:
    config = run.config
    steps = f" {run.last_step} steps of" if run.last_step else ""
    cap = f"soft-cap {config.student.softcap:g}" if config.student.softcap else "no soft-cap"
    weights = config.student.weights
    start = f"{weights} weights" if weights in ("pretrained", "random") else f"<code>{escape(weights)}</code>"
    return (
        f"Locality alignment by {OBJECTIVES[config.objective]}:{steps} {config.optim.batch_size} images from "
        f"<code>{escape(config.data.train or 'nowhere')}</code>, {config.masks.distribution} masks, {cap}; "
        f"it started from {start}."
    )


def _key_numbers(run: Run) -> list[tuple[str, str]]:
    found = []
    steps, losses = series(run.lines, "val_loss")
    if losses:
        arrow = f" → {losses[-1]:.4f}" if len(losses) > 1 else ""
        place = f"step {steps[0]} → {steps[-1]}" if arrow else f"step {steps[0]}"
        found.append((f"Validation loss, {place}", f"{losses[0]:.4f}{arrow}"))
    if run.facts and run.facts.get("step") is not None:
        found.append(("Backbone of step", str(run.facts["step"])))
    if run.probe:
        setting = run.probe.settings()[0]
        for metric, title in list(METRICS.items())[:2]:
            scores = [run.probe.score(model, setting, metric) for model in (BEFORE, ALIGNED)]
            if any(scores):
                found.append(
                    (
                        f"{_probe_title(title, scores)}, {setting_text(setting)}",
                        " → ".join(score_text(s) for s in scores if s),
                    )
                )
    for key, title, form in (
        ("images_per_second", "Images a second, median", "{:.0f}"),
        ("data_wait", "Time spent waiting for data, median", "{:.1%}"),
    ):
        values = series(run.lines, key)[1]
        if values:
            found.append((title, form.format(median(values))))
    return found


def _probe_title(title: str, scores: list[Score | None]) -> str:
    title = title.replace("Macro", "macro")
    if all(scores):
        return f"Patch probe, {title}, % before → aligned"
    return f"Patch probe, {title}, % {'aligned' if scores[1] else 'before'}"


def _notes(run: Run) -> str:
    return "\n".join(f'<p class="note">{escape(note)}</p>' for note in run.notes)


def curves(run: Run) -> list[tuple[str, str, list[Line]]]:
    """What is drawn over the steps: title, unit and curves of each chart that has any."""

    def line(
        name: str, key: str, factor: float = 1.0, colour: str = "aligned", markers: bool = False
    ) -> Line:
        steps, values = series(run.lines, key)
        return Line(name, steps, [factor * value for value in values], colour, markers)

    charts = [
        ("Loss", "", [line("training", "loss"), line("validation", "val_loss", 1, "before", True)]),
        (
            "Patch probe during training",
            "%",
            [
                line("macro recall", "probe_macro_recall", 100, "aligned", True),
                line("mAP", "probe_map", 100, "third", True),
            ],
        ),
        ("Learning rate", "", [line("learning rate", "lr")]),
        ("Gradient norm", "before clipping", [line("gradient norm", "grad_norm")]),
        ("Throughput", "images a second", [line("images a second", "images_per_second", 1, "third")]),
        ("Waiting for data", "% of the time", [line("data wait", "data_wait", 100, "third")]),
        ("Memory", "GiB at most", [line("memory", "memory", 1 / GIB, "third")]),
        ("Model FLOPs utilisation", "%", [line("utilisation", "mfu", 100, "third")]),
    ]
    return [(title, unit, lines) for title, unit, lines in charts if any(part.steps for part in lines)]


def _curves(run: Run) -> str:
    charts = "\n".join(
        line_chart(lines, unit, title, zero=title != "Loss") for title, unit, lines in curves(run)
    )
    return (
        f'<section>\n<h2>Training</h2>\n<div class="charts">\n{charts}\n</div>\n</section>' if charts else ""
    )


def _appendix(run: Run) -> str:
    parts = []
    if run.config:
        parts.append(
            f"<p>Trained with <code>python -m fastalign.train {escape(str(run.folder / 'config.yaml'))}</code></p>"
            "<details><summary>Configuration, resolved</summary>"
            f"<pre>{escape(to_yaml(run.config, comments=True))}</pre></details>"
        )
    if run.probe and run.probe.command:
        parts.append(f"<p>Probed with <code>{escape(run.probe.command)}</code></p>")
    versions = (
        {"fastalign (training)": run.facts["fastalign"]} if run.facts and "fastalign" in run.facts else {}
    )
    if run.probe:
        versions |= {f"{name} (probe)": version for name, version in run.probe.versions.items() if version}
    if versions:
        rows = "".join(
            f"<tr><th scope='row'>{escape(name)}</th><td>{escape(str(version))}</td></tr>"
            for name, version in versions.items()
        )
        parts.append(f'<h3>Versions</h3><div class="scroll"><table><tbody>{rows}</tbody></table></div>')
    return "<section>\n<h2>How it was made</h2>\n" + "\n".join(parts) + "\n</section>" if parts else ""
