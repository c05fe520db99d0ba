"""Checkpoint files: written in the background and atomically, checked when read, pruned."""

import os
import pickle
import shutil
import time
import zipfile
import zlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastalign.training.distributed import World, on_first_rank
from fastalign.training.sharding import full_tensor
from fastalign.utils import files
from fastalign.utils.errors import SharedError, UserError
from fastalign.utils.files import reason, system_error, write_atomically


def checksum(module: nn.Module) -> int:
    """A CRC-32 over the bytes of a module's weights and buffers in the order of their names."""
    code = 0
    for _, value in sorted(module.state_dict().items()):
        code = zlib.crc32(value.detach().cpu().reshape(-1).view(torch.uint8).numpy(), code)
    return code


def snapshot(tree: Any, *, keep: bool = True) -> Any:
    """An independent copy, on the host, of tensors and plain values in dictionaries, lists and tuples.

    Sharded tensors are gathered, for which every rank must call this; with `keep` false it returns no tensors.
    """

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = full_tensor(value.detach())
        if not keep:
            return None
        if value.device.type != "cuda":
            return value.clone()
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return host.copy_(value, non_blocking=True)

    copied = tree_map(copy, tree)
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copied


class DamagedFile(Exception):
    """A checkpoint whose content is damaged."""


def read_state(path: Path) -> dict:
    """The state in a checkpoint, on the CPU, with the checksum of each part compared: torch.load does not do that.

    DamagedFile: the content is damaged. UserError: it cannot be read, or holds something that must not be loaded.
    """
    try:
        with zipfile.ZipFile(path) as file:
            # zipfile ignores this flag; torch takes the part for a folder and leaves its numbers to chance.
            damaged = file.testzip() or any(part.external_attr & 0x10 for part in file.infolist())
        if not damaged:
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile and torch document no list of what they raise for damaged files
        obstacle = error if isinstance(error, pickle.UnpicklingError) else system_error(error)
        if obstacle is None:
            raise DamagedFile(reason(error)) from error
        raise UserError(f"{path} cannot be read ({reason(obstacle)}): make it readable") from error
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

    def save(
        self,
        state: dict,
        step: int,
        *,
        best: bool = False,
        publish: Callable[[dict], None] = lambda state: None,
    ) -> None:
        """Write a `snapshot` in the background, as `best.pt` too if it is the best; then remove old checkpoints.

        `publish` is called in the background with the state once it is on the disk, before anything is removed.
        UserError: the previous write failed.
        """
        self.wait()
        self._last_save = time.monotonic()
        self._writing = self._pool.submit(self._write, state, step, best, publish)

    def wait(self) -> None:
        """Return when the newest checkpoint is on the disk; UserError, once, if it could not be written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @property
    def failed(self) -> bool:
        """Whether `save` and `wait` will raise; does not wait."""
        writing = self._writing
        return writing is not None and writing.done() and writing.exception() is not None

    def _write(self, state: dict, step: int, best: bool, publish: Callable[[dict], None]) -> None:
        try:
            write_atomically(self.path(step), lambda file: torch.save(state, file))
            if best:
                self.make_best(step)
            publish(state)
            self.prune()
        except Exception as error:  # whatever it is, the next step must learn of it
            message = f"{self.path(step)} could not be written ({reason(system_error(error) or error)})"
            good = f"; the newest good checkpoint is {self.path(self.steps()[-1])}" if self.steps() else ""
            remedy = "free some space, or make the directory writable, and run the same command again"
            raise UserError(f"{message}{good}: {remedy}") from error

    def prune(self) -> None:
        """Remove the checkpoints too old to keep."""
        for old in self.steps()[: -self.keep]:
            self.path(old).unlink(missing_ok=True)

    def make_best(self, step: int) -> None:
        """Make `best.pt` the checkpoint of a step: a hard link if the file system has them, else a copy."""
        source, best = self.path(step), self.folder / "best.pt"
        if best.exists() and best.samefile(source):
            return
        temporary = files.temporary_name(best)
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
            temporary.replace(best)
            files.flush_folder(self.folder)
        except OSError:
            with source.open("rb") as file:
                write_atomically(best, lambda copy: shutil.copyfileobj(file, copy))

    def load(self) -> tuple[int | None, dict, list[str]]:
        """The newest undamaged checkpoint; damaged ones newer than it are renamed to `.damaged`.

        Returns its step (None if there is no checkpoint), its state on the CPU, and a line about each renamed file.
        UserError: all checkpoints are damaged (none is renamed), or one cannot be read.
        """
        damaged, notes = {}, []
        for step in reversed(self.steps()):
            try:
                state = read_state(self.path(step))
            except DamagedFile as error:
                damaged[self.path(step)] = error
                continue
            for path, error in damaged.items():
                aside = path.replace(path.with_name(f"{path.name}.damaged")).name
                good = self.path(step).name
                notes.append(f"{path} is damaged ({error}) and now {aside}: resuming from {good}")
            return step, state, notes
        if not damaged:
            return None, {}, []
        path, error = next(iter(damaged.items()))
        others = ", nor can those before it" if len(damaged) > 1 else ""
        raise UserError(
            f"{path} cannot be read ({error}){others}: restore one, or remove {self.folder} to start over"
        )

    def resume(self, world: World) -> tuple[int | None, dict, list[str]]:
        """`load` on every rank: rank 0 chooses the step, each rank reads its file; SharedError if one cannot."""
        loaded: dict = {}

        def choose() -> tuple[int | None, list[str]]:
            step, loaded["state"], notes = self.load()
            return step, notes

        step, notes = on_first_rank(world, choose)
        failure = None
        if step is not None and not world.main:
            try:
                loaded["state"] = read_state(self.path(step))
            except (UserError, DamagedFile) as error:
                failure = f"rank {world.rank} cannot read {self.path(step)}"
                failure += f" ({reason(error.__cause__ or error)}): give every machine the same output"
        for message in world.gather(failure):
            if message is not None:
                raise SharedError(message)
        return step, loaded.get("state", {}), notes
