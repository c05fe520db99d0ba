"""Fixtures for all tests: one thread, fixed seeds, no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import signal
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

# The same examples in every run: rounding is compared, and a flaky suite helps nobody.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported; runs the real kernels on the CPU


# A background job of a shell ignores SIGINT, and its children would too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _same_everywhere(tmp_path, monkeypatch):
    """No test touches the user's cache; seed, threads and precision are fixed: `precision=auto` is fp32 on a CPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("fastalign.backbones.precision.NATIVE_BF16", ())
    # The models are too small for two threads; test files run in parallel instead.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # fp32 means fp32, also in convolutions on a GPU.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture
def poison(monkeypatch):
    """Fills every new allocation with NaN, so that a kernel that leaves elements unwritten fails."""

    def poisoned(allocate):
        def call(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 111)

        return call

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture
def capturing(monkeypatch):
    """Replaces Inductor by `aot_eager`, which compiles faster. Returns the inputs of each graph."""
    from torch._dynamo.backends.registry import lookup_backend

    from fastalign import MaskEmbed

    torch._dynamo.reset()
    whole, graphs = MaskEmbed.compile, []

    def backend(graph, inputs):
        graphs.append(inputs)
        return lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(MaskEmbed, "compile", lambda *a, **k: whole(*a, **k, backend=backend))
    return graphs


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 40 real JPEGs for training and 10 for validation."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 40), ("val", 10)):
        for index in range(count):
            path = root / split / f"class{index % 2}" / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((64, 48), Image.Resampling.BICUBIC).save(path)
    return root


@pytest.fixture
def recipe(tmp_path, images):
    """Runs the training command in this process and returns the run folder."""
    from fastalign import train
    from tests.run_helpers import MODEL

    def run(*overrides, name="run", expect=0) -> Path:
        data = {"train": str(images / "train"), "val": str(images / "val"), "threads": 1}
        tree = {"output": str(tmp_path / name), "student": MODEL, "data": data, "log": {"every_steps": 2}}
        tree |= {"optim": {"batch_size": 8, "epochs": 2, "lr": 1e-3}, "efficiency": {"precision": "fp32"}}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree))
        assert train.main([str(path), *overrides]) == expect
        return tmp_path / name

    return run
