"""What makes a run faster changes no loss, or as much as it says."""

import json

import pytest
import torch

from tests.numerics import needs_compiler
from tests.run_helpers import losses, metrics


@pytest.mark.parametrize(
    "setting", ["efficiency.grad_checkpointing=true", "data.threads=2", "log.every_steps=5"]
)
def test_efficiency_settings_do_not_change_the_loss(recipe, setting):
    assert losses(recipe(setting, name="changed")) == pytest.approx(losses(recipe(name="plain")), rel=1e-5)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("setting", ["true", "blocks"])
def test_compiled_run_has_the_same_loss(recipe, setting):
    torch._dynamo.reset()
    plain = losses(recipe("max_steps=3", name="plain"))
    compiled = recipe(f"efficiency.compile={setting}", "max_steps=3", name="compiled")
    assert losses(compiled) == pytest.approx(plain, rel=1e-4)
    cache = metrics(compiled)[0][0]
    assert cache["compile_cache_hits"] + cache["compile_cache_misses"] > 0


@pytest.mark.parametrize("mode", ["zero", "drop"])
@pytest.mark.parametrize("setting", ["true", "blocks"])
def test_nothing_is_compiled_after_the_first_step(recipe, capturing, setting, mode, capsys):
    """Over steps, epochs, and validation, whose last batch is smaller; and in fixed shapes all along."""
    options = [f"masks.mode={mode}", "log.every_steps=3"]
    compiled = recipe(f"efficiency.compile={setting}", *options, name="compiled")
    lines = [json.loads(line) for line in (compiled / "metrics.jsonl").read_text().splitlines()]
    assert [index for index, line in enumerate(lines) if "compile_seconds" in line] == [0, 1]
    assert [line["step"] for line in lines[:2]] == [0, 1]
    assert capsys.readouterr().out.count("compiled in ") == 2
    assert not any(isinstance(size, torch.SymInt) for inputs in capturing for size in inputs)
    assert losses(compiled) == pytest.approx(losses(recipe(*options, name="plain")), rel=1e-4)


@pytest.mark.parametrize("mode", ["zero", "drop"])
def test_fp8_stays_close(recipe, mode):
    plain = losses(recipe("max_steps=4", f"masks.mode={mode}", name="plain"))
    options = ["efficiency.precision=fp8", f"masks.mode={mode}", "max_steps=4"]
    assert losses(recipe(*options, name="fp8")) == pytest.approx(plain, rel=0.02)


def test_bf16_stays_close(recipe):
    plain = losses(recipe("max_steps=4", name="plain"))
    assert losses(recipe("efficiency.precision=bf16", "max_steps=4", name="bf16")) == pytest.approx(
        plain, rel=0.02
    )
