"""Ten thousand steps of the command: memory, files, threads and processes stay as many as they were."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.crash import Ranks
from tests.data_helpers import needs_dali, small_photos, write_folder

STEPS = 10_000
MODEL = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 2}


def sample(pid: int) -> list[int]:
    """Resident bytes, open files, threads and children of a process."""
    process = Path(f"/proc/{pid}")
    resident = int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    tasks = list((process / "task").iterdir())
    children = sum(len((task / "children").read_text().split()) for task in tasks)
    return [resident, len(list((process / "fd").iterdir())), len(tasks), children]


def newest_step(run: Path) -> int:
    """The last step that is logged."""
    with (run / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1000))
        return json.loads(file.read().splitlines()[-1])["step"]


@pytest.mark.slow
@needs_dali
def test_nothing_grows_over_ten_thousand_steps(tmp_path):
    write_folder(tmp_path / "train", {f"{i}.jpg": data for i, data in enumerate(small_photos(400))})
    write_folder(tmp_path / "val", {f"{i}.jpg": data for i, data in enumerate(small_photos(4, 1))})
    tree = {
        "output": str(tmp_path / "run"),
        "student": {"name": "vit_tiny_patch16_224", "weights": "random", "kwargs": MODEL},
        "data": {"train": str(tmp_path / "train"), "val": str(tmp_path / "val"), "threads": 1},
        "optim": {"batch_size": 2, "epochs": 50, "lr": 1e-3, "ema": 0.99},
        "decoder": {"layers": 1},
        "checkpoint": {"every_steps": 500},
        "log": {"every_steps": 20},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    samples = []
    with Ranks([str(tmp_path / "recipe.yaml")], 1, folder=tmp_path) as ranks:
        t = time.time()
        ranks.until(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and (tmp_path / "run" / "metrics.jsonl").stat().st_size)
        while ranks.running():
            try:
                samples.append([newest_step(tmp_path / "run"), *sample(ranks.pids[0])])
            except (FileNotFoundError, ProcessLookupError, ValueError):
                pass
            time.sleep(0.2)
        print(time.time() - t)
        assert ranks.wait() == [0], ranks.said()
    samples = np.array(samples)
    np.save("/tmp/samples.npy", samples)
    print(samples[:: len(samples) // 40].tolist())
