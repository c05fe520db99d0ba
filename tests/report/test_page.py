"""The page, parsed: pictures, maps, scores, colours, what it says where something is missing; and bad input."""

import base64
import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from timm.data import create_transform

import fastalign as fa
import fastalign.report
from fastalign.config import load_config
from fastalign.report import charts, features
from fastalign.utils.sections import merge
from tests.report.helpers import GRID, probe_facts, refused, render


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
    assert "probe it" in page.text


MISSING = [
    ("backbone.json", "saved no backbone (it is unfinished, or trains the decoder only)", 0),
    ("config.yaml", "config.yaml is missing", 0),
    ("metrics.jsonl", "metrics.jsonl is missing or empty", 14),
    ({"student": {"weights": "/no/teacher.safetensors"}}, "Features before alignment are not shown: ", 8),
    ({"data": {"val": "/nowhere"}}, "No pictures are shown: no such folder", 0),
]


@pytest.mark.parametrize(("missing", "note", "images"), MISSING)
def test_what_is_missing_is_named_and_the_rest_is_shown(run, trained, capsys, missing, note, images):
    """A file of the run, or what its configuration names."""
    if isinstance(missing, str):
        (run / missing).unlink()
    else:
        tree = yaml.safe_load((run / "config.yaml").read_text())
        (run / "config.yaml").write_text(yaml.safe_dump(merge(tree, missing)))
    page = render(run, "--images", "2")
    assert note in page.text
    assert note in capsys.readouterr().out
    assert "has not been probed" in page.text
    assert len(page.all("image")) == images
    assert ("Throughput" in page.text) == (missing != "metrics.jsonl")
    if missing == "config.yaml":  # files are shown by the aligned backbone alone
        assert len(render(run, "--images", f"{trained.parent}/val/0.jpg").all("image")) == 4


def test_a_probe_with_less_than_usual_is_read(run):
    """Majority labels have no sizes; a score may be missing; models may have other names."""
    facts = probe_facts()
    for row in facts["results"]:
        row["model"] = f"mine-{row['model']}"
        del row["test"]["by_size"], row["test"]["per_class"]["average_precision"]
    for row in facts["summary"]:
        row |= {"model": f"mine-{row['model']}", "test": {"macro_recall": {"mean": None, "std": None}}}
    (run / "probe.json").write_text(json.dumps(facts))
    page = render(run, "--images", "0")
    assert "Recall by size" not in page.text
    assert "Recall, mine-aligned" in page.text
    assert "AP, mine-aligned" not in page.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{]\n{"step": 1}\n', "metrics.jsonl, line 1 "),
        ("backbone.json", "[]", "backbone.json is damaged"),
        ("probe.json", "{", "probe.json has no results"),
        ("probe.json", '{"data": {"classes": []}, "summary": [], "results": []}', "has no results"),
        ("probe.json", '{"data": {"classes": []}, "summary": [{"seeds": 1}]}', "has no results"),
        ("classify.json", "{}", "classify.json has no results"),
    ],
)
def test_damaged_files_are_named(run, capsys, name, content, message):
    (run / name).write_text(content)
    assert message in refused(capsys, run)
    assert not (run / "report.html").exists()


def test_bad_arguments(run, tmp_path, capsys, monkeypatch):
    cases = [
        (("--images", "-1"), "-1 cannot be read as an image"),
        (("--images", tmp_path / "gone.jpg"), "gone.jpg cannot be read as an image"),
        (("--output", tmp_path), "name a file that ends in .html"),
        (("--output", "metrics.jsonl"), "name a file that ends in .html"),
        (("--images", "0", "--pngs", run / "config.yaml"), "config.yaml is not a directory"),
        (("--probe", run / "gone.json"), "gone.json: No such file"),
    ]
    for arguments, message in cases:
        assert message in refused(capsys, run, *arguments)
    assert "neither metrics.jsonl nor backbone.json" in refused(capsys, tmp_path / "nothing")
    for name in ("fastalign.report.charts", "fastalign.report.page", "matplotlib"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(fastalign.report, "charts", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "figures need a package: pip install matplotlib" in refused(capsys, run)


def test_both_themes_have_all_colours():
    css = Path(features.__file__).with_name("page.css").read_text()
    light, dark = (dict(re.findall(r"--(\w+): (#\w{6})", s)) for s in re.findall(r":root \{([^}]*)\}", css))
    assert light.keys() == dark.keys()
    assert charts.THEME.items() <= light.items()
