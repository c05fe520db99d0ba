"""Trains the demo's teacher: a small ViT that learns from image-level labels only, as the backbones of the method do.

    python -m demo.train_teacher --data demo/data --out demo/teacher.safetensors

The weights have timm's state-dict keys; a JSON file with the same name describes the model, its input and its making.
"""

import argparse
import csv
import importlib.metadata
import json
import math
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fastalign.training.command import run_command
from fastalign.utils.errors import UserError
from fastalign.utils.files import write_tensors

ARCHITECTURE = "vit_tiny_patch16_224"
KWARGS = {"img_size": 48, "patch_size": 8, "embed_dim": 64, "depth": 10, "num_heads": 4, "num_classes": 10}
"""timm's arguments; half a million parameters. Narrow and deep: of the shapes tried, the one whose patch tokens carry
least about their patches (README.md)."""

MEAN = STD = 0.5
_SMALLEST_CROP = 0.7
_WARM_UP = 0.1


def load_split(folder: Path) -> tuple[list[Image.Image], Tensor]:
    """A split of the mosaics: the pictures in the order of labels.csv, and their labels, [pictures] int64."""
    table = folder / "images" / "labels.csv"
    if not table.is_file():
        raise UserError(f"train_teacher: --data has no {table}; render it with python -m demo.mosaics")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    pictures = []
    for row in rows:
        with Image.open(table.parent / row["name"]) as picture:
            pictures.append(picture.convert("RGB"))
    return pictures, torch.tensor([int(row["label"]) for row in rows])


def to_input(pictures: list[Image.Image]) -> Tensor:
    """Pictures of one size as a normalized batch, [B, 3, H, W] float32."""
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


def evaluation_view(picture: Image.Image) -> Image.Image:
    """The whole (square) picture at the model's size, bicubic: crop_pct 1."""
    return picture.resize((KWARGS["img_size"],) * 2, Image.Resampling.BICUBIC)


def training_view(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A random square of at least 70 % of the area at the model's size, flipped half of the time."""
    side = min(picture.size) * math.sqrt(rng.uniform(_SMALLEST_CROP, 1))
    left, top = (rng.uniform(0, whole - side) for whole in picture.size)
    size = (KWARGS["img_size"],) * 2
    view = picture.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else view


@torch.inference_mode()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images, [B, 3, H, W] normalized, whose highest logit is the label's; sets evaluation mode."""
    model.eval()
    guesses = torch.cat([model(chunk).argmax(1) for chunk in images.split(256)])
    return (guesses == labels).float().mean().item()


def _learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then a cosine to zero."""
    rise = max(1, round(_WARM_UP * steps))
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def train(args: argparse.Namespace) -> tuple[nn.Module, float]:
    """The model, trained on the mosaics, and its top-1 on the validation split after the last epoch."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    pictures, labels = load_split(args.data / "train")
    if args.batch > len(pictures):
        raise UserError(f"train_teacher: --batch {args.batch} exceeds the {len(pictures)} training pictures")
    val_pictures, val_labels = load_split(args.data / "val")
    val_images = to_input([evaluation_view(picture) for picture in val_pictures])
    # Half of the patches of a training view are dropped: twice as fast, and the teacher of masked views should
    # have seen incomplete pictures. The last epochs see all patches, as evaluation does.
    model = timm.create_model(ARCHITECTURE, **KWARGS, patch_drop_rate=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    batches = len(pictures) // args.batch
    accuracy = 0.0
    for epoch in range(args.epochs):
        started = time.perf_counter()
        if epoch == args.epochs - args.full_epochs:
            model.patch_drop = nn.Identity()
        model.train()
        order, total = rng.permutation(len(pictures)), 0.0
        for i in range(batches):
            chosen = order[i * args.batch : (i + 1) * args.batch]
            images = to_input([training_view(pictures[k], rng) for k in chosen])
            loss = F.cross_entropy(model(images), labels[chosen], label_smoothing=0.1)
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(epoch * batches + i, args.epochs * batches, args.lr)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item()
        accuracy, seconds = top1(model, val_images, val_labels), time.perf_counter() - started
        figures = f"loss {total / batches:.3f}  val top-1 {accuracy:.3f}  {seconds:.0f} s"
        print(f"epoch {epoch + 1:2d}  {figures}", flush=True)
    return model, accuracy


def save(out: Path, model: nn.Module, accuracy: float, seed: int, argv: list[str]) -> None:
    """Write the weights, and a description as JSON."""
    write_tensors(out, {name: value.contiguous() for name, value in model.state_dict().items()})
    facts = {
        "architecture": ARCHITECTURE,
        "kwargs": KWARGS,
        "mean": [MEAN] * 3,
        "std": [STD] * 3,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "val_top1": round(accuracy, 4),
        "command": shlex.join(["python", "-m", "demo.train_teacher", *argv]),
        "seed": seed,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "timm", "pillow", "numpy")},
    }
    out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{out}: val top-1 {accuracy:.3f}")


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m demo.train_teacher", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", type=Path, default=Path("demo/data"), help="the rendered mosaics")
    add("--out", type=Path, default=Path("demo/teacher.safetensors"), help="file to write")
    add("--epochs", type=int, default=24)
    add("--full-epochs", type=int, default=3, help="how many of them, the last, see all patches")
    add("--batch", type=int, default=64)
    add("--lr", type=float, default=1e-3)
    add("--weight-decay", type=float, default=0.05)
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    return run_command(lambda: save(args.out, *train(args), args.seed, argv))


if __name__ == "__main__":
    sys.exit(main())
