"""Classes from folders, tables and shards."""

from pathlib import Path

import numpy as np
import pytest

import fastalign as fa
from fastalign.data.sources import open_source
from fastalign.evaluation.datasets import open_image_splits
from tests.data_helpers import encode, write_tar
from tests.evaluation.helpers import SINGLE, coloured, write_split


def labels_of(root: Path):
    said = []
    splits, classes = open_image_splits(root, SINGLE, said.append)
    return {name: split.labels.tolist() for name, split in splits.items()}, classes, said


def test_classes_are_matched_by_name(tmp_path):
    """Validation lacks the middle one: its images must not slide into the gap."""
    write_split(tmp_path, "train", {"a/0.png": 0, "b/0.png": 0, "c/x/0.png": 0})
    write_split(tmp_path, "val", {"c/0.png": 0, "a/0.png": 0})
    labels, classes, said = labels_of(tmp_path)
    assert (labels, classes) == ({"train": [0, 1, 2], "val": [0, 2]}, ["a", "b", "c"])
    assert said == ["val/ has no image of class b: mean per class is over the other classes"]


def test_labels_in_a_table(tmp_path):
    """Integers sort by value; images next to images/ are ignored."""
    for split in ("train", "val"):
        write_split(tmp_path / split, "images", {"0.png": 10, "1.png": 9, "2.png": 100}, table=True)
        write_split(tmp_path / split, "masks", {"0.png": 0})
    labels, classes, said = labels_of(tmp_path)
    assert (labels["val"], classes, said) == ([1, 0, 2], ["9", "10", "100"], [])


def test_labels_in_shards(tmp_path):
    draw = np.random.default_rng(0)

    def text(label):
        return np.frombuffer(label.encode(), dtype=np.uint8)

    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for shard in range(2):
            members = []
            for number in range(2):
                key = f"dir.x/{shard}{number}"  # a dot in a folder's name ends no key
                members.append((f"{key}.cls", text(f"{2 - number}\n")))
                members.append((f"{key}.crop.png", encode(coloured(number, draw), "PNG")))
            write_tar(tmp_path / split / f"{shard}.tar", members)
    labels, classes, _ = labels_of(tmp_path)
    assert (labels["train"], classes) == ([1, 0, 1, 0], ["1", "2"])
    write_tar(tmp_path / "val" / "1.tar", [("a.png", encode(coloured(0, draw), "PNG"))])
    with pytest.raises(fa.UserError, match=r"1 of 3 images have no label, the first is .*1.tar:a.png"):
        labels_of(tmp_path)


@pytest.mark.parametrize("joined", [False, True])
def test_labels_of_names_with_dots(tmp_path, joined):
    """Each image has the `.cls` of its own name before that of its key, also behind a tar's end mark."""
    classes = {"2020.01.05": b"cat", "2020.01.06": b"dog", "2021": b"cow", "2022.07": b"pig"}
    images = ("2020.01.05", "2020.01.06", "2021.left", "2021.right", "2022.08")
    files = {f"{name}.jpg": b"i" for name in images} | {
        f"{name}.cls": label for name, label in classes.items()
    }
    path, content = tmp_path / "t.tar", b""
    for group in ([item] for item in files.items()) if joined else [list(files.items())]:
        content += write_tar(path, group).read_bytes()
    path.write_bytes(content)
    assert open_source(str(path)).class_names() == ["cat", "dog", "cow", "cow", None]


def test_labels_that_contradict_one_another_are_refused(tmp_path):
    members = [("a.jpg", b"i"), ("a.cls", b"cat"), ("b.cls", b"cat"), ("b.cls", b"cat"), ("a.cls", b"dog")]
    path = write_tar(tmp_path / "t.tar", members)
    with pytest.raises(fa.UserError, match=r"t.tar:a.cls has two labels, 'cat' and 'dog'"):
        open_source(str(path)).class_names()
