"""The page, parsed: pictures, maps, scores, colours, and what it says where something is missing."""

import base64
import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

import fastalign as fa
from fastalign.config import load_config
from fastalign.report import charts, features
from fastalign.report.run import load_backbones, read_run
from tests.report.helpers import GRID, edit_config, render


def test_the_page_needs_nothing_else_and_is_the_same_each_time(probed):
    page = render(probed, "--images", "3")
    first = (probed / "report.html").read_bytes()
    render(probed, "--images", "3")
    assert (probed / "report.html").read_bytes() == first
    assert not re.search(rb"https?:|url\((?!#)|@import", first)
    for _, attrs in page.tags:
        assert not {"srcset", "onload"} & attrs.keys()
        assert attrs.get("href", "#").startswith(("#", "data:image/"))
        assert "src" not in attrs
    assert not page.all("script") + page.all("link")
    assert all(attrs["aria-label"] for attrs in page.all("svg"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert (levels[0], levels.count(1)) == (1, 1)
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels))


def test_pictures_and_maps_are_those_of_the_images(run):
    page = render(run, "--images", "2")
    images = page.all("image")
    assert len(images) == 2 * 7
    vit = fa.load_backbone(run).eval()
    data = {key: vit.data[key] for key in ("mean", "std", "interpolation", "crop_pct")}
    transform = create_transform((3, 32, 48), is_training=False, **data)
    folder = Path(load_config(run / "config.yaml").data.val)
    means = re.findall(r"cosine with A\s+aligned, mean (\S+)", page.text)
    for place, name in enumerate(("0.jpg", "4.jpg")):  # the first and the last
        picture, *maps = map(_pixels, images[7 * place : 7 * place + 7])
        assert {tile.shape for tile in maps} == {(*GRID, 3)}
        pixels = transform(Image.open(folder / name))
        with torch.no_grad():
            tokens = vit.forward_features(pixels[None])[0, 1:].double()
        unit = tokens / tokens.norm(dim=1, keepdim=True)
        cosine = (unit @ unit[2 * 6 + 3]).tolist()  # row 2 of 4, column 3 of 6
        assert float(means[place]) == pytest.approx(sum(cosine) / 24, abs=0.0051)
        # The more similar, the lighter.
        luminance = (maps[3] @ [0.2126, 0.7152, 0.0722]).ravel()
        assert (np.diff(luminance[np.argsort(cosine)]) >= -0.1).all()
        assert np.ptp(luminance) > 100
        # The shown picture is what the backbone sees; matplotlib stores resampled images upside down.
        assert vit.data["mean"] == [0.5, 0.5, 0.5]
        seen = (pixels * 0.5 + 0.5).permute(1, 2, 0).numpy() * 255
        small = Image.fromarray(picture[::-1]).resize((48, 32), Image.Resampling.BOX)
        assert np.abs(np.asarray(small) - seen).mean() < 3


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


def _pixels(attrs: dict) -> np.ndarray:
    data = base64.b64decode(attrs["href"].partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_scores_and_classes(probed):
    for place, share in ((probed / "before", 0.712), (probed, 0.7)):
        place.mkdir(exist_ok=True)
        facts = {"mean": {"top1": share}, "settings": {"head": "linear"}}
        (place / "classify.json").write_text(json.dumps(facts))
    page = render(probed, "--images", "0")
    title = "Patch probe, macro recall, % before → aligned, union labels, linear head"
    assert f"{title}\n55.0 ± 10.0 → 65.0" in page.text
    assert "Image classification, top-1, % before → aligned, linear head\n71.2 → 70.0" in page.text
    table = re.search(r"Recall by class.*?</table>", (probed / "report.html").read_text(), re.S)[0]
    rows = re.findall(r"<tr><th scope=\"row\">.*?</tr>", table)
    rows = [re.sub("<[^>]+>", " ", row).split() for row in rows]
    # Recall before and aligned, then AP: means over seeds by hand, the largest gain first, the absent class last.
    assert rows == [
        ["a&lt;b&gt;&amp;c", "10", "30.0", "70.0", "30.0", "70.0"],
        ["dog", "10", "80.0", "60.0", "80.0", "60.0"],
        ["sea", "–", "–", "–", "–", "–"],
    ]
    widths = [attrs["style"] for attrs in page.all("i") if attrs.get("style", "").startswith("width")]
    assert widths[:2] == ["width:30.00%;background:var(--before)", "width:70.00%;background:var(--aligned)"]
    assert not page.all("b" + "c")  # the class name is text
    assert "probe it" in page.text


def decoder_only(run: Path) -> None:
    (run / "backbone.json").unlink()
    edit_config(run, "student", freeze=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # of an interrupted write


def elsewhere(run: Path) -> None:
    edit_config(run, "student", weights="/nowhere/teacher.safetensors")


MISSING = {
    "backbone": (lambda run: (run / "backbone.json").unlink(), "saved no backbone (it is unfinished)", 0),
    "decoder": (decoder_only, "saved no backbone (it trains the decoder only)", 0),
    "config": (lambda run: (run / "config.yaml").unlink(), "config.yaml is missing", 0),
    "metrics": (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl is missing or empty", 14),
    "weights": (elsewhere, "Features before are not shown, their weights are not available: ", 8),
    "data": (
        lambda run: edit_config(run, "data", val="/nowhere"),
        "No pictures are shown: no such folder",
        0,
    ),
}


@pytest.mark.parametrize("case", MISSING)
def test_what_is_missing_is_named_and_the_rest_is_shown(run, capsys, case):
    change, note, images = MISSING[case]
    change(run)
    page = render(run, "--images", "2")
    assert note in page.text
    assert note in capsys.readouterr().out
    assert "has not been probed" in page.text
    assert len(page.all("image")) == images
    assert ("Throughput" in page.text) == (case != "metrics")


def test_files_are_shown_by_the_aligned_backbone_alone_where_the_other_is_unknown(run, trained):
    (run / "config.yaml").unlink()
    page = render(run, "--images", str(trained.parent / "val" / "0.jpg"))
    assert len(page.all("image")) == 4
    assert "before, mean" not in page.text


def test_both_themes_have_all_colours():
    css = Path(features.__file__).with_name("page.css").read_text()
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", s)) for s in re.findall(r":root \{([^}]*)\}", css))
    assert light.keys() == dark.keys()
    assert charts.THEME.items() <= light.items()
