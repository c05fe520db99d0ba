"""A tiny ViT to train, a run whose updates a test makes itself, and what is read of a run's folder."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path

from fastalign.config import load_config
from fastalign.data.loader import Batch
from fastalign.training.distributed import World
from fastalign.training.run import Run

ROOT = Path(__file__).parents[1]
MODEL = {"name": "vit_tiny_patch16_224", "weights": "random", "kwargs": {"img_size": 32, "depth": 2}}


def lines(folder: Path, key: str = "step") -> list[dict]:
    """The lines of a run's metrics that have a key."""
    found = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in found if key in line]


def losses(folder: Path, key: str = "loss") -> list[float]:
    return [line[key] for line in lines(folder, key)]


def checkpoint(folder: Path, step: int | None = None) -> dict:
    """The state in the checkpoint of a step, or in the newest one."""
    pattern = "step-*.pt" if step is None else f"step-{step:08d}.pt"
    return torch.load(max((folder / "checkpoints").glob(pattern)), weights_only=True)


def assert_same(found, wanted, where: str = "") -> None:
    """Nested containers of tensors and plain values, to the bit."""
    (ours, structure), (theirs, expected) = map(tree_flatten_with_path, (found, wanted))
    assert structure == expected, where
    for (path, one), (_, other) in zip(ours, theirs, strict=True):
        assert type(one) is type(other), where + keystr(path)
        same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        assert same, where + keystr(path)


def flip(path: Path, position: int) -> None:
    """Flip a bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


def middle_of_weights(path: Path) -> int:
    """The position of a byte among the numbers of a checkpoint's largest tensor."""
    with zipfile.ZipFile(path) as file:
        part = max(file.infolist(), key=lambda each: each.file_size)
    # Its header has 30 bytes and two fields of variable length before the content.
    header = path.read_bytes()[part.header_offset : part.header_offset + 30]
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return part.header_offset + 30 + lengths + part.file_size // 2


def torchrun(*arguments: str | Path, ranks: int = 2, expect: int = 0) -> str:
    """Run a program or `-m` module on some ranks. Returns what they print.

    `precision=auto` is bf16 there if the CPU has it, unlike in pytest's process.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command += map(str, arguments)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == expect, result.stderr
    return result.stdout + result.stderr


SYNTHETIC = ["data.train=synthetic:256", "data.val=synthetic:64", "student.weights=random"]
SYNTHETIC += ["student.name=vit_tiny_patch16_224", "student.kwargs={img_size: 64, drop_path_rate: 0.1}"]
SYNTHETIC += ["optim={batch_size: 8, epochs: 2, lr: 1.0e-3, accumulate: 2, ema: 0.9}"]


def run_of_batches(tmp_path, *overrides):
    """A run, and finished batches for six updates of two parts."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    run = Run(load_config(None, [*SYNTHETIC, f"output={tmp_path}/run", *overrides]), World(0, 1, device))
    run.model.train()
    dtype, batches = run.dtype, []
    for first in range(0, 48, 4):
        images, ids = torch.randn(4, 3, 64, 64, device=device, dtype=dtype), torch.arange(first, first + 4)
        batches.append(Batch(images, ids))
    return run, iter(batches)
