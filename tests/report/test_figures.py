"""Components, colours, cosines and charts, against numpy, loops by hand and the run's own numbers."""

import io
import json
import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from fastalign.report import charts, features
from fastalign.report.run import load_backbones, read_probe, read_run
from tests.report.helpers import render


def test_components_are_those_of_an_svd():
    tokens = np.random.default_rng(0).standard_normal((3, 20, 12)) * np.linspace(1, 3, 12) + 5
    values, share = features.principal_components(tokens)
    rows = tokens.reshape(60, 12) - tokens.reshape(60, 12).mean(0)
    left, singular, _ = np.linalg.svd(rows, full_matrices=False)
    wanted = left[:, :3] * singular[:3]
    np.testing.assert_allclose(np.abs(values.reshape(60, 3)), np.abs(wanted), atol=1e-10)
    assert ((values.reshape(60, 3) ** 3).sum(0) > 0).all()
    assert share == pytest.approx((singular[:3] ** 2).sum() / (singular**2).sum())


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_shuffled_and_flipped_components_are_put_back(order):
    values = np.random.default_rng(1).standard_normal((2, 50, 3)) * [5, 2, 1]
    shuffled = 3 * values[..., list(order)] * [1, -1, -1] + 7
    signs = dict(zip(order, (1, -1, -1), strict=True))
    shift = 7 * np.array([signs[c] for c in range(3)])
    wanted = 3 * values + shift  # factor and shift stay, the shift with the sign
    np.testing.assert_allclose(features.match_components(shuffled, values), wanted, atol=1e-12)


def test_colours_go_from_the_first_percentile_to_the_last():
    values = np.stack([np.linspace(-1, 1, 101)] * 3, -1)[None]
    colours = features.component_colours(values)[0, :, 0]
    assert colours[0] == colours[1] == 0
    assert colours[99] == colours[100] == 255
    assert colours[50] == 128
    assert colours[25] == round(255 * 24 / 98)


def test_cosines_are_those_of_a_loop():
    tokens = np.random.default_rng(2).standard_normal((2, 6, 7))

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    by_hand = [[[cosine(a, b) for b in picture] for a in picture] for picture in tokens]
    found = features.cosines(tokens, np.tile(np.arange(6), (2, 1)))
    np.testing.assert_allclose(found, by_hand, atol=1e-12)


def test_marks_are_on_the_patches_of_the_cosines(run):
    """A, the square, in the centre; B, the circle, where the cosine with A before alignment is lowest."""
    models = load_backbones(read_run(run))
    images = torch.randn(1, 3, 32, 48)
    maps = features.compute_maps(["x"], images, models)
    with torch.no_grad():
        tokens = models["before"].forward_features(images)[0, 1:].double()
    other = torch.cosine_similarity(tokens, tokens[15:16], dim=1).argmin().item()
    square, *_, circle = charts.patches_figure(maps, [0]).axes[0].patches
    assert square.get_xy() == (3, 2)
    assert circle.get_center() == (other % 6 + 0.5, other // 6 + 0.5)


CURVES = [
    ("Loss", 0, "loss", 1),
    ("Loss", 1, "val_loss", 1),
    ("Learning rate", 0, "lr", 1),
    ("Throughput (images per second)", 0, "images_per_second", 1),
    ("Patch probe during training (%)", 0, "probe_map", 100),
    ("Waiting for data (% of the time)", 0, "data_wait", 100),
    ("Peak memory (GiB)", 0, "memory", 2**-30),
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


def test_long_curves_stay_small_and_keep_their_extremes():
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
    (setting,) = read_probe(probed / "probe.json")[1].values()
    scores, sizes = charts.probe_figure("union labels, linear head", setting).axes
    for axes, wanted in ((scores, [55, np.nan, 65, np.nan]), (sizes, [30, np.nan, 70, np.nan])):
        np.testing.assert_allclose([bar.get_height() for bar in axes.patches], wanted)
    assert [text.get_text() for text in sizes.get_xticklabels()] == ["50", "100"]


def test_pngs(probed, tmp_path):
    for folder in "ab":
        render(probed, "--images", "2", "--pngs", str(tmp_path / folder))
    for name in ("curves.png", "patches.png", "probe.png"):
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes()
        assert np.asarray(Image.open(io.BytesIO(content)).convert("L")).std() > 5
