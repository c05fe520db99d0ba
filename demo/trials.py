"""Trials: trainings that differ in a few keys of one recipe, and probes of the results, a folder each.

A finished trial is found again, an interrupted one resumes. Several run at once, each in a process with one thread
(``python -m demo.trials TRIAL ROOT``), which on a CPU is faster than one after another on all cores.
"""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from fastalign.backbones.vit import ViT
from fastalign.backbones.zoo import load_backbone
from fastalign.config import Config, load_config
from fastalign.evaluation.datasets import open_labelled
from fastalign.evaluation.options import Plan, Recipe
from fastalign.evaluation.patches import probe
from fastalign.train import train
from fastalign.training import build
from fastalign.training.command import run_command
from fastalign.training.distributed import World
from fastalign.training.metrics import mean_and_spread
from fastalign.utils.errors import UserError
from fastalign.utils.files import write_atomically

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Trial:
    """One training and its probes."""

    name: str
    seed: int
    recipe: str = "configs/demo.yaml"
    overrides: tuple[str, ...] = ()
    """keys that differ from the recipe's"""
    read: str = "student"
    """student: the backbone after training; teacher: before; decoder: the teacher and an untrained decoder"""
    folder: str = ""
    """an existing run; empty = a new one"""
    splits: tuple[str, ...] = ("val",)
    """what the heads are evaluated on; the epoch is always chosen on val"""
    heads: tuple[str, ...] = ("linear", "mlp", "transformer")
    images: int = 6000
    """training images of the heads, at most"""
    epochs: int = 3
    """of the heads"""

    def config(self, output: str | Path) -> Config:
        """The configuration of the training, in which no probe runs."""
        own = (f"seed={self.seed}", "probe.data=null", f"output={output}")
        return load_config(self.recipe, [*self.overrides, *own])

    def path(self, root: Path) -> Path:
        """The folder: the same only for the same training from the same files."""
        if self.folder:
            return Path(self.folder)
        settings = self.config("x")
        code = _digest(settings.model_dump_json(), settings)
        return root / f"{re.sub('[^a-z0-9.]+', '-', self.name.lower()).strip('-')}-s{self.seed}-{code}"

    def results(self, root: Path) -> Path:
        """The file with the results of the probes."""
        others = ("name", "overrides", "folder")
        asked = {key: value for key, value in asdict(self).items() if key not in others}
        made = (Path(self.folder) / "backbone.safetensors",) if self.folder else ()
        code = _digest(json.dumps(asked, sort_keys=True), self.config("x"), *made)
        return self.path(root) / f"probes-{self.read}-{self.seed}-{code}.json"


def pictures(config: Config) -> Path:
    """The labelled data DATA of a recipe whose `data.train` is DATA/train/images."""
    return Path(config.data.train).parent.parent


def _digest(text: str, config: Config, *files: Path) -> str:
    """Eight hexadecimal digits of a text, the weights and pictures that a recipe names, and other files."""
    digest = hashlib.sha256(text.encode())
    for file in (Path(config.student.weights), pictures(config) / "mosaics.json", *files):
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def run_trials(trials: Sequence[Trial], root: Path, workers: int = CORES) -> list[list[dict]]:
    """Run the trials that are not finished yet, `workers` at once, and return the rows of each as in `probe.json`.

    UserError names the log of a trial that failed.
    """
    done = itertools.count(1)

    def run(trial: Trial) -> list[dict]:
        file = trial.results(root)
        if not file.is_file():
            start_trial(trial, root)
        rows = json.loads(file.read_text())["rows"]
        last, found = rows[-1], rows[-1][trial.splits[-1]]
        figure = f"{last['labels']} {last['head']} {100 * found.get('map', found['macro_recall']):.1f}"
        print(f"[{next(done)}/{len(trials)}] {trial.name}, seed {trial.seed}: {figure}", flush=True)
        return rows

    with ThreadPoolExecutor(max(1, min(workers, len(trials)))) as pool:
        futures = [pool.submit(run, trial) for trial in trials]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def score(rows: Iterable[dict], split: str, labels: str, head: str, metric: str) -> dict[str, float | None]:
    """Mean and spread over seeds of a metric of one head."""
    asked = [row for row in rows if (row["labels"], row["head"]) == (labels, head)]
    return mean_and_spread([row[split][metric] for row in asked])


def start_trial(trial: Trial, root: Path) -> None:
    """Run a trial in its own process, so that trials share neither threads nor random numbers."""
    log = trial.path(root) / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if not torch.cuda.is_available() else None
    with log.open("a") as file:
        command = [sys.executable, "-m", "demo.trials", json.dumps(asdict(trial)), str(root)]
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
        raise UserError(f"trial {trial.name}, seed {trial.seed}, failed ({' '.join(last)}): see {log}")


def encoder_of(trial: Trial, folder: Path, device: torch.device) -> ViT | SimpleNamespace:
    """What the trial's heads read: a backbone, or what `probe` needs of one."""
    if trial.read == "student":
        return load_backbone(folder).to(device)
    config = trial.config(folder)
    if trial.read == "teacher":
        return build.starting_backbone(config).to(device).eval()
    objective, backbone = build.build_objective(config)
    backbone, decoder = backbone.to(device).eval(), objective.student.decoder.to(device).eval()
    # LayerScale begins at 1e-6, with which an untrained decoder does nothing. The heads read its last norm.
    for block in decoder.blocks:
        for scale in block.layer_scales() or ():
            torch.nn.init.ones_(scale)
    decoder.head = torch.nn.Identity()

    def forward_layers(images: torch.Tensor, skip_blocks: Sequence[int]) -> list[torch.Tensor]:
        (tokens,) = backbone.forward_layers(images, skip_blocks)
        visible = tokens.new_ones(len(tokens), 1, backbone.spec.patches, dtype=torch.bool)
        return [decoder(tokens, visible)[:, 0]]

    return SimpleNamespace(spec=backbone.spec, data=backbone.data, forward_layers=forward_layers)


def run_trial(trial: Trial, root: Path) -> None:
    """Train, unless the folder is finished; probe; write the rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world, folder = World(0, 1, device), trial.path(root)
    if trial.read == "student" and not trial.folder:
        train(trial.config(folder), world)
    data = str(pictures(load_config(trial.recipe)))
    splits = {name: open_labelled(data, name) for name in dict.fromkeys(("train", "val", *trial.splits))}
    splits["train"] = splits["train"].subset(np.arange(min(trial.images, len(splits["train"]))))
    common = {"seeds": (trial.seed,), "recipe": Recipe(epochs=trial.epochs, select="map")}
    plans = (
        Plan(heads=("linear",), labels=("global-union", "global-in-patch"), **common),
        Plan(heads=trial.heads, labels=("union",), hidden=256, **common),
    )
    say = lambda text: print(text, flush=True)  # noqa: E731
    rows = probe({trial.name: encoder_of(trial, folder, device)}, splits, plans, world, threads=1, say=say)
    text = json.dumps({"trial": asdict(trial), "rows": rows}) + "\n"
    write_atomically(trial.results(root), lambda file: file.write(text.encode()))


def main() -> int:
    """The process of one trial; returns its exit status."""
    given = json.loads(sys.argv[1])
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return run_command(lambda: run_trial(Trial(**fields), Path(sys.argv[2])))


if __name__ == "__main__":
    sys.exit(main())
