"""Scenes with label maps, a tiny ViT, the command and its results."""

import io
import json
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from rich.console import Console

import fastalign as fa
from fastalign.evaluation.features import Features
from fastalign.evaluation.heads import TokenShape
from fastalign.evaluation.results import summarise, table_of
from fastalign.probe import main
from fastalign.training.distributed import World

ROOT = Path(__file__).parents[2]
NAME = "vit_tiny_patch16_224"
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "reg_tokens": 1}
CLASSES = ("sky", "grass", "road", "kite")
ALONE = World(0, 1, torch.device("cpu"))
COUNTS = {"train": 20, "val": 8, "test": 6}
SHAPE = TokenShape(patches=4, prefix=1, width=6, heads=2)
QUICK = ["--epochs", "2", "--batch-size", "5", "--threads", "1", "--forward-batch", "4"]


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


def models():
    """Ours and timm's with the same weights, none of which is still as it was initialised."""
    vit = fa.create_backbone(NAME, **KWARGS)
    model = timm.create_model(NAME, num_classes=0, **KWARGS).eval()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.load_state_dict(vit.state_dict())
    return vit, model


def command(data, *more, backbone=NAME):
    made = ["--weights", "random", "--kwargs", json.dumps(KWARGS)] if backbone == NAME else []
    return ["--backbone", str(backbone), *made, "--data", str(data), *QUICK, *map(str, more)]


def results(path: Path) -> dict:
    return json.loads(path.read_text())


def made_features(count: int, seed: int, classes: int = 3) -> Features:
    """Tokens that say something about their labels; the last class is rare, some patches are void."""
    draw = np.random.default_rng(seed)
    union = draw.random((count, 4, classes)) < np.array([0.5, 0.4, 0.15])
    majority = np.where(union.any(-1), union.argmax(-1), -1).astype(np.int16)
    # The directions are the same in all splits.
    directions = np.random.default_rng(99).normal(size=(classes, 6))
    tokens = draw.normal(size=(count, 5, 6))
    tokens[:, 1:] += union @ directions
    tokens[:, 0] += union.any(1) @ directions
    return Features(
        {0: torch.from_numpy(tokens).bfloat16()},
        np.packbits(union, axis=-1),
        majority,
        union.any(1),
        classes,
    )


class Named(list):
    """Sixteen images by name, that nobody opens."""

    def __init__(self, name):
        super().__init__(range(16))
        self.name = name


def refused(capsys, *arguments) -> str:
    """The one line that the command refuses with."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastalign: ")
    assert error.count("\n") == 1
    return error


def row(model, seed, recall, *, skip=0, head="linear", **more):
    """A head's row with a few figures."""
    test = {"macro_recall": recall, "macro_precision": 0.5, "macro_f1": 0.5, "accuracy": 1.0, "loss": 0.25}
    key = {"model": model, "labels": "union", "head": head, "skip_blocks": skip}
    return {**key, "seed": seed, "test": test | more}


def shown(rows) -> str:
    console = Console(width=80, file=io.StringIO())
    console.print(table_of(summarise(rows), "test split of /data/scenes"))
    return console.file.getvalue()
