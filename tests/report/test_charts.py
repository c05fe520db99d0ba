"""Curves go through the numbers of the run."""

import json
import re

import numpy as np
import pytest

from fastalign.report.__main__ import main
from fastalign.report.charts import Line, line_chart, thinned, ticks
from tests.report.helpers import curve, render


def test_curves_go_through_the_metrics(trained):
    main([str(trained), "--images", "0"])
    text = (trained / "report.html").read_text()
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    charts = {svg.partition("<b>")[2].partition("<")[0]: svg for svg in text.split("<figure")[1:]}
    cases = [("Loss", "training", "loss", 1), ("Loss", "validation", "val_loss", 1)]
    cases += [
        ("Learning rate", "learning rate", "lr", 1),
        ("Throughput", "images a second", "images_per_second", 1),
    ]
    cases += [("Waiting for data", "data wait", "data_wait", 100), ("Memory", "memory", "memory", 2**-30)]
    for title, name, key, factor in cases:
        wanted = [(line["step"], factor * line[key]) for line in lines if key in line]
        found = curve(charts[title], name)
        assert len(wanted) == len(found) > 1
        largest = max(value for _, value in wanted)
        for (x, y), (step, value) in zip(found, wanted, strict=True):
            assert x == pytest.approx(step, abs=0.01)
            assert y == pytest.approx(value, abs=0.001 * largest)


def test_probes_during_training_have_their_chart(run):
    with (run / "metrics.jsonl").open("a") as file:
        for step, recall in ((2, 0.25), (4, 0.5)):
            file.write(
                json.dumps({"step": step, "probe_macro_recall": recall, "probe_map": recall / 2}) + "\n"
            )
    assert "Patch probe during training" in render(run, "--images", "0").text
    text = (run / "report.html").read_text()
    svg = next(part for part in text.split("<figure") if "Patch probe during" in part)
    np.testing.assert_allclose(curve(svg, "macro recall"), [(2, 25), (4, 50)], atol=0.05)
    np.testing.assert_allclose(curve(svg, "mAP"), [(2, 12.5), (4, 25)], atol=0.05)


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 60, [0, 20, 40, 60]),
        (1.08, 1.31, [1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.35]),
    ],
)
def test_ticks_are_round_and_enclose(low, high, wanted):
    assert ticks(low, high) == wanted


@pytest.mark.parametrize("values", [[0.0, 0.0], [3.0, 3.0], [1e-9, 2e-9], [-5.0, 5.0], [7.0]])
def test_a_chart_of_any_values_has_its_points_inside(values):
    svg = line_chart([Line("a", list(range(len(values))), values)], "", "A", zero=False)
    places = [float(n) for n in re.search(r'points="([^"]+)"', svg)[1].replace(",", " ").split()]
    assert all(0 <= x <= 420 for x in places[::2])
    assert all(0 <= y <= 250 for y in places[1::2])


def test_values_that_are_not_finite_are_left_out():
    svg = line_chart([Line("a", [1, 2, 3], [1.0, float("inf"), float("nan")])], "", "A")
    assert curve(svg, "a") == [(pytest.approx(1), pytest.approx(1))]
    assert line_chart([Line("a", [1], [float("nan")])], "", "A") == ""


def test_thinning_keeps_spikes():
    values = list(np.random.default_rng(0).standard_normal(10_000))
    values[4321], values[8765] = 99.0, -99.0
    steps, kept = thinned(list(range(10_000)), values)
    assert len(steps) <= 602
    assert steps == sorted(steps)
    assert [values[step] for step in steps] == kept
    assert {0, 4321, 8765, 9999} <= set(steps)


def test_of_a_step_that_occurs_twice_the_later_line_counts(run):
    """An interrupted run may have written steps that it makes again."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "epoch": 0, "loss": 0.5}) + "\n")
    render(run, "--images", "0")
    points = curve((run / "report.html").read_text().split("<figure")[1], "training")
    np.testing.assert_allclose([x for x, _ in points], [1, 2, 3, 4], atol=0.01)
    assert points[1][1] == pytest.approx(0.5, abs=0.01)
