"""What makes a run faster changes no loss, or as much as it says."""

import subprocess
import sys

import pytest
import torch
from torch.utils._pytree import tree_leaves

from fastalign import train
from tests.numerics import needs_compiler
from tests.run_helpers import assert_same, checkpoint, losses

COMPILE = [f"efficiency.compile={each}" for each in ("true", "blocks")]
SETTINGS = ["efficiency.grad_checkpointing=true", "data.threads=2", "log.every_steps=5"]
SETTINGS += [pytest.param(each, marks=[pytest.mark.slow, needs_compiler]) for each in COMPILE]


@pytest.mark.parametrize("setting", SETTINGS)
def test_efficiency_settings_do_not_change_the_loss(recipe, setting):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, close = losses(recipe(name="plain")), 1e-4 if setting in COMPILE else 1e-5
    assert losses(recipe(setting, name="changed")) == pytest.approx(plain, rel=close)
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == (setting in COMPILE)


@pytest.mark.parametrize("mode", ["zero", "drop"])
@pytest.mark.parametrize("setting", ["true", "blocks"])
def test_nothing_is_compiled_after_the_first_step(recipe, capturing, monkeypatch, setting, mode):
    """Over steps, epochs, and validation, whose last batch is smaller; and in fixed shapes all along."""
    graphs, update = [], train.update

    def counted(*arguments):
        found = update(*arguments)
        graphs.append(len(capturing))
        return found

    monkeypatch.setattr(train, "update", counted)
    compiled = recipe(f"efficiency.compile={setting}", f"masks.mode={mode}", name="compiled")
    assert len(graphs) == 10
    assert graphs[0] == graphs[-1] == len(capturing) > 0
    assert not any(isinstance(size, torch.SymInt) for inputs in capturing for size in inputs)
    plain = losses(recipe(f"masks.mode={mode}", name="plain"))
    assert losses(compiled) == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("mode", ["zero", "drop"])
def test_lower_precision_stays_close_and_resumes_with_the_same_bits(recipe, mode):
    mode = f"masks.mode={mode}"
    plain = losses(recipe(mode, "max_steps=4", name="plain"))
    for precision in ("bf16", "fp8"):
        options = [mode, f"efficiency.precision={precision}"]
        whole = recipe(*options, "max_steps=4", name=precision)
        assert losses(whole) == pytest.approx(plain, rel=0.02)
        assert losses(whole) != plain
        recipe(*options, "max_steps=2", name=f"resumed-{precision}")
        resumed = recipe(*options, "max_steps=4", name=f"resumed-{precision}")
        assert losses(resumed) == losses(whole)
        state = checkpoint(whole)
        for part in ("student", "optimizer"):
            assert_same(checkpoint(resumed)[part], state[part])
        tensors = [value for value in tree_leaves(state) if isinstance(value, torch.Tensor)]
        assert {value.dtype for value in tensors if value.is_floating_point()} == {torch.float32}


def test_freed_memory_is_kept_on_a_cpu():
    """In a process of its own, because the setting stays. 64 MiB are 16384 pages."""
    program = """
import resource, torch
from fastalign.training.distributed import keep_freed_memory
kept, faults = keep_freed_memory(), [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
for _ in range(8):
    torch.ones(2**24)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
assert not kept or faults[8] - faults[4] < 2**14, faults
"""
    subprocess.run([sys.executable, "-c", program], check=True)
