"""Shared by all tests: one thread, so that a figure of one machine holds on another; no network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest
import torch

# The same examples everywhere: rounding is compared, and a suite that fails one time in fifty helps nobody.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile("repeatable")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported: the real kernels, on the CPU


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """Nothing is read from or left in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.set_num_threads(
        1
    )  # models are so small that two wait for one another; files run side by side instead
    torch.manual_seed(0)
    # fp32 means fp32 in every comparison, also in a GPU's convolutions.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture
def poison(monkeypatch):
    """Memory that a kernel's launcher allocates comes full of NaN: what it forgets to write is seen."""

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
    """Compilation short of the processor's code, which takes most of the time. Returns each graph's inputs."""
    from torch._dynamo.backends.registry import lookup_backend

    from fastalign import MaskEmbed

    torch._dynamo.reset()
    whole, graphs = MaskEmbed.compile, []

    def backend(graph, inputs):
        graphs.append(inputs)
        return lookup_backend("aot_eager")(graph, inputs)

    monkeypatch.setattr(MaskEmbed, "compile", lambda *a, **k: whole(*a, **k, backend=backend))
    return graphs
