"""A tiny ViT, labelled pictures, and the command."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from fastalign.classify import main

ROOT = Path(__file__).parents[2]
NAME = "vit_tiny_patch16_224"
KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
FIGURES = ("top1", "top5", "mean_per_class", "loss")
QUICK = {"batch_size": 12, "threads": 1}


def picture(label: int, draw: np.random.Generator) -> Image.Image:
    """A class is a colour; the rest is noise."""
    colour = np.array([(label & 1) * 160, (label >> 1 & 1) * 160, (label >> 2 & 1) * 160])
    return Image.fromarray((colour + draw.integers(0, 90, (36, 40, 3))).astype(np.uint8))


def without_test(images: Path, folder: Path) -> Path:
    folder.mkdir()
    for split in ("train", "val"):
        (folder / split).symlink_to(images / split)
    return folder


def same_figures(ours: dict, theirs: dict) -> bool:
    return [s["curve"] for s in ours["seeds"]] == [s["curve"] for s in theirs["seeds"]] and all(
        ours["mean"][name] == theirs["mean"][name] for name in FIGURES
    )


def made(root: Path, split: str, files: dict[str, int | None], *, table: bool = False) -> Path:
    """Images by name, with a labels.csv of those that have a label."""
    draw = np.random.default_rng(0)
    for name, label in files.items():
        path = root / split / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(label or 0, draw).save(path)
    if table:
        lines = ["name,label", *(f"{name},{label}" for name, label in files.items() if label is not None)]
        (root / split / "labels.csv").write_text("\n".join(lines))
    return root


def run(images: Path, *flags: str, backbone: str = NAME) -> int:
    random = ["--weights", "random", "--kwargs", json.dumps(KWARGS)] if backbone == NAME else []
    return main(
        [
            "--backbone",
            backbone,
            "--data",
            str(images),
            *random,
            "--batch-size",
            "12",
            "--threads",
            "1",
            *flags,
        ]
    )
