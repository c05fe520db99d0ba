"""Random inputs, and how tests compare numbers: relative errors in the Euclidean norm, and the rule for kernels."""

import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.tolerance import allowed, errors, evaluate, is_floating
from benchmarks.tolerance import gradient_error as gradient_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where kernels are tested; on a CPU they run in the interpreter."""

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or not (Path(sysconfig.get_path("include")) / "Python.h").exists(),
    reason="torch.compile on a CPU needs g++ and Python.h (apt install g++ python3-dev)",
)


def some(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """A random input of a kernel."""
    return (scale * torch.randn(shape, device=DEVICE)).to(dtype)


def mask(images: int, copies: int, patches: int) -> Tensor:
    """Random masks, with an all-hidden and an all-visible copy if the shape allows."""
    visible = torch.rand(images, copies, patches, device=DEVICE) < 0.5
    visible[:1, :1], visible[-1:, -1:] = False, True
    return visible


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||, in float64."""
    found, wanted = found.detach().double(), wanted.detach().double()
    assert found.shape == wanted.shape, f"{tuple(found.shape)} against {tuple(wanted.shape)}"
    assert torch.isfinite(found).all(), "not finite"
    return ((found - wanted).norm() / wanted.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()


def randomise(module: torch.nn.Module, scale: float = 0.02) -> None:
    """Perturb every parameter, so that no initial zero or one hides an error."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


def check_kernel(
    kernel: Callable, reference: Callable, inputs: dict, *, only: set[str] | None = None
) -> None:
    """Compare a kernel with its reference in the same dtype and in float64, by the rule of `benchmarks.tolerance`.

    Forward and backward; gradients are for random cotangents of every output.

    Args:
        kernel, reference: called with the inputs as keyword arguments; return a tensor or a tuple of them.
        inputs: tensors (those with a floating dtype get gradients) and anything else.
        only: the names whose gradients are compared; default all.
    """
    leaves = sorted(n for n, x in inputs.items() if is_floating(x) and (only is None or n in only))
    found, cotangents = evaluate(kernel, inputs, leaves)
    eager, _ = evaluate(reference, inputs, leaves, cotangents)
    exact, _ = evaluate(reference, inputs, leaves, cotangents, torch.float64)
    for name, truth in exact.items():
        ours = found[name]
        if truth is None:
            assert ours is None or not ours.any(), f"{name}: should be zero"
            continue
        assert (ours.shape, ours.dtype) == (truth.shape, eager[name].dtype), name
        if truth.numel():
            error, bound = errors(ours, truth), allowed(errors(eager[name], truth), ours.dtype)
            assert (error <= bound).all(), f"{name}: error {error.tolist()}, allowed {bound.tolist()}"
