"""Checkpoint files: written in the background and atomically, checked when read, pruned."""

import os
import pickle
import shutil
import time
import zipfile
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastalign.backbones.weight_files import is_written, write_backbone
from fastalign.training.distributed import World, on_first_rank
from fastalign.utils.errors import UserError
from fastalign.utils.files import flush_folder, reason, system_error, temporary_name, write_atomically


def checksum(module: nn.Module) -> int:
    """A CRC-32 over the bytes of a module's weights and buffers in the order of their names."""
    code = 0
    for _, value in sorted(module.state_dict().items()):
        code = zlib.crc32(value.detach().cpu().reshape(-1).view(torch.uint8).numpy(), code)
    return code


def snapshot(tree: Any) -> Any:
    """A copy on the host of the tensors and plain values in dictionaries, lists and tuples."""
    return tree_map(lambda x: x.detach().to("cpu", copy=True) if isinstance(x, Tensor) else x, tree)


class DamagedFile(UserError):
    """A checkpoint whose content is damaged."""


def read_state(path: Path) -> dict:
    """The state in a checkpoint, on the CPU, after verifying the checksum of each part, which torch.load does not do.

    DamagedFile: the content is damaged. UserError: it cannot be read, or holds something that must not be loaded.
    """
    try:
        with zipfile.ZipFile(path) as file:
            # zipfile ignores this flag; torch takes the part for a folder and leaves its tensor uninitialized.
            damaged = file.testzip() or any(part.external_attr & 0x10 for part in file.infolist())
        if not damaged:
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch do not document what they raise for damaged files
        obstacle = error if isinstance(error, pickle.UnpicklingError) else system_error(error)
        if obstacle is None:
            raise DamagedFile(reason(error)) from error
        where = "make it readable, on every machine"
        raise UserError(f"{path} cannot be read ({reason(obstacle)}): {where}") from error
    raise DamagedFile("a part of it is damaged")


class Checkpoints:
    """The checkpoints of a run, `step-00000100.pt` and `best.pt`; the newest `keep` are kept."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
        self._last_save = time.monotonic()

    @property
    def age(self) -> float:
        """Seconds since the last `save`, or since this object was made."""
        return time.monotonic() - self._last_save

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        numbers = (path.stem.removeprefix("step-") for path in self.folder.glob("step-*.pt"))
        return sorted(int(number) for number in numbers if number.isdecimal())

    def path(self, step: int) -> Path:
        """The file of a step."""
        return self.folder / f"step-{step:08d}.pt"

    def save(self, state: dict, step: int) -> None:
        """Write a copy of a state in the background, then `complete` it. UserError: the previous write failed."""
        self.wait()
        self._last_save = time.monotonic()
        self._writing = self._pool.submit(self._write, snapshot(state), step)

    def wait(self) -> None:
        """Return when the newest checkpoint is on the disk; UserError, once, if it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @property
    def failed(self) -> bool:
        """Whether the next `save` or `wait` will raise; does not wait."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def _write(self, state: dict, step: int) -> None:
        try:
            write_atomically(self.path(step), lambda file: torch.save(state, file))
            self.complete(state, step)
        except Exception as error:  # of any class: the next update must see it
            message = f"{self.path(step)} could not be written ({reason(system_error(error) or error)})"
            good = f"; the newest good checkpoint is {self.path(self.steps()[-1])}" if self.steps() else ""
            remedy = "free some space, or make the directory writable, and run the same command again"
            raise UserError(f"{message}{good}: {remedy}") from error

    def complete(self, state: dict, step: int) -> None:
        """After writing a checkpoint: update `best.pt` and the backbone if its state says so, prune old checkpoints.

        If a kill interrupts this, the next start does it again.
        """
        if state.get("is_best"):
            self._make_best(step)
        folder, backbone = self.folder.parent, state.get("backbone")
        if backbone and not is_written(folder, backbone):
            source, prefix = state["average"] or state["student"], "encoder."
            weights = {k.removeprefix(prefix): value for k, value in source.items() if k.startswith(prefix)}
            write_backbone(folder, weights, backbone)
        for old in self.steps()[: -self.keep]:
            self.path(old).unlink(missing_ok=True)

    def _make_best(self, step: int) -> None:
        """Make `best.pt` the checkpoint of a step: a hard link if the file system supports them, else a copy."""
        source, best = self.path(step), self.folder / "best.pt"
        if best.exists() and best.samefile(source):
            return
        temporary = temporary_name(best)
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
            temporary.replace(best)
            flush_folder(self.folder)
        except OSError:
            with source.open("rb") as file:
                write_atomically(best, lambda copy: shutil.copyfileobj(file, copy))

    def resume(self, world: World) -> tuple[int | None, dict, list[str]]:
        """The newest undamaged checkpoint, on every rank; damaged ones newer than it are renamed to `.damaged`.

        Returns its step (None if there is no checkpoint), its state on the CPU, and a line about each renamed file.
        UserError: all checkpoints are damaged (none is renamed), or one cannot be read.
        """
        states = {}
        step, notes = on_first_rank(world, lambda: self._newest(states))
        if step is not None and not world.main:
            states[step] = read_state(self.path(step))
        return step, states.get(step, {}), notes

    def _newest(self, states: dict[int, dict]) -> tuple[int | None, list[str]]:
        """The newest undamaged step, whose state is added to `states`."""
        damaged, notes = {}, []
        for step in reversed(self.steps()):
            try:
                states[step] = read_state(self.path(step))
            except DamagedFile as error:
                damaged[self.path(step)] = error
                continue
            for path, error in damaged.items():
                aside = path.replace(path.with_name(f"{path.name}.damaged")).name
                notes.append(
                    f"{path} is damaged ({error}) and renamed to {aside}: resuming from {self.path(step).name}"
                )
            return step, notes
        if not damaged:
            return None, []
        path, error = next(iter(damaged.items()))
        others = ", nor can earlier ones" if len(damaged) > 1 else ""
        raise UserError(
            f"{path} cannot be read ({error}){others}: restore one, or remove {self.folder} to start over"
        )
