"""How tests compare numbers: relative errors in the Euclidean norm, and the rule for kernels."""

import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.tolerance import allowed, errors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where kernels are tested: on a CPU they run in the interpreter."""

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or not (Path(sysconfig.get_path("include")) / "Python.h").exists(),
    reason="torch.compile on a CPU needs g++ and Python.h (apt install g++ python3-dev)",
)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """||found - wanted|| / ||wanted||, in float64."""
    found, wanted = found.detach().double(), wanted.detach().double()
    assert found.shape == wanted.shape, f"{tuple(found.shape)} against {tuple(wanted.shape)}"
    assert torch.isfinite(found).all(), "not finite"
    return ((found - wanted).norm() / wanted.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()


def gradient_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest error of any parameter's gradient, against its own norm.

    A gradient that is zero in exact arithmetic is only rounding noise: norms below a millionth of the whole
    gradient's are compared with that instead.
    """
    assert found.keys() == wanted.keys()
    floor = 1e-6 * torch.stack([value.double().norm() for value in wanted.values()]).norm()
    errors = [
        (found[name].double() - wanted[name].double()).norm()
        / torch.maximum(wanted[name].double().norm(), floor)
        for name in wanted
    ]
    return torch.stack(errors).max().item()


def randomise(module: torch.nn.Module, scale: float = 0.02) -> None:
    """Move every parameter, so that nothing that starts at zero or one hides an error."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn_like(parameter))


def assert_as_exact(name: str, found: Tensor, eager: Tensor, truth: Tensor) -> None:
    """The rule for kernels, `benchmarks.tolerance`.

    Args:
        name: for the message.
        found: the kernel's result.
        eager: the reference's, from the same inputs in the same dtype.
        truth: the reference's, in float64.
    """
    assert found.shape == truth.shape, f"{name}: {tuple(found.shape)} against {tuple(truth.shape)}"
    assert found.dtype == eager.dtype, f"{name}: {found.dtype} against {eager.dtype}"
    if truth.numel() == 0:
        return
    error, bound = errors(found, truth), allowed(errors(eager, truth), found.dtype)
    assert (error <= bound).all(), f"{name}: error {error.tolist()}, allowed {bound.tolist()}"


def check_kernel(
    kernel: Callable, reference: Callable, inputs: dict, *, only: set[str] | None = None
) -> None:
    """Compare a kernel with its reference in the same dtype and in float64, forward and backward.

    Gradients are taken for random cotangents of every output.

    Args:
        kernel, reference: called with the inputs as keyword arguments; return a tensor or a tuple of them.
        inputs: tensors (those with a floating dtype get gradients) and anything else, which is passed on.
        only: the names whose gradients are compared; default all.
    """

    def floating(value):
        return isinstance(value, Tensor) and value.is_floating_point()

    wanted = {name for name, value in inputs.items() if floating(value) and (only is None or name in only)}
    results, cotangents = [], None
    for function, dtype in ((kernel, None), (reference, None), (reference, torch.float64)):
        arguments = {
            name: value.detach().to(dtype or value.dtype).requires_grad_(name in wanted) if floating(value) else value
            for name, value in inputs.items()
        }  # fmt: skip
        outputs = function(**arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if cotangents is None:
            cotangents = [torch.randn_like(output) for output in outputs]
        leaves = {name: arguments[name] for name in sorted(wanted)}
        gradients = torch.autograd.grad(
            outputs,
            list(leaves.values()),
            [cotangent.to(output.dtype) for cotangent, output in zip(cotangents, outputs, strict=True)],
            allow_unused=True,
        ) if leaves else ()  # fmt: skip
        named = {f"output {index}": output for index, output in enumerate(outputs)}
        named |= {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
        results.append(named)
    for name, truth in results[2].items():
        if truth is None:
            assert results[0][name] is None or not results[0][name].any(), f"{name}: should be none"
        else:
            assert_as_exact(name, results[0][name], results[1][name], truth)
