"""Optimizer, schedule, moving average and metrics, each against an independent truth."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from timm.scheduler import CosineLRScheduler

from fastalign.training import metrics
from fastalign.training.reporter import Reporter
from fastalign.training.update import learning_rate
from fastalign.utils.errors import UserError


@pytest.mark.parametrize("warmup", [0, 7])
def test_learning_rate_is_timms_cosine_per_update(warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    truth = CosineLRScheduler(
        optimizer, t_initial=50, lr_min=3e-5, warmup_t=warmup, warmup_lr_init=3e-5, t_in_epochs=False
    )
    for step in range(50):
        truth.step_update(step)
        rate = learning_rate(step, total=50, warmup=warmup, lr=3e-4, min_lr=3e-5)
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
    assert learning_rate(50, total=50, warmup=warmup, lr=3e-4, min_lr=3e-5) == pytest.approx(3e-5)


def test_metrics_continue_after_an_interruption(tmp_path):
    log = Reporter(tmp_path)
    for step in (1, 2, 3):
        log.add(step=step, loss=torch.tensor(0.5 * step))
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    other = Reporter(tmp_path, main=False)  # another rank writes nothing
    other.add(step=1, loss=1.0)
    other.close()
    log = Reporter(tmp_path, step=2)
    log.add(step=3, loss=9.0)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 1.0), (3, 9.0)]


def test_tensorboard_events_are_written(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Reporter(tmp_path, sinks=["tensorboard"])
    log.add(step=5, loss=1.25)
    log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (event,) = events.Scalars("loss")
    assert (event.step, event.value) == (5, 1.25)


def test_missing_wandb_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        Reporter(tmp_path, sinks=["wandb:project"])


def test_speed_of_an_interval(monkeypatch):
    """Ten images in 0.2 s, of which 0.02 were waited for data."""
    clock = iter([0.0, 0.2, 0.2])
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    speed = metrics.Speed(images=10, ranks=1, flops=1.0, device=torch.device("cpu"))
    speed.tick(0.02)
    figures = speed.measure()
    assert (figures["images_per_second"], figures["data_wait"]) == pytest.approx((50, 0.1))
