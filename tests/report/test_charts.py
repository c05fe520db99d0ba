"""Charts show the numbers of the run."""

import io
import json
import re

import numpy as np
from PIL import Image

from fastalign.report import charts
from fastalign.report.run import read_probe
from tests.report.helpers import render

CURVES = [
    ("Loss", 0, "loss", 1),
    ("Loss", 1, "val_loss", 1),
    ("Learning rate", 0, "lr", 1),
    ("Throughput (images per second)", 0, "images_per_second", 1),
    ("Patch probe during training (%)", 0, "probe_map", 100),
    ("Waiting for data (% of the time)", 0, "data_wait", 100),
    ("Memory (GiB at most)", 0, "memory", 2**-30),
]


def test_curves_go_through_the_metrics(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    lines += [{"step": step, "probe_map": recall} for step, recall in ((4, 0.5), (2, 0.25))]
    lines += [{"step": 2, "epoch": 0, "loss": 0.5, "lr": None}]  # of a resumed run: the later line counts
    found = {axes.get_title(loc="left"): axes for axes in charts.curves_figure(charts.curves(lines)).axes}
    for title, place, key, factor in CURVES:
        wanted = {line["step"]: factor * line[key] for line in lines if line.get(key) is not None}
        assert len(wanted) > 1
        points = found[title].lines[place].get_xydata()
        np.testing.assert_allclose(points, sorted(wanted.items()), rtol=1e-12)


def test_long_curves_stay_small_and_keep_their_extremes(run):
    """100,000 steps of noise with one spike up and one down: the path reaches both."""
    values = np.random.default_rng(0).standard_normal(100_000)
    values[43210], values[87654] = 99.0, -99.0
    curve = ("loss", list(range(100_000)), values.tolist(), "red", "-")
    svg = charts.inline_svg(charts.curves_figure({"Loss": [curve]}), "Loss")
    assert len(svg) < 100_000
    path = max(re.findall(r' d="([^"]+)"', svg), key=len)
    heights = np.array([float(y) for _, y in re.findall(r"([\d.]+) ([\d.]+)", path)])
    # In SVG y points down. The noise fills about 8 of the 198 units between the spikes.
    assert np.ptp(heights) > 20 * (np.percentile(heights, 90) - np.percentile(heights, 10))
    assert heights.argmin() < heights.argmax()


def test_bars_have_the_height_of_the_shares(probed):
    """Means over seeds by hand; no bar where nothing was measured."""
    probe = read_probe(probed / "probe.json")
    scores, sizes = charts.probe_figure(probe, "union labels, linear head").axes
    for axes, wanted in ((scores, [55, np.nan, 65, np.nan]), (sizes, [30, np.nan, 70, np.nan])):
        np.testing.assert_allclose([bar.get_height() for bar in axes.patches], wanted)
    assert [text.get_text() for text in sizes.get_xticklabels()] == ["50", "100"]


def test_pngs(probed, tmp_path):
    for folder in "ab":
        render(probed, "--images", "2", "--pngs", str(tmp_path / folder))
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["curves.png", "patches.png", "probe.png"]
    for name in names:
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes()
        assert np.asarray(Image.open(io.BytesIO(content)).convert("L")).std() > 5
    (probed / "backbone.json").unlink()
    (probed / "probe.json").unlink()
    render(probed, "--pngs", str(tmp_path / "c"))
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["curves.png"]
