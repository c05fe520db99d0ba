"""Checkpoints: written in the background, whole or not at all; the newest that is undamaged is found again."""

import errno
import os
import re
import shutil
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastalign.training.distributed import World, on_first_rank
from fastalign.training.sharding import whole
from fastalign.utils import files
from fastalign.utils.errors import SharedError, UserError
from fastalign.utils.files import flush_folder, remove_leftovers, temporary_name, write_atomically

_NAME = re.compile(r"step-(\d+)\.pt$")
_REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space")
_REMEDIES |= dict.fromkeys(
    (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST),
    "make the folder one that can be written",
)


def checksum(module: nn.Module) -> int:
    """A CRC-32 over the bytes of a module's weights and buffers, in the order of their names; on any device."""
    code = 0
    for _, value in sorted(module.state_dict().items()):
        code = zlib.crc32(value.detach().cpu().reshape(-1).view(torch.uint8).numpy(), code)
    return code


def snapshot(tree: Any, *, keep: bool = True) -> Any:
    """A copy on the host that nobody else can change.

    From a GPU through pinned memory, with one wait at the end. Tensors that ranks share (FSDP) are put together: then
    every rank must call this.

    Args:
        tree: tensors and plain values in dictionaries, lists and tuples.
        keep: False on ranks that only take part in putting tensors together; they get None for each tensor.
    """
    devices = set()

    def copy(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = whole(value.detach())
            if not keep:
                return None
            if value.device.type != "cuda":
                return value.clone()
            devices.add(value.device)
            host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            return host.copy_(value, non_blocking=True)
        if isinstance(value, dict):
            return {key: copy(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(copy(each) for each in value)
        return value

    copied = copy(tree)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return copied


class Checkpoints:
    """The checkpoints of a run. One process writes them, any number may read them.

    Args:
        folder: where they lie, as `step-00000100.pt` and `best.pt`.
        keep: how many of the newest are kept.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep
        self._writer: threading.Thread | None = None
        self._failure: UserError | None = None
        self.newest_step: int | None = None
        """of the checkpoint that was last written or read here"""

    def clean(self) -> None:
        """Remove what a killed writer left behind; call it before the first save."""
        remove_leftovers(self.folder)

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, ascending."""
        names = (_NAME.fullmatch(path.name) for path in self.folder.glob("step-*.pt"))
        return sorted(int(match[1]) for match in names if match)

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
        copied: bool = False,
    ) -> None:
        """Take a snapshot and write it in the background; then remove the checkpoints too old to keep.

        Args:
            state: tensors and plain values; they may change as soon as this returns.
            step: names the file.
            best: it becomes `best.pt` too.
            publish: called in the background with the snapshot once it is on the disk, before anything is removed.
            copied: `state` is a `snapshot` already.

        Raises:
            UserError: the write before this one failed; it is waited for where it still runs.
        """
        self.wait()
        state = state if copied else snapshot(state)
        self._writer = threading.Thread(
            target=self._write, args=(state, step, best, publish), name="checkpoint"
        )
        self._writer.start()

    def wait(self) -> None:
        """Return when the newest checkpoint is on the disk.

        Raises:
            UserError: it could not be written; told once.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self.failed:
            failure, self._failure = self._failure, None
            raise failure

    @property
    def failed(self) -> bool:
        """Whether a write is known to have failed, which `save` and `wait` will tell; nobody is waited for."""
        return self._failure is not None

    def _write(self, state: dict, step: int, best: bool, publish: Callable[[dict], None]) -> None:
        try:
            write_atomically(self.path(step), lambda file: torch.save(state, file))
            self.newest_step = step
            if best:
                self.make_best(step)
            publish(state)
            self.prune()
        except Exception as error:  # whatever it is, the step that comes next must hear of it
            self._failure = self._explain(error, step)

    def prune(self) -> None:
        """Remove the checkpoints too old to keep."""
        for old in self.steps()[: -self.keep]:
            self.path(old).unlink(missing_ok=True)

    def _explain(self, error: Exception, step: int) -> UserError:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        number = cause.errno if cause is not None else None
        steps = self.steps()
        good = f"the newest good checkpoint is {self.path(steps[-1])}" if steps else "there is none yet"
        return UserError(
            f"{self.path(step)} could not be written ({files.reason(cause or error)}); {good}: "
            f"{_REMEDIES.get(number, 'see that the disk is well')} and run the same command again"
        )

    def make_best(self, step: int) -> None:
        """Let `best.pt` be the checkpoint of a step: the same file where the file system has links, else a copy."""
        source, best = self.path(step), self.folder / "best.pt"
        if best.exists() and best.samefile(source):
            return
        temporary = temporary_name(best)
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            with source.open("rb") as file:
                write_atomically(best, lambda copy: shutil.copyfileobj(file, copy))
            return
        temporary.replace(best)
        flush_folder(self.folder)

    def choose(self) -> tuple[int | None, list[str]]:
        """The newest step whose file is undamaged; damaged ones newer than it are put aside as `.damaged`.

        Returns:
            The step, None where there is no checkpoint; and a line for each that was put aside.

        Raises:
            UserError: there are checkpoints, and all are damaged; they stay where they are.
        """
        damaged: list[tuple[Path, str]] = []
        for step in reversed(self.steps()):
            reason = files.damage(self.path(step))
            if reason is None:
                return step, [self._put_aside(*each, step) for each in damaged]
            damaged.append((self.path(step), reason))
        if not damaged:
            return None, []
        path, reason = damaged[0]
        others = f", nor can the {len(damaged) - 1} before it" if len(damaged) > 1 else ""
        raise UserError(
            f"{path} cannot be read ({reason}){others}: restore one, or remove {self.folder} to begin anew"
        )

    def _put_aside(self, path: Path, reason: str, step: int) -> str:
        aside = path.with_name(f"{path.name}.damaged")
        path.replace(aside)
        return f"{path} is damaged ({reason}) and now {aside.name}: going on from {self.path(step).name}"

    def load(self, step: int) -> dict:
        """The state of a step, on the CPU.

        Raises:
            UserError: the file cannot be read.
        """
        path = self.path(step)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(f"{path} cannot be read ({files.reason(error)}): see that it can") from error

    def resume(self, world: World) -> tuple[int | None, dict, list[str]]:
        """What a run goes on from, on every rank: rank 0 chooses the step, each rank reads its file.

        Returns:
            The step (None = there is no checkpoint), its state on the CPU, and lines about what was put aside.

        Raises:
            SharedError: no checkpoint can be read, or a rank cannot read the one that was chosen; on every rank.
        """
        step, notes = on_first_rank(world, self.choose)
        if step is None:
            return None, {}, []
        state, failure = {}, None
        try:
            state = self.load(step)
        except UserError as error:
            path = self.path(step)
            failure = (
                str(error)
                if world.main or path.exists()
                else (
                    f"rank {world.rank} does not see {path}, rank 0 does: give every machine the same output folder"
                )
            )
        for told in world.gather(failure):
            if told is not None:
                raise SharedError(told)
        self.newest_step = step
        return step, state, notes
