"""When a kernel is correct: the one rule of the tests and the benchmarks."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def errors(found: Tensor, truth: Tensor) -> Tensor:
    """[2] float64: the Euclidean and the largest error, each relative to the same norm of the truth."""
    if truth.numel() == 0:
        return torch.zeros(2, dtype=torch.float64, device=truth.device)
    truth = truth.detach().double().flatten()
    difference = found.detach().double().flatten() - truth
    norms = [(difference.norm(), truth.norm()), (difference.abs().max(), truth.abs().max())]
    return torch.stack([error / norm.clamp_min(1e-30) for error, norm in norms])


def allowed(eager: Tensor, dtype: torch.dtype) -> Tensor:
    """[2] float64: twice the error of eager PyTorch in the same dtype, plus a few roundings.

    One rounding is of the result's dtype, sixteen are of fp32, in which statistics and sums are kept: a kernel may
    sum in another order than eager PyTorch.

    Args:
        eager: `errors` of the reference from the same inputs in the same dtype.
        dtype: of the result.
    """
    return 2 * eager + torch.finfo(dtype).eps + 16 * torch.finfo(torch.float32).eps


def is_floating(value: object) -> bool:
    """Whether a value is a tensor with a floating dtype."""
    return isinstance(value, Tensor) and value.is_floating_point()


def evaluate(
    function: Callable,
    inputs: dict,
    leaves: Iterable[str],
    cotangents: list[Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[dict[str, Tensor | None], list[Tensor]]:
    """Outputs and gradients of a function by name, and the cotangents.

    Args:
        function: called with the inputs as keyword arguments; returns a tensor or a tuple of them.
        inputs: tensors and anything else.
        leaves: the names of the inputs whose gradients are computed.
        cotangents: of the outputs; random by default, in the layout of the outputs.
        dtype: floating inputs are converted to it.
    """
    arguments = {
        name: value.detach().to(dtype or value.dtype).requires_grad_(name in leaves) if is_floating(value) else value
        for name, value in inputs.items()
    }  # fmt: skip
    outputs = function(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = cotangents or [torch.randn_like(output) for output in outputs]
    given = [cotangent.to(output.dtype) for cotangent, output in zip(cotangents, outputs, strict=True)]
    variables = [arguments[name] for name in leaves]
    gradients = torch.autograd.grad(outputs, variables, given, allow_unused=True) if variables else ()
    named = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    named |= {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return named, cotangents


def gradient_error(found: dict[str, Tensor], wanted: dict[str, Tensor], floor: float = 1e-6) -> float:
    """The largest relative error of any parameter's gradient.

    A gradient that is zero in exact arithmetic is only rounding noise, so norms count as at least `floor` of the
    whole gradient's.
    """
    assert found.keys() == wanted.keys()
    smallest = floor * torch.stack([value.double().norm() for value in wanted.values()]).norm()
    errors = [
        (found[name].double() - wanted[name].double()).norm()
        / torch.maximum(wanted[name].double().norm(), smallest)
        for name in wanted
    ]
    return torch.stack(errors).max().item()
