"""Small images with label maps or classes, tiny backbones, the two commands and their results."""

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import fastalign as fa
from fastalign import classify, probe
from fastalign.backbones.spec import BlockSpec, ViTSpec
from fastalign.evaluation.datasets import open_labelled
from fastalign.evaluation.features import PatchFeatures
from fastalign.training.distributed import World
from fastalign.utils.errors import UserError

NAME = "vit_tiny_patch16_224"
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
SINGLE = World(0, 1, torch.device("cpu"))
CPU = {"device": torch.device("cpu"), "dtype": torch.float32}

# --- label maps

SIZE = (6, 4)  # width, height
PUBLISHED = {  # names without suffix of the two labelled splits
    "coco": [[f"{n:012d}" for n in part] for part in ((9, 25, 30, 34, 36, 42, 49), (139, 285))],
    "ade20k": [[f"ADE_{part}_{n:08d}" for n in range(1, end)] for part, end in (("train", 4), ("val", 3))],
}


def picture(number=0, size=SIZE):
    draw = np.random.default_rng(number)
    return Image.fromarray(draw.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def grey(*values, size=SIZE, dtype=np.uint8):
    """A map with the given values in its first pixels, 0 elsewhere."""
    pixels = np.zeros((size[1], size[0]), dtype=dtype)
    pixels.flat[: len(values)] = values
    return Image.fromarray(pixels)


def put(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def expected(*values, rest=0):
    labels = np.full((SIZE[1], SIZE[0]), rest, dtype=np.int16)
    labels.flat[: len(values)] = values
    return labels


def names(images):
    source = getattr(images, "source", images)
    return [source.name(index) for index in range(len(source))]


def refused(data, *words, split="train", index=0):
    """A split, or one of its label maps, is refused with a message that contains the words."""
    with pytest.raises((UserError, FileNotFoundError)) as error:
        open_labelled(str(data), split).label_map(index)
    for word in words:
        assert str(word) in str(error.value)


# --- scenes for the probe

CLASSES = ("sky", "grass", "road", "kite")
COUNTS = {"train": 20, "val": 8, "test": 6}
SPEC = ViTSpec(BlockSpec(6, 2, 24), depth=1, image_size=(2, 2), patch_size=(1, 1))
PROBE_KWARGS = {**KWARGS, "reg_tokens": 1}


def scene(draw: np.random.Generator, split: str) -> tuple[Image.Image, Image.Image]:
    """Noise coloured by class: sky above, grass below, a road somewhere, a strip that is void."""
    height, width = (int(n) for n in draw.integers(34, 60, 2))
    labels = np.full((height, width), 1, np.uint8)
    labels[: draw.integers(height // 4, height // 2)] = 0
    left = int(draw.integers(0, width - 12))
    labels[height // 2 :, left : left + 12] = 2
    labels[:, -5:] = 255
    if split == "train":
        labels[3:8, 3:9] = 3
    colours = np.zeros((256, 3), np.uint8)
    colours[[0, 1, 2, 3]] = (60, 90, 160), (40, 150, 40), (120, 110, 100), (170, 20, 20)
    pixels = colours[labels] + draw.integers(0, 70, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels), Image.fromarray(labels)


def models(**kwargs):
    """Our backbone and timm's with the same, moved weights."""
    kwargs = kwargs or PROBE_KWARGS
    vit, model = fa.create_backbone(NAME, **kwargs), timm.create_model(NAME, num_classes=0, **kwargs).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.load_state_dict(vit.state_dict())
    return vit, model


def patch_features(count: int, seed: int, classes: int = 3) -> PatchFeatures:
    """Tokens that correlate with their labels; the last class is rare, some patches are void."""
    draw = np.random.default_rng(seed)
    union = draw.random((count, 4, classes)) < np.array([0.5, 0.4, 0.15])
    majority = np.where(union.any(-1), union.argmax(-1), -1).astype(np.int16)
    directions = np.random.default_rng(99).normal(size=(classes, 6))  # the same in all splits
    tokens = draw.normal(size=(count, 5, 6))
    tokens[:, 1:] += union @ directions
    tokens[:, 0] += union.any(1) @ directions
    tokens = {0: torch.from_numpy(tokens).bfloat16()}
    labels = (torch.from_numpy(each) for each in (np.packbits(union, axis=-1), majority, union.any(1)))
    return PatchFeatures(tokens, *labels, classes)


def probe_line(data, *more, backbone=NAME) -> list[str]:
    """The arguments of a probe."""
    made = ["--weights", "random", "--kwargs", json.dumps(PROBE_KWARGS)] if backbone == NAME else []
    quick = ["--epochs", "2", "--batch-size", "5", "--threads", "1", "--forward-batch", "4"]
    return ["--backbone", str(backbone), *made, "--data", str(data), *quick, *map(str, more)]


# --- images with classes

FIGURES = ("top1", "top5", "mean_per_class", "loss")
QUICK = {"batch_size": 12, "threads": 1}


def coloured(label: int, draw: np.random.Generator) -> Image.Image:
    """The class is a colour; the rest is noise."""
    colour = np.array([(label & 1) * 160, (label >> 1 & 1) * 160, (label >> 2 & 1) * 160])
    return Image.fromarray((colour + draw.integers(0, 90, (36, 40, 3))).astype(np.uint8))


def write_split(root: Path, split: str, files: dict[str, int | None], *, table: bool = False) -> Path:
    """Images by name, with a labels.csv of those that have a label."""
    draw = np.random.default_rng(0)
    for name, label in files.items():
        put(root / split / name, coloured(label or 0, draw))
    if table:
        lines = ["name,label", *(f"{name},{label}" for name, label in files.items() if label is not None)]
        (root / split / "labels.csv").write_text("\n".join(lines))
    return root


def same_figures(ours: dict, theirs: dict) -> bool:
    return [s["curve"] for s in ours["seeds"]] == [s["curve"] for s in theirs["seeds"]] and all(
        ours["mean"][name] == theirs["mean"][name] for name in FIGURES
    )


def classify_line(images, *more, backbone=NAME) -> list[str]:
    """The arguments of a classification."""
    made = ["--weights", "random", "--kwargs", json.dumps(KWARGS)] if backbone == NAME else []
    quick = ["--batch-size", "12", "--threads", "1"]
    return ["--backbone", str(backbone), *made, "--data", str(images), *quick, *map(str, more)]


# --- commands

COMMANDS = {"probe": probe.main, "classify": classify.main}


def command_error(capsys, command: str, arguments: list) -> str:
    """The one line with which a command refuses its arguments."""
    capsys.readouterr()
    assert COMMANDS[command](list(map(str, arguments))) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastalign: ")
    assert error.count("\n") == 1
    return error


def results(path: Path) -> dict:
    return json.loads(path.read_text())
