"""The demo's mosaics, and the teacher's weights in the repository."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from demo import mosaics, train_teacher

DEMO = Path(mosaics.__file__).parent
SETTINGS = mosaics.Settings(train=24, val=8, test=4, seed=3, size=96)
TINY = ("--train", "3", "--val", "2", "--test", "2", "--workers", "1")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mosaics") / "data"
    assert mosaics.render(folder, SETTINGS, workers=1)
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pictures_label_maps_and_tables_fit(rendered):
    names = (rendered / "classes.txt").read_text().splitlines()
    assert names == json.loads((rendered / "mosaics.json").read_text())["classes"]
    assert len(names) == 10
    for split, count in (("train", 24), ("val", 8), ("test", 4)):
        header, *rows = (rendered / split / "images/labels.csv").read_text().splitlines()
        assert (header, len(rows)) == ("name,label", count)
        for index, row in enumerate(rows):
            picture = Image.open(rendered / split / f"images/{index:05d}.jpg")
            label_map = Image.open(rendered / split / f"labels/{index:05d}.png")
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (96, 96))
            assert (label_map.format, label_map.mode, label_map.size) == ("PNG", "L", (96, 96))
            areas = np.bincount(np.asarray(label_map).ravel(), minlength=10)
            largest = areas.tolist().index(areas.max())
            assert row == f"{index:05d}.jpg,{largest}"


def test_pictures_have_one_to_four_regions_of_distinct_classes():
    counts = set()
    for index in range(60):
        regions = mosaics.draw_regions(np.random.default_rng([0, 0, index]), 96)
        _, labels = mosaics.draw_mosaic(0, "train", index, 96)
        # One class a region: the two maps cut the picture into the same cells.
        pairs = set(zip(regions.ravel().tolist(), labels.ravel().tolist(), strict=True))
        assert len(pairs) == len({region for region, _ in pairs}) == len({label for _, label in pairs})
        assert np.bincount(regions.ravel()).min() >= 0.05 * 96 * 96
        counts.add(len(pairs))
    assert counts == {1, 2, 3, 4}


def test_a_picture_depends_on_seed_split_and_index_alone(rendered, tmp_path):
    assert mosaics.render(tmp_path / "again", SETTINGS, workers=2)
    assert contents(tmp_path / "again") == contents(rendered)
    _, labels = mosaics.draw_mosaic(SETTINGS.seed, "val", 5, SETTINGS.size)
    assert np.array_equal(labels, np.asarray(Image.open(rendered / "val" / "labels" / "00005.png")))
    others = [mosaics.draw_mosaic(SETTINGS.seed, split, 5, SETTINGS.size)[1] for split in ("train", "test")]
    assert not any(np.array_equal(labels, other) for other in others)


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
        assert (box[:, 2:] <= (width, height)).all()
        assert np.allclose(box[:, 2] - box[:, 0], box[:, 3] - box[:, 1])


def test_a_second_command_does_nothing_and_other_settings_render_again(tmp_path, capsys, monkeypatch):
    command = ["--out", str(tmp_path / "data"), *TINY]
    assert mosaics.main(command) == 0
    before = contents(tmp_path / "data")
    with monkeypatch.context() as patch:
        patch.setattr(mosaics, "draw_mosaic", lambda *_: 1 / 0)
        assert mosaics.main(command) == 0
        assert capsys.readouterr().out.endswith("already there\n")
        with pytest.raises(ZeroDivisionError):
            mosaics.main([*command, "--seed", "1"])
    assert contents(tmp_path / "data") == before, "an interruption leaves the old data"
    assert mosaics.main([*command, "--seed", "1"]) == 0
    after = contents(tmp_path / "data")
    assert after.keys() == before.keys()
    assert after["train/images/00000.jpg"] != before["train/images/00000.jpg"]
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "thesis.txt").write_text("mine")
    monkeypatch.setitem(mosaics.PHOTOS, "flower", ("no_such_package", "flower.jpg"))
    monkeypatch.setitem(mosaics.DISTRIBUTIONS, "no_such_package", "no-such-package")
    for out, message in (
        (tmp_path, "holds something other than mosaics"),
        (tmp_path / "data", "pip install no-such-package"),
    ):
        assert mosaics.main(["--out", str(out), *TINY]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_teacher_in_the_repository_knows_fresh_validation_mosaics():
    card = json.loads((DEMO / "teacher.json").read_text())
    model = timm.create_model(card["architecture"], **card["kwargs"])
    model.load_state_dict(load_file(DEMO / "teacher.safetensors"), strict=True)
    pairs = [mosaics.draw_mosaic(77, "val", index, 96) for index in range(300)]
    images = [train_teacher.evaluation_view(Image.fromarray(picture)) for picture, _ in pairs]
    labels = torch.tensor([mosaics.image_label(labels) for _, labels in pairs])
    accuracy = train_teacher.top1(model, train_teacher.to_input(images), labels)
    # Four standard errors of a share of 300 pictures are 0.12.
    assert accuracy == pytest.approx(card["val_top1"], abs=0.12)
    assert accuracy > 0.45


def test_training_writes_weights_that_timm_loads(rendered, tmp_path, capsys):
    out, threads = tmp_path / "teacher.safetensors", torch.get_num_threads()
    line = ["--out", str(out), "--epochs", "2", "--full-epochs", "1", "--threads", str(threads)]
    assert train_teacher.main([*line, "--data", str(rendered), "--batch", "8"]) == 0
    assert capsys.readouterr().out.count("val top-1") == 3
    card = json.loads(out.with_suffix(".json").read_text())
    timm.create_model(card["architecture"], **card["kwargs"]).load_state_dict(load_file(out), strict=True)
    for wrong in (["--data", str(tmp_path / "nothing")], ["--data", str(rendered), "--batch", "25"]):
        assert train_teacher.main([*line, *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1
