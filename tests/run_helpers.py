"""A tiny ViT to train, and what is read of a run's folder."""

import json
from pathlib import Path

import torch

MODEL = {"name": "vit_tiny_patch16_224", "weights": "random", "kwargs": {"img_size": 32, "depth": 2}}


def metrics(folder: Path) -> tuple[list[dict], list[dict]]:
    """The training lines and the validation lines of a run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "val_loss" in line]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics(folder)[0]]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = max((folder / "checkpoints").glob("step-*.pt"))
    return torch.load(newest, weights_only=True)["student"]
