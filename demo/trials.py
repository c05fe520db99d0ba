"""Trials: trainings that differ in a few keys of one recipe, and probes of what came out, a folder each.

A trial that is finished is found again, one that was interrupted goes on. Several run at once, a process and a thread
each, which on a CPU is faster than one after another on all cores.

    python -m demo.trials SPEC.json       (what `run_trials` starts for each trial)
"""

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from fastalign.backbones.zoo import load_backbone
from fastalign.config import Config, load_config
from fastalign.evaluation.datasets import open_labelled
from fastalign.evaluation.options import Plan, Recipe
from fastalign.evaluation.patch_features import Encoder, frozen_encoder
from fastalign.evaluation.patches import probe
from fastalign.train import train
from fastalign.training import build
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
    """student: the backbone after training; teacher: before; decoder: the teacher behind an untrained decoder"""
    folder: str = ""
    """a run that is there already; empty = one of its own"""
    splits: tuple[str, ...] = ("val",)
    """what the heads are judged on; the epoch is always chosen on val"""
    heads: tuple[str, ...] = ("linear", "mlp", "transformer")
    images: int = 6000
    """training images of the heads, at most"""
    epochs: int = 3
    """of the heads"""

    def config(self, output: str | Path) -> Config:
        """What is trained; the probes come afterwards, so none runs during training."""
        own = (f"seed={self.seed}", "probe.data=null", f"output={output}")
        return load_config(self.recipe, [*self.overrides, *own])

    def place(self, root: Path) -> Path:
        """The trial's folder: of the same name only where the same is trained from the same files."""
        if self.folder:
            return Path(self.folder)
        settings = self.config("x")
        code = _digest(settings.model_dump_json(), *_read_files(settings))
        return root / f"{re.sub('[^a-z0-9.]+', '-', self.name.lower()).strip('-')}-s{self.seed}-{code}"

    def results(self, root: Path) -> Path:
        """The file with the trial's probes."""
        asked = {
            key: value for key, value in asdict(self).items() if key not in ("name", "overrides", "folder")
        }
        made = (Path(self.folder) / "backbone.safetensors",) if self.folder else ()
        code = _digest(json.dumps(asked, sort_keys=True), *_read_files(self.config("x")), *made)
        return self.place(root) / f"probes-{self.read}-{self.seed}-{code}.json"


def _read_files(config: Config) -> tuple[Path, ...]:
    """What decides a trial beside its keys: the weights that it starts from, and how its pictures were rendered."""
    return Path(config.student.weights), pictures(config) / "mosaics.json"


def pictures(config: Config) -> Path:
    """The labelled data that a recipe trains on the images of: DATA, where `data.train` is DATA/train/images."""
    return Path(config.data.train).parent.parent


def _digest(text: str, *files: Path) -> str:
    """Eight hexadecimal digits of a text and the content of files."""
    digest = hashlib.sha256(text.encode())
    for file in files:
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def run_trials(
    trials: Sequence[Trial],
    root: Path,
    say: Callable[[str], None] = print,
    workers: int = CORES,
    minutes: float | None = None,
) -> list[list[dict] | None]:
    """Runs the trials that are not finished yet.

    Args:
        trials: what to run.
        root: the folder of all.
        say: gets a line when a trial is done.
        workers: how many at once.
        minutes: begin no trial later than that; None = all are run.

    Returns:
        For each trial its rows, as `probe.json` has them; None for one that was not begun.

    Raises:
        UserError: a trial failed; its log is named.
    """
    workers = max(1, min(workers, len(trials)))
    done, began = itertools.count(1), time.monotonic()

    def run(trial: Trial) -> list[dict] | None:
        file = trial.results(root)
        if not file.is_file():
            if minutes is not None and time.monotonic() - began > 60 * minutes:
                return None
            _start(trial, root)
        rows = json.loads(file.read_text())["rows"]
        best = rows[-1][trial.splits[-1]]
        say(f"[{next(done)}/{len(trials)}] {trial.name}, seed {trial.seed}: {_headline(rows[-1], best)}")
        return rows

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(run, trial) for trial in trials]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def score(rows: Iterable[dict], split: str, labels: str, head: str, metric: str) -> dict[str, float | None]:
    """Mean and spread of a metric over the rows of one head; the rows are of several seeds."""
    return mean_and_spread(
        [row[split][metric] for row in rows if (row["labels"], row["head"]) == (labels, head)]
    )


def _headline(row: dict, found: dict) -> str:
    score = found.get("map", found["macro_recall"])
    return f"{row['labels']} {row['head']} {100 * score:.1f}"


def _start(trial: Trial, root: Path) -> None:
    """Runs a trial in a process of its own, so that trials share neither threads nor random numbers."""
    folder = trial.place(root)
    folder.mkdir(parents=True, exist_ok=True)
    spec = trial.results(root).with_suffix(".spec")
    spec.write_text(json.dumps({"trial": asdict(trial), "root": str(root)}))
    log = folder / "log.txt"
    with log.open("a") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"} if not torch.cuda.is_available() else None
        command = [sys.executable, "-m", "demo.trials", str(spec)]
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    if code:
        last = [line for line in log.read_text().splitlines() if line.strip()][-1:]
        raise UserError(f"trial {trial.name}, seed {trial.seed}, failed ({' '.join(last)}): see {log}")
    spec.unlink()


def _probed(trial: Trial, folder: Path, device: torch.device) -> Encoder:
    """What the trial's heads read."""
    if trial.read == "student":
        return frozen_encoder(load_backbone(folder).to(device))
    config = trial.config(folder)
    if trial.read == "teacher":
        return frozen_encoder(build.starting_backbone(config).to(device))
    objective, backbone = build.build_objective(config)
    probed, decoder = frozen_encoder(backbone.to(device)), objective.student.decoder.to(device).eval()
    # Blocks as they are drawn, but in earnest: LayerScale 1 where training begins with 1e-6; the norm behind them,
    # not the layer that maps to the teacher's width.
    for block in decoder.blocks:
        for scale in block.layer_scales() or ():
            torch.nn.init.ones_(scale)
    decoder.head = torch.nn.Identity()
    shape = probed.shape

    def encode(images: torch.Tensor) -> list[torch.Tensor]:
        tokens = probed.encode(images)[0]
        visible = tokens.new_ones(len(tokens), 1, shape.patches, dtype=torch.bool)
        return [decoder(tokens, visible)[:, 0]]

    return Encoder(
        **{**vars(probed), "encode": encode, "identity": f"{probed.identity} decoder {trial.seed}"}
    )


def run_trial(trial: Trial, root: Path) -> None:
    """Trains, unless the folder is finished, probes, and writes the rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world, folder = World(0, 1, device), trial.place(root)
    if trial.read == "student" and not trial.folder:
        train(trial.config(folder), world)
    data = str(pictures(load_config(trial.recipe)))
    splits = {name: open_labelled(data, name) for name in dict.fromkeys(("train", "val", *trial.splits))}
    count = len(splits["train"])
    splits["train"] = splits["train"].subset(np.arange(min(trial.images, count)))
    recipe = Recipe(epochs=trial.epochs, select="map")
    plans = (
        Plan(
            heads=("linear",), labels=("global-union", "global-in-patch"), seeds=(trial.seed,), recipe=recipe
        ),
        Plan(heads=trial.heads, labels=("union",), seeds=(trial.seed,), recipe=recipe, hidden=256),
    )
    rows = probe(
        {trial.name: _probed(trial, folder, device)},
        splits,
        plans,
        world,
        report_on=trial.splits,
        threads=1,
        say=lambda text: print(text, flush=True),
    )
    text = json.dumps({"trial": asdict(trial), "rows": rows}) + "\n"
    write_atomically(trial.results(root), lambda file: file.write(text.encode()))


def main() -> int:
    """The process of one trial; returns its exit status."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in spec["trial"].items()}
    try:
        run_trial(Trial(**fields), Path(spec["root"]))
    except UserError as error:
        print(f"fastalign: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
