"""What a run prints: the block at its start, the time left, its end; and `--dry-run`."""

import io
import re
import time

import pytest
import torch

from fastalign import train
from fastalign.config import load_config
from fastalign.training import dry_run
from fastalign.training.reporter import Reporter, clock, duration
from tests.run_helpers import losses, run_of_batches


def test_durations_and_clocks():
    texts = {3.4: "3 s", 119: "119 s", 120: "2 min", 3600: "60 min", 7200: "2 h 0 min", 12000: "3 h 20 min"}
    assert {seconds: duration(seconds) for seconds in texts} == texts
    assert re.fullmatch(r"\d\d:\d\d", clock(0))
    assert clock(7 * 86400).startswith(time.strftime("%a")), "another day is named"


def test_start_and_end_of_a_run(recipe, capsys):
    folder = recipe("optim.epochs=1")
    out = capsys.readouterr().out
    for line in (
        r"fastalign [\d.]+, torch \S+, CPU, 1 rank, 1 pass per update",
        r"precision: fp32",
        r"backbone: vit_tiny_patch16_224, [\d.]+ M parameters, 2 x 2 patches of 32 x 32 pixels, soft-cap 30.0, "
        "weights random",
        r"data: 40 images; 10 for validation",
        r"batch: 8 images, 8 per rank and pass",
        r"length: 1 epoch of 5 updates",
        rf"new run in {folder}",
        r"expected end: \d\d:\d\d, in \d+ s",
        r"target scale [\d.]+: the targets are multiplied by it; loss.target_scale=[\d.]+ skips the measurement .*",
        rf"aligned backbone: {folder}/backbone.safetensors, validation loss [\d.]+",
        rf"  fastalign export {folder} --to timm",
    ):
        assert re.search(f"^{line}$", out, re.M), line
    scale = re.search(r"loss.target_scale=[\d.]+", out)[0]
    assert losses(recipe("optim.epochs=1", scale, name="given")) == losses(folder), "the number is exact"
    capsys.readouterr()
    recipe("optim.epochs=1")
    assert f"{folder} is finished: step 5 of 5, nothing to train" in capsys.readouterr().out


def test_a_run_that_diverges_says_so_at_its_end(recipe, capsys):
    for lr, warning in (
        ("1e3", r"warning: the validation loss rose from [\d.]+ before training to [\d.e+]+: lower optim.lr"),
        ("1e30", "warning: no backbone was written, because no validation loss was finite: lower optim.lr"),
    ):
        recipe("max_steps=2", f"optim.lr={lr}", "optim.clip=null", name=lr)
        assert re.search(f"^{warning}$", capsys.readouterr().out, re.M)


def test_a_bar_of_its_own_for_what_is_slow(tmp_path, monkeypatch):
    """On a terminal the bar of the training moves with each update and shows the time left after two."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", terminal)
    bars = Reporter(tmp_path, total=10)
    task = bars._bar.tasks[0]
    bars.update(1)
    assert (task.completed, task.description.strip()) == (1, "")
    bars.update(2)
    assert task.completed == 2
    assert task.description.endswith(" s left")
    assert [len(bars._bar.tasks) for _ in bars.track("ab", "validating", 2)] == [2, 2]
    assert len(bars._bar.tasks) == 1
    for step in (2, 3):
        bars._show({"step": step, "loss": 1.0, "images_per_second": 9.0, "data_wait": 0.0})
    assert re.findall(r"expected end: \d\d:\d\d, in \d+ s\n", terminal.getvalue())
    bars.close()


def test_the_time_left_includes_evaluations(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("fastalign.training.reporter.time.monotonic", lambda: now[0])
    reporter = Reporter(tmp_path, total=12, epoch=5)
    with reporter.evaluating():
        now[0] += 100
    reporter.update(1)
    now[0] += 2
    assert reporter._left(2) == 10 * 2 + 3 * 100, "ten updates, and evaluations at steps 5, 10 and 12"
    with reporter.evaluating():
        now[0] += 30
    assert reporter._left(2) == 10 * 2 + 3 * 30, "an evaluation does not slow the updates down"
    reporter.close()


def test_a_dry_run_leaves_nothing(recipe, capsys):
    folder = recipe("--dry-run", "probe.data=/nowhere", "faults.quarantine=/nowhere")
    out = capsys.readouterr().out
    assert re.search(r"^memory: [\d.]+ GiB of the process at the peak$", out, re.M)
    assert re.search(r"^speed: \d+ images/s on synthetic images", out, re.M)
    assert re.search(r"^whole run: 40 images, 10 updates in about \d+ s", out, re.M)
    assert not folder.exists()


def test_the_largest_micro_batch_that_fits_is_kept_by_the_run(recipe, tmp_path, monkeypatch, capsys):
    """A fake GPU that runs out of memory beyond five images; then the same losses by accumulation."""
    run, _ = run_of_batches(tmp_path, "optim.accumulate=1")
    assert dry_run.largest_fitting(run, 8, train.update) == 8

    def limited(run, batches, epoch):
        if len(next(batches).ids) > 5:
            raise torch.cuda.OutOfMemoryError

    assert dry_run.largest_fitting(run, 8, limited) == 4
    recipe("optim.micro_batch=auto", expect=2)
    assert "optim.micro_batch=auto measures the memory of a GPU" in capsys.readouterr().err
    monkeypatch.setattr(dry_run, "_measure_micro_batch", lambda *_: 4)
    folder = recipe("optim.micro_batch=auto", "max_steps=3")
    monkeypatch.delattr(dry_run, "_measure_micro_batch")  # a run measures once
    recipe("optim.micro_batch=auto")
    optim = load_config(folder / "config.yaml").optim
    assert (optim.micro_batch, optim.accumulate) == (4, 2)
    assert losses(folder) == pytest.approx(losses(recipe(name="plain")), rel=1e-4)
    recipe("optim.micro_batch=3", expect=2)
    assert "multiple of optim.micro_batch x ranks = 3" in capsys.readouterr().err
