"""The training command on 1, 2 or 4 ranks, to be killed, stopped and signalled: a torchrun that starts in a second.

A rank is a process of its own that joins the others over gloo, forked from a server that has imported torch, timm
and DALI already. (Forking is safe there: importing them starts no thread, and DALI's pipelines are made afterwards.)

    with Ranks([recipe, "optim.ema=0.9"], 2, folder=tmp_path) as ranks:
        ranks.until(lambda: (run / "metrics.jsonl").exists())
        ranks.send(1, signal.SIGKILL)
        assert ranks.wait() == [-9, -9]         # exit codes by rank; the first to end badly takes the others with it
        assert "..." in ranks.said(0)

    finish([recipe], 2, folder=tmp_path)        # to the end, which must be a good one

`prepare` breaks things from inside: a function of a test's module (or a `functools.partial` of one) that every rank
calls before the command, and that may replace parts of fastalign, as in `functools.partial(nan_on, rank=1, step=7)`;
who it is stands in `os.environ["RANK"]`. What differs from a real start: the ranks share a hash seed.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing import connection
from pathlib import Path
from unittest import mock

import torch
import yaml

import fastalign as fa
from fastalign import train
from tests.data_helpers import small_photos, write_folder
from tests.numerics import randomise

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0
"""Seconds after which a test that waits for ranks gives up; a minute and more goes by on a busy machine."""
SINGLE = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")} | {
    "CUDA_VISIBLE_DEVICES": ""
}
"""One thread for everything, OpenMP's and BLAS's would not survive the fork; and no GPU."""
LAZY = ["nvidia.dali", "nvidia.dali.fn", "nvidia.dali.types"]
"""What a run imports at its first use, and takes long."""


class Ranks:
    """The training command on some ranks; leaving the block kills what is left of them.

    Args:
        arguments: of the command.
        size: number of ranks.
        folder: where their output goes, `rank-0.txt` and so on; an earlier one's is overwritten.
        prepare: see above.
        mercy: seconds between SIGTERM and SIGKILL for the ranks that are left when one has ended badly. torchrun has
            30; 0 is SIGKILL at once, as if the machine had gone.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        size: int = 2,
        *,
        folder: Path,
        prepare: Callable[[], None] | None = None,
        mercy: float = 0.0,
    ):
        self.size, self.folder, self.mercy = size, folder, mercy
        self.first: int | None = None
        """the rank that ended badly first"""
        folder.mkdir(parents=True, exist_ok=True)
        group = {
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": size,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": _free_port(),
        }
        self._processes = []
        for rank in range(size):
            where = {name: str(value) for name, value in {**group, "RANK": rank, "LOCAL_RANK": rank}.items()}
            where = {**os.environ, **SINGLE, **where}  # the server still has another test's
            options = (list(arguments), where, folder / f"rank-{rank}.txt", prepare)
            self._processes.append(_server().Process(target=_rank, args=options, daemon=True))
        for process in self._processes:
            process.start()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_) -> None:
        for rank in range(self.size):
            self.send(rank)
        for process in self._processes:
            process.join()

    @property
    def pids(self) -> list[int]:
        """The processes, by rank."""
        return [process.pid for process in self._processes]

    def running(self) -> bool:
        """Whether every rank is still there."""
        return all(process.exitcode is None for process in self._processes)

    def send(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a rank, if it is still there."""
        if self._processes[rank].exitcode is None:
            os.kill(self._processes[rank].pid, number)

    def until(self, condition: Callable[[], object], timeout: float = PATIENCE, poll: float = 0.002) -> bool:
        """Wait for a condition. Returns whether it came true before a rank ended; too late is an AssertionError."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if condition():
                return True
            if not self.running():
                return False
            time.sleep(poll)
        raise AssertionError(f"still waiting after {timeout:g} s\n{self.said()}")

    def wait(self, timeout: float = PATIENCE) -> list[int]:
        """Wait for the end, as torchrun does: when a rank ends badly, the others are ended.

        Returns:
            Exit codes by rank; -9 = killed by signal 9.
        """
        end = time.monotonic() + timeout
        while (left := [p for p in self._processes if p.exitcode is None]) and self.first is None:
            connection.wait([process.sentinel for process in left], max(0.0, end - time.monotonic()))
            bad = [rank for rank, process in enumerate(self._processes) if process.exitcode]
            self.first = bad[0] if bad else None
            assert bad or time.monotonic() < end, f"still running after {timeout:g} s\n{self.said()}"
        if left and self.mercy:
            for rank in range(self.size):
                self.send(rank, signal.SIGTERM)
            for process in left:
                process.join(self.mercy)
        self.__exit__()
        return [process.exitcode for process in self._processes]

    def said(self, rank: int | None = None) -> str:
        """What a rank printed, or all of them did, on either stream."""
        ranks = range(self.size) if rank is None else [rank]
        texts = (self.folder / f"rank-{number}.txt" for number in ranks)
        return "".join(text.read_text(errors="replace") for text in texts if text.exists())


def finish(arguments: Sequence[str], size: int = 2, **options) -> str:
    """Run the command to its end; anything but exit code 0 of every rank fails. Arguments as for `Ranks`.

    Returns:
        What all ranks printed.
    """
    with Ranks(arguments, size, **options) as ranks:
        codes = ranks.wait()
        assert codes == [0] * size, f"exit codes {codes}\n{ranks.said()}"
        return ranks.said()


def _rank(arguments: list[str], environment: dict[str, str], output: Path, prepare) -> None:
    """One rank, in a process of its own."""
    with output.open("wb", buffering=0) as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    sys.exit(train.main(arguments))


@cache
def _server() -> multiprocessing.context.ForkServerContext:
    """The server."""
    context = multiprocessing.get_context("forkserver")
    # pytest: what a rank runs lies in tests' modules, which import it.
    context.set_forkserver_preload(["pytest", __name__, *LAZY])
    with mock.patch.dict(os.environ, {**SINGLE, "PYTHONPATH": str(ROOT)}):
        multiprocessing.forkserver.ensure_running()
    return context


def _free_port() -> int:
    with socket.socket() as candidate:
        candidate.bind(("127.0.0.1", 0))
        return candidate.getsockname()[1]


MODEL = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
MEASURED = {"images_per_second", "data_wait", "memory"}
"""What differs from run to run."""


def write_recipe(root: Path) -> Path:
    """Real JPEGs (48 and 10), a tiny model that starts from a file, and switched on what a run has to remember.

    Six updates an epoch. Off is what depends on the number of ranks: stochastic depth, mixup and cutmix.

    Returns:
        The recipe's file. It has no `output`.
    """
    write_folder(root / "train", {f"{i}.jpg": data for i, data in enumerate(small_photos(48))})
    write_folder(root / "val", {f"{i}.jpg": data for i, data in enumerate(small_photos(10, 1))})
    torch.manual_seed(0)
    backbone = fa.create_backbone("vit_tiny_patch16_224", **MODEL)
    randomise(backbone)
    backbone.norm.weight.data *= 3  # the target scale is not 1
    torch.save(backbone.state_dict(), root / "weights.pth")
    tree = {
        "student": {"name": "vit_tiny_patch16_224", "weights": str(root / "weights.pth"), "kwargs": MODEL},
        "data": {"train": str(root / "train"), "val": str(root / "val"), "threads": 1},
        "optim": {
            "batch_size": 8,
            "accumulate": 2,
            "epochs": 8,
            "lr": 2e-3,
            "warmup_epochs": 0.5,
            "ema": 0.9,
        },
        "checkpoint": {"every_steps": 4},
        "log": {"every_steps": 3},
        "efficiency": {"precision": "fp32"},
    }
    tree["data"] |= {"color_jitter": 0.4, "randaugment": "rand-m9-mstd0.5-inc1"}
    (root / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return root / "recipe.yaml"


def lines_of(run: Path) -> list[dict]:
    """The lines of a run's metrics, each of which must be whole, without what differs from run to run."""
    text = (run / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [
        {key: value for key, value in json.loads(line).items() if key not in MEASURED}
        for line in text.splitlines()
    ]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines_of(run) if "loss" in line]
