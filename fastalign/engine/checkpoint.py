"""Checkpoints: written whole or not at all, the newest and the best kept, the newest found again."""

import os
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch
from torch import nn

from fastalign.errors import UserError

_NAME = re.compile(r"step-(\d+)\.pt$")


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name, flush it to the disk, then rename it: nobody ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def checksum(module: nn.Module) -> int:
    """A CRC-32 over the bytes of a module's weights and buffers, in the order of their names; on any device."""
    code = 0
    for _, value in sorted(module.state_dict().items()):
        code = zlib.crc32(value.detach().cpu().reshape(-1).view(torch.uint8).numpy(), code)
    return code


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: where they lie, as `step-00000100.pt` and `best.pt`.
        keep: how many of the newest are kept.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def clean(self) -> None:
        """Remove what a killed writer left behind."""
        for leftover in self.folder.glob(".*.pt.*"):
            leftover.unlink(missing_ok=True)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        names = (_NAME.search(path.name) for path in self.folder.glob("step-*.pt"))
        return sorted(int(match[1]) for match in names if match)

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self.folder / f"step-{step:08d}.pt"

    def save(self, state: dict, step: int, *, best: bool = False) -> None:
        """Save a state of tensors and plain values; then remove the ones too old to keep."""
        write_atomically(self.path(step), lambda file: torch.save(state, file))
        if best:
            with self.path(step).open("rb") as source:
                write_atomically(self.folder / "best.pt", lambda file: shutil.copyfileobj(source, file))
        for old in self.steps()[: -self.keep]:
            self.path(old).unlink()

    def newest(self) -> dict | None:
        """The state of the newest checkpoint, on the CPU; None where there is none.

        Raises:
            UserError: the file cannot be read.
        """
        steps = self.steps()
        if not steps:
            return None
        path = self.path(steps[-1])
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"{path} cannot be read ({reason}): remove it to resume from the one before"
            ) from error
