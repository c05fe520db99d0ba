"""The report: numbers against numpy, timm and loops by hand; the page parsed; every input that can be wrong."""

import base64
import io
import itertools
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from timm.data import create_transform

import fastalign as fa
import fastalign.report
from fastalign import train
from fastalign.build import build_objective
from fastalign.config import load_config
from fastalign.report import features
from fastalign.report.__main__ import main
from fastalign.report.charts import Line, line_chart, thinned, ticks
from fastalign.report.pictures import pick
from fastalign.report.probe import read_probe
from fastalign.report.source import backbones, read_run

MODEL = {"name": "vit_tiny_patch16_224", "weights": "random"}
MODEL["kwargs"] = {"img_size": [32, 48], "patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}
GRID = (4, 6)
CSS = Path(features.__file__).with_name("page.css").read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of four updates on real JPEGs."""
    root, rng = tmp_path_factory.mktemp("report"), np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 5)):
        for index in range(count):
            path = root / split / f"{index}.jpg"
            path.parent.mkdir(exist_ok=True)
            noise = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((96, 72), Image.Resampling.BICUBIC).save(path)
    tree = {
        "output": str(root / "run"),
        "student": MODEL,
        "data": {"train": str(root / "train"), "val": str(root / "val"), "threads": 1},
        "optim": {"batch_size": 8, "epochs": 2},
        "log": {"every_steps": 1},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(tree))
    assert train.main([str(root / "recipe.yaml")]) == 0
    return root / "run"


@pytest.fixture
def run(trained, tmp_path):
    """The run's small files, to be damaged at will."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("metrics.jsonl", "config.yaml", "backbone.json", "backbone.safetensors"):
        (folder / name).write_bytes((trained / name).read_bytes())
    return folder


def split(recall, **more):
    counted = [None if value is None else 10 for value in recall]
    per_class = {"recall": recall, "average_precision": recall, "positives": counted, **more}
    sizes = {"edges": [0, 0.5, 1.0], "recall": [recall[0], None], "positives": [7, 0]}
    return {"macro_recall": recall[0], "per_class": per_class, "by_size": sizes}


def probe_facts() -> dict:
    """A probe of three classes, one of them absent, with two seeds."""
    recalls = {
        "before": ([0.2, 0.9, None], [0.4, 0.7, None]),
        "aligned": ([0.6, 0.5, None], [0.8, 0.7, None]),
    }
    key = {"labels": "union", "head": "linear", "skip_blocks": 0}
    results = [
        {"model": model, **key, "seed": seed, "epoch": 4, "val": {}, "test": split(recall)}
        for model, both in recalls.items()
        for seed, recall in enumerate(both)
    ]
    scores = {"before": (0.55, 0.1), "aligned": (0.65, None)}
    summary = [
        {"model": m, **key, "seeds": 2, "test": {"macro_recall": {"mean": mean, "std": std}}}
        for m, (mean, std) in scores.items()
    ]
    data = {"path": "scenes", "classes": ["a<b>&c", "dog", "sea"], "images": {"train": 3, "test": 2}}
    return {
        "command": "probe it",
        "data": data,
        "versions": {"torch": "2"},
        "results": results,
        "summary": summary,
    }


class Page(HTMLParser):
    """Refuses a page whose tags do not close; keeps what tests look at."""

    VOID = ("meta", "img", "br", "input", "link")

    def __init__(self, text: str):
        super().__init__()
        self.stack, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


def render(folder: Path, *arguments: str) -> Page:
    assert main([str(folder), *arguments]) == 0
    return Page((folder / "report.html").read_text())


def refused(capsys, *arguments) -> str:
    """The one line with which the command refuses."""
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


# --- numbers


def test_components_are_those_of_an_svd():
    tokens = np.random.default_rng(0).standard_normal((3, 20, 12)) * np.linspace(1, 3, 12) + 5
    values, share = features.principal_components(tokens)
    rows = tokens.reshape(60, 12) - tokens.reshape(60, 12).mean(0)
    left, singular, _ = np.linalg.svd(rows, full_matrices=False)
    wanted = left[:, :3] * singular[:3]
    np.testing.assert_allclose(np.abs(values.reshape(60, 3)), np.abs(wanted), atol=1e-10)
    assert ((values.reshape(60, 3) ** 3).sum(0) > 0).all()
    assert share == pytest.approx((singular[:3] ** 2).sum() / (singular**2).sum())


def test_features_of_one_direction_have_two_empty_components():
    tokens = np.arange(8.0).reshape(1, 8, 1) * np.array([3.0, 4.0])
    values, share = features.principal_components(tokens)
    np.testing.assert_allclose(np.abs(values[0, :, 0]), 5 * np.abs(np.arange(8) - 3.5))
    np.testing.assert_allclose(values[0, :, 1:], 0, atol=1e-9)
    assert share == pytest.approx(1)
    constant, _ = features.principal_components(np.ones((2, 4, 6)))
    assert (features.component_colours(constant) == 128).all()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
def test_shuffled_and_flipped_components_are_put_back(order):
    values = np.random.default_rng(1).standard_normal((2, 50, 3)) * [5, 2, 1]
    shuffled = 3 * values[..., list(order)] * [1, -1, -1] + 7
    np.testing.assert_allclose(features.aligned_to(shuffled, values), *[_signed(values, order)], atol=1e-12)


def _signed(values, order):
    """What undoing a shuffle by hand gives: the factor and the shift stay, the shift with the sign."""
    signs = dict(zip(order, (1, -1, -1), strict=True))
    return np.stack([3 * values[..., c] + 7 * signs[c] for c in range(3)], -1)


def test_colours_go_from_the_first_percentile_to_the_last():
    values = np.stack([np.linspace(-1, 1, 101)] * 3, -1)[None]
    colours = features.component_colours(values)[0, :, 0]
    assert colours[0] == colours[1] == 0
    assert colours[99] == colours[100] == 255
    assert colours[50] == 128
    assert colours[25] == round(255 * 24 / 98)


def test_cosines_and_queries_are_those_of_a_loop():
    tokens = np.random.default_rng(2).standard_normal((24, 7))
    centre, other = features.queries(tokens, GRID)
    assert centre == 2 * 6 + 3  # row 2 of 4, column 3 of 6

    def cosine(a, b):
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))

    by_hand = [cosine(tokens[centre], token) for token in tokens]
    np.testing.assert_allclose(features.cosines(tokens, centre), by_hand, atol=1e-12)
    assert by_hand[other] == min(by_hand)


def test_the_ramp_gets_lighter_and_ends_where_it_says():
    ramp = features.ramp_colours(np.linspace(-0.5, 1, 50), -0.5).astype(float) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(ramp) > 0).all()
    assert (features.ramp_colours(np.array([-1.0, -0.5]), -0.5) == features._RAMP[0]).all()


def test_tokens_are_timms_without_the_prefix():
    vit = fa.create_backbone("vit_tiny_patch16_224", depth=2, img_size=32).eval()
    twin = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=0).eval()
    twin.load_state_dict(vit.state_dict())
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        wanted = twin.forward_features(images)[:, 1:].double().numpy()
    np.testing.assert_allclose(features.patch_tokens(vit, images), wanted, atol=1e-5)


def test_what_a_run_started_from_is_what_training_started_from(trained):
    """Random weights are drawn again; the encoder that training begins with is the truth."""
    found = backbones(read_run(trained))
    _, begun = build_objective(load_config(trained / "config.yaml"))
    wanted = begun.state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in found["before"].state_dict().items())
    aligned = found["aligned"].state_dict()
    assert not torch.equal(aligned["blocks.0.attn.qkv.weight"], wanted["blocks.0.attn.qkv.weight"])


# --- curves


def curve(svg: str, name: str) -> list[tuple[float, float]]:
    """The points of a curve in the units of the axes, by way of the ticks' labels."""
    across = [(float(x), float(t)) for x, t in re.findall(r'<text class="x" x="([^"]+)"[^>]*>([^<]+)<', svg)]
    heights = [float(y) for y in re.findall(r'<line [^>]*y1="([^"]+)"', svg)]
    up = list(zip(heights, map(float, re.findall(r'<text class="y"[^>]*>([^<]+)<', svg)), strict=True))

    def unit(ticks, place):
        (a, first), (b, last) = ticks[0], ticks[-1]
        return first + (place - a) / (b - a) * (last - first)

    points = re.search(rf'<polyline data-name="{name}" points="([^"]+)"', svg)[1]
    pairs = [tuple(map(float, point.split(","))) for point in points.split()]
    return [(unit(across, x), unit(up, y)) for x, y in pairs]


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


# --- the page


def test_the_page_needs_nothing_else_and_is_the_same_each_time(run):
    (run / "probe.json").write_text(json.dumps(probe_facts()))
    page = render(run, "--images", "3")
    first = (run / "report.html").read_bytes()
    assert render(run, "--images", "3")
    assert (run / "report.html").read_bytes() == first
    assert b"http:" not in first
    assert b"https:" not in first
    assert b"url(" not in first
    assert b"@import" not in first
    for _, attrs in page.tags:
        assert not {"href", "srcset", "onload"} & attrs.keys()
        assert attrs.get("src", "data:image/").startswith("data:image/")
    assert not page.all("script")
    assert not page.all("link")
    assert all(attrs["alt"] for attrs in page.all("img"))
    assert all(attrs["aria-label"] and attrs["role"] == "img" for attrs in page.all("svg"))
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
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
    assert (
        "Patch probe, macro recall, % before → aligned, union labels, linear head55.0 ± 10.0 → 65.0"
        in page.text
    )
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
    bars = page.all("rect")
    assert len(bars) == 2  # no bar for the size that has no patch
    assert float(bars[1]["height"]) / float(bars[0]["height"]) == pytest.approx(70 / 30, abs=0.01)
    assert not page.all("b" + "c")  # the class name is text
    assert "probe it" in page.text


def test_a_run_that_was_not_probed_says_so(run):
    assert "has not been probed" in render(run, "--images", "0").text


def test_an_unfinished_run_has_curves_only(run, capsys):
    (run / "backbone.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    page = render(run)
    assert "saved no backbone (it is unfinished)" in page.text
    assert "saved no backbone (it is unfinished)" in capsys.readouterr().out
    assert page.all("polyline")
    assert not page.all("img")


@pytest.mark.parametrize("missing", ["config.yaml", "metrics.jsonl"])
def test_what_is_missing_is_named_and_the_rest_is_shown(run, trained, missing):
    (run / missing).unlink()
    page = render(run, "--images", str(trained.parent / "val" / "0.jpg"))
    assert f"{missing} is missing" in page.text
    assert len(page.all("img")) == (4 if missing == "config.yaml" else 7)
    assert bool(page.all("polyline")) == (missing != "metrics.jsonl")


def edit_config(run: Path, section: str, **values) -> None:
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree[section] |= values
    (run / "config.yaml").write_text(yaml.safe_dump(tree))


def test_without_the_weights_before_only_the_aligned_ones_are_shown(run):
    edit_config(run, "student", weights="/nowhere/teacher.safetensors")
    page = render(run, "--images", "2")
    assert "Features before are not shown" in page.text
    assert "/nowhere/teacher.safetensors" in page.text
    assert len(page.all("img")) == 2 * 4
    assert not any("before" in attrs["alt"] for attrs in page.all("img"))


def test_data_that_moved_away_costs_the_pictures_only(run):
    edit_config(run, "data", val="/nowhere/val")
    page = render(run)
    assert "No pictures are shown: no such folder: /nowhere/val" in page.text
    assert page.all("polyline")
    assert not page.all("img")


def test_a_synthetic_data_set_has_pictures_too(run):
    edit_config(run, "data", val=None, train="synthetic:10")
    page = render(run, "--images", "2")
    assert len(page.all("img")) == 14
    assert page.all("img")[7]["alt"].startswith("synthetic:9")


def test_a_remainder_of_the_image_is_not_shown(tmp_path):
    """384 / 14 leaves 6 pixels that no patch reads."""
    vit = fa.create_backbone("vit_tiny_patch16_224", depth=1, img_size=32)
    vit.spec = vit.spec.__class__(**{**vars(vit.spec), "image_size": (38, 38)})
    path = tmp_path / "flat.png"
    Image.new("RGB", (50, 50), (9, 99, 199)).save(path)
    pictures = pick([str(path)], None, vit)
    assert pictures.inputs.shape == (1, 3, 38, 38)
    assert pictures.shown[0].size == (32 * 7, 32 * 7)
    assert pictures.shown[0].getpixel((0, 0)) == (9, 99, 199)


def test_a_run_that_trains_the_decoder_only_says_so(run):
    (run / "backbone.json").unlink()
    edit_config(run, "student", freeze=True)
    assert "saved no backbone (it trains the decoder only)" in render(run).text


def test_of_a_step_that_occurs_twice_the_later_line_counts(run):
    """An interrupted run may have written steps that it makes again."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "epoch": 0, "loss": 0.5}) + "\n")
    render(run, "--images", "0")
    points = curve((run / "report.html").read_text().split("<figure")[1], "training")
    np.testing.assert_allclose([x for x, _ in points], [1, 2, 3, 4], atol=0.01)
    assert points[1][1] == pytest.approx(0.5, abs=0.01)


def test_pngs(run, tmp_path):
    (run / "probe.json").write_text(json.dumps(probe_facts()))
    pytest.importorskip("matplotlib")
    render(run, "--images", "2", "--pngs", str(tmp_path / "a"))
    render(run, "--images", "2", "--pngs", str(tmp_path / "b"))
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["curves.png", "patches.png", "probe.png"]
    for name in names:
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes()
        assert np.asarray(Image.open(io.BytesIO(content)).convert("L")).std() > 5
    (run / "backbone.json").unlink()
    (run / "probe.json").unlink()
    render(run, "--pngs", str(tmp_path / "c"))
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["curves.png"]


# --- bad input


def test_folders_that_are_no_run(tmp_path, capsys):
    assert "there is no such folder" in refused(capsys, tmp_path / "nothing")
    assert "neither metrics.jsonl nor backbone.json" in refused(capsys, tmp_path)


def test_damaged_files_are_named(run, capsys):
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text("{]\n" + whole)
    assert "metrics.jsonl, line 1 " in refused(capsys, run)
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\n" + whole.encode())
    assert "metrics.jsonl, line 1 " in refused(capsys, run)
    (run / "metrics.jsonl").write_text(whole)
    (run / "backbone.json").write_text("[]")
    assert "backbone.json is damaged" in refused(capsys, run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda facts: facts.pop("summary"), "summary"),
        (lambda facts: facts["summary"].clear(), "summary"),
        (lambda facts: facts["results"][0].pop("test"), "results.0.test"),
        (lambda facts: facts["results"][0]["test"]["per_class"]["recall"].pop(), "per_class"),
        (lambda facts: facts["results"][0]["test"]["by_size"]["edges"].pop(), "by_size"),
        (
            lambda facts: facts["summary"][0]["test"]["macro_recall"].update(mean="good"),
            "summary.0.test.macro_recall",
        ),
    ],
)
def test_a_probe_of_another_format_is_refused(run, capsys, change, place):
    facts = probe_facts()
    change(facts)
    (run / "other.json").write_text(json.dumps(facts))
    said = refused(capsys, run, "--probe", run / "other.json")
    assert "other.json: " in said
    assert place in said


def test_a_probe_that_is_not_there_or_not_json(run, capsys):
    assert "no such file" in refused(capsys, run, "--probe", run / "gone.json")
    (run / "probe.json").write_text("{")
    assert "probe.json: Invalid JSON" in refused(capsys, run)


def test_a_probe_of_scores_alone_is_shown(run, tmp_path):
    facts = probe_facts() | {"results": []}
    (run / "probe.json").write_text(json.dumps(facts))
    page = render(run, "--images", "0", "--pngs", str(tmp_path / "pngs"))
    assert "55.0 ± 10.0" in page.text
    assert not page.all("rect")


def test_a_probe_with_less_than_usual_is_read(run):
    """Majority labels have no sizes; a score may be missing; another model's name is one, too."""
    facts = probe_facts()
    for row in facts["results"]:
        row["model"] = f"mine-{row['model']}"
        row["test"].pop("by_size")
        row["test"]["per_class"].pop("average_precision")
    for row in facts["summary"]:
        row |= {"model": f"mine-{row['model']}", "test": {"macro_recall": {"mean": None, "std": None}}}
    (run / "probe.json").write_text(json.dumps(facts))
    page = render(run, "--images", "0")
    assert "mine-aligned" in page.text
    assert not page.all("rect")
    assert read_probe(run / "probe.json").score("mine-before", ("union", "linear", "0"), "map") is None


def test_bad_arguments(run, tmp_path, capsys, monkeypatch):
    assert "--images -1" in refused(capsys, run, "--images", "-1")
    assert "it is no image file" in refused(capsys, run, "--images", tmp_path / "gone.jpg")
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    assert "bad.jpg is not an image" in refused(capsys, run, "--images", tmp_path / "bad.jpg")
    assert "it is a folder" in refused(capsys, run, "--output", tmp_path)
    assert "it is a file" in refused(capsys, run, "--images", "0", "--pngs", run / "config.yaml")
    for name in ("fastalign.report.pngs", "matplotlib", "matplotlib.figure"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr(fastalign.report, "pngs", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "--pngs needs matplotlib" in refused(capsys, run, "--pngs", tmp_path / "out")


# --- style


def luminance(colour: str) -> float:
    """WCAG's relative luminance."""
    levels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in levels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_and_bars_stand_out_in_both_themes(theme):
    colours = [
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{([^}]*)\}", CSS)
    ]
    assert len(colours) == 2
    assert colours[0].keys() == colours[1].keys()

    def contrast(a, b):
        light, dark = sorted((luminance(colours[theme][a]), luminance(colours[theme][b])), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    for ground in ("back", "card"):
        assert min(contrast(text, ground) for text in ("text", "quiet")) >= 4.5
        assert min(contrast(line, ground) for line in ("before", "aligned", "third")) >= 3
