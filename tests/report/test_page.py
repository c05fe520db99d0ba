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
from tests.report.helpers import GRID, edit_config, probe_facts, render


def test_the_page_needs_nothing_else_and_is_the_same_each_time(run):
    (run / "probe.json").write_text(json.dumps(probe_facts()))
    page = render(run, "--images", "3")
    first = (run / "report.html").read_bytes()
    render(run, "--images", "3")
    assert (run / "report.html").read_bytes() == first
    assert not re.search(rb"https?:|url\((?!#)|@import", first)
    for _, attrs in page.tags:
        assert not {"srcset", "onload"} & attrs.keys()
        assert attrs.get("href", "#").startswith("#")
        assert attrs.get("src", "data:image/").startswith("data:image/")
    assert not page.all("script") + page.all("link")
    assert all(attrs["alt"] for attrs in page.all("img"))
    assert all(attrs["aria-label"] and attrs["role"] == "img" for attrs in page.all("svg"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert (levels[0], levels.count(1)) == (1, 1)
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels))


def test_pictures_and_maps_are_those_of_the_images(run):
    page = render(run, "--images", "2")
    images = page.all("img")
    assert len(images) == 2 * 7
    vit = fa.load_backbone(run).eval()
    data = {key: vit.data[key] for key in ("mean", "std", "interpolation", "crop_pct")}
    transform = create_transform((3, 32, 48), is_training=False, **data)
    folder = Path(load_config(run / "config.yaml").data.val)
    for place, name in enumerate(("0.jpg", "4.jpg")):  # the first and the last
        picture, *maps = images[7 * place : 7 * place + 7]
        assert picture["alt"] == f"{name}, with patches A and B marked"
        shown = _pixels(picture)
        assert shown.shape[0] * 3 == shown.shape[1] * 2
        assert shown.shape[1] >= 256
        assert {_pixels(tile).shape for tile in maps} == {(*GRID, 3)}
        with torch.no_grad():
            tokens = vit.forward_features(transform(Image.open(folder / name))[None])[0, 1:].double()
        unit = tokens / tokens.norm(dim=1, keepdim=True)
        cosine = (unit @ unit[2 * 6 + 3]).tolist()
        said = re.fullmatch(
            rf"Cosines with {name}, patch A, aligned: mean (\S+), lowest (\S+)", maps[3]["alt"]
        )
        assert float(said[1]) == pytest.approx(sum(cosine) / 24, abs=0.0051)
        assert float(said[2]) == pytest.approx(min(cosine), abs=0.0051)
        # The lightest patch is the patch itself, the darkest the least similar.
        light = _pixels(maps[3]).astype(int).sum(-1).ravel()
        assert light.argmax() == 15
        assert light[int(np.argmin(cosine))] == light.min()
        # The shown picture is what the backbone sees: made small again it is the input.
        small = Image.fromarray(shown).resize((48, 32), Image.Resampling.BOX)
        seen = (transform(Image.open(folder / name)) * 0.5 + 0.5).permute(1, 2, 0).numpy() * 255
        assert vit.data["mean"] == [0.5, 0.5, 0.5]
        assert np.abs(np.asarray(small) - seen).mean() < 3
    marks = [attrs["style"] for attrs in page.all("span") if attrs.get("class", "").startswith("mark a")]
    assert set(marks) == {"left:50%;top:50%;width:16.67%;height:25%"}


def _pixels(attrs: dict) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(attrs["src"].partition(",")[2]))).convert("RGB"))


def test_scores_classes_and_sizes_of_a_probe(run):
    (run / "probe.json").write_text(json.dumps(probe_facts()))
    page = render(run, "--images", "0")
    title = "Patch probe, macro recall, % before → aligned, union labels, linear head"
    assert f"{title}55.0 ± 10.0 → 65.0" in page.text
    table = re.search(r"Recall by class.*?</table>", (run / "report.html").read_text(), re.S)[0]
    rows = [
        re.sub("<[^>]+>", " ", row).split() for row in re.findall(r"<tr><th scope=\"row\">.*?</tr>", table)
    ]
    # Recall before and aligned, then AP: means over seeds by hand, the largest gain first, the absent class last.
    assert rows == [
        ["a&lt;b&gt;&amp;c", "10", "30.0", "70.0", "30.0", "70.0"],
        ["dog", "10", "80.0", "60.0", "80.0", "60.0"],
        ["sea", "–", "–", "–", "–", "–"],
    ]
    widths = [attrs["style"] for attrs in page.all("i") if attrs.get("style", "").startswith("width")]
    assert widths[:2] == ["width:30.00%;background:var(--before)", "width:70.00%;background:var(--aligned)"]
    described = [attrs["aria-label"] for attrs in page.all("svg")]
    assert (
        "Recall by size, percent. before: 50: 30; aligned: 50: 70" in described
    )  # no patch of the other size
    assert not page.all("b" + "c")  # the class name is text
    assert "probe it" in page.text


def decoder_only(run: Path) -> None:
    (run / "backbone.json").unlink()
    edit_config(run, "student", freeze=True)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # of an interrupted write


MISSING = {
    "backbone": (lambda run: (run / "backbone.json").unlink(), "saved no backbone (it is unfinished)", 0),
    "decoder": (decoder_only, "saved no backbone (it trains the decoder only)", 0),
    "config": (lambda run: (run / "config.yaml").unlink(), "config.yaml is missing", 0),
    "metrics": (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl is missing or empty", 14),
    "weights": (
        lambda run: edit_config(run, "student", weights="/nowhere/teacher.safetensors"),
        "Features before are not shown, their weights are not available: ",
        8,
    ),
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
    assert len(page.all("img")) == images
    assert bool(page.all("svg")) == (case != "metrics")


def test_files_are_shown_by_the_aligned_backbone_alone_where_the_other_is_unknown(run, trained):
    (run / "config.yaml").unlink()
    page = render(run, "--images", str(trained.parent / "val" / "0.jpg"))
    assert len(page.all("img")) == 4
    assert not any("before" in attrs["alt"] for attrs in page.all("img"))


def test_both_themes_have_all_colours():
    css = Path(features.__file__).with_name("page.css").read_text()
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", s)) for s in re.findall(r":root \{([^}]*)\}", css))
    assert light.keys() == dark.keys()
    assert charts.THEME.items() <= light.items()


def test_image_classification_before_and_after(run):
    for place, share in ((run / "before", 0.712), (run, 0.7)):
        place.mkdir(exist_ok=True)
        facts = {"mean": {"top1": share}, "settings": {"head": "linear"}}
        (place / "classify.json").write_text(json.dumps(facts))
    render(run, "--images", "0")
    page = (run / "report.html").read_text()
    assert "Image classification, top-1, % before → aligned, linear head" in page
    assert "<dd>71.2 → 70.0</dd>" in page
