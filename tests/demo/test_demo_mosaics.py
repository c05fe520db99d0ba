"""The demo: its mosaics, the teacher's weights that come with the repository, and the summary of a run."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from demo import mosaics, summary, train_teacher

DEMO = Path(mosaics.__file__).parent
SETTINGS = mosaics.Settings(train=24, val=8, test=4, seed=3, size=96)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mosaics") / "data"
    assert mosaics.render(folder, SETTINGS, workers=1)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_table(folder, split):
    with (folder / split / "images" / "labels.csv").open(newline="") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize(("split", "count"), [("train", 24), ("val", 8), ("test", 4)])
def test_labels_csv_names_the_largest_region_of_each_picture(rendered, split, count):
    header, *rows = read_table(rendered, split)
    assert header == ["name", "label"]
    assert [name for name, _ in rows] == [f"{index:05d}.jpg" for index in range(count)]
    for name, label in rows:
        labels = np.asarray(Image.open(rendered / split / "labels" / name.replace(".jpg", ".png")))
        areas = {value: int((labels == value).sum()) for value in np.unique(labels)}
        assert areas[int(label)] == max(areas.values())


def test_classes_txt_names_the_ids_of_the_label_maps(rendered):
    names = (rendered / "classes.txt").read_text().splitlines()
    assert names == json.loads((rendered / "mosaics.json").read_text())["classes"]
    assert len(names) == 10


def test_pictures_are_jpegs_and_label_maps_bytes_of_the_same_size(rendered):
    for path in rendered.glob("*/images/*.jpg"):
        with Image.open(path) as picture:
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (96, 96))
        with Image.open(path.parent.parent / "labels" / f"{path.stem}.png") as labels:
            assert (labels.format, labels.mode, labels.size) == ("PNG", "L", (96, 96))
            assert np.asarray(labels).max() < len(mosaics.CLASSES)


def test_pictures_have_one_to_four_regions_of_distinct_classes():
    counts = set()
    for index in range(60):
        regions = mosaics.draw_regions(np.random.default_rng([0, 0, index]), 96)
        _, labels = mosaics.draw_mosaic(mosaics.load_photos(), 0, "train", index, 96)
        # One class a region: the two maps cut the picture into the same cells.
        pairs = set(zip(regions.ravel().tolist(), labels.ravel().tolist(), strict=True))
        assert len(pairs) == len({region for region, _ in pairs}) == len({label for _, label in pairs})
        assert np.bincount(regions.ravel()).min() >= 0.05 * 96 * 96
        counts.add(len(pairs))
    assert counts == {1, 2, 3, 4}


@pytest.mark.parametrize("workers", [1, 2])
def test_rendering_again_gives_the_same_bytes_for_any_number_of_workers(rendered, tmp_path, workers):
    assert mosaics.render(tmp_path / "again", SETTINGS, workers=workers)
    assert contents(tmp_path / "again") == contents(rendered)


def test_a_picture_does_not_depend_on_the_others(rendered):
    _, labels = mosaics.draw_mosaic(mosaics.load_photos(), SETTINGS.seed, "val", 5, SETTINGS.size)
    assert np.array_equal(labels, np.asarray(Image.open(rendered / "val" / "labels" / "00005.png")))
    alone, _ = mosaics.draw_mosaic(mosaics.load_photos(), SETTINGS.seed, "train", 5, SETTINGS.size)
    other, _ = mosaics.draw_mosaic(mosaics.load_photos(), SETTINGS.seed, "val", 5, SETTINGS.size)
    assert not np.array_equal(alone, other)


@pytest.mark.parametrize("name", mosaics.CLASSES)
def test_no_split_shows_what_another_shows(name):
    width, height = mosaics.load_photos()[mosaics.CLASSES.index(name)].size
    rng = np.random.default_rng(0)
    boxes = {
        split: np.array([mosaics.crop_window(rng, width, height, split) for _ in range(500)])
        for split in mosaics.SPLITS
    }
    assert boxes["train"][:, 2].max() <= int(0.6 * width) <= boxes["val"][:, 0].min()
    assert boxes["val"][:, 2].max() <= int(0.8 * width) <= boxes["test"][:, 0].min()
    for box in boxes.values():
        assert box.min() >= 0
        assert box[:, 2].max() <= width
        assert box[:, 3].max() <= height
        assert np.allclose(box[:, 2] - box[:, 0], box[:, 3] - box[:, 1])


def test_a_second_command_does_nothing_and_other_settings_render_anew(tmp_path, capsys):
    command = ["--out", str(tmp_path / "data"), "--train", "3", "--val", "2", "--test", "2", "--workers", "1"]
    assert mosaics.main(command) == 0
    before = contents(tmp_path / "data")
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert mosaics.main(command) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "rendered" in first
    assert second.endswith("already there")
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert mosaics.main([*command, "--seed", "1"]) == 0
    after = contents(tmp_path / "data")
    assert after.keys() == before.keys()
    assert after["train/images/00000.jpg"] != before["train/images/00000.jpg"]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert mosaics.main(["--out", str(tmp_path), "--train", "1", "--val", "1", "--test", "1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_missing_package_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(mosaics.PHOTOS, "flower", ("no_such_package", "flower.jpg"))
    monkeypatch.setitem(mosaics.DISTRIBUTIONS, "no_such_package", "no-such-package")
    assert mosaics.main(["--out", str(tmp_path / "data"), "--train", "1", "--val", "1", "--test", "1"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "pip install no-such-package" in message
    assert not list(tmp_path.iterdir())


def test_an_interrupted_render_leaves_the_old_data(rendered, tmp_path, monkeypatch):
    out = tmp_path / "data"
    mosaics.render(out, mosaics.Settings(train=2, val=1, test=1), workers=1)
    before = contents(out)
    monkeypatch.setattr(mosaics, "draw_mosaic", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        mosaics.render(out, mosaics.Settings(train=2, val=1, test=1, seed=9), workers=1)
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_the_teacher_in_the_repository_knows_fresh_validation_mosaics():
    card = json.loads((DEMO / "teacher.json").read_text())
    model = timm.create_model(card["architecture"], **card["kwargs"])
    model.load_state_dict(load_file(DEMO / "teacher.safetensors"), strict=True)
    pairs = [mosaics.draw_mosaic(mosaics.load_photos(), 77, "val", index, 96) for index in range(300)]
    images = [train_teacher.evaluation_view(Image.fromarray(picture)) for picture, _ in pairs]
    labels = torch.tensor([mosaics.image_label(labels) for _, labels in pairs])
    accuracy = train_teacher.top1(model, train_teacher.to_input(images), labels)
    # Four standard errors of a share of 300 pictures are 0.12.
    assert accuracy == pytest.approx(card["val_top1"], abs=0.12)
    assert accuracy > 0.45


def test_training_writes_weights_that_timm_loads(rendered, tmp_path, capsys):
    out = tmp_path / "teacher.safetensors"
    sizes = ["--epochs", "2", "--full-epochs", "1", "--batch", "8", "--threads", "1"]
    threads = torch.get_num_threads()
    try:
        assert train_teacher.main(["--data", str(rendered), "--out", str(out), *sizes]) == 0
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out.count("val top-1") == 3
    card = json.loads(out.with_suffix(".json").read_text())
    timm.create_model(card["architecture"], **card["kwargs"]).load_state_dict(load_file(out), strict=True)
    capsys.readouterr()
    for wrong in (["--data", str(tmp_path / "nothing")], ["--data", str(rendered), "--batch", "25"]):
        assert train_teacher.main([*wrong, "--out", str(out), "--threads", str(threads)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


METRICS = [
    {"step": 0, "epoch": 0, "val_loss": 1.33},
    {"step": 1, "epoch": 0, "loss": 1.3, "lr": 3e-4, "images_per_second": 10.0, "data_wait": 0.5},
    {"step": 2, "epoch": 0, "loss": 0.9, "lr": 2e-4, "images_per_second": 100.0, "data_wait": 0.25},
    {"step": 3, "epoch": 1, "loss": 0.8, "lr": 1e-4, "images_per_second": 110.0, "data_wait": 0.0},
    {"step": 3, "epoch": 1, "val_loss": 0.75},
]


def write_run(folder, lines, tail=""):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    return str(folder)


def test_the_summary_reads_a_file_whose_last_line_is_torn(tmp_path, capsys):
    assert summary.main([write_run(tmp_path, METRICS, tail='{"step": 4, "lo')]) == 0
    printed = capsys.readouterr().out
    for expected in ("1.3300", "0.7500", "100", "25.0%", "not saved yet"):
        assert expected in printed
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 800


@pytest.mark.parametrize("lines", [None, [], METRICS[1:4]])
def test_a_run_without_validation_is_one_line(tmp_path, capsys, lines):
    run = str(tmp_path) if lines is None else write_run(tmp_path, lines)
    assert summary.main([run]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "curves.png").exists()
