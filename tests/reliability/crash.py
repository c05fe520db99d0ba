"""The training command on 1, 2 or 4 ranks, to be killed, stopped and signalled: a torchrun that starts in a second.

    with Ranks([recipe, "optim.ema=0.9"], 2, folder=tmp_path) as ranks:
        ranks.until(lambda: (run / "metrics.jsonl").exists())
        ranks.send(1, signal.SIGKILL)
        assert ranks.wait() == [-9, -9]         # exit codes by rank; the first failure ends the other ranks
        assert "..." in ranks.output(0)
    finish([recipe], 2, folder=tmp_path)        # to the end, with exit code 0

A rank is forked from a server that has imported torch, timm and DALI, which start no thread.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
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
from tests.run_helpers import lines

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds that a test waits for ranks
# One thread, since those of OpenMP and BLAS do not survive the fork; no GPU.
SINGLE = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
SINGLE["CUDA_VISIBLE_DEVICES"] = ""
LAZY = ["nvidia.dali", "nvidia.dali.fn", "nvidia.dali.types"]  # imported by a run at first use, slowly


class Ranks:
    """The training command on some ranks, with `folder` for their output; the end of the block kills them.

    `prepare`: a function of a test module, or a partial of one, that every rank calls first; `grace`: seconds between
    SIGTERM and SIGKILL for the other ranks when one has failed (torchrun: 30).
    """

    def __init__(
        self,
        arguments: Sequence[str],
        size: int = 2,
        *,
        folder: Path,
        prepare: Callable[[], None] | None = None,
        grace: float = 0.0,
    ):
        self.size, self.folder, self.grace = size, folder, grace
        folder.mkdir(parents=True, exist_ok=True)
        group = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
        group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        self._processes = []
        for rank in range(size):
            environment = {**os.environ, **SINGLE, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            options = (list(arguments), environment, folder / f"rank-{rank}.txt", prepare)
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

    def pid(self, rank: int) -> int:
        return self._processes[rank].pid

    def running(self) -> bool:
        """Whether every rank is running."""
        return all(process.exitcode is None for process in self._processes)

    def send(self, rank: int, number: int = signal.SIGKILL) -> None:
        """Send a signal to a rank if it is running."""
        if self._processes[rank].exitcode is None:
            with suppress(ProcessLookupError):  # the fork server reaps a rank before it reports its exit code
                os.kill(self._processes[rank].pid, number)

    def until(self, condition: Callable[[], object]) -> bool:
        """Wait for a condition. Returns whether it came true before a rank ended."""
        end = time.monotonic() + PATIENCE
        while not (true := condition()) and self.running():
            assert time.monotonic() < end, f"still waiting\n{self.output()}"
            time.sleep(0.002)
        return bool(true)

    def wait(self, timeout: float = PATIENCE) -> list[int]:
        """Wait for the end, as torchrun does: a failure of one rank ends the others. Returns exit codes by rank."""
        end, failed = time.monotonic() + timeout, False
        while not failed and (left := [p for p in self._processes if p.exitcode is None]):
            connection.wait([process.sentinel for process in left], max(0.0, end - time.monotonic()))
            failed = any(process.exitcode for process in self._processes)
            assert failed or time.monotonic() < end, f"still running after {timeout:g} s\n{self.output()}"
        if failed and self.grace:
            for rank in range(self.size):
                self.send(rank, signal.SIGTERM)
            for process in self._processes:
                process.join(self.grace)
        self.__exit__()
        return [process.exitcode for process in self._processes]

    def output(self, rank: int | None = None) -> str:
        """What a rank, or all of them, printed on stdout and stderr."""
        texts = sorted(self.folder.glob("rank-*.txt" if rank is None else f"rank-{rank}.txt"))
        return "".join(text.read_text(errors="replace") for text in texts)


def finish(arguments: Sequence[str], size: int = 2, **options) -> str:
    """Run the command to its end, which must be exit code 0 on every rank. Returns what all ranks printed."""
    with Ranks(arguments, size, **options) as ranks:
        codes = ranks.wait()
        assert codes == [0] * size, f"exit codes {codes}\n{ranks.output()}"
        return ranks.output()


def _rank(arguments: list[str], environment: dict[str, str], output: Path, prepare) -> None:
    """One rank, in its own process."""
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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", __name__, *LAZY])
    with mock.patch.dict(os.environ, {**SINGLE, "PYTHONPATH": str(ROOT)}):
        multiprocessing.forkserver.ensure_running()
    return context


def _free_port() -> int:
    with socket.socket() as candidate:
        candidate.bind(("127.0.0.1", 0))
        return candidate.getsockname()[1]


MODEL = {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 3}
MEASURED = {"images_per_second", "data_wait", "memory"}  # metrics that differ from run to run


def write_recipe(root: Path) -> Path:
    """A recipe without `output`: 48 and 10 JPEGs, six updates per epoch, nothing that depends on the ranks."""
    write_folder(root / "train", {f"{i}.jpg": data for i, data in enumerate(small_photos(48))})
    write_folder(root / "val", {f"{i}.jpg": data for i, data in enumerate(small_photos(10, 1))})
    torch.manual_seed(0)
    backbone = fa.create_backbone("vit_tiny_patch16_224", **MODEL)
    randomise(backbone)
    backbone.norm.weight.data *= 3  # the target scale is not 1
    torch.save(backbone.state_dict(), root / "weights.pth")
    model = {"name": "vit_tiny_patch16_224", "weights": str(root / "weights.pth"), "kwargs": MODEL}
    data = {"train": str(root / "train"), "val": str(root / "val"), "threads": 1}
    data |= {"color_jitter": 0.4, "randaugment": "rand-m9-mstd0.5-inc1"}
    optim = {"batch_size": 8, "accumulate": 2, "epochs": 8, "lr": 2e-3, "warmup_epochs": 0.5, "ema": 0.9}
    tree = {"student": model, "data": data, "optim": optim, "efficiency": {"precision": "fp32"}}
    tree |= {"checkpoint": {"every_steps": 4}, "log": {"every_steps": 3}}
    (root / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return root / "recipe.yaml"


def lines_of(run: Path) -> list[dict]:
    """The lines of `metrics.jsonl`, without `MEASURED`."""
    assert (run / "metrics.jsonl").read_bytes().endswith(b"\n")
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines(run)]
