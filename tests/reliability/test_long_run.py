"""Ten thousand steps of the command: memory, files, threads and processes do not grow."""

import contextlib
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from tests.data_helpers import needs_dali, small_photos, write_folder
from tests.reliability.crash import Ranks, write_recipe
from tests.run_helpers import lines

STEPS = 10_000
BYTES_A_STEP = 400
"""Limit for the growth of resident memory over the last 80 % of the steps; a loss kept each step makes 700."""
MODEL = {"img_size": 32, "depth": 1, "embed_dim": 24, "num_heads": 2}


def sample(pid: int) -> list[int]:
    """Resident bytes, open files, threads and children."""
    process = Path(f"/proc/{pid}")
    resident = int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    tasks = list((process / "task").iterdir())
    children = sum(len((task / "children").read_text().split()) for task in tasks)
    return [resident, len(list((process / "fd").iterdir())), len(tasks), children]


@pytest.mark.slow
@needs_dali
def test_nothing_grows_over_ten_thousand_steps(tmp_path):
    """Fifty epochs of real JPEGs, with validation, checkpoints, an average, and metrics every 20 steps."""
    recipe, run = str(write_recipe(tmp_path)), tmp_path / "run"
    write_folder(tmp_path / "images", {f"{i}.jpg": data for i, data in enumerate(small_photos(400))})
    options = [
        "student.weights=random",
        f"student.kwargs={MODEL}",
        "teacher.skip_blocks=0",
        "decoder.layers=1",
    ]
    options += [f"data.train={tmp_path / 'images'}", "data.color_jitter=0", "data.randaugment=''"]
    options += ["optim.batch_size=2", "optim.accumulate=1", "optim.epochs=50", f"output={run}"]
    options += ["checkpoint.every_steps=150", "log.every_steps=20"]
    samples = []
    log = run / "metrics.jsonl"
    with Ranks([recipe, *options], 1, folder=tmp_path) as ranks:
        ranks.until(lambda: log.exists() and log.stat().st_size)
        while ranks.running():
            with contextlib.suppress(OSError, ValueError):  # the process has ended, or the line is incomplete
                samples.append([json.loads(log.read_bytes().splitlines()[-1])["step"], *sample(ranks.pid(0))])
            time.sleep(0.1)
        assert ranks.wait() == [0], ranks.output()
    assert [line["step"] for line in lines(run, "loss")] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines(run, "val_loss")] == list(range(0, STEPS + 1, STEPS // 50))
    table = np.array(samples)
    step, resident, *counts = table[table[:, 0] >= STEPS // 5].T
    assert len(step) > 50
    slope, half = np.polyfit(step, resident, 1)[0], len(step) // 2
    print(f"resident memory grows by {slope:.0f} bytes per step")
    assert slope < BYTES_A_STEP
    for name, count in zip(("open files", "threads", "children"), counts, strict=True):
        # Medians: a thread that ends and the next one are sometimes counted together.
        assert np.median(count[half:]) == np.median(count[:half]), name
        assert count.max() <= np.median(count) + 3, name
