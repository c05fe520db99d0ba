"""The one tolerance rule: relative error in the Euclidean norm."""

import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor

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
